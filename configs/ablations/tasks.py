"""Which tasks the model is tuned on: the paper's v1 (Recommend) and v2 (both), and more.

Command: python -m palr_jax.ablate --config=configs/ablations/tasks.py --workdir=runs/tasks

The base is v2, half of each. The variants share the retrieval, and rank the same candidates from
the same prompts; `untuned` is the model as it came.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    return define(
        'tasks',
        base(),
        ('untuned', {'stages': ('data', 'retrieval', 'ranking', 'report')}),
        ('v1', {'tasks.recommend_retrieval': 0.0}),
        ('lists_alone', {'tasks.recommend_retrieval': 1.0}),
        ('no_enrichment', {'tasks.enrich': False}),
        ('no_swaps', {'tasks.swap': 0.0}),
        ('listwise', {'tasks.recommend_retrieval': 1.0, 'finetune.objective': 'listwise'}),
    )
