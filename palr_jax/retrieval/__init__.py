"""Retrieval: retrievers score the whole catalogue, an index finds each user's best.

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
from palr_jax.retrieval.folds import retrieve_out_of_fold
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
from palr_jax.retrieval.profile import embed_texts, item_texts
from palr_jax.retrieval.retriever import TrainedRetriever
from palr_jax.retrieval.systems import Material, Texts, fit_systems, load_mix, mix_systems
from palr_jax.retrieval.train import train_sasrec

__all__ = [
    'Candidates',
    'ItemIndex',
    'Material',
    'Popularity',
    'Retriever',
    'Texts',
    'TrainedRetriever',
    'build_index',
    'embed_texts',
    'fit_popularity',
    'fit_systems',
    'hash_items',
    'item_texts',
    'load_index',
    'load_mix',
    'mix_systems',
    'read_candidates',
    'read_ranks',
    'recall_against_exact',
    'retrieve',
    'retrieve_out_of_fold',
    'save_candidates',
    'save_index',
    'save_ranks',
    'target_ranks',
    'train_sasrec',
]
