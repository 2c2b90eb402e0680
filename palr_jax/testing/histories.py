"""Made-up histories with something to learn, which the made-up data sets share.

The items lie on rings. A user has two favourite rings and mostly takes the next unseen item of the
current one, so the last item says a lot about the next one and popularity says little.
"""

import numpy as np

_MOST_RINGS = 18
_FIRST_SECOND = 880_000_000  # of the events, in the year 1997


def _rings(items: int) -> int:
    return min(_MOST_RINGS, max(2, items // 10))


def ring(index: int, items: int) -> int:
    """The ring of item `index` (0-based) among `items`."""
    return index % _rings(items)


def events(users: int, items: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Rows of (user id, item id, rating, second) in file order; ids count from 1."""
    rng = np.random.default_rng([seed, 2])
    rings = [np.arange(ring, items, _rings(items)) for ring in range(_rings(items))]
    popularity = 1 / np.arange(1, items + 1) ** 0.5
    popularity = rng.permutation(popularity / popularity.sum())
    groups = []
    for user in range(1, users + 1):
        favourites = rng.choice(len(rings), size=2, replace=False)
        longest = max(3, items // 2)
        length = int(rng.integers(min(8, longest), min(24, longest), endpoint=True))
        history = _history(rng, [rings[f] for f in favourites], popularity, length)
        second = _FIRST_SECOND + int(rng.integers(10_000_000))
        group: list[tuple[int, int, int, int]] = []
        for item in history:
            if group and rng.random() < 0.6:
                groups.append(group)
                group = []
                second += int(rng.integers(1, 90))
            group.append((user, int(item) + 1, int(rng.integers(1, 6)), second))
        groups.append(group)
    # Whole groups move: within one second the order in the file is the order of the events.
    return [row for index in rng.permutation(len(groups)) for row in groups[index]]


def _history(
    rng: np.random.Generator, rings: list[np.ndarray], popularity: np.ndarray, length: int
) -> list[int]:
    """`length` different items (0-based), most of them the next unseen one of a ring."""
    seen: list[int] = []
    ring, position = rings[0], int(rng.integers(len(rings[0])))
    while len(seen) < length:
        draw = rng.random()
        if draw < 0.08:
            item = int(rng.choice(len(popularity), p=popularity))
            if item not in seen:
                seen.append(item)
            continue
        unseen = [r for r in rings if not set(r.tolist()) <= set(seen)]
        if not unseen:
            rings = [np.arange(len(popularity))]
            continue
        if draw < 0.2 or not any(ring is r for r in unseen):
            ring = unseen[int(rng.integers(len(unseen)))]
            position = int(rng.integers(len(ring)))
        while int(ring[position % len(ring)]) in seen:
            position += 1
        seen.append(int(ring[position % len(ring)]))
    return seen
