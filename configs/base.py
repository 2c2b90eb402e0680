"""The defaults of every field, as a config of its own; palr_jax/config.py documents each.

Command: python -m palr_jax.main --config=configs/base.py --workdir=runs/base
"""

from ml_collections import ConfigDict

from palr_jax.config import default_config


def get_config() -> ConfigDict:
    return default_config()
