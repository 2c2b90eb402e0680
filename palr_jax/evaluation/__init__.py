"""From ranked items to numbers that can be trusted: metrics, intervals, tests and the report.

Every user counts, ties are no luck, and each comparison is paired.
"""

from palr_jax.evaluation.groups import user_groups
from palr_jax.evaluation.lists import ItemFacts, item_facts, top_items
from palr_jax.evaluation.metrics import (
    TargetRanks,
    hit_rate,
    ndcg,
    rank_targets,
    recall,
    reciprocal_rank,
)
from palr_jax.evaluation.render import table
from palr_jax.evaluation.report import (
    SCHEMA,
    Comparison,
    HeldOutLoss,
    Run,
    build,
    by_group,
    sampled,
    write,
)

__all__ = [
    'SCHEMA',
    'Comparison',
    'HeldOutLoss',
    'ItemFacts',
    'Run',
    'TargetRanks',
    'build',
    'by_group',
    'hit_rate',
    'item_facts',
    'ndcg',
    'rank_targets',
    'recall',
    'reciprocal_rank',
    'sampled',
    'table',
    'top_items',
    'user_groups',
    'write',
]
