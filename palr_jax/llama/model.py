"""The LLaMA architecture: plain functions for the mathematics, Linen for parameters and the scan.

All layers are one scanned block, so a 32-layer program compiles like a one-layer program, and every
leaf under `layers` has a leading layer axis. LLaMA 1, 2 and 3, SmolLM and TinyLlama differ only in
their `LlamaConfig`.

Axis letters: B batch, T tokens, D width, H heads, K key-value heads, E head dimension,
V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from palr_jax.llama import quantize
from palr_jax.llama.attention import ATTENDED, Cached, Causal
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.products import PROJECTED, einsum, low_rank, product
from palr_jax.parallel.mesh import HEAD_AXIS, ROW_AXES, constrain, row_shards

Params = Any  # a nested dict of arrays
Attention = Callable[..., jax.Array]  # a plan of `attention.py`
Rotation = tuple[jax.Array, jax.Array]
ADAPTER_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # as PEFT
LOGIT_CHUNK = 256  # scored tokens whose logits [chunk, V] exist at one time, on each device
# What the backward pass keeps of a layer, by the name in `config.model.remat`; the rest it computes
# again. Without the results of everything elementwise it needs less memory for no measurable time;
# with the layer's input alone a tenth, for a third more work.
REMAT = {
    'none': jax.checkpoint_policies.everything_saveable,
    'projections': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED, PROJECTED),
    ),
    'full': jax.checkpoint_policies.nothing_saveable,
}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32 (Zhang and Sennrich, 2019)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def inverse_frequencies(config: LlamaConfig) -> jax.Array:
    """[E/2] RoPE angles a position (Su et al., 2021), stretched as `config.rope_scaling` says.

    `linear` divides every frequency by the factor. `llama3` divides the low frequencies, keeps the
    high ones and blends between (Llama 3.1 model card).
    """
    frequencies = config.rope_theta ** -(
        jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    )
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == 'linear':
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths  # in the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return blend * frequencies + (1 - blend) * frequencies / scaling.factor


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the halves of x [B, T, H, E] by (cosines, sines), each [B, T, 1, E/2], in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Projection(nn.Module):
    """x @ kernel, plus scaling * (x @ lora_a) @ lora_b where the projection is adapted.

    The adapter's input has dropout where the caller brings a `dropout` rng, as training does.
    """

    features: int
    lora: LoraSpec | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = x.shape[-1]
        stored = self.get_variable('params', 'kernel')
        if isinstance(stored, Mapping):
            y = quantize.matmul(x, stored)
        else:
            init = nn.initializers.normal(fan_in**-0.5)
            kernel = self.param('kernel', init, (fan_in, self.features), self.dtype)
            # The kernel is float32 where the kernels are trained themselves.
            y = product(x, kernel.astype(x.dtype))
        if self.lora is None:
            return y
        # B starts at zero (the adapted model starts as the base model), A does not (else neither
        # would ever move). Both stay float32: small updates vanish in bfloat16.
        a = self.param('lora_a', ADAPTER_INIT, (fan_in, self.lora.rank))
        b = self.param('lora_b', nn.initializers.zeros, (self.lora.rank, self.features))
        x = nn.Dropout(self.lora.dropout)(x, deterministic=not self.has_rng('dropout'))
        return y + self.lora.scaling * low_rank(x, a.astype(x.dtype), b.astype(x.dtype))


class Block(nn.Module):
    """One decoder layer: attention and gated MLP, each after a norm and added to its input."""

    config: LlamaConfig
    lora: LoraSpec | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rotation: Rotation, attention: Attention):
        """x [B, T, D] -> (x, None), the form that `nn.scan` asks for."""
        norm = functools.partial(Norm, self.config.norm_eps, self.dtype)
        x = x + Attend(self.config, self.lora, self.dtype, name='attention')(
            norm(name='attention_norm')(x), rotation, attention
        )
        x = x + Mlp(self.config, self.lora, self.dtype, name='mlp')(norm(name='mlp_norm')(x))
        return constrain(x, ROW_AXES), None


class Norm(nn.Module):
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:], self.dtype)
        return rms_norm(x, scale, self.eps)


class Attend(nn.Module):
    config: LlamaConfig
    lora: LoraSpec | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rotation: Rotation, attention: Attention) -> jax.Array:
        c = self.config
        B, T, D = x.shape
        project = functools.partial(_projection, self.lora, self.dtype)
        query = project('q', c.heads * c.head_dim)(x).reshape(B, T, c.heads, c.head_dim)
        key = project('k', c.kv_heads * c.head_dim)(x).reshape(B, T, c.kv_heads, c.head_dim)
        value = project('v', c.kv_heads * c.head_dim)(x).reshape(B, T, c.kv_heads, c.head_dim)
        # Named as what the attention keeps: else they would be rotated again for its backward pass.
        query, key = (checkpoint_name(rotate(x, rotation), ATTENDED) for x in (query, key))
        if isinstance(attention, Cached):
            out = attention(query, key, value, self._slots(key.dtype))
            self.put_variable('new', 'key', key.swapaxes(1, 2))
            self.put_variable('new', 'value', value.swapaxes(1, 2))
        else:
            out = attention(query, key, value)
        return project('o', D)(out.reshape(B, T, c.heads * c.head_dim))

    def _slots(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array] | None:
        """Keys and values of earlier passes, each [B, K, N, E]; None in the first."""
        if not self.has_variable('slots', 'key'):
            return None
        key, value = (self.get_variable('slots', name) for name in ('key', 'value'))
        return key.view(dtype), value.view(dtype)


class Mlp(nn.Module):
    config: LlamaConfig
    lora: LoraSpec | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        project = functools.partial(_projection, self.lora, self.dtype)
        gate, up = (project(name, self.config.hidden)(x) for name in ('gate', 'up'))
        return project('down', x.shape[-1])(swiglu(gate, up))


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer, 2020), whose backward pass writes its two results and no more."""
    return nn.silu(gate) * up


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(kept, out_bar):
    gate, up = kept
    sigmoid = nn.sigmoid(gate)
    gate_bar = out_bar * up * sigmoid * (1 + gate * (1 - sigmoid))
    # Behind the barrier, or XLA's CPU backend writes the sigmoid down for both results: an
    # exponential is quicker than its way to memory and back.
    return gate_bar, out_bar * nn.silu(jax.lax.optimization_barrier(gate))


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _projection(lora: LoraSpec | None, dtype: jnp.dtype, name: str, features: int) -> Projection:
    adapted = lora is not None and name in lora.targets
    return Projection(features, lora if adapted else None, dtype, name=name)


class Llama(nn.Module):
    """Tokens to hidden states; the output head is applied only where a token is scored.

    Attributes:
      config: the architecture.
      lora: which projections carry an adapter; None for the base model alone.
      dtype: of the activations, whatever the parameters have; of the parameters that `init` makes.
      remat: what a backward pass keeps of each layer, a name of `REMAT`.
    """

    config: LlamaConfig
    lora: LoraSpec | None = None
    dtype: jnp.dtype = jnp.float32
    remat: str = 'projections'

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, attention: Attention) -> jax.Array:
        """tokens and positions [B, T] int32 -> normed hidden states [B, T, D].

        `attention` is a plan of `attention.py`: a pytree of arrays. Under the plan `Cached` the
        layers read the collection `slots`, if it is there, 2 x [layers, B, K, N, E] in integers of
        the same bits, and leave the keys and values of this pass in `new`, 2 x
        [layers, B, K, T, E]: `apply(…, mutable=['new'])`.
        """
        c = self.config
        embed = nn.Embed(
            c.vocab_size, c.width, dtype=self.dtype, param_dtype=self.dtype, name='embed'
        )
        x = constrain(embed(tokens), ROW_AXES)
        angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(c)
        rotation = jnp.cos(angles), jnp.sin(angles)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat]),
            variable_axes={'params': 0, 'slots': 0, 'new': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.layers,
        )(c, self.lora, self.dtype, name='layers')
        x, _ = layers(x, rotation, attention)
        if not c.tied_head:
            # Declared here so that the parameter tree is whole; read by `output_head`.
            Projection(c.vocab_size, None, self.dtype, name='head')(x[:, :0])
        return Norm(c.norm_eps, self.dtype, name='final_norm')(x)


def output_head(params: Params) -> jax.Array:
    """[D, V] kernel of the output projection: its own, or the transposed embedding when tied."""
    if 'head' in params:
        return params['head']['kernel']
    return params['embed']['embedding'].T


def stored_head(params: Params) -> tuple[jax.Array, int]:
    """The output projection as it lies in memory, and its axis of D: [D, V] and 0, or tied 1.

    XLA's CPU backend copies the transpose of a tied embedding before a loop reads it, which takes a
    fifth of the time of scoring one user's titles.
    """
    if 'head' in params:
        return params['head']['kernel'], 0
    return params['embed']['embedding'], 1


def head_logits(hidden: jax.Array, head: jax.Array, axis: int = 0) -> jax.Array:
    """[..., D] hidden states -> [..., V] float32; head and axis as of `stored_head`."""
    return einsum('...d,dv->...v' if axis == 0 else '...d,vd->...v', hidden, head)


def log_likelihood(
    hidden: jax.Array, targets: jax.Array, head: jax.Array, axis: int = 0
) -> jax.Array:
    """Log-probability of each target token under the hidden state before it.

    Logits, log-softmax and sums are float32. Only about `LOGIT_CHUNK` rows of logits a device exist
    at a time, in the backward pass too. A chunk takes tokens of every row, so that each device has
    its share of it where the rows are sharded.

    Args:
      hidden: [B, N, D] hidden states, each of the token before its target; N at least 1.
      targets: [B, N] int32 token ids; NaN comes back for one that is not in the vocabulary.
      head: [D, V], or [V, D] where `axis` is 1.
      axis: of D in `head`.

    Returns:
      [B, N] float32 natural-log probabilities.
    """
    B, N, D = hidden.shape
    chunks = min(N, -(-B * N // (LOGIT_CHUNK * row_shards())))
    size = -(-N // chunks)
    padding = size * chunks - N
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(B, chunks, size, D)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(B, chunks, size)
    # Gathered once, not for every chunk.
    head = constrain(head, *((None, HEAD_AXIS) if axis == 0 else (HEAD_AXIS, None)))

    parts = hidden.swapaxes(0, 1), targets.swapaxes(0, 1)
    values = jax.lax.map(lambda part: _chosen(*part, head, axis), parts)
    return values.swapaxes(0, 1).reshape(B, -1)[:, :N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chosen(hidden: jax.Array, targets: jax.Array, head: jax.Array, axis: int) -> jax.Array:
    """`log_likelihood` of one chunk.

    Under a frozen head the gradient in `hidden` is made in the forward pass, where the logits are,
    but for the factor that the backward pass brings: neither the logits are kept nor made again.
    """
    return _log_softmax(hidden, targets, head, axis)[0]


def _log_softmax(hidden, targets, head, axis):
    """([B, N] log-probability of each target, [B, N, V] logits, [B, N, 1] their log-sum-exp)."""
    logits = head_logits(hidden, head, axis)
    logits = constrain(logits, ROW_AXES, None, HEAD_AXIS)
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # A negative index would count from the end.
    targets = jnp.where(targets < 0, logits.shape[-1], targets)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (chosen - norm)[..., 0], logits, norm


def _chosen_forward(hidden, targets, head, axis):
    hidden_value, target_ids, kernel = hidden.value, targets.value, head.value
    found, logits, norm = _log_softmax(hidden_value, target_ids, kernel, axis)
    if head.perturbed:
        return found, (hidden_value, target_ids, kernel)
    is_target = jnp.arange(logits.shape[-1]) == target_ids[..., None]
    logits_bar = (is_target - jnp.exp(logits - norm)).astype(kernel.dtype)
    hidden_bar = einsum('...v,dv->...d' if axis == 0 else '...v,vd->...d', logits_bar, kernel)
    return found, hidden_bar.astype(hidden_value.dtype)


def _chosen_backward(axis, kept, found_bar):
    if not isinstance(kept, tuple):
        return (kept * found_bar[..., None]).astype(kept.dtype), None, None
    hidden, targets, head = kept
    _, pull = jax.vjp(lambda h, w: _log_softmax(h, targets, w, axis)[0], hidden, head)
    hidden_bar, head_bar = pull(found_bar)
    return hidden_bar, None, head_bar


_chosen.defvjp(_chosen_forward, _chosen_backward, symbolic_zeros=True)


def apply_logits(
    params: Params,
    config: LlamaConfig,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    lora: LoraSpec | None = None,
) -> jax.Array:
    """Every logit of every position, for checks and small inputs.

    Args:
      params: the tree of `Llama`.
      config: the architecture.
      tokens: [B, T] int32.
      positions: [B, T] int32; by default they count from 0 in every segment, padding left or right.
      segments: [B, T] int32, 0 on padding; default one segment a row, no padding.
      lora: the adapters in `params`, if any.

    Returns:
      [B, T, V] float32.
    """
    tokens = jnp.asarray(tokens)
    if segments is None:
        segments = jnp.ones_like(tokens)
    if positions is None:
        begins = jnp.argmax(segments[:, :, None] == segments[:, None, :], axis=-1)
        positions = jnp.arange(tokens.shape[1]) - begins
    dtype = params['embed']['embedding'].dtype
    model = Llama(config, lora, dtype)
    hidden = model.apply({'params': params}, tokens, positions, Causal(segments))
    return jnp.dot(hidden, output_head(params), preferred_element_type=jnp.float32)
