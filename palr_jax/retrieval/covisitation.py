"""Item co-visitation: which items follow which in the users' histories, as vectors of low rank.

A classical retriever without gradients, fitted in seconds, that is hard to beat where items come in
pairs. Over all training histories, an item j that comes d places after an item i adds

    C[i, j] += 1 / (d * sqrt(n))          d = 1 … WINDOW, n the user's training events,

and the square root of its cosine form, sqrt(C[i, j] / sqrt(c_i c_j)) with c the row and the column
sums of C, is factored as U S V^T. An item's vector is its row of V. A user's vector is the sum of
the latest items' rows of U S at unit length, weighted by 1 / (places before the end of the history,
from 1).

Chosen on the validation users of MovieLens-1M and Amazon Beauty, against the full matrix (item-kNN,
as wide as the catalogue), closed-form ridge regression from the history to the next item (EASE's
form), undirected counts and other decays. 512 factors find more targets in the first 50 than the
full matrices do, which in turn have a better NDCG@10 on Beauty, where single pairs say much. The
root keeps the few very large counts from taking the factors.

Axes: U' the users at hand, I items, D width, N training events.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from etils import epath

from palr_jax import storage
from palr_jax.data.splits import Split
from palr_jax.errors import InputError

FORMAT = 1
FILE = 'covisitation.npz'
WINDOW = 20  # places between two items that count, and latest items of a history that are read
POWER_STEPS = 4  # of the randomised SVD
SPARE = 16  # directions of the randomised SVD beyond those that are kept


@dataclass(frozen=True)
class Covisitation:
    """A fitted retriever; see `Retriever`.

    Attributes:
      sources: [I, D] float32, unit rows: what an item of a history says about the next item.
      item_vectors: [I, D] float32. Items without a pair in training have zero rows in both.
    """

    sources: np.ndarray
    item_vectors: np.ndarray

    def user_vectors(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """[U', D] float32; an empty history has the zero vector.

        Args:
          histories: U' arrays of item ids, oldest first; the latest WINDOW are read.

        Raises:
          InputError: an id is not in the catalogue (0, which is padding, is none either).
        """
        latest = [np.asarray(history, np.int64)[-WINDOW:] for history in histories]
        ends = np.cumsum([0, *map(len, latest)])
        items = np.concatenate([np.zeros(0, np.int64), *latest])
        bad = (items < 1) | (items > len(self.sources))
        if bad.any():
            row = np.searchsorted(ends, bad.argmax(), side='right') - 1
            raise InputError(
                f'The history in row {row} holds the item id {items[bad.argmax()]}; '
                f'item ids are 1 to {len(self.sources)}.'
            )
        from_end = np.repeat(ends[1:], np.diff(ends)) - np.arange(len(items))
        weights = (1 / from_end).astype(np.float32)
        shape = len(histories), len(self.sources)
        return sp.csr_array((weights, items - 1, ends), shape) @ self.sources


def fit_covisitation(split: Split, items: int, width: int, seed: int) -> Covisitation:
    """Fits the retriever to the training parts alone.

    Args:
      items: I, the size of the catalogue.
      width: D; less where the matrix has a smaller rank.
      seed: of the randomised SVD.

    Raises:
      InputError: nobody has two training items, or the width is not positive.
    """
    if width < 1:
        raise InputError(f'The width of the co-visitation factors is {width}; allowed: 1 or more.')
    matrix = covisits(split, items)
    if not matrix.nnz:
        raise InputError('No user has two training items; the retriever has nothing to learn from.')
    rows, columns = (np.ravel(matrix.sum(axis)) for axis in (1, 0))
    matrix.data /= np.sqrt(np.repeat(rows, np.diff(matrix.indptr)) * columns[matrix.indices])
    matrix.data **= 0.5
    left, singular, right = truncated_svd(matrix.astype(np.float32), width, seed)
    sources = left * singular
    lengths = np.linalg.norm(sources, axis=1, keepdims=True)
    sources = np.divide(sources, lengths, out=np.zeros_like(sources), where=lengths > 0)
    return Covisitation(sources, right)


def covisits(split: Split, items: int) -> sp.csr_array:
    """C of the top of the file: [I, I] float64, row = the earlier item, id 1 first."""
    train = split.train_events()
    events = split.items[train].astype(np.int64) - 1
    users = np.repeat(np.arange(len(split.train_end)), split.train_end)
    shares = 1 / np.sqrt(split.train_end[users])
    total = sp.csr_array((items, items))
    for distance in range(1, WINDOW + 1):  # one at a time: all pairs at once would not fit
        later = distance + np.flatnonzero(users[distance:] == users[:-distance])
        pairs = events[later - distance], events[later]
        total = total + sp.csr_array((shares[later] / distance, pairs), (items, items))
    return total


def truncated_svd(
    matrix: sp.csr_array, rank: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values and their vectors, by randomised subspace iteration.

    Algorithm 4.4 of Halko, Martinsson and Tropp (2011), with LU instead of QR between the steps. A
    Lanczos SVD (`scipy.sparse.linalg.svds`) gives the same ranking several times slower.

    Args:
      matrix: [I, I] float32.
      rank: how many; fewer come back if the others vanish.

    Returns:
      U [I, D], singular values [D] descending, V [I, D]; float32.
    """
    transposed = matrix.T.tocsr()
    size = min(rank + SPARE, *matrix.shape)
    start = np.random.default_rng(seed).standard_normal((matrix.shape[1], size), np.float32)
    basis = matrix @ start
    for _ in range(POWER_STEPS):
        basis = matrix @ _well_conditioned(transposed @ _well_conditioned(basis))
    basis, _ = np.linalg.qr(basis)
    right, singular, rotation = np.linalg.svd(transposed @ basis, full_matrices=False)
    keep = np.flatnonzero(singular > 1e-5 * singular[0])[:rank]  # the others are rounding
    return basis @ rotation.T[:, keep], singular[keep], np.ascontiguousarray(right[:, keep])


def _well_conditioned(basis: np.ndarray) -> np.ndarray:
    """Other columns that span the same space, so that the large directions do not hide the rest."""
    return scipy.linalg.lu(basis, permute_l=True, check_finite=False)[0]


def save(retriever: Covisitation, folder: epath.PathLike) -> None:
    """Writes `covisitation.npz`."""
    storage.write_arrays(
        epath.Path(folder) / FILE,
        about=np.array(json.dumps({'format': FORMAT})),
        sources=retriever.sources,
        item_vectors=retriever.item_vectors,
    )


def load(folder: epath.PathLike) -> Covisitation:
    """Reads what `save` wrote.

    Raises:
      InputError: the file is missing, damaged, of another format, or its arrays do not match.
    """
    path = epath.Path(folder) / FILE
    arrays = dict(storage.read_arrays(path))
    found = json.loads(str(arrays.pop('about', '{}'))).get('format')
    if found != FORMAT:
        raise InputError(f'{path}: format is {found}; this version reads {FORMAT}.')
    shapes = {name: arrays[name].shape for name in sorted(arrays)}
    if shapes.keys() != {'sources', 'item_vectors'} or len(set(shapes.values())) != 1:
        raise InputError(
            f'{path}: the arrays are {shapes}; allowed: sources and item_vectors of one shape.'
        )
    return Covisitation(**arrays)
