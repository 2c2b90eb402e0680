"""Whether the order of the history tells the model anything.

Command: python -m palr_jax.ablate --config=configs/ablations/history_order.py --workdir=runs/order

The base shows the oldest item first. Every variant shows the same items, in training too.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    orders = ('newest_first', 'shuffled')
    variants = [(order, {'prompts.history_order': order}) for order in orders]
    return define('history_order', base(), *variants)
