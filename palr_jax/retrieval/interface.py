"""What every retriever is once it is fitted: users and items as vectors."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Retriever(Protocol):
    """Scores an item for a user by the dot product of their vectors, so that one index serves all.

    Axes: U' the users at hand, I items, D width (each retriever has its own).
    """

    @property
    def item_vectors(self) -> np.ndarray:
        """[I, D] float32; row 0 is item 1."""

    def user_vectors(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """[U', D] float32 vectors of users who need not have been there when it was fitted.

        Args:
          histories: U' arrays of item ids 1 … I, oldest first; an empty one has the zero vector.
        """
