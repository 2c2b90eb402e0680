"""The retrievers that a run asks for, by name: fitted, weighed, saved and loaded."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from palr_jax.data.splits import Split
from palr_jax.retrieval import covisitation, mix, retriever, train
from palr_jax.retrieval.interface import Retriever


class System(NamedTuple):
    """How one kind of retriever is fitted, saved and loaded."""

    fit: Callable[[Split, int, ConfigDict, int, epath.Path], Any]
    save: Callable[[Any, epath.PathLike], None]
    load: Callable[[epath.PathLike], Any]


SYSTEMS = {
    'sequence': System(train.train_sasrec, retriever.save, retriever.load),
    'covisitation': System(
        lambda split, items, config, seed, folder: covisitation.fit_covisitation(
            split, items, config.covisitation_width, seed
        ),
        covisitation.save,
        covisitation.load,
    ),
}


def fit_systems(
    split: Split, items: int, config: ConfigDict, seed: int, folder: epath.PathLike
) -> dict[str, Retriever]:
    """Fits the retrievers of `config.systems` to the training parts, and saves them in `folder`.

    Raises:
      InputError: the training data are empty, or a retriever's settings do not fit.
    """
    folder, fitted = epath.Path(folder), {}
    for name in config.systems:
        fitted[name] = SYSTEMS[name].fit(split, items, config, seed, folder)
        SYSTEMS[name].save(fitted[name], folder)
    return fitted


def mix_systems(
    fitted: Mapping[str, Retriever],
    split: Split,
    exclude: bool,
    seed: int,
    folder: epath.PathLike,
) -> mix.Mix:
    """The fitted retrievers as one, weighed on a seeded half of the validation users; saved.

    One retriever has no weights to choose. Nor have several where nobody validates: they count
    alike.
    """
    weights = (1.0,) * len(fitted)
    users = split.users('valid')
    if len(fitted) > 1 and len(users):
        half = np.random.default_rng([seed, 6]).permutation(users)[: -(-len(users) // 2)]
        weights, _ = mix.choose_weights(list(fitted.values()), split, np.sort(half), exclude)
    mix.save_weights(dict(zip(fitted, weights)), folder)
    return mix.Mix(tuple(fitted.values()), weights)


def load_mix(folder: epath.PathLike) -> mix.Mix:
    """What `mix_systems` made, from its folder.

    Raises:
      InputError: a file is missing, damaged or of another format.
    """
    weights = mix.load_weights(folder)
    return mix.Mix(tuple(SYSTEMS[name].load(folder) for name in weights), tuple(weights.values()))
