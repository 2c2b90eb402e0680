"""SASRec (Kang and McAuley, 2018, arXiv 1808.09781) and its kin: causal models of a user's items.

`sasrec` is a Transformer with a vector for each position. `hstu` has a learnt bias by distance in
its place (every token of a training row then stands where the last one of a history stands) and
cheaper layers. SASRec's layers with that bias were tried too: they find as much as HSTU's, epoch by
epoch, and take a fifth longer. The mathematics are the plain functions here; the Linen modules at
the end only declare parameters. Three things are built so that they cannot go wrong:

* Item ids are 1 … I and 0 is padding. The table holds the I items alone: padding is looked up as a
  zero vector, and it cannot be recommended because it has no logit.
* Positions are counted from the end of a history, so padding in front of it changes nothing.
* A token attends to itself and to earlier tokens of its own segment. That is the causal mask, the
  padding mask and what keeps several histories in one row apart, and no row of it is ever empty.

Unlike the paper's, the blocks of SASRec are pre-norm in queries, keys and values alike.

Axes: B rows, T tokens of a row, D width, H heads, F hidden width (4 D), I items.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Params = dict[str, Any]
ENCODERS = ('sasrec', 'hstu')
BLOCKS, LEAST_BLOCK = 4, 32  # queries are cut in BLOCKS, none shorter than LEAST_BLOCK


@dataclass(frozen=True)
class SasrecConfig:
    """The shape of the model; what is saved beside its parameters."""

    encoder: str  # one of ENCODERS
    items: int  # I
    width: int  # D
    blocks: int
    heads: int  # divides the width
    length: int  # latest items that are read; the number of positions or distances


def embed_items(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Vectors [..., D] of item ids [...] from the table [I, D]; zeros for padding."""
    return table[jnp.maximum(ids, 1) - 1] * (ids > 0)[..., None]


def positions_from_end(ids: jax.Array) -> jax.Array:
    """0 for the last token of a left-padded row, 1 for the one before: [B, T] -> [B, T]."""
    return jnp.broadcast_to(jnp.arange(ids.shape[1] - 1, -1, -1), ids.shape)


def attention_mask(segments: jax.Array) -> jax.Array:
    """Who attends to whom, [B, T, T] bool; segments [B, T] number the histories of a row from 1.

    Padding is segment 0: its tokens attend to each other, which keeps them finite, and nothing
    else attends to them.
    """
    causal = jnp.tri(segments.shape[1], dtype=bool)
    return causal & (segments[:, :, None] == segments[:, None, :])


def layer_norm(x: jax.Array, p: Params, eps: float = 1e-6) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * p['scale'] + p['bias']


def linear(x: jax.Array, p: Params) -> jax.Array:
    return x @ p['kernel'] + p['bias']


def attention(x: jax.Array, p: Params, mask: jax.Array, heads: int) -> jax.Array:
    """Multi-head self-attention: x [B, T, D], mask [B, T, T] -> [B, T, D]."""
    q, k, v = (split_heads(linear(x, p[name]), heads) for name in 'qkv')
    mixed = mix(softmax, q, k, v, mask)
    return linear(mixed.swapaxes(1, 2).reshape(x.shape), p['o'])


def mix(
    weigh: Callable[[jax.Array, jax.Array], jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Values weighed by `weigh(logits, mask)`: q, k, v [B, H, T, E] -> [B, H, T, E].

    Each block of queries reads the keys up to its own end, which saves most of the masked half.
    Written out, since XLA's CPU backend takes twice as long for jax.nn.dot_product_attention here.
    """
    tokens, mixed = q.shape[2], []
    q = q * q.shape[-1] ** -0.5
    size = max(LEAST_BLOCK, -(-tokens // BLOCKS))
    for start in range(0, tokens, size):
        rows, keys = slice(start, start + size), slice(min(start + size, tokens))
        logits = jnp.einsum('bhqe,bhte->bhqt', q[:, :, rows], k[:, :, keys])
        if bias is not None:
            logits = logits + bias[:, rows, keys]
        weights = weigh(logits, mask[:, None, rows, keys])
        mixed.append(jnp.einsum('bhqt,bhte->bhqe', weights, v[:, :, keys]))
    return jnp.concatenate(mixed, 2)


def softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask, logits, -1e30), -1)


def silu(logits: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, jax.nn.silu(logits), 0)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, T, D] -> [B, H, T, D / H]."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def mlp(x: jax.Array, p: Params) -> jax.Array:
    return linear(jax.nn.relu(linear(x, p['up'])), p['down'])


def distance_bias(weights: jax.Array, tokens: int) -> jax.Array:
    """[H, T, T]: weights [H, length] at the distance from query to key; T at most `length`."""
    places = jnp.arange(tokens)
    return weights[:, jnp.maximum(places[:, None] - places, 0)]


def hstu(x: jax.Array, p: Params, mask: jax.Array, heads: int, bias: jax.Array) -> jax.Array:
    """The HSTU layer (Zhai et al., 2024, arXiv 2402.17152, eq. 2 to 4): x [B, T, D] -> [B, T, D].

    Attention weights are SiLU of logit plus bias, not a softmax: how often something occurs counts,
    not only how it compares. Another projection of the input gates the result.
    """
    projected = linear(layer_norm(x, p['input_norm']), p['hstu']['uqkv'])
    u, q, k, v = jnp.split(jax.nn.silu(projected), 4, -1)
    q, k, v = (split_heads(y, heads) for y in (q, k, v))
    mixed = mix(silu, q, k, v, mask, bias).swapaxes(1, 2).reshape(x.shape)
    return linear(layer_norm(mixed, p['mixed_norm']) * u, p['hstu']['o'])


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; without a key, or at rate 0, `x` itself."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def encode(
    params: Params,
    ids: jax.Array,
    heads: int,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """The state after each item of each history; its product with item vectors scores the next.

    Args:
      params: what `SASRec` declares.
      ids: [B, T] item ids; left-padded histories, or several histories a row (then `positions` and
        `segments` say how).
      positions: [B, T] places counted from the end of each history; None: those of left padding.
      segments: [B, T] from 1, 0 at padding; None: one history a row.
      dropout: share of dropped activations; applied only with a `key`.

    Returns:
      [B, T, D]; zeros at padding, so that a user without history has the zero vector.
    """
    if positions is None:
        positions = positions_from_end(ids)
    if segments is None:
        segments = (ids > 0).astype(jnp.int32)
    table = params['items']['embedding']
    mask, real = attention_mask(segments), (ids > 0)[..., None]
    blocks = [name for name in params if name.startswith('block_')]
    keys = iter([None] * (2 * len(blocks) + 1))
    if key is not None:
        keys = iter(jax.random.split(key, 2 * len(blocks) + 1))

    x = embed_items(table, ids) * table.shape[1] ** 0.5
    if 'positions' in params:
        x = x + params['positions']['embedding'][positions]
    x = drop(x * real, dropout, next(keys))
    for i in range(len(blocks)):
        p = params[f'block_{i}']
        if 'hstu' in p:
            bias = distance_bias(p['distance']['bias'], ids.shape[1])
            x = x + drop(hstu(x, p, mask, heads, bias), dropout, next(keys))
            continue
        y = attention(layer_norm(x, p['attention_norm']), p['attention'], mask, heads)
        x = x + drop(y, dropout, next(keys))
        y = mlp(layer_norm(x, p['mlp_norm']), p['mlp'])
        x = x + drop(y, dropout, next(keys))
    return layer_norm(x, params['final_norm']) * real


class _Leaves(nn.Module):
    """Declares the named parameters of one layer and returns them."""

    shapes: dict[str, tuple[int, ...]]

    @nn.compact
    def __call__(self) -> Params:
        inits = {
            'embedding': nn.initializers.normal(0.02),
            'kernel': nn.initializers.xavier_uniform(),
            'bias': nn.initializers.zeros,
            'scale': nn.initializers.ones,
        }
        return {name: self.param(name, inits[name], shape) for name, shape in self.shapes.items()}


class _Linears(nn.Module):
    shapes: dict[str, tuple[int, int]]

    @nn.compact
    def __call__(self) -> Params:
        return {
            name: _Leaves({'kernel': shape, 'bias': shape[1:]}, name=name)()
            for name, shape in self.shapes.items()
        }


class _Block(nn.Module):
    config: SasrecConfig

    @nn.compact
    def __call__(self) -> Params:
        c = self.config
        d, f = c.width, 4 * c.width
        norm = {'scale': (d,), 'bias': (d,)}
        if c.encoder == 'hstu':
            return {
                'distance': _Leaves({'bias': (c.heads, c.length)}, name='distance')(),
                'input_norm': _Leaves(norm, name='input_norm')(),
                'hstu': _Linears({'uqkv': (d, 4 * d), 'o': (d, d)}, name='hstu')(),
                'mixed_norm': _Leaves(norm, name='mixed_norm')(),
            }
        return {
            'attention_norm': _Leaves(norm, name='attention_norm')(),
            'attention': _Linears(dict.fromkeys('qkvo', (d, d)), name='attention')(),
            'mlp_norm': _Leaves(norm, name='mlp_norm')(),
            'mlp': _Linears({'up': (d, f), 'down': (f, d)}, name='mlp')(),
        }


class SASRec(nn.Module):
    """Declares the parameters and calls `encode`; its arguments are documented there."""

    config: SasrecConfig

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        dropout: float = 0.0,
    ) -> jax.Array:
        c = self.config
        params = {
            'items': _Leaves({'embedding': (c.items, c.width)}, name='items')(),
            'final_norm': _Leaves({'scale': (c.width,), 'bias': (c.width,)}, name='final_norm')(),
        } | {f'block_{i}': _Block(c, name=f'block_{i}')() for i in range(c.blocks)}
        if c.encoder == 'sasrec':
            params['positions'] = _Leaves({'embedding': (c.length, c.width)}, name='positions')()
        key = self.make_rng('dropout') if self.has_rng('dropout') else None
        return encode(params, ids, c.heads, positions, segments, dropout, key)


@functools.partial(jax.jit, static_argnames='config')
def init_params(config: SasrecConfig, seed: int) -> Params:
    """Fresh parameters as a nested dict."""
    return SASRec(config).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))['params']
