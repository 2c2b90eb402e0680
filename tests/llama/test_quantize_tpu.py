"""Quantised kernels of LLaMA-7B's size compile for a TPU v5e chip, without having one."""

import pytest

pytestmark = [pytest.mark.tpu_backend, pytest.mark.slow]
PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from palr_jax.llama import quantize

mesh = jax.sharding.Mesh(np.array(chips[:1]), ('data',), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec())
place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
stack = jax.ShapeDtypeStruct((3, 4096, 11008), jnp.bfloat16)
x = place(jax.ShapeDtypeStruct((512, 4096), jnp.bfloat16))

@jax.jit
def products(x, kernels):
    return jax.lax.scan(lambda x, kernel: (x, quantize.matmul(x, kernel)), x, kernels)[1]

found = {}
for kind in ('int8', 'nf4'):
    kernels = jax.eval_shape(jax.vmap(functools.partial(quantize.encode, kind=kind)), stack)
    kernels = jax.tree.map(place, kernels)
    lowered = products.trace(x, kernels).lower(lowering_platforms=('tpu',))
    memory = lowered.compile().memory_analysis()
    found[kind] = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
report(found)
"""


def test_no_kernel_is_unpacked_outside_its_product(tpu_report):
    """A kernel has 90 MB in bfloat16, a product 11 MB; codes and scales are all that is stored."""
    report = tpu_report(PROGRAM)
    weights, activations = 3 * 4096 * 11008, 2 * 512 * 4096
    stored = {'int8': weights + 3 * 4 * 11008, 'nf4': weights // 2 + weights // 64 * 4}
    for kind, (arguments, temporaries) in report.items():
        assert arguments == pytest.approx(stored[kind] + activations, rel=1e-3)
        assert temporaries < 30e6
