"""Matrix products in as many passes of bfloat16 as the precision says, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palr_jax.llama.products import dot, einsum, low_rank, product

# Of a product's size: the last bits of one pass, of three, and of float32.
ERRORS = {'default': (1e-4, 6e-3), 'high': (1e-9, 2e-5), 'highest': (0, 1e-6)}


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def error(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize('precision', ERRORS)
def test_the_precision_says_how_exact_a_product_is(precision):
    x, kernel, right = draw((2, 7, 48), (48, 33), (2, 48, 33))
    least, most = ERRORS[precision]
    with jax.default_matmul_precision(precision):
        found = jax.jit(product)(x, kernel)
        transposed = jax.jit(dot, static_argnums=2)(x, kernel.T, 1)
        summed = jax.jit(einsum, static_argnums=0)('...qe,...ev->...qv', x, right)
    expected = x.astype(np.float64) @ kernel.astype(np.float64)
    assert least <= error(found, expected) <= most
    np.testing.assert_allclose(found, transposed, atol=1e-5)
    of_units = precision == 'default'  # three passes are not worth it there
    bounds = ERRORS[precision if of_units else 'highest']
    assert bounds[0] <= error(summed, x.astype(np.float64) @ right.astype(np.float64)) <= bounds[1]


def test_three_passes_keep_what_is_far_below_one(tmp_path):
    """1 + 2^-12 is 1 in bfloat16; the sum of its products with +1 and -1 is not 0."""
    x = np.array([[[1 + 2.0**-12, 1]]], np.float32)
    kernel = np.array([[1], [-1]], np.float32)
    found = {}
    for precision in ERRORS:
        with jax.default_matmul_precision(precision):
            found[precision] = float(jax.jit(product)(x, kernel)[0, 0, 0])
    assert found == {'default': 0, 'high': 2.0**-12, 'highest': 2.0**-12}


@pytest.mark.parametrize('wrong', [np.nan, np.inf])
@pytest.mark.parametrize('precision', ERRORS)
def test_what_is_not_finite_does_not_become_finite(precision, wrong):
    x, kernel = draw((1, 3, 8), (8, 4))
    x[0, 1, 2] = wrong
    with jax.default_matmul_precision(precision):
        found = np.asarray(jax.jit(product)(x, kernel))
    assert not np.isfinite(found[0, 1]).any()
    assert np.isfinite(found[0, [0, 2]]).all()


def test_bfloat16_is_added_up_in_float32_and_rounded_once():
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in draw((2, 7, 512), (512, 33)))
    found = jax.jit(product)(x, kernel)
    assert found.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2.0**-8, atol=1e-4)


@pytest.mark.parametrize(
    ('dtype', 'precision', 'most'),
    [
        ('float32', 'highest', 1e-6),
        ('float32', 'high', 2e-5),
        ('float32', 'default', 1e-2),
        ('bfloat16', 'highest', 1e-2),
    ],
)
def test_gradients(dtype, precision, most):
    """Of sum(y * weight), by the chain rule in float64."""
    x, kernel, a, b, weight = draw((2, 7, 16), (16, 12), (16, 3), (3, 12), (2, 7, 12))
    narrow = [jnp.asarray(value, dtype) for value in (x, kernel, a, b)]
    x, kernel, a, b = (np.asarray(value, np.float64) for value in narrow)

    def loss(x, kernel, a, b):
        y = (product(x, kernel) + low_rank(x, a, b)).astype(jnp.float32)
        scores = einsum('...qe,...te->...qt', y, jnp.asarray(weight))
        return jnp.sum(scores)

    with jax.default_matmul_precision(precision):
        found = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*narrow)
    y_bar = np.broadcast_to(weight.astype(np.float64).sum(1, keepdims=True), weight.shape)
    expected = (
        y_bar @ kernel.T + y_bar @ b.T @ a.T,
        np.einsum('btd,btf->df', x, y_bar),
        np.einsum('btd,btf,rf->dr', x, y_bar, b),
        np.einsum('btd,dr,btf->rf', x, a, y_bar),
    )
    for one, other in zip(found, expected):
        assert one.dtype == dtype
        assert error(one, other) < most


def test_gradients_of_both_factors_of_an_einsum():
    query, key, out_bar = draw((2, 5, 8), (2, 6, 8), (2, 5, 6))
    with jax.default_matmul_precision('default'):
        _, pull = jax.vjp(lambda q, k: einsum('...qe,...te->...qt', q, k), query, key)
        found = pull(jnp.asarray(out_bar))
    wide = [value.astype(np.float64) for value in (query, key, out_bar)]
    assert error(found[0], np.einsum('bqt,bte->bqe', wide[2], wide[1])) < 1e-2
    assert error(found[1], np.einsum('bqt,bqe->bte', wide[2], wide[0])) < 1e-6


def lowered(platform, dtype, precision):
    x, kernel = (jnp.asarray(value, dtype) for value in draw((2, 8, 16), (16, 8)))
    with jax.default_matmul_precision(precision):
        traced = jax.jit(product).trace(x, kernel)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_is_asked_for_the_product_itself():
    """It has units for it: neither halves nor a rounding of its own are made for it."""
    narrow = lowered('tpu', 'bfloat16', 'highest')
    assert '-> tensor<2x8x8xbf16>' in narrow
    assert 'f32' not in narrow
    three = lowered('tpu', 'float32', 'high')
    assert three.count('stablehlo.dot_general') == 1
    assert 'precision = [HIGH, HIGH]' in three
    assert 'bf16' not in three


def test_a_cpu_is_asked_for_products_of_bfloat16_in_float32():
    assert lowered('cpu', 'float32', 'high').count('-> tensor<2x8x8xf32>') >= 3
    for dtype, precision in (('float32', 'default'), ('bfloat16', 'highest')):
        text = lowered('cpu', dtype, precision)
        assert '(tensor<2x8x16xbf16>, tensor<16x8xbf16>) -> tensor<2x8x8xf32>' in text
