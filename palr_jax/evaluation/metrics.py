"""Ranking metrics with one relevant item a user, averaged over the order of tied items.

An item that scores exactly like the target may stand before or behind it; no sorting routine's
habit decides. With `g` items scored higher and `t` others tied with it, the target stands at each
of the ranks g+1 … g+t+1 with the same probability, and every metric here is the expected value
over that rank. A constant scorer thus gets what a random order gets, whatever order the candidates
came in. A target that is not among the ranked items is a miss.

Axes: U' evaluated users, C candidates. Means over users are the caller's: each function returns
one value a user, so that no batch is ever weighted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from palr_jax.errors import InputError


@dataclass(frozen=True)
class TargetRanks:
    """Where each user's target stands among the items ranked for the user."""

    greater: np.ndarray  # [U'] int32: items scored strictly higher than the target
    ties: np.ndarray  # [U'] int32: OTHER items with exactly the target's score
    found: np.ndarray  # [U'] bool: False = the target is not among the ranked items

    def __len__(self) -> int:
        return len(self.found)

    def take(self, rows: np.ndarray) -> 'TargetRanks':
        """The users of `rows`: indices or a mask [U']."""
        return TargetRanks(self.greater[rows], self.ties[rows], self.found[rows])

    def spread(self, rows: np.ndarray, users: int) -> 'TargetRanks':
        """These users as the `rows` [U'] of so many `users`; all others are misses."""
        greater, ties = (np.zeros(users, np.int32) for _ in range(2))
        found = np.zeros(users, bool)
        greater[rows], ties[rows], found[rows] = self.greater, self.ties, self.found
        return TargetRanks(greater, ties, found)


def rank_targets(
    items: np.ndarray,
    scores: np.ndarray,
    targets: np.ndarray,
    users: np.ndarray | None = None,
) -> TargetRanks:
    """Finds each user's target among the items ranked for the user, by item id alone.

    Args:
      items: [U', C] item ids, each at most once a row, in any order; -1 marks an unfilled slot.
      scores: [U', C], higher is better; compared in their own dtype, so cast before, not after,
        precision is lost. Unfilled slots may hold anything.
      targets: [U'] item ids.
      users: [U'] ids named in errors; the row numbers if None.

    Raises:
      InputError: a user has no target (an id below 1), a score that is not a number, or the target
        twice among the items.
    """
    items, scores, targets = np.asarray(items), np.asarray(scores), np.asarray(targets)
    if items.ndim != 2 or scores.shape != items.shape or targets.shape != items.shape[:1]:
        raise ValueError(
            'items and scores must be [U, C] and targets [U]: '
            f'found {items.shape}, {scores.shape} and {targets.shape}'
        )
    filled = items >= 0
    at_target = items == targets[:, None]

    def refuse(bad: np.ndarray, fault: str) -> None:
        """`bad` [U']: the rows that have the fault."""
        if bad.any():
            row = int(bad.argmax())
            who = f'user {users[row]}' if users is not None else f'user in row {row}'
            raise InputError(f'The {who} has {fault} ({int(bad.sum())} of {len(bad)} users do).')

    refuse(targets < 1, 'no target item; targets are item ids from 1')
    refuse((np.isnan(scores) & filled).any(1), 'a score that is NaN; scores must be numbers')
    refuse(at_target.sum(1) > 1, 'the target twice among the ranked items; items must be distinct')

    found = at_target.any(1)
    if not found.any():
        nothing = np.zeros(len(items), np.int32)
        return TargetRanks(nothing, nothing, found)
    target_scores = np.take_along_axis(scores, at_target.argmax(1)[:, None], 1)
    higher = filled & (scores > target_scores)
    equal = filled & (scores == target_scores) & ~at_target
    return TargetRanks(
        np.where(found, higher.sum(1), 0).astype(np.int32),
        np.where(found, equal.sum(1), 0).astype(np.int32),
        found,
    )


def _expected_gain(ranks: TargetRanks, gains: np.ndarray) -> np.ndarray:
    """Mean of `gains` over the ranks that the target may take.

    Args:
      gains: [K]; the gain of the ranks 1 … K, nothing beyond.

    Returns:
      [U'] float64: (gains[g+1] + … + gains[min(g+t+1, K)]) / (t+1), 0 for a target not found.
    """
    total = np.concatenate([[0.0], np.cumsum(gains, dtype=np.float64)])
    cutoff = len(gains)
    places = ranks.ties.astype(np.int64) + 1
    first = np.minimum(ranks.greater, cutoff)
    last = np.minimum(ranks.greater + places, cutoff)
    return np.where(ranks.found, (total[last] - total[first]) / places, 0.0)


def _ranks_to(cutoff: int) -> np.ndarray:
    if cutoff < 1:
        raise ValueError(f'a metric is cut at rank 1 or later, found {cutoff}')
    return np.arange(1, cutoff + 1)


def hit_rate(ranks: TargetRanks, k: int) -> np.ndarray:
    """HR@k [U']: 1 where the target is among the first k; E[…] = clip(k - g, 0, t+1) / (t+1)."""
    return _expected_gain(ranks, np.ones(len(_ranks_to(k))))


recall = hit_rate  # the same number with one relevant item; the name used of a retriever's list


def ndcg(ranks: TargetRanks, k: int) -> np.ndarray:
    """NDCG@k [U']: 1 / log2(rank + 1) within the first k, else 0; the ideal DCG is 1."""
    return _expected_gain(ranks, 1 / np.log2(_ranks_to(k) + 1))


def reciprocal_rank(ranks: TargetRanks, cutoff: int) -> np.ndarray:
    """1 / rank [U'] within the first `cutoff`, else 0; the mean over users is MRR@cutoff.

    Systems that rank lists of different lengths compare only under one cutoff.
    """
    return _expected_gain(ranks, 1 / _ranks_to(cutoff))


def per_user(ranks: TargetRanks, ks: Iterable[int], cutoff: int) -> dict[str, np.ndarray]:
    """Every reported metric by name, [U'] each: HR@k, NDCG@k and MRR cut at `cutoff`.

    NDCG@1 is left out: it is HR@1.
    """
    ks = sorted(set(ks))
    values = {f'HR@{k}': hit_rate(ranks, k) for k in ks}
    values |= {f'NDCG@{k}': ndcg(ranks, k) for k in ks if k > 1}
    return values | {'MRR': reciprocal_rank(ranks, cutoff)}
