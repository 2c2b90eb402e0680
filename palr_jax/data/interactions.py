"""Interactions and the catalogue: the one form that every source is brought into.

A parser hands over a `RawLog` in file order. `build` sorts it and drops repeated pairs, `k_core`
filters it, `build_catalogue` describes the items that are left. Everything is vectorised over the
rows; a log of 20 million rows needs about 2 GiB.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

TIE_RULE = 'file order: a stable sort by time keeps events of one second as they stand in the file'
# Texts that exports of data frames write where there is no value.
_NOTHING = {'', 'nan', 'NaN', 'None', 'null', 'NULL', '<NA>'}
# Not genres, but marks that none is known.
_NO_KEYWORDS = {'', 'unknown', '(no genres listed)'}
# The last (YYYY) of a title; further groups may follow it: 'Ghost Town (1995) (V)'.
_YEAR = re.compile(r'\(((?:18|19|20)\d{2})\)(?:\s*\([^()]*\))*\s*$')
_LATEST = 1e11  # seconds, in the year 5138; larger times are milliseconds
_INTEGER = re.compile(r'-?[0-9]+')


class Item(NamedTuple):
    """What a source says about one item."""

    title: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class RawLog:
    """What a parser hands over: N rows in file order, and what is known about the items."""

    users: np.ndarray  # [N] integer codes into user_ids
    items: np.ndarray  # [N] integer codes into item_ids
    times: np.ndarray  # [N] seconds or milliseconds, integer or float
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    metadata: Mapping[str, Item]  # by raw item id; may lack some and may know more
    files: tuple[str, ...]  # that were read
    # What to show for an item without a title, by raw item id; may lack some.
    placeholders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Interactions:
    """N events of U users with I items.

    The rows are sorted by user, then by time; events of one second keep the order of the file. A
    (user, item) pair occurs once, with its first event. Dense ids follow the natural order of the
    raw ids (numeric if all are integers), so the order of the users in the file does not matter.
    """

    users: np.ndarray  # [N] int32, 0..U-1
    items: np.ndarray  # [N] int32, 1..I
    times: np.ndarray  # [N] int64, seconds
    user_ids: tuple[str, ...]  # raw ids [U]


@dataclass(frozen=True)
class Catalogue:
    """The items by dense id 0..I; row 0 is padding and holds empty values."""

    raw_ids: tuple[str, ...]
    titles: tuple[str, ...]  # as shown in prompts: 'Heat (1995)'
    years: tuple[int | None, ...]
    keywords: tuple[tuple[str, ...], ...]  # genres or categories

    @property
    def items(self) -> int:
        """I, without the padding."""
        return len(self.raw_ids) - 1


@dataclass(frozen=True)
class Source:
    """A prepared data set."""

    interactions: Interactions
    catalogue: Catalogue
    record: dict[str, Any]  # the `dataset` part of the report; JSON-able


def natural_order(ids: Sequence[str]) -> np.ndarray:
    """Positions that sort `ids`: by number if all are integers, else by text. Returns [len]."""
    if all(map(_INTEGER.fullmatch, ids)):
        order = sorted(range(len(ids)), key=lambda n: (int(ids[n]), ids[n]))
    else:
        order = sorted(range(len(ids)), key=ids.__getitem__)
    return np.array(order, dtype=np.int64)


def build(log: RawLog) -> tuple[Interactions, tuple[str, ...], int]:
    """Sorts a log and keeps the first event of each (user, item) pair.

    Times in milliseconds become seconds, after they have ordered the events.

    Returns:
      The interactions, the raw ids of items 1..I, and the number of repeated pairs dropped.
    """
    user_ids, users = _in_natural_order(log.user_ids, log.users)
    item_ids, items = _in_natural_order(log.item_ids, log.items)
    order = np.lexsort((log.times, users))  # stable, so ties keep the file's order
    users, items, times = users[order], items[order] + 1, log.times[order]
    del order
    if len(times) and np.median(times) > _LATEST:
        times = times / 1000
    pairs = users.astype(np.int64) * (len(item_ids) + 1) + items
    first = np.unique(pairs, return_index=True)[1]
    first.sort()
    interactions = Interactions(
        users[first], items[first], np.floor(times[first]).astype(np.int64), user_ids
    )
    return interactions, item_ids, len(pairs) - len(first)


def _in_natural_order(
    ids: tuple[str, ...], codes: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    order = natural_order(ids)
    rank = np.empty(len(ids), np.int32)
    rank[order] = np.arange(len(ids), dtype=np.int32)
    return tuple(ids[n] for n in order), rank[codes]


def k_core(
    interactions: Interactions, k: int
) -> tuple[Interactions, np.ndarray, list[dict[str, int]]]:
    """Drops users and items with fewer than `k` events until none is left.

    One round is not enough: an item that goes can leave a user below `k`. Users and items are
    judged by the counts at the start of a round; the fixed point does not depend on that.

    Returns:
      The interactions with dense ids 0..U'-1 and 1..I', the old ids of the items that are kept
      [I'], and the counts {'users', 'items', 'interactions'} after each round that dropped
      something.
    """
    users, items, times = interactions.users, interactions.items, interactions.times
    rounds = []
    while True:
        of_user, of_item = np.bincount(users), np.bincount(items)
        keep = (of_user[users] >= k) & (of_item[items] >= k)
        if keep.all():
            break
        users, items, times = users[keep], items[keep], times[keep]
        rounds.append(_counts(users, items))
    kept_users, users = np.unique(users, return_inverse=True)
    kept_items, items = np.unique(items, return_inverse=True)
    kept = Interactions(
        users.astype(np.int32),
        items.astype(np.int32) + 1,
        times,
        tuple(interactions.user_ids[u] for u in kept_users),
    )
    return kept, kept_items, rounds


def counts(interactions: Interactions) -> dict[str, int]:
    """Numbers of users and items that have events, and of events."""
    return _counts(interactions.users, interactions.items)


def _counts(users: np.ndarray, items: np.ndarray) -> dict[str, int]:
    return {
        'users': int(np.count_nonzero(np.bincount(users))),
        'items': int(np.count_nonzero(np.bincount(items))),
        'interactions': len(users),
    }


def is_missing(text: str) -> bool:
    """Whether a text is nothing, or what exports of data frames write for nothing."""
    return text.strip() in _NOTHING


def build_catalogue(
    raw_ids: Iterable[str], metadata: Mapping[str, Item], placeholders: Mapping[str, str]
) -> tuple[Catalogue, int]:
    """Describes the items `raw_ids`, in this order, as items 1..I.

    An item without a title gets its placeholder, or else 'Untitled item RAW_ID': it keeps its
    place in the counts, and no empty text, 'nan' or 'None' reaches a prompt. Titles are trimmed
    and otherwise left alone.

    Returns:
      The catalogue and the number of items that got the placeholder.
    """
    ids, titles, years, keywords = [''], [''], [None], [()]
    untitled = 0
    for raw_id in raw_ids:
        title, words = metadata.get(raw_id, Item('', ()))
        title = title.strip()
        if is_missing(title):
            title = placeholders.get(raw_id, f'Untitled item {raw_id}')
            untitled += 1
        ids.append(raw_id)
        titles.append(title)
        years.append(year_of(title))
        keywords.append(tuple(w for w in dict.fromkeys(words) if w not in _NO_KEYWORDS))
    return Catalogue(tuple(ids), tuple(titles), tuple(years), tuple(keywords)), untitled


def year_of(title: str) -> int | None:
    """The year in the parenthesis that ends a title; None if there is none.

    >>> year_of('2001: A Space Odyssey (1968)')
    1968
    """
    found = _YEAR.search(title)
    return int(found[1]) if found else None
