"""Which events train, validate and test.

A split is three positions a user. They are independent of each other: in a split by time a user may
have a test target but no validation target, or no training event at all.

* leave_one_out: each user's last event tests, the one before validates, the rest trains (section 3
  of the paper). Other users' training events may be later than a test event.
* temporal: two cuts in time hold for all users. What is earlier than the first cut trains. A user's
  validation target is his first event from the first cut on, if it is earlier than the second; his
  test target is his first event from the second cut on; a history ends at the cut. So nothing that
  happened at or after a cut, to whomever, is in what a model learns from or reads before it.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from palr_jax.data.interactions import Interactions
from palr_jax.errors import InputError

Part = Literal['valid', 'test']


@dataclass(frozen=True)
class Split:
    """The events of U users in time order; positions count from a user's first event."""

    offsets: np.ndarray  # [U+1] int64: user u has items[offsets[u]:offsets[u + 1]]
    items: np.ndarray  # [N] int32, 1..I
    train_end: np.ndarray  # [U] int32: the events before it train
    valid_at: np.ndarray  # [U] int32: position of the validation target, -1 = none
    test_at: np.ndarray  # [U] int32: position of the test target, -1 = none
    # Seconds of the validation and the test cut [2] int64; empty where there are none.
    cuts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def train(self, user: int) -> np.ndarray:
        """Training items of a user, oldest first [n] int32."""
        start = self.offsets[user]
        return self.items[start : start + self.train_end[user]]

    def history(self, user: int, part: Part) -> np.ndarray:
        """Items before the user's target, oldest first [n] int32.

        At test time the validation item belongs to it. A user without a target has the training
        items.
        """
        at = self._at(part)[user]
        start = self.offsets[user]
        return self.items[start : start + (self.train_end[user] if at < 0 else at)]

    def target(self, user: int, part: Part) -> int:
        """The user's target item, 0 = none."""
        at = self._at(part)[user]
        return 0 if at < 0 else int(self.items[self.offsets[user] + at])

    def targets(self, part: Part) -> np.ndarray:
        """The target item of every user [U] int32, 0 = none."""
        at = self._at(part)
        targets = np.zeros(len(at), np.int32)
        has = at >= 0
        targets[has] = self.items[self.offsets[:-1][has] + at[has]]
        return targets

    def users(self, part: Part) -> np.ndarray:
        """The users who have a target, ascending."""
        return np.flatnonzero(self._at(part) >= 0)

    def train_events(self) -> np.ndarray:
        """Which of the events train [N] bool."""
        lengths = np.diff(self.offsets)
        position = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], lengths)
        return position < np.repeat(self.train_end, lengths)

    def without(self, users: np.ndarray) -> 'Split':
        """The same, but these users train nothing and have no targets."""
        gone = np.isin(np.arange(len(self.train_end)), users)
        return replace(
            self,
            train_end=np.where(gone, 0, self.train_end),
            valid_at=np.where(gone, -1, self.valid_at),
            test_at=np.where(gone, -1, self.test_at),
        )

    def validating(self, users: np.ndarray) -> 'Split':
        """The same, but no others than these users have validation targets."""
        kept = np.isin(np.arange(len(self.train_end)), users)
        return replace(self, valid_at=np.where(kept, self.valid_at, -1))

    def _at(self, part: Part) -> np.ndarray:
        if part not in ('valid', 'test'):
            raise ValueError(f"part is {part!r}; allowed are 'valid' and 'test'.")
        return self.valid_at if part == 'valid' else self.test_at


def leave_one_out(interactions: Interactions) -> Split:
    """Each user's last event tests, the one before validates, the rest trains.

    Section 3 of the paper. Users with fewer than 3 events only train.
    """
    offsets = _offsets(interactions)
    lengths = np.diff(offsets)
    enough = lengths >= 3
    return Split(
        offsets=offsets,
        items=interactions.items,
        train_end=np.where(enough, lengths - 2, lengths).astype(np.int32),
        valid_at=np.where(enough, lengths - 2, -1).astype(np.int32),
        test_at=np.where(enough, lengths - 1, -1).astype(np.int32),
    )


def temporal(interactions: Interactions, valid_from: int, test_from: int) -> Split:
    """Splits at two moments; see the top of the file.

    A user without an event before a cut has no target there: nothing could be asked of a model.

    Args:
      interactions: N events of U users.
      valid_from: the first cut, in seconds; an event of this second is behind it.
      test_from: the second cut, in seconds.
    """
    offsets = _offsets(interactions)
    users, lengths = interactions.users, np.diff(offsets)
    before_valid, before_test = (
        np.bincount(users[interactions.times < cut], minlength=len(lengths))
        for cut in (valid_from, test_from)
    )
    validates = (before_valid > 0) & (before_valid < before_test)
    tests = (before_test > 0) & (before_test < lengths)
    return Split(
        offsets=offsets,
        items=interactions.items,
        train_end=before_valid.astype(np.int32),
        valid_at=np.where(validates, before_valid, -1).astype(np.int32),
        test_at=np.where(tests, before_test, -1).astype(np.int32),
        cuts=np.array([valid_from, test_from], np.int64),
    )


def cut_times(interactions: Interactions, valid_share: float, test_share: float) -> tuple[int, int]:
    """The seconds from which the latest shares of all events validate and test.

    Events of one second are never parted: all of them are behind the cut, so a part may be a little
    larger than its share.
    """
    times = np.sort(interactions.times)
    at = [len(times) * (1 - share) for share in (valid_share + test_share, test_share)]
    valid_from, test_from = times[np.minimum(np.round(at).astype(int), len(times) - 1)]
    return int(valid_from), int(test_from)


def make_split(
    interactions: Interactions, kind: str, valid_share: float = 0.1, test_share: float = 0.1
) -> Split:
    """Splits as `config.data.split` says.

    Args:
      interactions: the events after the k-core.
      kind: leave_one_out or temporal.
      valid_share: share of all events between the two cuts; only of temporal.
      test_share: share of all events behind the second cut; only of temporal.

    Raises:
      InputError: there is no split of this name, or a part of it would be empty.
    """
    if kind == 'leave_one_out':
        return leave_one_out(interactions)
    if kind != 'temporal':
        raise InputError(f'config.data.split is {kind!r}; allowed are leave_one_out, temporal.')
    split = temporal(interactions, *cut_times(interactions, valid_share, test_share))
    sizes = {
        'training events': int(split.train_end.sum()),
        'validation users': len(split.users('valid')),
        'test users': len(split.users('test')),
    }
    for part, size in sizes.items():
        if not size:
            raise InputError(
                f'config.data.valid_share={valid_share:g} and config.data.test_share={test_share:g}'
                f' leave no {part}, with cuts at the seconds {split.cuts.tolist()}; allowed are '
                'shares that leave some of each.'
            )
    return split


def validation_halves(split: Split, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The users with a validation target in two seeded halves, each in a seeded order.

    The settings of the retrievers are chosen on the first, and how the LLM is fused with them on
    the second, which has the odd one: what looks good on users whom the retrievers were fitted to
    would be trusted too much.
    """
    users = split.users('valid')
    order = np.random.default_rng([seed, 6]).permutation(users)
    half = len(users) // 2
    return order[:half], order[half:]


def _offsets(interactions: Interactions) -> np.ndarray:
    """Where each user's events begin [U+1] int64."""
    lengths = np.bincount(interactions.users, minlength=len(interactions.user_ids))
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def describe(split: Split) -> dict[str, Any]:
    """Counts for the record; a target is cold if it is in nobody's training events.

    Of a split by time also the cuts in seconds, the training events, the events that neither train
    nor are targets, and the users without a training event.
    """
    trained = np.unique(split.items[split.train_events()])
    counts: dict[str, Any] = {}
    if len(split.cuts):
        train_events = int(split.train_end.sum())
        targets = sum(len(split.users(part)) for part in ('valid', 'test'))
        counts['valid_from'], counts['test_from'] = split.cuts.tolist()
        counts['train_events'] = train_events
        counts['other_events'] = len(split.items) - train_events - targets
        counts['users_without_training'] = int(np.count_nonzero(split.train_end == 0))
    for part in ('valid', 'test'):
        targets = split.targets(part)[split.users(part)]
        counts[f'{part}_users'] = len(targets)
        counts[f'{part}_cold'] = int(np.count_nonzero(~np.isin(targets, trained)))
    return counts
