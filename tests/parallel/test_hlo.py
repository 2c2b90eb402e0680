"""Work with loops multiplied out, and communication, against arithmetic by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from palr_jax.parallel import hlo
from palr_jax.parallel.mesh import make_mesh


def test_loop_bodies_are_multiplied_out():
    """A loop of 5 around a loop of 3 products of 64 x 64: 15 of them, and one product outside."""

    def inner(x, kernel):
        return jnp.tanh(x @ kernel), None

    def outer(x, kernels):
        return jax.lax.scan(inner, x, kernels)[0], None

    def program(x, kernels):
        return jax.lax.scan(outer, x, kernels)[0] @ x

    compiled = jax.jit(program).lower(jnp.ones((64, 64)), jnp.ones((5, 3, 64, 64))).compile()
    product = 2 * 64**3
    # Elementwise work comes on top: 64 x 64 numbers, 15 times.
    assert hlo.work(compiled.as_text())['flops'] == pytest.approx(16 * product, rel=0.02)
    assert compiled.cost_analysis()['flops'] < 4 * product
    parts = hlo.computations(compiled.as_text())
    trips = [n for name in parts for _, n in hlo.loops(parts, name)]
    assert sorted(trips)[-2:] == [3, 5]


def test_collectives_of_a_loop_are_counted_as_often_as_it_runs():
    """Eight devices, kernels [7, 64, 64] divided by rows: each of 7 is gathered, 16 KiB a time."""
    mesh = make_mesh(ConfigDict({'data': 1, 'fsdp': 8, 'tensor': 1, 'slices': 1}))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=place('fsdp'))
    kernels = jax.ShapeDtypeStruct((7, 64, 64), jnp.float32, sharding=place(None, 'fsdp'))

    def layer(x, kernel):
        kernel = jax.lax.with_sharding_constraint(kernel, place())
        return jnp.tanh(x @ kernel), None

    program = jax.jit(lambda x, kernels: jax.lax.scan(layer, x, kernels)[0])
    text = program.lower(x, kernels).compile().as_text()
    assert hlo.collectives(text) == {'all-gather': {'count': 7, 'bytes': 7 * 4 * 64 * 64}}


@pytest.mark.parametrize(
    ('shape', 'size'),
    [(('bf16', '32,512'), 32768), (('f32', ''), 4), (('pred', '7'), 7), (('u8', '2,3'), 6)],
)
def test_bytes_of_an_array(shape, size):
    assert hlo.array_bytes(shape) == size
