"""Amazon Beauty (2014) with SmolLM2-135M at the paper's sizes: 20 history items, 50 candidates.

Command: python -m palr_jax.main --config=configs/beauty.py --workdir=runs/beauty

The retriever is `strong` unless another is named: configs/beauty.py:paper is about as strong as the
paper's SASRec. Both were chosen on the validation users (docs/results.md).

Data: reviews and metadata are fetched from their publisher; the two files on disk with
--config.data.path=FOLDER.
Hardware and time: the retriever took up to 28 minutes on two shared CPU cores. The LLM is meant for
an accelerator, with --config.model.dtype=bfloat16: 350 steps of 16 lists of 20 candidates, whose
titles were cut at 16 words, took 4 minutes on one NVIDIA H200 (docs/results.md); these sizes were
not timed.

Items are shown as `ASIN (title)`, as in the paper, and answered by their titles. An item has up to
268 tokens, and wording, candidates and answer are never cut, so the longest list must fit. The 50
candidates of a briefly trained retriever have 1,797 tokens on average, 5,014 at most (all users); a
fine-tuning example without its history has up to 3,110. Fewer than 1 % of the histories are cut.
"""

from ml_collections import ConfigDict

from palr_jax.config import default_config, one_of

STRONG = {
    'systems': ('sequence', 'covisitation', 'profile'),
    'encoder': 'hstu',
    'width': 128,
    'dropout': 0.5,
    'learning_rate': 1e-3,
    'schedule': 'cosine',
    'epochs': 30,
    'evaluate_every': 3,
    'patience': 10,
}
# With `bce`, the loss of SASRec's authors, NDCG@10 stood still at .025 on the validation users from
# epoch 16 on; the paper's strength is about .04, which the full softmax passes after nine.
PAPER = {'dropout': 0.5, 'learning_rate': 1e-3, 'epochs': 9, 'evaluate_every': 3}


def get_config(retriever: str = 'strong') -> ConfigDict:
    config = default_config()
    config.data.source = 'amazon'
    config.data.path = 'download:amazon-Beauty'

    config.retrieval.update(one_of({'strong': STRONG, 'paper': PAPER}, retriever, 'beauty'))

    config.prompts.template = 'products'
    config.prompts.item = 'id_title'
    config.prompts.length = 6144
    config.ranking.batch_size = 2

    config.finetune.length = 4096
    config.finetune.batch_size = 4
    config.finetune.steps = 500  # about one epoch of the 9,518 examples
    config.finetune.decay_steps = 500
    config.finetune.warmup = 20
    return config
