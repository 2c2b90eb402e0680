"""What a retriever says about users: their best items, and where their targets stand.

A score is the dot product of a user's vector and an item's; popularity has vectors of width 1.

Axes: U' the users at hand, I items, D width, C candidates, k of them asked for, M parts of a sum, G
sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import TargetRanks
from palr_jax.retrieval.index import ItemIndex, to_vectors

BATCH = 256  # users whose scores over the catalogue are held at once


@dataclass(frozen=True)
class Candidates:
    """What a retriever hands to the ranking."""

    users: np.ndarray  # [U'] dense users
    items: np.ndarray  # [U', C] int32, best first, -1 = unfilled slot
    scores: np.ndarray  # [U', C] float32, -inf in unfilled slots


def retrieve(
    index: ItemIndex,
    queries: np.ndarray,
    histories: Sequence[np.ndarray],
    k: int,
    exclude: bool,
    users: np.ndarray | None = None,
) -> Candidates:
    """The k best items of each user; with `exclude`, the k best that the history does not hold.

    An index knows nothing of histories, so more than k are asked for, twice as many again for the
    users who still lack some, until k unseen items are there or the catalogue ends. The amounts
    are powers of two, so that few programs are compiled.

    Args:
      queries: [U', D] user vectors.
      histories: U' arrays of item ids.
      users: [U'] dense users named in the result; the row numbers if None.

    Raises:
      InputError: k is not positive, or a vector is not finite.
    """
    total, rows = len(index.vectors), np.arange(len(queries))
    users = rows if users is None else np.asarray(users)
    if not len(queries) == len(histories) == len(users):
        raise ValueError(f'{len(queries)} queries, {len(histories)} histories, {len(users)} users')
    items = np.full((len(queries), k), -1, np.int32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    fetch = k if not exclude else 1 << (2 * k - 1).bit_length()
    while len(rows):
        fetch = min(fetch, max(total, k))
        found, found_scores = index.search(queries[rows], fetch)
        lacking = []
        for row, ids, values in zip(rows, found, found_scores):
            unseen = ids > 0
            if exclude:
                unseen &= ~np.isin(ids, histories[row])
            best = np.flatnonzero(unseen)[:k]
            items[row, : len(best)], scores[row, : len(best)] = ids[best], values[best]
            if len(best) < k and fetch < total:
                lacking.append(row)
        rows, fetch = np.array(lacking, int), 2 * fetch
    return Candidates(users, items, scores)


def target_ranks(
    queries: np.ndarray,
    vectors: np.ndarray,
    targets: np.ndarray,
    histories: Sequence[np.ndarray],
    exclude: bool,
) -> TargetRanks:
    """Where each user's target stands in the whole catalogue; no item is sampled.

    With `exclude`, items of the history are not ranked; a target that is in the history is.

    Args:
      queries: [U', D] user vectors.
      vectors: [I, D] item vectors.
      targets: [U'] item ids.
      histories: U' arrays of item ids.

    Raises:
      InputError: a user has no target, or a vector is not finite.
    """
    (ranks,) = mixture_ranks([(queries, vectors)], [(1.0,)], targets, histories, exclude)
    return ranks


def mixture_ranks(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    weights: Sequence[Sequence[float]],
    targets: np.ndarray,
    histories: Sequence[np.ndarray],
    exclude: bool,
) -> list[TargetRanks]:
    """`target_ranks` under each of several weighted sums of the scores of M parts.

    The parts' scores are computed once for all sums.

    Args:
      parts: M pairs of user vectors [U', D] and item vectors [I, D], each with a D of its own.
      weights: the sums, each M weights.
    """
    queries = [to_vectors(queries, 'user vectors') for queries, _ in parts]
    vectors = [to_vectors(vectors, 'item vectors') for _, vectors in parts]
    targets, users, total = np.asarray(targets, np.int32), len(queries[0]), len(vectors[0])
    bad = (targets < 1) | (targets > total)
    if bad.any():
        raise InputError(
            f'The user in row {bad.argmax()} has the target item {targets[bad.argmax()]}; '
            f'item ids are 1 to {total}.'
        )
    greater, ties = (np.zeros((len(weights), users), np.int32) for _ in range(2))
    vectors, weights = jax.device_put((vectors, np.array(weights, np.float32)))
    for start in range(0, users, BATCH):
        part = slice(start, start + BATCH)
        count = len(targets[part])
        ranked = np.ones((BATCH, total + 1), bool)  # column 0 is padding
        if exclude:
            for row, history in enumerate(histories[part]):
                ranked[row, np.asarray(history, int)] = False
        ranked[np.arange(count), targets[part]] = True
        pad = BATCH - count  # the last batch has the shape of the others
        above, same, finite = _count(
            [np.pad(each[part], ((0, pad), (0, 0))) for each in queries],
            vectors,
            weights,
            np.pad(targets[part], (0, pad), constant_values=1),
            ranked[:, 1:],
        )
        if not finite:
            raise InputError('A score of the retriever overflows; its vectors are too large.')
        greater[:, part], ties[:, part] = above[:, :count], same[:, :count] - 1
    return [TargetRanks(g, t, np.ones(users, bool)) for g, t in zip(greater, ties)]


@jax.jit
def _count(
    queries: list[jax.Array],
    vectors: list[jax.Array],
    weights: jax.Array,
    targets: jax.Array,
    ranked: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of M queries [B, D] and vectors [I, D], G sums: greater, ties and itself [G, B]; finite."""
    scores = [jnp.matmul(q, v.T, precision='highest') for q, v in zip(queries, vectors)]

    def count(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = sum(weight * each for weight, each in zip(weights, scores))
        target = jnp.take_along_axis(mixed, targets[:, None] - 1, 1)
        return jnp.sum((mixed > target) & ranked, 1), jnp.sum((mixed == target) & ranked, 1)

    finite = jnp.array([jnp.isfinite(each).all() for each in scores]).all()
    return *jax.lax.map(count, weights), finite


def save_candidates(folder: epath.PathLike, system: str, part: str, candidates: Candidates) -> None:
    """Writes the candidates that `system` has for the users of a split part."""
    storage.write_arrays(
        _path(folder, system, part, 'candidates'),
        users=candidates.users,
        items=candidates.items,
        scores=candidates.scores,
    )


def read_candidates(folder: epath.PathLike, system: str, part: str) -> Candidates:
    """Reads what `save_candidates` wrote."""
    return Candidates(**storage.read_arrays(_path(folder, system, part, 'candidates')))


def save_ranks(
    folder: epath.PathLike, system: str, part: str, users: np.ndarray, ranks: TargetRanks
) -> None:
    """Writes where the targets of `users` [U'] stand for `system`."""
    storage.write_arrays(
        _path(folder, system, part, 'ranks'),
        users=users,
        greater=ranks.greater,
        ties=ranks.ties,
        found=ranks.found,
    )


def read_ranks(folder: epath.PathLike, system: str, part: str) -> tuple[np.ndarray, TargetRanks]:
    """Reads what `save_ranks` wrote: users [U'] and ranks."""
    arrays = dict(storage.read_arrays(_path(folder, system, part, 'ranks')))
    return arrays.pop('users'), TargetRanks(**arrays)


def _path(folder: epath.PathLike, system: str, part: str, what: str) -> epath.Path:
    return epath.Path(folder) / f'{system}_{part}_{what}.npz'
