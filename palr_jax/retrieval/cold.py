"""Vectors of items that no training event names, predicted from their texts.

A trained retriever has learnt to rank such an item below everything, as nobody ever took it. Ridge
regression from text vectors to the trained vectors, fitted on the items that were trained (warm),
says where the item would be if it had been (Gantner et al., ICDM 2010, in closed form).

Axes: I items, D width of the trained vectors, E width of the text vectors.
"""

import numpy as np

from palr_jax.errors import InputError
from palr_jax.retrieval.index import to_vectors


def cold_item_vectors(
    collaborative: np.ndarray, texts: np.ndarray, trained: np.ndarray, ridge: float
) -> np.ndarray:
    """Trained vectors with those of the cold items replaced by predictions.

    A prediction is the mean warm vector plus a deviation. Ridge regression shrinks deviations, so
    cold items would crowd around the mean and be retrieved for nobody, or for everybody; hence all
    are stretched by one factor, until the predicted deviations of the warm items have the median
    length of the real ones. (Their mean square is that of a few popular items: cold items would
    take twice their share of the places.)

    Args:
      collaborative: [I, D] vectors of the trained retriever; those of cold items are not read.
      texts: [I, E] text vectors; their unit does not matter.
      trained: [I] bool, the warm items; at least one.
      ridge: penalty as a multiple of the mean variance of the text vectors' E directions, above 0;
        from 0.3 to 10 it hardly matters.

    Returns:
      [I, D] float32; the rows of warm items are those of `collaborative` to the bit.

    Raises:
      InputError: no item is warm, the ridge is not positive, or a vector is not finite.
    """
    collaborative = np.asarray(collaborative, np.float32)
    texts = to_vectors(texts, 'text vectors').astype(np.float64)
    trained = np.asarray(trained, bool)
    if not len(collaborative) == len(texts) == len(trained):
        raise ValueError(f'{len(collaborative)} vectors, {len(texts)} texts, {len(trained)} flags')
    if not trained.any():
        raise InputError('No item has a training event; vectors of cold items need at least one.')
    if not ridge > 0:
        raise InputError(f'The ridge of cold items is {ridge:g}; allowed: a number above 0.')
    warm = to_vectors(collaborative[trained], 'trained item vectors').astype(np.float64)
    mean, text_mean = warm.mean(0), texts[trained].mean(0)
    deviations, texts = warm - mean, texts - text_mean

    gram = texts[trained].T @ texts[trained]
    scale = np.trace(gram) / len(gram) or 1.0  # texts that are all alike predict the mean
    penalty = ridge * scale * np.eye(len(gram))
    weights = np.linalg.solve(gram + penalty, texts[trained].T @ deviations)  # [E, D]
    predicted = texts @ weights
    size = np.median(np.linalg.norm(predicted[trained], axis=1))
    stretch = np.median(np.linalg.norm(deviations, axis=1)) / size if size else 1.0

    vectors = collaborative.copy()
    vectors[~trained] = (mean + stretch * predicted[~trained]).astype(np.float32)
    return vectors
