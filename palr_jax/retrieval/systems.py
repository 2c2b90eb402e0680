"""The retrievers that a run asks for, by name: fitted, weighed, saved and loaded."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from palr_jax.data import Catalogue
from palr_jax.data.splits import Split
from palr_jax.retrieval import covisitation, mix, profile, retriever, train
from palr_jax.retrieval.cold import cold_item_vectors
from palr_jax.retrieval.interface import Retriever
from palr_jax.retrieval.popularity import fit_popularity
from palr_jax.retrieval.retriever import TrainedRetriever

RIDGE = 1.0  # of the vectors of cold items; from 0.3 to 10 it hardly matters


class Texts(NamedTuple):
    """What the base model makes of texts; a retriever that reads none does not ask for it."""

    vectors: Callable[[], np.ndarray]  # of the items' texts, [I, E]
    profiles: profile.Profiles
    fingerprint: Callable[[], str]  # of the model


class Material(NamedTuple):
    """What retrievers are made from."""

    split: Split
    catalogue: Catalogue
    config: ConfigDict  # config.retrieval
    seed: int
    folder: epath.Path  # of checkpoints, and of what is fitted
    texts: Texts | None = None


class System(NamedTuple):
    """How one kind of retriever is fitted, saved and loaded."""

    fit: Callable[[Material], Any]
    save: Callable[[Any, epath.PathLike], None]
    load: Callable[[epath.PathLike, Texts | None], Any]


def fit_sequence(material: Material) -> TrainedRetriever:
    """SASRec or HSTU; items that no training event names get vectors from their texts if asked."""
    split, catalogue, config, seed, folder, texts = material
    trained = train.train_sasrec(split, catalogue.items, config, seed, folder)
    warm = fit_popularity(split, catalogue.items).counts > 0
    if not config.cold_items or warm.all():
        return trained
    described = profile.whiten(texts.vectors())
    table = cold_item_vectors(trained.item_vectors, described, warm, RIDGE)
    return dataclasses.replace(trained, params=trained.params | {'items': {'embedding': table}})


def fit_covisitation(material: Material) -> covisitation.Covisitation:
    return covisitation.fit_covisitation(
        material.split,
        material.catalogue.items,
        material.config.covisitation_width,
        material.seed,
    )


def fit_profile(material: Material) -> profile.ProfileRetriever:
    return profile.fit_profile(
        material.catalogue,
        material.texts.vectors(),
        material.texts.profiles,
        material.texts.fingerprint(),
        material.config.profile_share,
        material.config.profile_decay,
    )


SYSTEMS = {
    'sequence': System(fit_sequence, retriever.save, lambda folder, _: retriever.load(folder)),
    'covisitation': System(
        fit_covisitation, covisitation.save, lambda folder, _: covisitation.load(folder)
    ),
    'profile': System(
        fit_profile,
        profile.save,
        lambda folder, texts: profile.load(folder, texts.profiles, texts.fingerprint()),
    ),
}


def fit_systems(material: Material) -> dict[str, Retriever]:
    """Fits the retrievers of `config.systems` to the training parts, and saves them.

    Raises:
      InputError: the training data are empty, or a retriever's settings do not fit.
    """
    fitted = {}
    for name in material.config.systems:
        fitted[name] = SYSTEMS[name].fit(material)
        SYSTEMS[name].save(fitted[name], material.folder)
    return fitted


def mix_systems(
    fitted: Mapping[str, Retriever], split: Split, exclude: bool, folder: epath.PathLike
) -> mix.Mix:
    """The fitted retrievers as one, weighed on the validation users of `split`; saved.

    One retriever has no weights to choose. Nor have several where nobody validates: they count
    alike.
    """
    weights = (1.0,) * len(fitted)
    users = split.users('valid')
    if len(fitted) > 1 and len(users):
        weights, _ = mix.choose_weights(list(fitted.values()), split, users, exclude)
    mix.save_weights(dict(zip(fitted, weights)), folder)
    return mix.Mix(tuple(fitted.values()), weights)


def load_mix(folder: epath.PathLike, texts: Texts | None = None) -> mix.Mix:
    """What `mix_systems` made, from its folder.

    Args:
      texts: of the model at hand; only a mix with the profile retriever needs it.

    Raises:
      InputError: a file is missing, damaged or of another format, or of another model.
    """
    weights = mix.load_weights(folder)
    members = tuple(SYSTEMS[name].load(folder, texts) for name in weights)
    return mix.Mix(members, tuple(weights.values()))
