"""Where the profile comes from: nowhere, counted keywords, or keywords that the LLM chooses.

Command: python -m palr_jax.ablate --config=configs/ablations/profile_source.py --workdir=runs/prof

The base counts. `untrained_counts` shows profiles in ranking alone, not in training.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    return define(
        'profile_source',
        base(),
        ('none', {'prompts.profile': 'none'}),
        ('llm', {'prompts.profile': 'llm'}),
        ('untrained_counts', {'tasks.profile': False}),
    )
