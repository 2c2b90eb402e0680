"""How much of a difference is the seed: of the retriever, the users who are tuned on, the adapter.

Command: python -m palr_jax.ablate --config=configs/ablations/seeds.py --workdir=runs/seeds

The ranked users are the same (`ranking.users_seed`), so the differences are those of training. The
intervals of a single run leave them out: compare them with what is found here.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    variants = [(f'seed_{seed}', {'seed': seed}) for seed in (1, 2, 3, 4)]
    return define('seeds', base(), *variants)
