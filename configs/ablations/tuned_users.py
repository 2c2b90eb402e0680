"""How many users must give examples: 5 % to all of them; the paper has 20 %.

Command: python -m palr_jax.ablate --config=configs/ablations/tuned_users.py --workdir=runs/users

All variants take the same number of steps, so fewer users are seen more often. With all users
nobody is left for the held-out loss, and every ranked user is a seen one.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    shares = (0.05, 0.1, 0.5, 1.0)
    variants = [(f'users_{share:.0%}'.rstrip('%'), {'tasks.users': share}) for share in shares]
    return define('tuned_users', base(), *variants)
