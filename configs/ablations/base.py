"""What the studies of this folder start from; not a study itself.

Command: python -m palr_jax.main --config=configs/ablations/base.py --workdir=runs/ablations_base

configs/demo.py with more fine-tuning and more users: MovieLens-100K and SmolLM2-135M, so that a
study runs on two cores. The numbers are small ones; --config.base.ranking.users=0 ranks all users,
and configs/ml100k.py has the paper's sizes.
"""

from ml_collections import ConfigDict

from configs.demo import get_config as demo


def get_config() -> ConfigDict:
    config = demo()
    config.finetune.steps = 60
    config.finetune.decay_steps = 60
    config.finetune.checkpoint_every = 20
    config.ranking.users = 200
    return config
