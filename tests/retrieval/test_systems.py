"""Retrievers by name: fitted, weighed on validation users, and read back as they were."""

import numpy as np
import pytest

from palr_jax.data import Catalogue, validation_halves
from palr_jax.errors import InputError
from palr_jax.retrieval import Material, Texts, fit_popularity, fit_systems, load_mix, mix_systems
from palr_jax.retrieval.cold import cold_item_vectors
from palr_jax.retrieval.mix import choose_weights, load_weights
from palr_jax.retrieval.profile import whiten
from palr_jax.retrieval.systems import RIDGE


def material(split, settings, folder, items=40, texts=None):
    catalogue = Catalogue(
        raw_ids=('', *map(str, range(1, items + 1))),
        titles=('', *(f'Item {i}' for i in range(1, items + 1))),
        years=(None,) * (items + 1),
        keywords=((), *(('even',) if i % 2 == 0 else () for i in range(1, items + 1))),
    )
    return Material(split, catalogue, settings, 0, folder, texts)


def texts_of(items, fingerprint='abc'):
    """Texts as a model might see them, and a note of whether anybody asked."""
    asked = []

    def vectors():
        asked.append(True)
        return np.random.default_rng(0).normal(size=(items, 6))

    def profiles(histories):
        return [('even',)] * len(histories)

    return Texts(vectors, profiles, lambda: fingerprint), asked


@pytest.fixture
def both(settings):
    settings.systems = ('sequence', 'covisitation')
    settings.epochs = 2
    return settings


def test_a_mix_is_read_back_as_it_was(chain, both, tmp_path):
    fitted = fit_systems(material(chain, both, tmp_path))
    mixed = mix_systems(fitted, chain, True, tmp_path)
    assert list(fitted) == ['sequence', 'covisitation']
    again = load_mix(tmp_path)
    assert again.weights == mixed.weights
    histories = [np.array([3, 4, 5]), np.zeros(0, int)]
    np.testing.assert_array_equal(again.user_vectors(histories), mixed.user_vectors(histories))
    np.testing.assert_array_equal(again.item_vectors, mixed.item_vectors)


def test_the_weights_come_from_the_users_that_the_split_leaves(chain, both, tmp_path):
    fitted = fit_systems(material(chain, both, tmp_path))
    half, _ = validation_halves(chain, 0)
    expected, _ = choose_weights(list(fitted.values()), chain, np.sort(half), True)
    assert mix_systems(fitted, chain.validating(half), True, tmp_path).weights == expected


def test_one_retriever_is_itself(chain, settings, tmp_path):
    settings.epochs = 1
    fitted = fit_systems(material(chain, settings, tmp_path))
    mixed = mix_systems(fitted, chain, True, tmp_path)
    assert load_weights(tmp_path) == {'sequence': 1.0}
    assert mixed.item_vectors is fitted['sequence'].item_vectors


def test_nobody_to_validate_on(split_of, both, tmp_path):
    both.epochs = 1
    split = split_of([[1, 2], [2, 3], [4]])
    mixed = mix_systems(fit_systems(material(split, both, tmp_path, 4)), split, True, tmp_path)
    assert mixed.weights == (1.0, 1.0)


def test_a_missing_file_is_named(chain, both, tmp_path):
    mix_systems(fit_systems(material(chain, both, tmp_path)), chain, True, tmp_path)
    (tmp_path / 'covisitation.npz').unlink()
    with pytest.raises(InputError, match=r'covisitation\.npz'):
        load_mix(tmp_path)


def test_texts_are_asked_for_only_where_they_are_read(chain, both, tmp_path):
    texts, asked = texts_of(40)
    fit_systems(material(chain, both, tmp_path, texts=texts))
    assert not asked
    both.systems = ('covisitation', 'profile')
    fitted = fit_systems(material(chain, both, tmp_path, texts=texts))
    assert asked
    mixed = mix_systems(fitted, chain, True, tmp_path)
    again, histories = load_mix(tmp_path, texts), [np.array([3, 4, 5])]
    np.testing.assert_array_equal(again.user_vectors(histories), mixed.user_vectors(histories))
    with pytest.raises(InputError, match=r'profile\.npz: these vectors are of the model abc'):
        load_mix(tmp_path, texts_of(40, 'other')[0])


def test_cold_items_get_vectors_from_their_texts(chain, settings, tmp_path):
    """Three items of the catalogue are in no history; the others keep theirs to the bit."""
    settings.epochs = 2
    plain = fit_systems(material(chain, settings, tmp_path / 'plain', 43))['sequence']
    settings.cold_items = True
    texts, _ = texts_of(43)
    told = fit_systems(material(chain, settings, tmp_path / 'told', 43, texts))['sequence']
    warm = fit_popularity(chain, 43).counts > 0
    assert np.flatnonzero(~warm).tolist() == [40, 41, 42]
    np.testing.assert_array_equal(told.item_vectors[warm], plain.item_vectors[warm])
    expected = cold_item_vectors(plain.item_vectors, whiten(texts.vectors()), warm, RIDGE)
    np.testing.assert_array_equal(told.item_vectors, expected)
    assert np.abs(told.item_vectors[40:] - plain.item_vectors[40:]).max() > 0.1
    # A history that holds a new item reads its vector, too.
    history = [np.array([1, 41])]
    assert np.abs(told.user_vectors(history) - plain.user_vectors(history)).max() > 1e-3
