"""How many history items a prompt needs.

Command: python -m palr_jax.ablate --config=configs/ablations/history_length.py --workdir=runs/hist

The base shows the latest 8. Profiles are always of the whole history, and so help short ones.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    lengths = (1, 2, 4, 16, 20)
    config = base()
    config.prompts.length = 768
    config.finetune.length = 768
    variants = [(f'latest_{n}', {'prompts.history': n}) for n in lengths]
    return define('history_length', config, ('none', {'prompts.history': 0}), *variants)
