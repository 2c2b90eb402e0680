"""The splash kernel, interpreted on the CPU, against the softmax that is written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palr_jax.llama import attention, splash
from palr_jax.llama.attention import by_blocks


def value_and_gradients(attend, query, key, value, segments, weight):
    """The outputs of real tokens, and the gradients of their weighted sum."""

    def loss(query, key, value):
        out = attend(query, key, value, segments)
        out = jnp.where((segments > 0)[..., None, None], out, 0)
        return jnp.sum(out * weight), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


def draw(tokens, heads, kv_heads, size):
    """Two rows: two segments and padding, and one segment alone."""
    rng = np.random.default_rng(0)
    query, key, value, weight = (
        jnp.asarray(rng.standard_normal((2, tokens, h, size)), jnp.float32)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    segments = np.ones((2, tokens), np.int32)
    segments[0, 90:], segments[0, tokens - 20 :] = 2, 0
    return query, key, value, jnp.asarray(segments), weight


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(256, 4, 4, 128), (200, 4, 2, 64)])
def test_outputs_and_gradients_equal(shape):
    """Packed rows, a length that is no multiple of 128, and shared key heads."""
    inputs = draw(*shape)
    kernel = functools.partial(splash._on_one_device, interpret=True)
    found, expected = (
        jax.jit(functools.partial(value_and_gradients, attend))(*inputs)
        for attend in (kernel, by_blocks)
    )
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_only_long_rows_ask_for_the_kernel(monkeypatch):
    """And on this platform even they do without it."""
    asked = []

    def kernel(*inputs):
        asked.append(inputs[0].shape)
        return by_blocks(*inputs)

    monkeypatch.setattr(splash, 'attend', kernel)
    monkeypatch.setattr(attention, 'SPLASH_TOKENS', 64)
    for tokens in (63, 64):
        query, key, value, segments, _ = draw(tokens, 2, 2, 8)
        plan = attention.Causal(segments)
        found = jax.jit(lambda *heads, plan=plan: plan(*heads))(query, key, value)
        np.testing.assert_allclose(found, by_blocks(query, key, value, segments), atol=1e-6)
    assert asked == [(2, 64, 2, 8)]


@pytest.mark.parametrize('rows', [1, 2, 4])
def test_rows_that_do_not_divide_the_mesh_are_computed_everywhere(monkeypatch, rows):
    """The kernel is traced on every platform, so a last small batch must not fail anywhere."""
    monkeypatch.setattr(attention, 'SPLASH_TOKENS', 64)
    query, key, value, segments, _ = draw(64, 2, 2, 8)
    query, key, value, segments = (
        jnp.tile(x, (2, *(1,) * (x.ndim - 1)))[:rows] for x in (query, key, value, segments)
    )
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ('data', 'fsdp'), axis_types=auto, devices=jax.devices()[:4])
    expected = by_blocks(query, key, value, segments)
    with jax.set_mesh(mesh):
        plan = attention.Causal(segments)
        found = jax.jit(lambda *heads, plan=plan: plan(*heads))(query, key, value)
    np.testing.assert_allclose(found, expected, atol=1e-6)


PROGRAM = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from palr_jax.llama.attention import Causal

def loss(query, key, value, segments):
    return jnp.sum(Causal(segments)(query, key, value).astype(jnp.float32))

found = {}
for name, shape in (('one', (1, 1, 1)), ('rows', (2, 2, 1)), ('rows and heads', (1, 2, 2))):
    axes = ('data', 'fsdp', 'tensor')
    mesh = jax.sharding.Mesh(
        np.array(chips[: np.prod(shape)]).reshape(shape), axes, axis_types=(AxisType.Auto,) * 3)

    def place(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), *spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = shape[0] * shape[1]
    query = place((rows, 1024, 8, 128), jnp.bfloat16, None, 'tensor')
    key = place((rows, 1024, 2, 128), jnp.bfloat16, None, 'tensor')
    segments = place((rows, 1024), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key, segments)
    compiled = traced.lower(lowering_platforms=('tpu',)).compile()
    text = compiled.as_text()
    found[name] = {
        'kernels': text.count('custom_call_target="tpu_custom_call"'),
        'collectives': re.findall(r'= [^=]*? (all-[a-z]+|collective-[a-z]+)', text),
        'temp': compiled.memory_analysis().temp_size_in_bytes,
    }
report(found)
"""


@pytest.mark.tpu_backend
@pytest.mark.slow
def test_on_a_tpu_the_kernel_is_used_and_its_rows_and_heads_are_divided(tpu_report):
    """Forward, and backward for keys and queries; nothing as large as the logits is stored."""
    report = tpu_report(PROGRAM)
    for found in report.values():
        assert found['kernels'] >= 3
        assert found['collectives'] == []
        assert found['temp'] < 8 * 1024 * 1024 * 2
