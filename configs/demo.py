"""The whole system in minutes: MovieLens-100K, SmolLM2-135M, two cores and no accelerator.

Command: python -m palr_jax.main --config=configs/demo.py --workdir=runs/demo   (or: make demo)

Smaller than the paper's: 8 history titles instead of 20, 15 candidates instead of 50, 100 test
users instead of all, a few minutes of fine-tuning. configs/ml100k.py is the full size.
"""

from ml_collections import ConfigDict

from palr_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.prompts.history = 8
    config.prompts.length = 512

    config.tasks.candidates = 10
    config.tasks.targets = 3
    config.finetune.steps = 20
    config.finetune.batch_size = 2
    config.finetune.length = 512
    config.finetune.learning_rate = 1e-3
    config.finetune.warmup = 4
    config.finetune.decay_steps = 20
    config.finetune.checkpoint_every = 10
    config.finetune.held_out = 16

    config.ranking.candidates = 15
    config.ranking.users = 100
    config.ranking.valid_users = 80
    config.ranking.batch_size = 1
    return config
