"""What is recommended, beside whether it is right: coverage, novelty and diversity of the lists.

A system can be accurate and show everybody the same few well-known items of one kind. None of the
three measures looks at the targets, and none is good or bad alone: a list drawn by lot is more
novel than any useful one.

Axes: U' evaluated users, C candidates, K items of a list, I items of the catalogue. A list has item
ids, best first, and -1 where it is shorter than K.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from palr_jax.data.interactions import Catalogue
from palr_jax.data.splits import Split
from palr_jax.errors import InputError

LENGTH = 10  # items of the lists that a report measures


@dataclass(frozen=True)
class ItemFacts:
    """What the measures know of the I items; row 0 is padding."""

    holders: np.ndarray  # [I+1] training users who have the item
    users: int  # users who have a training event
    keywords: Sequence[Sequence[str]]  # [I+1] genres or categories

    @property
    def items(self) -> int:
        """I, without the padding."""
        return len(self.keywords) - 1


def item_facts(split: Split, catalogue: Catalogue) -> ItemFacts:
    """Counts the training users of every item."""
    users = np.repeat(np.arange(len(split.train_end)), split.train_end)
    pairs = np.unique(np.stack([users, split.items[split.train_events()]]), axis=1)
    holders = np.bincount(pairs[1], minlength=catalogue.items + 1)
    return ItemFacts(holders, np.count_nonzero(split.train_end), catalogue.keywords)


def top_items(
    items: np.ndarray, scores: np.ndarray, users: np.ndarray, k: int, *, seed: int
) -> np.ndarray:
    """The k best items of each user [U', k] int32, best first, -1 where there are fewer.

    Tied items come in an order drawn by lot. It depends on the seed, the user and the items alone:
    not on the slots that they came in, nor on the other users.

    Args:
      items: [U', C] item ids, each at most once a row, in any order; -1 marks an unfilled slot.
      scores: [U', C], higher is better. Unfilled slots may hold anything.
      users: [U'] dense ids.
      k: length of the lists.

    Raises:
      InputError: a score is not a number.
    """
    items, users = np.asarray(items), np.asarray(users)
    scores = np.asarray(scores, np.float64)  # holds every narrower number, so no tie is new
    if items.ndim != 2 or scores.shape != items.shape or users.shape != items.shape[:1]:
        raise ValueError(
            'items and scores must be [U, C] and users [U]: '
            f'found {items.shape}, {scores.shape} and {users.shape}'
        )
    filled = items >= 0
    bad = (np.isnan(scores) & filled).any(1)
    if bad.any():
        raise InputError(
            f'The user {users[bad.argmax()]} has a score that is NaN; scores must be numbers '
            f'({int(bad.sum())} of {len(bad)} users have one).'
        )
    lots = _mixed(_mixed(_mixed(np.array([[seed]])) + _unsigned(users)[:, None]) + _unsigned(items))
    order = np.lexsort((lots, -np.where(filled, scores, 0), ~filled), axis=1)[:, :k]
    best = np.where(filled, items, -1)
    best = np.take_along_axis(best, order, 1).astype(np.int32)
    return np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=-1)


def coverage(lists: np.ndarray, items: int) -> float:
    """Share of the catalogue's `items` items that are in any list (Ge et al., RecSys 2010).

    More users cover more, so only rows with the same users compare.
    """
    return len(np.unique(lists[lists > 0])) / items


def novelty(lists: np.ndarray, facts: ItemFacts) -> np.ndarray:
    """Mean self-information of each list's items in bits [U'] (Zhou et al., PNAS 2010).

    An item that k of U training users have carries log2(U / k) bits: what one learns on hearing
    that somebody has it. One that nobody has counts as if one user had it. An empty list has 0.
    """
    bits = np.log2(facts.users) - np.log2(np.maximum(facts.holders, 1))
    shown = lists > 0
    return (bits[lists] * shown).sum(1) / np.maximum(shown.sum(1), 1)


def diversity(lists: np.ndarray, keywords: Sequence[Sequence[str]]) -> np.ndarray:
    """Mean Jaccard distance of a list's pairs of items [U'], from 0 (all alike) to 1.

    Intra-list diversity (Ziegler et al., WWW 2005), with 1 - |A and B| / |A or B| of the items'
    keywords as the distance. Two items without keywords are alike, and one without is as far as can
    be from one with. A list of fewer than two items has 0.

    Args:
      lists: [U', K].
      keywords: [I+1].
    """
    words = _word_matrix(keywords)
    size = np.array([len(set(of_item)) for of_item in keywords])
    shown = lists > 0
    total = np.zeros(len(lists))
    for second in range(1, lists.shape[1]):
        for first in range(second):
            a, b = lists[:, first], lists[:, second]
            both = words[a].multiply(words[b]).sum(1)
            either = size[a] + size[b] - both
            distance = np.where(either > 0, 1 - both / np.maximum(either, 1), 0.0)
            total += distance * (shown[:, first] & shown[:, second])
    number = shown.sum(1)
    return total / np.maximum(number * (number - 1) // 2, 1)


def _word_matrix(keywords: Sequence[Sequence[str]]) -> sp.csr_array:
    """[I+1, words] 1 where an item has a keyword."""
    columns = {word: place for place, word in enumerate(sorted(set().union(*keywords)))}
    entries = [(row, columns[word]) for row, words in enumerate(keywords) for word in set(words)]
    rows, cols = np.array(entries, int).reshape(-1, 2).T
    shape = (len(keywords), max(1, len(columns)))
    return sp.csr_array((np.ones(len(rows), np.int32), (rows, cols)), shape=shape)


def _unsigned(ids: np.ndarray) -> np.ndarray:
    return ids.astype(np.int64).astype(np.uint64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that looks random: the finaliser of SplitMix64.

    Steele, Lea & Flood, OOPSLA 2014; it starts from its additive constant, so that 0 moves too.
    """
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
