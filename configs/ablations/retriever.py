"""What the LLM adds to weak and strong retrievers.

Command: python -m palr_jax.ablate --config=configs/ablations/retriever.py --workdir=runs/retriever

The base is SASRec with the full softmax. Training does not depend on the retriever (the paper's
candidates are similar items), so all variants share one adapter and differ in what it ranks.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    return define(
        'retriever',
        base(),
        ('bce', {'retrieval.loss': 'bce'}),
        ('gbce', {'retrieval.loss': 'gbce'}),
        ('hstu', {'retrieval.encoder': 'hstu'}),
        ('covisitation', {'retrieval.systems': ('covisitation',)}),
        ('mixed', {'retrieval.systems': ('sequence', 'covisitation')}),
    )
