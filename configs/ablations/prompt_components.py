"""Which part of the prompt earns its tokens: history, profile and candidates, each on and off.

Command: python -m palr_jax.ablate --config=configs/ablations/prompt_components.py --workdir=runs/p

Six of the eight combinations: a prompt without history and profile says nothing of the user. All
variants score the same candidates; whether the prompt lists them is what varies. Without a list
nothing can be learned from lists, so those variants are tuned on the task Recommend alone, and
`recommend_only`, which lists candidates when it ranks, tells the two effects apart.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define

NO_HISTORY = {'prompts.history': 0}
NO_PROFILE = {'prompts.profile': 'none'}
NO_CANDIDATES = {'prompts.candidates': False, 'tasks.recommend_retrieval': 0.0}


def get_config() -> ConfigDict:
    return define(
        'prompt_components',
        base(),
        ('no_profile', NO_PROFILE),
        ('no_history', NO_HISTORY),
        ('no_candidates', NO_CANDIDATES),
        ('history_alone', NO_PROFILE | NO_CANDIDATES),
        ('profile_alone', NO_HISTORY | NO_CANDIDATES),
        ('recommend_only', {'tasks.recommend_retrieval': 0.0}),
    )
