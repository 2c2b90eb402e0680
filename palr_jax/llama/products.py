"""Matrix products by the matrix units of TPUs, GPUs and CPUs, and their backward passes.

Matrix units multiply bfloat16 and add up in float32. `model.matmul_precision` says what becomes of
float32 factors: one product of their rounded values (`default`), three of their upper and lower
halves (`high`, about 16 of 24 bits), or float32 throughout (`highest`). XLA does so on TPUs; on a
CPU it multiplies in float32 whatever is asked, where one with matrix units (AMX) is five to six
times as fast at bfloat16. So the halves are made here for CPUs. And a product of bfloat16 is asked
for its float32 result and rounded in a step of its own: asked for bfloat16, XLA's CPU backend would
convert both factors to float32 first.

Which form it is, is chosen when a program is lowered: a program for TPUs can be made on a machine
without one.

Axis letters: B batch, T tokens, D inputs, F outputs, r rank of an adapter.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PROJECTED = 'projected'  # the results of `product`, for `llama.model.REMAT`
PASSES = {'default': 1, 'high': 3}  # products of bfloat16 in place of one of float32

Contract = Callable[[jax.Array, jax.Array], jax.Array]


def dot(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Contracts the last axis of `left` with this one of `right` [2 axes], in their one type.

    Not to be differentiated: see `product`.
    """
    dimensions = (((left.ndim - 1,), (axis,)), ((), ()))
    contract = functools.partial(jax.lax.dot_general, dimension_numbers=dimensions)
    passes = _passes(left.dtype)
    if passes is None:
        return contract(left, right)

    def by_units(left: jax.Array, right: jax.Array) -> jax.Array:
        wide = functools.partial(contract, preferred_element_type=jnp.float32)
        return _in_passes(passes, wide, left, right).astype(left.dtype)

    return jax.lax.platform_dependent(left, right, cpu=by_units, default=contract)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, T, D] @ kernel [D, F], both of one type."""
    return x @ kernel if _passes(x.dtype) is None else _unit_product(x, kernel)


@jax.custom_vjp
def _unit_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return checkpoint_name(dot(x, kernel, 0), PROJECTED)


def _unit_product_forward(x, kernel):
    out = checkpoint_name(dot(x.value, kernel.value, 0), PROJECTED)
    return out, (x.value if kernel.perturbed else None, kernel.value)


def _unit_product_backward(kept, out_bar):
    x, kernel = kept
    kernel_bar = None if x is None else jnp.einsum('btd,btf->df', x, out_bar)
    return dot(out_bar, kernel, 1), kernel_bar


_unit_product.defvjp(_unit_product_forward, _unit_product_backward, symbolic_zeros=True)


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x [B, T, D] @ a [D, r] @ b [r, F].

    The gradients of `a` and `b` are sums over tokens with the thin array at the left: XLA's CPU
    backend copies the left one transposed, and what JAX would put there has all features.
    """
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x, a, b):
    inner = checkpoint_name(dot(x, a, 0), PROJECTED)
    return dot(inner, b, 0), (x, inner, a, b)


def _low_rank_backward(kept, out_bar):
    x, inner, a, b = kept
    inner_bar = dot(out_bar, b, 1)
    a_bar = jnp.einsum('btr,btd->rd', inner_bar, x).T
    b_bar = jnp.einsum('btr,btd->rd', inner, out_bar)
    return dot(inner_bar, a, 1), a_bar, b_bar


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def einsum(pattern: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one type, in float32; at the left the contracted axis is last.

    In three passes a CPU would lose more by making the halves than it gains: there are as many
    factors as products' results in attention, and in the output head of a few scored tokens.
    """
    if left.dtype == jnp.float32 and _passes(left.dtype) == 1:
        return _unit_einsum(pattern, left, right)
    return jnp.einsum(pattern, left, right, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unit_einsum(pattern: str, left: jax.Array, right: jax.Array) -> jax.Array:
    contract = functools.partial(jnp.einsum, pattern, preferred_element_type=jnp.float32)
    by_units = functools.partial(_in_passes, 1, contract)
    return jax.lax.platform_dependent(left, right, cpu=by_units, default=contract)


def _unit_einsum_forward(pattern, left, right):
    out = _unit_einsum(pattern, left.value, right.value)
    return out, (left.value if right.perturbed else None, right.value)


def _unit_einsum_backward(pattern, kept, out_bar):
    left, right = kept
    factors, of_out = pattern.split('->')
    of_left, of_right = factors.split(',')
    left_bar = _unit_einsum(f'{of_out},{of_right}->{of_left}', out_bar, right)
    if left is None:
        return left_bar, None
    # A sum over the rows of both: a CPU's matrix units would have them transposed first.
    return left_bar, jnp.einsum(f'{of_out},{of_left}->{of_right}', out_bar, left)


_unit_einsum.defvjp(_unit_einsum_forward, _unit_einsum_backward, symbolic_zeros=True)


def _passes(dtype: jnp.dtype) -> int | None:
    """How many products of bfloat16 a CPU makes in place of one; None where it does as it is."""
    if dtype == jnp.bfloat16:
        return 1
    return PASSES.get(jax.config.jax_default_matmul_precision)


def _in_passes(passes: int, contract: Contract, left: jax.Array, right: jax.Array) -> jax.Array:
    """`contract`, which gives float32, of bfloat16 factors or of what stands for the factors."""
    if left.dtype == jnp.bfloat16:
        return contract(left, right)
    if passes == 1:
        return contract(left.astype(jnp.bfloat16), right.astype(jnp.bfloat16))
    (upper, lower), (of_upper, of_lower) = _halves(left), _halves(right)
    return contract(upper, of_upper) + (contract(upper, of_lower) + contract(lower, of_upper))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two of bfloat16, each rounded to nearest."""
    # With integers: a conversion and back is one that XLA may leave out, and takes twice as long.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + (jnp.uint32(0x7FFF) + ((bits >> 16) & jnp.uint32(1)))
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    lower = x - jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return upper, lower.astype(jnp.bfloat16)
