"""Retrievers by name: fitted, weighed on validation users, and read back as they were."""

import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.retrieval import fit_systems, load_mix, mix_systems
from palr_jax.retrieval.mix import choose_weights, load_weights


@pytest.fixture
def both(settings):
    settings.systems = ('sequence', 'covisitation')
    settings.covisitation_width = 8
    settings.epochs = 2
    return settings


def test_a_mix_is_read_back_as_it_was(chain, both, tmp_path):
    fitted = fit_systems(chain, 40, both, 0, tmp_path)
    mixed = mix_systems(fitted, chain, True, 0, tmp_path)
    assert list(fitted) == ['sequence', 'covisitation']
    again = load_mix(tmp_path)
    assert again.weights == mixed.weights
    histories = [np.array([3, 4, 5]), np.zeros(0, int)]
    np.testing.assert_array_equal(again.user_vectors(histories), mixed.user_vectors(histories))
    np.testing.assert_array_equal(again.item_vectors, mixed.item_vectors)


def test_the_weights_come_from_half_of_the_validation_users(chain, both, tmp_path):
    """The other half stays free for other choices."""
    fitted = fit_systems(chain, 40, both, 0, tmp_path)
    users = chain.users('valid')
    half = np.sort(np.random.default_rng([0, 6]).permutation(users)[:75])
    assert len(users) == 150
    expected, _ = choose_weights(list(fitted.values()), chain, half, True)
    assert mix_systems(fitted, chain, True, 0, tmp_path).weights == expected


def test_one_retriever_is_itself(chain, settings, tmp_path):
    settings.systems, settings.epochs = ('sequence',), 1
    fitted = fit_systems(chain, 40, settings, 0, tmp_path)
    mixed = mix_systems(fitted, chain, True, 0, tmp_path)
    assert load_weights(tmp_path) == {'sequence': 1.0}
    assert mixed.item_vectors is fitted['sequence'].item_vectors


def test_nobody_to_validate_on(split_of, both, tmp_path):
    both.epochs = 1
    fitted = fit_systems(split_of([[1, 2], [2, 3], [4]]), 4, both, 0, tmp_path)
    mixed = mix_systems(fitted, split_of([[1, 2], [2, 3], [4]]), True, 0, tmp_path)
    assert mixed.weights == (1.0, 1.0)


def test_a_missing_file_is_named(chain, both, tmp_path):
    mix_systems(fit_systems(chain, 40, both, 0, tmp_path), chain, True, 0, tmp_path)
    (tmp_path / 'covisitation.npz').unlink()
    with pytest.raises(InputError, match=r'covisitation\.npz'):
        load_mix(tmp_path)
