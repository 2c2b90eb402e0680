"""Fusion: one retriever's score plus the LLM's, on identical candidates.

Both scores are standardised over each user's candidates, so that one weight serves all users. The
weight comes from a grid that includes 0 (the retriever alone), by NDCG@10 on the validation users.
"""

from collections.abc import Sequence

import numpy as np

from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import ndcg, rank_targets


def standardize(scores: np.ndarray) -> np.ndarray:
    """[U', C] float64: mean 0 and (population) standard deviation 1 over each row's filled slots.

    Unfilled slots are -inf and stay so. A row whose scores are all equal becomes 0.

    Raises:
      InputError: a score is NaN or +inf; it would otherwise pass for an unfilled slot.
    """
    scores = np.asarray(scores, np.float64)
    wrong = np.isnan(scores) | (scores == np.inf)
    if wrong.any():
        row, slot = np.argwhere(wrong)[0]
        raise InputError(
            f'The score in row {row}, slot {slot} is {scores[row, slot]}; allowed: finite numbers, '
            'and -inf in unfilled slots.'
        )
    filled = np.isfinite(scores)
    count = np.maximum(filled.sum(axis=1, keepdims=True), 1)
    known = np.where(filled, scores, 0.0)
    centred = np.where(filled, known - known.sum(axis=1, keepdims=True) / count, 0.0)
    spread = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    # Compared as they are: the rounded mean of equal scores may leave a spread of 1e-17.
    highest = np.max(scores, axis=1, keepdims=True, initial=-np.inf)
    lowest = np.min(np.where(filled, scores, np.inf), axis=1, keepdims=True, initial=np.inf)
    standard = np.divide(centred, spread, out=np.zeros_like(centred), where=highest > lowest)
    return np.where(filled, standard, -np.inf)


def fuse(retriever: np.ndarray, llm: np.ndarray, weight: float) -> np.ndarray:
    """[U', C] standardised retriever score + weight * standardised LLM score; -inf if unfilled.

    Raises:
      InputError: a score is NaN or +inf, or the two have not scored the same candidates.
    """
    base, other = standardize(retriever), standardize(llm)
    filled = np.isfinite(base)
    if base.shape != other.shape or (filled != np.isfinite(other)).any():
        raise InputError(
            f'Retriever and LLM have scored different candidates ({filled.sum()} of {base.shape} '
            f'and {np.isfinite(other).sum()} of {other.shape} slots); allowed: the same slots.'
        )
    return np.where(filled, base + weight * np.where(filled, other, 0.0), -np.inf)


def shuffle_users(scores: np.ndarray, seed: int) -> np.ndarray:
    """[U', C] every user's scores are those of another one, slot by slot; a control.

    The other's slots may be filled differently: a score that he lacks is the mean of his others.
    """
    filled = np.isfinite(scores)
    order = np.random.default_rng([seed, 9]).permutation(len(scores))
    other = np.empty(len(scores), np.int64)
    other[order] = np.roll(order, 1)  # a single cycle: nobody keeps his own
    taken = scores[other]
    known = np.isfinite(taken)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    mean = np.where(known, taken, 0.0).sum(axis=1, keepdims=True) / count
    return np.where(filled, np.where(known, taken, mean), -np.inf)


def choose_weight(
    items: np.ndarray,
    retriever: np.ndarray,
    llm: np.ndarray,
    targets: np.ndarray,
    grid: Sequence[float],
    users: int | None = None,
) -> tuple[float, dict[float, float]]:
    """The grid's weight of largest mean NDCG@10 (the smallest of equals), and all the means.

    Args:
      items: [U', C] candidates of validation users.
      retriever: [U', C] their retriever scores.
      llm: [U', C] their LLM scores.
      targets: [U'] validation targets.
      grid: weights to try; 0 is among them.
      users: that the means are over, those included whose target was not retrieved and who are
        not scored; U' if None.

    Raises:
      InputError: the grid lacks 0, or there is no validation user, not even an unscored one.
    """
    if 0 not in grid:
        raise InputError(
            f'ranking.fusion_weights is {tuple(grid)}; allowed: numbers with 0, the retriever '
            'alone, among them.'
        )
    users = len(targets) if users is None else users
    if not users:
        raise InputError('There is no validation user to choose the fusion weight on.')
    means = {
        weight: float(
            ndcg(rank_targets(items, fuse(retriever, llm, weight), targets), 10).sum() / users
        )
        for weight in sorted(grid)
    }
    return max(means, key=lambda weight: (means[weight], -weight)), means
