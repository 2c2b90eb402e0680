"""Whether the model learns the retriever's order where the prompt lists the candidates in it.

Command: python -m palr_jax.ablate --config=configs/ablations/candidate_order.py --workdir=runs/cand

Training and ranking have one order, and only retrieved candidates have the retriever's. So all
variants are tuned on retrieved lists (of retrievers that have not seen the user), the base too;
`similar_shuffled` is tuned as the paper does.
"""

from ml_collections import ConfigDict

from configs.ablations.base import get_config as base
from palr_jax.study import define


def get_config() -> ConfigDict:
    config = base()
    config.tasks.candidates_from = 'retriever'
    config.tasks.recommend_retrieval = 1.0
    return define(
        'candidate_order',
        config,
        ('retriever_order', {'prompts.candidate_order': 'retriever'}),
        ('similar_shuffled', {'tasks.candidates_from': 'similar'}),
    )
