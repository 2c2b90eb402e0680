"""Groups of users: for whom does a system work?

A group's name is 'grouping: group'. The groups of a grouping never overlap, and the rule that makes
them looks at all users of the split, so a sample of the users has the same groups:

* 'fine-tuning: seen users', 'fine-tuning: unseen users': those whose training histories gave
  examples for fine-tuning, and the rest. The paper fine-tunes on a fifth of the users, to show that
  the LLM learns something of use to the unseen. (The retriever trains on all of them.)
* 'history length: 3-9': items before the target. The bounds are the quartiles over all users who
  have a target; users with one length stay together, so there may be fewer than four groups.
* 'target popularity: head', '… middle', '… tail', '… cold': items by their training events, most
  popular first. An item is head while the more popular items have less than a third of all training
  events, middle while they have less than two thirds, and tail after that; so items with the same
  number of events stay together. A cold item has no training event.

Axes: U' evaluated users, I items.
"""

import numpy as np

from palr_jax.data.splits import Part, Split


def user_groups(
    split: Split, part: Part, users: np.ndarray, tuned: np.ndarray | None
) -> dict[str, np.ndarray]:
    """A mask [U'] for each group that has users, as `by_group` takes them; see the top of the file.

    Args:
      split: the histories.
      part: where the targets are, 'valid' or 'test'.
      users: [U'] dense ids of the evaluated users, all with a target there.
      tuned: dense ids of the users who gave fine-tuning examples; None where nothing was
        fine-tuned, which leaves that grouping out.
    """
    users = np.asarray(users)
    if not np.isin(users, split.users(part)).all():
        raise ValueError(f'a user without a {part} target cannot be evaluated')
    groups = {}
    if tuned is not None:
        chosen = np.isin(users, tuned)
        groups = {'fine-tuning: seen users': chosen, 'fine-tuning: unseen users': ~chosen}
    lengths = split.valid_at if part == 'valid' else split.test_at  # what stands before a target
    of_user = lengths[users]
    for low, high in quartiles(lengths[split.users(part)]):
        name = f'history length: {low}-{high}' if low < high else f'history length: {low}'
        groups[name] = (of_user >= low) & (of_user <= high)
    classes = popularity_classes(split)[split.targets(part)[users]]
    for name in ('head', 'middle', 'tail', 'cold'):
        groups[f'target popularity: {name}'] = classes == name
    return {name: mask for name, mask in groups.items() if mask.any()}


def quartiles(values: np.ndarray) -> list[tuple[int, int]]:
    """At most four ranges (lowest, highest value), which part whole numbers by their quartiles."""
    if not len(values):
        return []
    ends = np.unique(np.quantile(values, [0.25, 0.5, 0.75, 1], method='inverted_cdf'))
    within = np.searchsorted(ends, values)
    parts = [values[within == part] for part in range(len(ends))]
    return [(int(part.min()), int(part.max())) for part in parts]


def popularity_classes(split: Split) -> np.ndarray:
    """'head', 'middle', 'tail' or 'cold' for each item [I+1]; row 0 is padding."""
    events = split.items[split.train_events()]
    counts = np.bincount(events, minlength=int(split.items.max(initial=0)) + 1)
    sizes, places, items = np.unique(counts, return_inverse=True, return_counts=True)
    of_size = sizes * items  # events of all items that have so many each
    more_popular = of_size[::-1].cumsum()[::-1] - of_size
    thirds = 3 * more_popular[places]
    conditions = [counts == 0, thirds < len(events), thirds < 2 * len(events)]
    return np.select(conditions, ['cold', 'head', 'middle'], 'tail')
