"""The frozen base in 8 or 4 bits, for ranking and training: QLoRA (Dettmers et al., 2023).

A quantised projection has a dict where its kernel was, so every path still begins as it did:

    q/kernel [N, in, out]  ->  q/kernel/int8 [N, in, out] int8,     q/kernel/scale [N, 1, out]
                           or  q/kernel/nf4 [N, in, out/2] uint8,   q/kernel/scale [N, in/64, out]

The scales are float32. Only the kernels under `layers` are quantised; embedding, head and norms
keep their type. The scan over the layers hands one layer at a time to `matmul`, so one kernel
exists in the type of the activations.

- int8: kernel ~ int8 * scale, the scale of an output channel being its largest magnitude / 127.
- nf4: kernel ~ LEVELS[code] * scale, the scale of 64 inputs of a channel being their largest
  magnitude. The 16 levels are quantiles of the normal distribution. A byte holds the codes of the
  outputs j (low) and j + out/2 (high), so the product is two products side by side and no kernel
  is ever put together: on a TPU each is unpacked inside its matrix multiplication. Pairs of inputs,
  or jnp.uint4 on CPUs, cost a copy of the whole kernel or stack.
"""

import functools
import math
import statistics
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from palr_jax.errors import InputError
from palr_jax.llama.products import PROJECTED

Path = tuple[str, ...]  # of a leaf in the parameter tree

KINDS = ('none', 'int8', 'nf4')
BLOCK = 64  # inputs that share an nf4 scale
LEAST_BLOCK = 16  # below it the scales would outweigh what they scale

Quantized = Mapping[str, jax.Array]


def normal_levels() -> np.ndarray:
    """[16] float32 levels of nf4: 7 negative, 0 and 8 positive ones, from -1 to 1.

    Evenly spaced quantiles of the normal distribution on either side; the outermost leave half of
    the mean of 1/32 and 1/30 behind them, as in QLoRA's appendix E.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    return (np.array([*negative, 0.0, *reversed(positive)]) / positive[0]).astype(np.float32)


LEVELS = normal_levels()


def quantize(kernel: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Quantises a stack of kernels [N, in, out], one layer after the other; see `encode`."""
    shapes = jax.eval_shape(functools.partial(encode, kind=kind), kernel[0])
    stored = {name: np.empty((len(kernel), *x.shape), x.dtype) for name, x in shapes.items()}
    for n, layer in enumerate(kernel):
        for name, part in encode(layer, kind).items():
            stored[name][n] = part
    return stored


@functools.partial(jax.jit, static_argnames='kind')
def encode(kernel: jax.Array, kind: str) -> dict[str, jax.Array]:
    """Quantises one layer's kernel [in, out], of any floating-point type.

    Raises:
      InputError: nf4, and the inputs do not divide into blocks.
    """
    inputs, outputs = kernel.shape
    size = inputs if kind == 'int8' else block_size(inputs)
    blocks = kernel.astype(jnp.float32).reshape(-1, size, outputs)
    largest = jnp.max(jnp.abs(blocks), axis=1)
    parts = blocks / jnp.where(largest > 0, largest, 1)[:, None]
    if kind == 'int8':
        codes = jnp.round(127 * parts).reshape(inputs, outputs)
        return {'int8': codes.astype(jnp.int8), 'scale': largest / 127}
    between = (LEVELS[1:] + LEVELS[:-1]) / 2
    codes = jnp.searchsorted(between, parts, method='compare_all').astype(jnp.uint8)
    low, high = jnp.split(codes.reshape(inputs, outputs), 2, axis=1)
    return {'nf4': low | (high << 4), 'scale': largest}


def block_size(inputs: int) -> int:
    """Inputs that share an nf4 scale: 64, or the largest power of two that divides `inputs`.

    Raises:
      InputError: that would be less than 16.
    """
    size = math.gcd(inputs, BLOCK)
    if size < LEAST_BLOCK:
        raise InputError(
            f"config.model.quantize is 'nf4', and a kernel has {inputs} inputs; allowed: a "
            f'multiple of {LEAST_BLOCK}.'
        )
    return size


def dequantize(kernel: Quantized) -> jax.Array:
    """One layer's kernel [in, out] in float32."""
    if 'int8' in kernel:
        return kernel['int8'] * kernel['scale']
    return jnp.concatenate(_nf4_halves(kernel), axis=-1)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: Quantized) -> jax.Array:
    """x [..., in] @ one layer's kernel -> [..., out] in the type of x; the kernel has no gradient.

    Not by `products.product`, whose backward pass names the unpacked kernel: a mesh would then
    gather that.
    """
    return _matmul_forward(x, kernel)[0]


def _matmul_forward(x, kernel):
    if 'int8' in kernel:
        # bfloat16 holds every int8 exactly; the scale, which it would round, multiplies the sums.
        y = (_dot(x, kernel['int8'], 0) * kernel['scale'][0]).astype(x.dtype)
    else:
        halves = [_dot(x, half, 0).astype(x.dtype) for half in _nf4_halves(kernel)]
        y = jnp.concatenate(halves, axis=-1)
    return checkpoint_name(y, PROJECTED), kernel


def _matmul_backward(kernel, y_bar):
    if 'int8' in kernel:
        x_bar = _dot((y_bar * kernel['scale'][0]).astype(y_bar.dtype), kernel['int8'], 1)
    else:
        first, second = jnp.split(y_bar, 2, axis=-1)
        of_first, of_second = _nf4_halves(kernel)
        x_bar = _dot(first, of_first, 1) + _dot(second, of_second, 1)
    return x_bar.astype(y_bar.dtype), None


matmul.defvjp(_matmul_forward, _matmul_backward)


def _dot(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Contracts the last axis of `left` with this one of `right`, in the type of `left`: float32.

    As in `products.dot`, a CPU's matrix units take bfloat16 only where the result is float32.
    """
    dimensions = (((left.ndim - 1,), (axis,)), ((), ()))
    right = right.astype(left.dtype)
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _nf4_halves(kernel: Quantized) -> list[jax.Array]:
    """The first and the second half of the outputs, [in, out/2] float32 each."""
    packed = kernel['nf4']
    blocks, half = len(kernel['scale']), packed.shape[-1]
    halves = zip((packed & 15, packed >> 4), jnp.split(kernel['scale'], 2, axis=-1))
    return [
        (jnp.asarray(LEVELS)[codes].reshape(blocks, -1, half) * scale[:, None]).reshape(-1, half)
        for codes, scale in halves
    ]


def is_quantized(path: Path) -> bool:
    """Whether the leaf at `path` of the full tree is one that is quantised."""
    return path[0] == 'layers' and path[-1] == 'kernel'
