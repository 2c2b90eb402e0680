"""How large the adapter must be, and where.

Command: python -m palr_jax.ablate --config=configs/ablations/lora.py --workdir=runs/lora

The base has rank 8 on q and v. alpha is twice the rank throughout, so the scale of the adapter's
output is the same. All variants rank from the same prompts.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define

TARGETS = {
    'q': ('q',),
    'attention': ('q', 'k', 'v', 'o'),
    'mlp': ('gate', 'up', 'down'),
    'all': ('q', 'k', 'v', 'o', 'gate', 'up', 'down'),
}


def get_config() -> ConfigDict:
    ranks = [(f'rank_{r}', {'lora.rank': r, 'lora.alpha': 2.0 * r}) for r in (2, 4, 16, 32)]
    targets = [(f'on_{name}', {'lora.targets': names}) for name, names in TARGETS.items()]
    return define('lora', base(), *ranks, *targets)
