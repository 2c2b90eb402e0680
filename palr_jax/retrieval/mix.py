"""Several retrievers as one: a weighted sum of their standardised scores, still a dot product.

A user's scores under one retriever have a mean and a standard deviation over the catalogue. Both
follow from the vectors, no score is computed: with the item vectors centred and C their covariance,
the mean is 0 and the deviation of u's scores is sqrt(u^T C u). So the concatenation of

    weight * u / sqrt(u^T C u)   for the user,   the centred v   for the item,

over the retrievers has the weighted sum of the z-scores as its dot product, and one index finds the
best of it. A retriever that says nothing of a user (a zero vector, equal scores) adds nothing.

Axes: U' the users at hand, I items, D width of one retriever or the sum of several.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath

from palr_jax import storage
from palr_jax.data.splits import Split
from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import TargetRanks, ndcg
from palr_jax.retrieval.candidates import mixture_ranks
from palr_jax.retrieval.interface import Retriever

FORMAT = 1
FILE = 'mix.json'
BLOCK = 2**14  # item vectors held in float64 at once

Weights = tuple[float, ...]  # one a retriever, in their order


def ndcg_at_10(ranks: TargetRanks) -> np.ndarray:
    """[U'], what the weights are chosen by."""
    return ndcg(ranks, 10)


def center(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Item vectors [I, D] -> minus their mean [I, D] float32, and their covariance [D, D]."""
    vectors = np.asarray(vectors, np.float32)
    # The float32 mean of equal numbers is that number: they become 0, not a spread of 1e-17.
    centred = vectors - vectors.mean(0, dtype=np.float64).astype(np.float32)
    blocks = (centred[at : at + BLOCK].astype(np.float64) for at in range(0, len(centred), BLOCK))
    return centred, sum(block.T @ block for block in blocks) / len(centred)


def standardize(queries: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """User vectors whose scores have a standard deviation of 1 over the catalogue.

    Args:
      queries: [U', D].
      covariance: [D, D] of the item vectors.

    Returns:
      [U', D] float32; zero where the scores do not differ.
    """
    queries = np.asarray(queries, np.float64)
    spread = np.sqrt(np.maximum((queries @ covariance * queries).sum(1), 0))
    # The spread is at most this (Cauchy-Schwarz); far below, it is the rounding of the vectors.
    most = np.linalg.norm(queries, axis=1) * np.sqrt(np.trace(covariance))
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 1e-6 * most)
    return (queries * scale[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Mix:
    """Retrievers and their weights; itself a `Retriever`.

    Retrievers of weight 0 are not asked. One alone is what it was before, to the bit.

    Attributes:
      weights: not negative, not all 0; only their ratios matter for the order of the items.
    """

    retrievers: tuple[Retriever, ...]
    weights: Weights

    def __post_init__(self) -> None:
        weights = np.array(self.weights, float)
        if len(weights) != len(self.retrievers) or not (weights >= 0).all() or not weights.any():
            raise InputError(
                f'The weights of {len(self.retrievers)} retrievers are {self.weights}; allowed: '
                'one each, none negative, not all 0.'
            )

    @functools.cached_property
    def _members(self) -> list[tuple[Retriever, float]]:
        return [(r, w) for r, w in zip(self.retrievers, self.weights) if w]

    @functools.cached_property
    def _centred(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [center(retriever.item_vectors) for retriever, _ in self._members]

    @functools.cached_property
    def item_vectors(self) -> np.ndarray:
        """[I, D] float32."""
        if len(self._members) == 1:
            return self._members[0][0].item_vectors
        return np.concatenate([vectors for vectors, _ in self._centred], 1)

    def user_vectors(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """[U', D] float32; an empty history has the zero vector if all retrievers say so."""
        if len(self._members) == 1:
            return self._members[0][0].user_vectors(histories)
        parts = [
            weight * standardize(retriever.user_vectors(histories), covariance)
            for (retriever, weight), (_, covariance) in zip(self._members, self._centred)
        ]
        return np.concatenate(parts, 1, dtype=np.float32)


def choose_weights(
    retrievers: Sequence[Retriever],
    split: Split,
    users: np.ndarray,
    exclude: bool,
    metric: Callable[[TargetRanks], np.ndarray] = ndcg_at_10,
) -> tuple[Weights, dict[Weights, float]]:
    """The weights of the largest mean `metric` on validation targets, and all that was tried.

    All weights in tenths that sum to 1 are tried; of equals, fewer retrievers win.

    Args:
      users: dense users with a validation target.
      exclude: whether items of the history are left out of the ranking.

    Returns:
      Weights that sum to 1, and the mean of the metric for each tried.

    Raises:
      InputError: there is no retriever or no user, or a user has no validation target.
    """
    if not len(retrievers) or not len(users):
        raise InputError(
            f'Weights are chosen for {len(retrievers)} retrievers on {len(users)} validation '
            'users; at least one of each is needed.'
        )
    histories = [split.history(user, 'valid') for user in users]
    parts = []
    for retriever in retrievers:
        vectors, covariance = center(retriever.item_vectors)
        parts.append((standardize(retriever.user_vectors(histories), covariance), vectors))
    tenths = itertools.product(range(11), repeat=len(retrievers))
    grid = [tuple(n / 10 for n in share) for share in tenths if sum(share) == 10]
    targets = split.targets('valid')[users]
    ranks = mixture_ranks(parts, grid, targets, histories, exclude)
    means = {weights: float(metric(of_users).mean()) for weights, of_users in zip(grid, ranks)}
    best = max(means, key=lambda weights: (means[weights], -np.count_nonzero(weights)))
    return best, means


def save_weights(weights: Mapping[str, float], folder: epath.PathLike) -> None:
    """Writes `mix.json`: the weights by the names of their retrievers."""
    storage.write_json(epath.Path(folder) / FILE, {'format': FORMAT, 'weights': dict(weights)})


def load_weights(folder: epath.PathLike) -> dict[str, float]:
    """Reads what `save_weights` wrote.

    Raises:
      InputError: the file is missing, damaged or of another format.
    """
    path = epath.Path(folder) / FILE
    stored = storage.read_json(path)
    if not isinstance(stored, dict) or stored.get('format') != FORMAT:
        found = stored.get('format') if isinstance(stored, dict) else None
        raise InputError(f'{path}: format is {found}; this version reads {FORMAT}.')
    return {name: float(weight) for name, weight in stored['weights'].items()}
