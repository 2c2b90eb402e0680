"""Retrieval: SASRec and popularity score the whole catalogue, an index finds each user's best.

Users and items meet as vectors: a score is a dot product, so everything else works for both."""

from palr_jax.retrieval.candidates import (
    Candidates,
    read_candidates,
    read_ranks,
    retrieve,
    save_candidates,
    save_ranks,
    target_ranks,
)
from palr_jax.retrieval.index import (
    ItemIndex,
    build_index,
    hash_items,
    load_index,
    recall_against_exact,
    save_index,
)
from palr_jax.retrieval.interface import Retriever
from palr_jax.retrieval.popularity import Popularity, fit_popularity
from palr_jax.retrieval.retriever import TrainedRetriever, load, save
from palr_jax.retrieval.train import train_sasrec

__all__ = [
    'Candidates',
    'ItemIndex',
    'Popularity',
    'Retriever',
    'TrainedRetriever',
    'build_index',
    'fit_popularity',
    'hash_items',
    'load',
    'load_index',
    'read_candidates',
    'read_ranks',
    'recall_against_exact',
    'retrieve',
    'save',
    'save_candidates',
    'save_index',
    'save_ranks',
    'target_ranks',
    'train_sasrec',
]
