"""Vectors of items without training events, predicted from their texts."""

import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.retrieval.candidates import target_ranks
from palr_jax.retrieval.cold import cold_item_vectors


def test_one_direction_by_hand():
    """Texts 0, 2, 4 and vectors 1, 2, 3 (warm): slope 4 / (8 + 8) with a ridge of one variance.

    Deviations of the warm texts are -2, 0, 2 and of the vectors -1, 0, 1: x'x = 8, x'y = 4. The
    predictions of the warm are -1/2, 0, 1/2; the median length of the real deviations is 1, that of
    the predicted 1/2, so they are stretched by 2. The cold text 3 deviates by 1: 2 + 2 * 1/4.
    """
    texts = np.array([[0.0], [2], [4], [3]])
    vectors = np.array([[1.0], [2], [3], [-99]])
    trained = np.array([True, True, True, False])
    # Medians of (1, 0, 1) and of (1/2, 0, 1/2).
    np.testing.assert_allclose(
        cold_item_vectors(vectors, texts, trained, ridge=1)[3], [2.5], rtol=1e-6
    )


@pytest.fixture(scope='module')
def related():
    """(vectors, texts, trained): 400 items whose texts are a noisy turn of their vectors."""
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((400, 16)) * 3 + 1).astype(np.float32)
    turn = rng.standard_normal((16, 40))
    texts = vectors @ turn + 4 * rng.standard_normal((400, 40))
    trained = rng.random(400) > 0.1
    spoilt = np.where(trained[:, None], vectors, -5).astype(np.float32)
    return vectors, spoilt, texts, trained


def test_warm_vectors_stay_to_the_bit_and_cold_ones_are_not_read(related):
    _, spoilt, texts, trained = related
    found = cold_item_vectors(spoilt, texts, trained, ridge=1)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[trained], spoilt[trained])
    unknown = np.where(trained[:, None], spoilt, np.nan)
    np.testing.assert_array_equal(cold_item_vectors(unknown, texts, trained, ridge=1), found)
    everything = cold_item_vectors(spoilt, texts, np.ones(400, bool), ridge=1)
    np.testing.assert_array_equal(everything, spoilt)


def test_ridge_regression_is_least_squares_with_penalty_rows(related):
    """Up to the stretch: rows sqrt(penalty) * identity with target 0, by LAPACK's least squares."""
    _, spoilt, texts, trained = related
    x, y = texts[trained] - texts[trained].mean(0), spoilt[trained] - spoilt[trained].mean(0)
    penalty = 0.5 * (x**2).sum() / 40
    rows = np.concatenate([x, np.sqrt(penalty) * np.eye(40)])
    weights = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((40, 16))]))[0]
    expected = (texts[~trained] - texts[trained].mean(0)) @ weights
    found = cold_item_vectors(spoilt, texts, trained, ridge=0.5)[~trained] - spoilt[trained].mean(0)
    stretch = np.median(np.linalg.norm(y, axis=1)) / np.median(np.linalg.norm(x @ weights, axis=1))
    np.testing.assert_allclose(found, stretch * expected, rtol=1e-3, atol=1e-4)


def test_cold_vectors_are_as_long_as_warm_ones(related):
    """With any ridge: a strong one would leave the bare mean, which everybody or nobody likes."""
    vectors, spoilt, texts, trained = related
    mean = vectors[trained].mean(0)
    usual = np.median(np.linalg.norm(vectors[trained] - mean, axis=1))
    for ridge in (0.01, 1, 100):
        found = cold_item_vectors(spoilt, texts, trained, ridge)[~trained]
        assert np.median(np.linalg.norm(found - mean, axis=1)) == pytest.approx(usual, rel=0.15)


def test_a_cold_target_is_found_where_text_tells(related):
    """Users like what is near an item; the cold targets come far above chance, and the same vectors
    predicted from unrelated texts do not. Warm and cold items share the upper places."""
    vectors, spoilt, texts, trained = related
    cold = np.flatnonzero(~trained)
    rng = np.random.default_rng(1)
    queries = vectors[cold] - vectors.mean(0) + 0.5 * rng.standard_normal((len(cold), 16))

    def places(item_vectors):
        nothing = [np.zeros(0, int)] * len(cold)
        return target_ranks(queries, item_vectors, cold + 1, nothing, exclude=True).greater

    predicted = cold_item_vectors(spoilt, texts, trained, ridge=1)
    assert np.median(places(predicted)) < 10
    assert np.median(places(spoilt)) > 100
    shuffled = cold_item_vectors(spoilt, rng.permutation(texts), trained, ridge=1)
    assert 100 < np.median(places(shuffled)) < 300

    scores = rng.standard_normal((500, 16)) @ predicted.T
    upper = np.argsort(-scores)[:, :40]
    assert 0.5 * len(cold) / 400 < np.isin(upper, cold).mean() < 2 * len(cold) / 400


def test_texts_that_are_all_alike_give_the_mean():
    found = cold_item_vectors(
        np.array([[1.0, 0], [3, 0], [9, 9]]), np.ones((3, 4)), np.array([True, True, False]), 1
    )
    np.testing.assert_array_equal(found[2], [2, 0])


def test_bad_input_is_named():
    vectors, texts = np.ones((2, 3)), np.ones((2, 2))
    with pytest.raises(InputError, match='No item has a training event'):
        cold_item_vectors(vectors, texts, np.zeros(2, bool), 1)
    with pytest.raises(InputError, match='ridge of cold items is 0; allowed: a number above 0'):
        cold_item_vectors(vectors, texts, np.ones(2, bool), 0)
    with pytest.raises(InputError, match='text vectors hold a value that is NaN'):
        cold_item_vectors(vectors, texts * np.nan, np.ones(2, bool), 1)
    with pytest.raises(InputError, match='trained item vectors hold a value that is NaN'):
        cold_item_vectors(vectors * np.nan, texts, np.ones(2, bool), 1)
