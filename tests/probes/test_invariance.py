"""Whether a broken scorer is found out."""

import numpy as np
import pytest

from palr_jax.config import default_config
from palr_jax.probes.invariance import BITS, TOLERANCE, TOLERANCE_BF16, compare, table, tolerance

ONES = np.ones((2, 3))
BASE = np.array([[-1.5, -2.25, -np.inf], [-60.0, -3.0, -4.0]], np.float32)


def test_differences_are_the_largest_of_all_sums():
    other = BASE + np.float32(0.5) * (BASE == -60)
    change = compare('x', BASE, other, ONES, TOLERANCE)
    assert change.difference == 0.5
    assert not change.bit_equal
    assert not change.passed


def test_rounding_passes_where_rounding_is_allowed():
    """The next float32 after 60 is 2^-18 away."""
    other = np.where(BASE == -60, np.nextafter(BASE, np.float32(0)), BASE)
    change = compare('x', BASE, other, ONES, TOLERANCE)
    assert change.difference == 2**-18
    assert change.passed
    assert not compare('x', BASE, other, ONES, BITS).passed


def test_a_title_of_ten_tokens_may_differ_tenfold():
    other = BASE + np.float32(0.25) * (BASE == -60)
    sizes = np.where(BASE == -60, 10.0, 1.0)
    assert not compare('x', BASE, other, ONES, TOLERANCE_BF16).passed
    change = compare('x', BASE, other, sizes, TOLERANCE_BF16)
    assert change.difference == 0.025
    assert change.passed


def test_equal_bits_pass():
    change = compare('x', BASE, BASE.copy(), ONES, BITS)
    assert (change.difference, change.bit_equal, change.passed) == (0, True, True)


@pytest.mark.parametrize(
    ('dtype', 'precision', 'backend', 'allowed'),
    [
        ('float32', 'highest', 'tpu', TOLERANCE),
        ('float32', 'high', 'cpu', TOLERANCE),
        ('float32', 'default', 'cpu', TOLERANCE_BF16),
        ('float32', 'high', 'tpu', TOLERANCE_BF16),
        ('float32', 'default', 'tpu', TOLERANCE_BF16),
        ('bfloat16', 'highest', 'cpu', TOLERANCE_BF16),
    ],
)
def test_the_tolerance_follows_the_arithmetic(dtype, precision, backend, allowed):
    config = default_config()
    config.model.dtype, config.model.matmul_precision = dtype, precision
    unit = 'sum' if allowed == TOLERANCE else 'token'
    assert tolerance(config, backend) == (unit, allowed)


def test_the_table_fits_a_terminal():
    change = {'difference': 1e-5, 'bit_equal': False, 'tolerance': 1e-4, 'passed': True}
    found = {
        'system': 'llm_zero_shot',
        'dtype': 'bfloat16',
        'users': 8,
        'candidates': 50,
        'unit': 'token',
        'changes': [
            {'name': 'padding: up to 4 shapes, not 1', **change},
            {'name': 'order', **change, 'tolerance': BITS, 'passed': False},
        ],
    }
    text = table(found)
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[2].endswith('1e-04  differ  PASS')
    assert text.splitlines()[3].endswith('no bit  differ  FAIL')
