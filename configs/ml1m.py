"""MovieLens-1M with SmolLM2-135M at the paper's sizes: 20 history titles, 50 candidates.

Command: python -m palr_jax.main --config=configs/ml1m.py --workdir=runs/ml1m

The retriever is `strong` unless another is named: configs/ml1m.py:paper is about as strong as the
paper's SASRec. Both were chosen on the validation users (docs/results.md).

Data: fetched from GroupLens (6 MB); a copy on disk with --config.data.path=ml-1m.zip.
Hardware and time: the retriever took 57 minutes on two shared CPU cores, two and a half on one
NVIDIA H200. The LLM is meant for an accelerator, with --config.model.dtype=bfloat16: 500 steps
of 32 lists of 20 candidates took 7 minutes there (docs/results.md); 50 candidates were not timed.
Ranking prompts have 982 tokens on average (docs/data.md) and 1,151 at most (of a briefly trained
retriever, all users), fine-tuning examples 861: no history is cut.
"""

from ml_collections import ConfigDict

from palr_jax.config import default_config, one_of

STRONG = {
    'systems': ('sequence', 'covisitation'),
    'encoder': 'hstu',
    'width': 128,
    'blocks': 4,
    'heads': 4,
    'length': 200,  # half of the users have 96 events or more
    'dropout': 0.3,
    'schedule': 'cosine',
    'epochs': 24,
    'evaluate_every': 4,
}
PAPER = {'loss': 'bce', 'length': 200, 'epochs': 10}  # more training makes it stronger


def get_config(retriever: str = 'strong') -> ConfigDict:
    config = default_config()
    config.data.source = 'ml1m'
    config.data.path = 'download:ml-1m'

    config.retrieval.update(one_of({'strong': STRONG, 'paper': PAPER}, retriever, 'ml1m'))

    config.prompts.length = 1280
    config.finetune.length = 1024
    config.finetune.steps = 700  # about two epochs of the 4,832 examples
    config.finetune.decay_steps = 700
    config.finetune.warmup = 20
    return config
