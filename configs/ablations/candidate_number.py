"""How many candidates the model should rank: more recall against a harder choice.

Command: python -m palr_jax.ablate --config=configs/ablations/candidate_number.py --workdir=runs/cn

A target that is not among the candidates is a miss, whatever the model. The base ranks 15. The
variants share the fine-tuning, whose lists have a length of their own: `trained_on_5` and
`trained_on_20` vary that one.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    config = base()
    config.prompts.length = 1024
    config.finetune.length = 1024
    ranked = [(f'ranks_{n}', {'ranking.candidates': n}) for n in (10, 20, 30)]
    trained = [(f'trained_on_{n}', {'tasks.candidates': n}) for n in (5, 20)]
    return define('candidate_number', config, *ranked, *trained)
