"""How an item should read: with its year, without it, or with its id as in the paper's Beauty.

Command: python -m palr_jax.ablate --config=configs/ablations/title_format.py --workdir=runs/title

The base shows and scores "Heat (1995)". `id_shown` shows ids and scores titles; `id_scored` scores
both, where the tokens of an id, which the model cannot know, take part in the score.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    return define(
        'title_format',
        base(),
        ('no_year', {'prompts.item': 'title_no_year', 'prompts.answer': 'title_no_year'}),
        ('id_shown', {'prompts.item': 'id_title'}),
        ('id_scored', {'prompts.item': 'id_title', 'prompts.answer': 'id_title'}),
    )
