"""MovieLens-100K with SmolLM2-135M at the paper's sizes: 20 history titles, 50 candidates.

Command: python -m palr_jax.main --config=configs/ml100k.py --workdir=runs/ml100k
Hardware and time: hours on two cores; any single accelerator shortens it.
"""

from ml_collections import ConfigDict

from palr_jax.config import default_config


def get_config() -> ConfigDict:
    return default_config()
