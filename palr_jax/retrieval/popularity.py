"""Popularity: every user gets the items that most training events name."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from palr_jax.data.splits import Split


@dataclass(frozen=True)
class Popularity:
    """As vectors of width 1 it goes through the same index, retrieval and ranks as any retriever.

    Attributes:
      counts: [I] float32 training events of each item, item id 1 first (exact below 2**24).
    """

    counts: np.ndarray

    @property
    def item_vectors(self) -> np.ndarray:
        """[I, 1]."""
        return self.counts[:, None]

    def user_vectors(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """[U', 1] ones, whatever the histories."""
        return np.ones((len(histories), 1), np.float32)


def fit_popularity(split: Split, items: int) -> Popularity:
    """Counts the training events of the `items` items of a catalogue."""
    counts = np.bincount(split.items[split.train_events()], minlength=items + 1)
    return Popularity(counts[1:].astype(np.float32))
