"""Candidates for fine-tuning, by retrievers that have not seen what they are asked.

A retriever that was trained on a user's items puts the next of them first: it remembers. A language
model that learns from such lists learns that the first candidate is right. So the users are dealt
into folds, and a fold's candidates come from retrievers that were fitted without its users.
"""

from collections.abc import Sequence

import numpy as np
from absl import logging

from palr_jax.errors import InputError
from palr_jax.retrieval.candidates import Candidates, retrieve
from palr_jax.retrieval.index import build_index
from palr_jax.retrieval.systems import Material, fit_systems, mix_systems


def retrieve_out_of_fold(
    material: Material, users: np.ndarray, pasts: Sequence[np.ndarray], folds: int, k: int
) -> Candidates:
    """The k best items after each past that the past does not hold.

    Args:
      material: of the retrievers; each fold's are fitted in a folder of its own, `fold_0` ….
      users: [E] the dense user of each past; each user's pasts are in one fold.
      pasts: E arrays of item ids, oldest first.
      folds: into how many the users are dealt, by the seed.
      k: items.

    Returns:
      Candidates [E, k] in the order of `pasts`.

    Raises:
      InputError: a fold holds all users with training items, so nobody is left to learn from.
    """
    split = material.split
    dealt = np.random.default_rng([material.seed, 7]).permutation(np.unique(users))
    items = np.full((len(users), k), -1, np.int32)
    scores = np.full((len(users), k), -np.inf, np.float32)
    for fold, held in enumerate(np.array_split(dealt, folds)):
        rows = np.flatnonzero(np.isin(users, held))
        if not len(rows):
            continue
        others = split.without(held)
        if not others.train_end.any():
            raise InputError(
                f'tasks.folds is {folds}: a fold holds all {len(held)} users with training items, '
                'and no retriever can learn without them; allowed: more folds, or a smaller '
                'tasks.users.'
            )
        logging.info('fold %d of %d: retrievers without %d users', fold + 1, folds, len(held))
        part = material._replace(split=others, folder=material.folder / f'fold_{fold}')
        mixed = mix_systems(fit_systems(part), others, True, part.folder)
        histories = [pasts[row] for row in rows]
        index = build_index(mixed.item_vectors, 'exact')
        found = retrieve(index, mixed.user_vectors(histories), histories, k, True)
        items[rows], scores[rows] = found.items, found.scores
    return Candidates(np.asarray(users), items, scores)
