"""Intervals and tests against scipy and against arithmetic by hand."""

import numpy as np
import pytest
from scipy import stats

from palr_jax.evaluation import statistics
from palr_jax.evaluation.statistics import (
    bootstrap_interval,
    holm,
    paired_bootstrap_interval,
    randomisation_test,
    smallest_detectable,
)


def two_systems(users=150, seed=0, gain=0.05):
    rng = np.random.default_rng(seed)
    b = rng.choice([0, 0, 0, 0.3, 0.5, 1.0], users)
    return np.clip(b + gain * rng.integers(-1, 3, users), 0, 1), b


def test_bootstrap_agrees_with_scipy():
    values, _ = two_systems()
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method='percentile', rng=np.random.default_rng(1)
    ).confidence_interval
    found = bootstrap_interval(values, resamples=20_000, seed=0)
    np.testing.assert_allclose(found, expected, atol=0.003)


def test_paired_bootstrap_agrees_with_scipy():
    a, b = two_systems()
    expected = stats.bootstrap(
        (a, b),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method='percentile',
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = paired_bootstrap_interval(a, b, resamples=20_000, seed=0)
    np.testing.assert_allclose(found, expected, atol=0.001)


def test_interval_has_the_width_of_the_normal_theory():
    hits = np.zeros(1000)
    hits[:300] = 1
    low, high = bootstrap_interval(hits, resamples=20_000, seed=3)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)  # the binomial standard error
    np.testing.assert_allclose([low, high], [0.3 - half, 0.3 + half], atol=0.0015)


def test_metrics_are_resampled_together():
    a, b = two_systems()
    both = bootstrap_interval(np.stack([a, b], 1), resamples=500, seed=5)
    np.testing.assert_allclose(both[0], bootstrap_interval(a, resamples=500, seed=5))
    np.testing.assert_allclose(both[1], bootstrap_interval(b, resamples=500, seed=5))


@pytest.mark.parametrize(('right', 'of'), [(0, 200), (1, 1), (3, 50), (50, 50), (313, 1000)])
def test_share_interval_agrees_with_scipy(right, of):
    expected = stats.binomtest(right, of).proportion_ci(method='wilson')
    np.testing.assert_allclose(statistics.share_interval(right, of), expected, atol=1e-12)


def test_randomisation_test_agrees_with_scipy():
    for seed in (0, 4, 6):
        a, b = two_systems(users=60, seed=seed)
        a[::2] = b[::2]  # users without a difference
        a[3] = 0
        expected = stats.permutation_test(
            (a - b,),
            np.mean,
            permutation_type='samples',
            n_resamples=20_000,
            rng=np.random.default_rng(1),
        ).pvalue
        assert 0.01 < expected < 0.6
        found = randomisation_test(a, b, resamples=20_000, seed=0)
        assert found == pytest.approx(expected, abs=0.012)


def test_randomisation_test_by_hand():
    """Three equal differences: two of the eight tosses are as extreme, p = 1/4."""
    ones, zeros = np.ones(3), np.zeros(3)
    assert randomisation_test(ones, zeros, resamples=40_000, seed=0) == pytest.approx(
        0.25, abs=0.01
    )
    assert randomisation_test(ones, zeros, resamples=99, seed=4) == randomisation_test(
        zeros, ones, resamples=99, seed=4
    )


def test_p_is_never_zero_and_one_without_a_difference():
    a = np.full(200, 0.7)
    assert randomisation_test(a, np.zeros(200), resamples=999, seed=0) == 1 / 1000
    assert randomisation_test(a, a, resamples=999, seed=0) == 1


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 lifted to the one before."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_the_seed_decides():
    values, other = two_systems()
    first, again, another = (
        bootstrap_interval(values, resamples=200, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != another).any()
    other[::7] += 0.4
    ps = {randomisation_test(values, other, resamples=5000, seed=seed) for seed in (1, 1, 2)}
    assert len(ps) == 2


def test_memory_bound_changes_no_result(monkeypatch):
    a, b = two_systems(users=101)
    before = (
        bootstrap_interval(a, resamples=97, seed=0),
        randomisation_test(a, b, resamples=97, seed=0),
    )
    monkeypatch.setattr(statistics, '_CHUNK', 1000)
    np.testing.assert_array_equal(bootstrap_interval(a, resamples=97, seed=0), before[0])
    assert randomisation_test(a, b, resamples=97, seed=0) == before[1]


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match='finite value'):
        bootstrap_interval(np.array([0.0, np.nan]), resamples=10, seed=0)
    with pytest.raises(ValueError, match='finite value'):
        bootstrap_interval(np.zeros(0), resamples=10, seed=0)
    with pytest.raises(ValueError, match='same users'):
        randomisation_test(np.zeros(3), np.zeros(4), resamples=10, seed=0)


def test_smallest_detectable_by_hand():
    """Differences of +1 and -1, half each: 2.8016 standard errors of sqrt(100 / 99) / 10."""
    a, b = np.tile([1.0, -1.0], 50), np.zeros(100)
    assert smallest_detectable(a, b) == pytest.approx(2.8016 * 0.100504, rel=1e-4)
    assert smallest_detectable(a + 5, b) == pytest.approx(smallest_detectable(a, b))
    assert np.isnan(smallest_detectable(b, b))
    assert np.isnan(smallest_detectable(b[:1], a[:1]))


def test_a_detectable_difference_is_found_8_times_in_10():
    """Users drawn from a population with that true difference, tested as the report tests."""
    a, b = two_systems(users=200, gain=0.1)
    spread = (a - b) - (a - b).mean()
    rng = np.random.default_rng(0)

    def found(difference, trials=400):
        samples = difference + rng.choice(spread, (trials, len(spread)))
        nothing = np.zeros(len(spread))
        ps = [
            randomisation_test(row, nothing, resamples=199, seed=n) for n, row in enumerate(samples)
        ]
        return np.mean(np.array(ps) <= 0.05)

    assert found(smallest_detectable(a, b)) == pytest.approx(0.8, abs=0.05)
    assert found(0.0) == pytest.approx(0.05, abs=0.03)
