"""Popularity: every user gets the items that most training events name.

As vectors of width 1 it goes through the same index, retrieval and ranks as a trained retriever.
"""

import numpy as np

from palr_jax.data.splits import Split


def item_counts(split: Split, items: int) -> np.ndarray:
    """Training events of each item: [I] float32 (exact below 2**24), item id 1 first."""
    train = [split.train(user) for user in range(len(split.train_end))]
    counts = np.bincount(np.concatenate([np.zeros(0, np.int32), *train]), minlength=items + 1)
    return counts[1:].astype(np.float32)


def popularity_queries(users: int) -> np.ndarray:
    """[U', 1] ones: user vectors whose scores with `item_counts(…)[:, None]` are the counts."""
    return np.ones((users, 1), np.float32)
