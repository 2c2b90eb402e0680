"""Intervals and tests over users, all seeded.

Users are the independent units: resampling draws users, never single events. Every function starts
its own random stream from the seed, so no result depends on which other systems were measured,
and systems with the same users in the same order are resampled alike.

Axes: U' users, M metrics, N resamples.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import ndtri

CONFIDENCE = 0.95  # of every interval
LEVEL, POWER = 0.05, 0.8  # of the test that `smallest_detectable` speaks of

_CHUNK = 2**22  # numbers drawn at a time: bounds the memory at about 100 MB
_BOOTSTRAP, _SIGNS = 0, 1  # two independent random streams of one seed


def bootstrap_interval(values: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """95 % percentile bootstrap interval of the mean over users (Efron & Tibshirani 1993, ch. 13).

    Args:
      values: [U'] or [U', M], one row a user.
      resamples: sets of U' users drawn with replacement.

    Returns:
      [2] or [M, 2]: lower and upper end.
    """
    values = _checked(values)
    users = len(values)

    def mean_of_draw(rng: np.random.Generator, rows: int) -> np.ndarray:
        drawn = rng.integers(0, users, size=(rows, users))
        drawn += np.arange(rows)[:, None] * users
        times = np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users)
        return times.astype(np.float64) @ values / users

    means = _in_chunks(mean_of_draw, resamples, users, seed, _BOOTSTRAP)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(means, [tail, 1 - tail], axis=0).T


def paired_bootstrap_interval(
    a: np.ndarray, b: np.ndarray, *, resamples: int, seed: int
) -> np.ndarray:
    """95 % interval [2] of mean(a) - mean(b): two systems, [U'] each, same users, same order."""
    return bootstrap_interval(_difference(a, b), resamples=resamples, seed=seed)


def share_interval(right: int, of: int) -> tuple[float, float]:
    """95 % score interval of a share, `right` of `of` >= 1 (Wilson 1927).

    Where none or all are right, draws from them are, too: a bootstrap interval would have no width.
    """
    z = float(ndtri((1 + CONFIDENCE) / 2))
    centre = right + z * z / 2
    half = z * math.sqrt(right * (of - right) / of + z * z / 4)
    return max(0.0, centre - half) / (of + z * z), min(of + z * z, centre + half) / (of + z * z)


def randomisation_test(a: np.ndarray, b: np.ndarray, *, resamples: int, seed: int) -> float:
    """Two-sided p-value of the paired randomisation test (Smucker, Allan & Carterette 2007).

    Under the null hypothesis the two systems are exchangeable for each user, so the sign of each
    user's difference is a coin toss. p = (1 + n) / (1 + resamples), where n counts the tosses
    whose mean difference is at least as far from 0 as the observed one: never 0.

    Args:
      a, b: [U'], two systems on the same users in the same order.
    """
    difference = _difference(a, b)
    # A user without a difference adds nothing under any sign; most users of a ranking are such.
    difference = difference[difference != 0]
    observed = abs(difference.sum())

    def sum_of_tosses(rng: np.random.Generator, rows: int) -> np.ndarray:
        heads = rng.integers(0, 2, size=(rows, len(difference)))
        return (2.0 * heads - 1) @ difference

    sums = _in_chunks(sum_of_tosses, resamples, len(difference), seed, _SIGNS)
    # Sums that are equal on paper differ in their last bits with the order of the addition.
    extreme = np.count_nonzero(np.abs(sums) >= observed * (1 - 1e-9))
    return float(1 + extreme) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) for making all of these tests; keeps their order."""
    tests = len(p_values)
    adjusted = [0.0] * tests
    least = 0.0
    for place, test in enumerate(sorted(range(tests), key=lambda test: p_values[test])):
        least = max(least, min(1.0, (tests - place) * p_values[test]))
        adjusted[test] = least
    return adjusted


def smallest_detectable(a: np.ndarray, b: np.ndarray) -> float:
    """The true mean difference that a paired test of so many such users would find 8 times in 10.

    (z(1 - LEVEL / 2) + z(POWER)) * sd / sqrt(U'), that is 2.80 standard errors of the mean
    difference (Bloom, Evaluation Review 1995): a two-sided test at 5 % without correction for
    further tests, by the normal approximation, with the standard deviation of these users'
    differences. It depends on their spread and number, not on the difference found; a smaller
    difference may be real and yet come out as not significant.

    Args:
      a, b: [U'], two systems on the same users in the same order.

    Returns:
      In the unit of the metric; NaN where no spread can be seen: one user, or one difference.
    """
    difference = _difference(a, b)
    if np.ptp(difference) == 0:
        return float('nan')
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return float((ndtri(1 - LEVEL / 2) + ndtri(POWER)) * error)


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f'one finite value for each of one or more users needed, found {values}')
    return values


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = _checked(a), _checked(b)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f'paired values must be [U] for the same users: {a.shape} and {b.shape}')
    return a - b


def _in_chunks(
    draw: Callable[[np.random.Generator, int], np.ndarray],
    resamples: int,
    width: int,
    seed: int,
    stream: int,
) -> np.ndarray:
    """Concatenates `draw(rng, rows)` until `resamples` rows of `width` numbers were drawn."""
    rng = np.random.default_rng([seed, stream])
    step = max(1, _CHUNK // max(1, width))
    return np.concatenate(
        [draw(rng, min(step, resamples - done)) for done in range(0, resamples, step)]
    )
