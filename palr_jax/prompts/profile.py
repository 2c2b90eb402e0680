"""The user profile: the two keywords that describe a history best (section 1 of the paper)."""

from collections import defaultdict
from collections.abc import Sequence

KEYWORDS = 2  # the paper's profile names two


def count_profile(
    history: Sequence[int], keywords: Sequence[tuple[str, ...]], n: int = KEYWORDS
) -> tuple[str, ...]:
    """The n keywords of largest weight in a history, most important first.

    Every item has one vote, shared equally by its keywords, so that an item with six genres does
    not outvote three items with one. Equal weights go to the keyword that was seen last.

    Args:
      history: item ids, oldest first; nothing from the target on may be among them.
      keywords: the keywords of each item id.
      n: how many to return, fewer if the history has fewer.
    """
    weight: dict[str, float] = defaultdict(float)
    last_seen: dict[str, int] = {}
    for position, item in enumerate(history):
        for keyword in keywords[item]:
            weight[keyword] += 1.0 / len(keywords[item])
            last_seen[keyword] = position
    # Rounding keeps sums that are equal on paper equal here; the name settles what is left.
    ranked = sorted(weight, key=lambda k: (-round(weight[k], 9), -last_seen[k], k))
    return tuple(ranked[:n])
