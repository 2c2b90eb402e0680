"""Searching the item vectors for the largest dot products: ScaNN, exact or approximate in JAX.

The seam is `ItemIndex.search`. ScaNN compares every vector up to 20,000 items, as its documentation
advises; above, it searches a tree of about sqrt(I) leaves with asymmetric hashing and reorders the
best exactly. How many leaves and how many of the best is measured when the index is built: vectors
that lie in clusters need a hundredth of the leaves, random ones half of them. Equal scores come in
the order of item ids from every backend that compares every vector, so that a list does not depend
on the backend.

Only vectors and settings, the measured ones too, are saved: the index is rebuilt from them, which
takes well under a second for 20,000 items and about 10 seconds for a million.

Axes: B queries, I items, D width; item ids are rows + 1.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from palr_jax import storage
from palr_jax.errors import InputError

BACKENDS = ('auto', 'scann', 'tree', 'exact', 'approx')
SCANN = BACKENDS[:3]
FORMAT = 2  # 1 did not hold `effort`
FILE = 'index.npz'
BRUTE_FORCE_ITEMS = 20_000  # ScaNN's documentation advises brute force below
LEAST_TREE_ITEMS = 1_000  # the hashing needs vectors to learn from; also its recall is poor below
# From fast to thorough: the share of the leaves that is searched, and how many times the items that
# are asked for are scored exactly. The first that reaches RECALL is taken.
EFFORTS = (
    *((0.005, 4), (0.01, 6), (0.02, 6), (0.05, 6), (0.1, 10)),
    *((0.2, 12), (0.35, 16), (0.5, 20), (0.7, 24), (1.0, 32)),
)
RECALL = 0.98  # of the exact TUNED_FOR best of TUNED_ON queries
TUNED_FOR, TUNED_ON = 50, 256
LEAST_REORDERED = 200  # items scored exactly, however few are asked for
BLOCK_SCORES = 2**26  # scores held at once by the JAX backends

Effort = tuple[float, int]  # one of EFFORTS
# [B, D] float32, k <= I -> (rows [B, k], scores [B, k]), best first; NaN score = unfilled.
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ItemIndex:
    """Item vectors and a way to search them.

    Attributes:
      vectors: [I, D] float32.
      backend: what searches: 'scann (brute force)', 'scann (tree, n leaves)', 'exact' or 'approx'.
      settings: what `build_index` was asked for; JSON-able.
    """

    vectors: np.ndarray
    backend: str
    settings: dict[str, Any]
    _search: Search

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items of largest dot product with each query, best first.

        Args:
          queries: [B, D], any float type.
          k: may differ from call to call.

        Returns:
          ids [B, k] int32 from 1, scores [B, k] float32; -1 and -inf where there is no k-th item.

        Raises:
          InputError: k is not positive, or a query is not finite.
        """
        queries, total = to_vectors(queries, 'queries'), len(self.vectors)
        if k < 1:
            raise InputError(f'The number of items to find is {k}; allowed: 1 or more.')
        if queries.shape[1] != self.vectors.shape[1]:
            raise InputError(
                f'The queries have width {queries.shape[1]}; the item vectors have '
                f'{self.vectors.shape[1]}.'
            )
        ids = np.full((len(queries), k), -1, np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if len(queries):
            rows, found = self._search(queries, min(k, total))
            filled = ~np.isnan(found)
            ids[:, : rows.shape[1]] = np.where(filled, rows + 1, -1)
            scores[:, : rows.shape[1]] = np.where(filled, found, -np.inf)
        return ids, scores


def build_index(
    vectors: np.ndarray,
    backend: str = 'auto',
    leaves: int | None = None,
    queries: np.ndarray | None = None,
    effort: Effort | None = None,
) -> ItemIndex:
    """Builds an index of item vectors.

    Args:
      vectors: [I, D], any float type; memory maps are fine.
      backend: 'auto' is ScaNN where it can be imported and exact search elsewhere; 'tree' is ScaNN
        with a tree for less than 20,000 items too.
      leaves: of the tree; None: sqrt(I). Fewer than 1,000 items never have one.
      queries: [n, D] such as will be searched with, for measuring the recall of a tree; None: some
        of the item vectors.
      effort: what was measured before; None: it is measured.

    Raises:
      InputError: a vector is not finite, the backend is unknown, or ScaNN was asked for by name and
        cannot be imported.
    """
    vectors = to_vectors(vectors, 'item vectors')
    settings = {'backend': backend, 'leaves': leaves, 'effort': None}
    if backend not in BACKENDS:
        raise InputError(
            f'config.retrieval.index is {backend!r}; allowed are {", ".join(BACKENDS)}.'
        )
    if leaves is not None and leaves < 1:
        raise InputError(f'The number of leaves is {leaves}; allowed: 1 or more.')
    if not len(vectors):
        raise InputError('The index has no item vectors; at least one is needed.')
    scann, cause = _import_scann() if backend in SCANN else (None, '')
    if backend in ('scann', 'tree') and scann is None:
        raise InputError(
            f'config.retrieval.index is {backend!r}, but ScaNN cannot be imported ({cause}); '
            "'exact' finds the same items."
        )
    if scann is None:
        backend = 'approx' if backend == 'approx' else 'exact'
        return ItemIndex(vectors, backend, settings, _jax_search(vectors, backend))
    total = len(vectors)
    small = total <= BRUTE_FORCE_ITEMS and backend != 'tree' and leaves is None
    if small or total < LEAST_TREE_ITEMS:
        return ItemIndex(vectors, 'scann (brute force)', settings, _brute_force(scann, vectors))
    count = min(leaves or round(math.sqrt(total)), total)
    tree = _plant(scann, vectors, count)
    if effort is None:
        effort = _choose_effort(tree, vectors, queries)
    name = f'scann (tree, {count} leaves)'
    search = functools.partial(tree, *effort)
    return ItemIndex(vectors, name, settings | {'effort': list(effort)}, search)


def recall_against_exact(index: ItemIndex, queries: np.ndarray, k: int) -> float:
    """Share of the exact k best items that the index finds, over the queries [B, D]."""
    found, _ = index.search(queries, k)
    exact, _ = build_index(index.vectors, 'exact').search(queries, k)
    hits = [np.isin(e[e > 0], f).mean() for e, f in zip(exact, found)]
    return float(np.mean(hits))


def hash_items(raw_ids: Sequence[str]) -> str:
    """Identity of an item table: sha256 over its raw ids in order."""
    return hashlib.sha256(json.dumps(list(raw_ids)).encode()).hexdigest()


def save_index(index: ItemIndex, folder: epath.PathLike, items_hash: str) -> None:
    """Writes vectors, settings and `hash_items(…)` of the table that the rows belong to."""
    settings = index.settings | {'format': FORMAT, 'items_sha256': items_hash}
    storage.write_arrays(
        epath.Path(folder) / FILE, vectors=index.vectors, settings=np.array(json.dumps(settings))
    )


def load_index(folder: epath.PathLike, items_hash: str) -> ItemIndex:
    """Rebuilds the index that `save_index` wrote.

    Raises:
      InputError: the file is missing, damaged, of another format, or of another item table.
    """
    path = epath.Path(folder) / FILE
    stored = storage.read_arrays(path)
    settings = json.loads(str(stored['settings']))
    if (found := settings.pop('format')) != FORMAT:
        raise InputError(f'{path}: this index has format {found}; this version reads {FORMAT}.')
    if (found := settings.pop('items_sha256')) != items_hash:
        raise InputError(
            f'{path}: this index belongs to another item table ({found[:12]}…); the items at hand '
            f'are {items_hash[:12]}….'
        )
    return build_index(stored['vectors'], **settings)


def to_vectors(vectors: np.ndarray, name: str) -> np.ndarray:
    """Any two-dimensional numbers as contiguous float32.

    Raises:
      InputError: they are not two-dimensional, or one is not finite; `name` says which they are.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2:
        raise InputError(f'The {name} have shape {vectors.shape}; they must be [rows, width].')
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        raise InputError(
            f'The {name} hold a value that is NaN or infinite in row {finite.argmin()} '
            f'({np.count_nonzero(~finite)} of {len(vectors)} rows do).'
        )
    return vectors


def in_order(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts each row by score, the best first, and equal scores by item; NaN comes last."""
    order = np.lexsort((rows, -scores))
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


@functools.cache
def _import_scann() -> tuple[Any, str]:
    """The module, or None and why; warns once. A broken wheel raises more than ImportError."""
    try:
        from scann import scann_ops_pybind
    except Exception as error:
        cause = f'{type(error).__name__}: {error}'
        logging.warning('ScaNN cannot be imported, the index is exact instead: %s', cause)
        return None, cause
    return scann_ops_pybind, ''


def _jax_search(vectors: np.ndarray, backend: str) -> Search:
    on_device = jnp.asarray(vectors)
    largest = max(1, BLOCK_SCORES // len(vectors))
    block = 1 << (largest.bit_length() - 1)

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for start in range(0, len(queries), block):
            part = queries[start : start + block]
            size = min(block, 1 << (len(part) - 1).bit_length())  # few shapes, few compilations
            padded = np.pad(part, ((0, size - len(part)), (0, 0)))
            scores, rows = _top_k(padded, on_device, k, backend == 'approx')
            parts.append((np.asarray(rows)[: len(part)], np.asarray(scores)[: len(part)]))
        return tuple(np.concatenate(column) for column in zip(*parts))

    return search


@functools.partial(jax.jit, static_argnames=('k', 'approximate'))
def _top_k(
    queries: jax.Array, vectors: jax.Array, k: int, approximate: bool
) -> tuple[jax.Array, jax.Array]:
    scores = jnp.matmul(queries, vectors.T, precision='highest')
    return jax.lax.approx_max_k(scores, k) if approximate else jax.lax.top_k(scores, k)


def _brute_force(scann: Any, vectors: np.ndarray) -> Search:
    searcher = scann.builder(vectors, 1, 'dot_product').score_brute_force().build()
    total = len(vectors)

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        best = np.empty((len(queries), k), np.int64)
        best_scores = np.empty(best.shape, np.float32)
        # ScaNN cuts a group of equal scores where it likes: fetch on until the group has ended.
        left, fetch = np.arange(len(queries)), min(total, k + 1)
        while len(left):
            rows, scores = searcher.search_batched_parallel(queries[left], fetch)
            cut = (scores[:, k - 1] == scores[:, -1]) & (fetch < total)
            rows, scores = in_order(rows.astype(np.int64), scores)
            best[left], best_scores[left] = rows[:, :k], scores[:, :k]
            left, fetch = left[cut], min(total, 2 * fetch)
        return best, best_scores

    return search


def _plant(scann: Any, vectors: np.ndarray, leaves: int) -> Callable[..., Any]:
    """A tree, searched by (share, depth, queries, k): a `Search` with an effort before it."""
    total = len(vectors)
    searcher = (
        scann.builder(vectors, 1, 'dot_product')
        .tree(leaves, leaves, training_sample_size=min(total, 250_000))
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(1)
        .build()
    )

    def search(
        share: float, depth: int, queries: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        reorder = min(total, max(LEAST_REORDERED, depth * k))
        enough = 8 * reorder * leaves / total  # leaves that hold eight times what is reordered
        searched = min(leaves, math.ceil(max(share * leaves, enough)))
        rows, scores = searcher.search_batched_parallel(queries, k, reorder, searched)
        rows = rows.astype(np.int64)
        short = np.isnan(scores).any(1)  # the searched leaves held fewer than k items
        if short.any():
            rows[short], scores[short] = _jax_search(vectors, 'exact')(queries[short], k)
        return in_order(rows, scores)

    return search


def _choose_effort(
    tree: Callable[..., Any], vectors: np.ndarray, queries: np.ndarray | None
) -> Effort:
    """The least of EFFORTS that finds RECALL of the exact best; the greatest if none does."""
    pool = vectors if queries is None else to_vectors(queries, 'queries')
    some = np.random.default_rng(0).permutation(len(pool))[:TUNED_ON]
    sample, k = pool[np.sort(some)], min(TUNED_FOR, len(vectors))
    exact, _ = _jax_search(vectors, 'exact')(sample, k)
    for effort in EFFORTS:
        found, _ = tree(*effort, sample, k)
        if np.mean([np.isin(best, rows).mean() for best, rows in zip(exact, found)]) >= RECALL:
            break
    return effort
