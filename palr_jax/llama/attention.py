"""Who attends to whom: plans that the layers share, each a function over queries, keys, values.

A plan is made once a forward pass and handed to every layer. `Causal` serves training and plain
scoring; `OnePass` serves ranking, where all candidates of a user attend to one prompt; `Cached`
serves generation, where a new token attends to keys and values of earlier passes, too, which the
layers bring as a fourth argument.

The G = H / K query heads that share a key-value head are folded into the query axis: [G*T, E] by
[E, T] is one plain matrix product a key-value head. XLA's CPU backend is slower at the same
product with a group axis of its own. Logits and softmax are float32. `jax.nn.dot_product_attention`
is not used: it has no blocks, and the log-sum-exp that `OnePass` would join two of them by has no
gradient. On TPUs long rows go through the splash kernel.

Axis letters: B batch, T tokens, L prompt length, R rows, S row length, H heads, K key-value heads,
G query heads a key-value head, E head dimension.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from palr_jax.llama import splash
from palr_jax.llama.products import einsum

SPLASH_TOKENS = 1024  # rows at least as long go through the splash kernel on TPUs
BLOCKS, LEAST_BLOCK = 8, 128  # causal queries are cut in BLOCKS, none shorter than LEAST_BLOCK
ATTENDED = 'attended'  # what the backward pass of the attention wants of the forward pass
MASKED = -1e30  # finite: a row that is masked everywhere has a mean, not NaN


@flax.struct.dataclass
class Causal:
    """Each token attends to itself and the earlier tokens of its own segment.

    Attributes:
      segments: [B, T] int32; 0 marks padding, which attends to padding: no row is fully masked.
    """

    segments: jax.Array

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """query [B, T, H, E], key and value [B, T, K, E] -> [B, T, H, E]."""
        return _causal(query, key, value, self.segments)


@flax.struct.dataclass
class OnePass:
    """The prompt attends causally to itself; each candidate to the prompt and to its own tokens.

    The tokens are the prompt's L followed by R rows of S candidate tokens, several candidates a
    row. A candidate token's logits over the prompt and over its own row are computed apart and
    share one softmax: prompt keys are neither repeated for a candidate nor masked against other
    candidates, and no logit exists between tokens of different rows.

    Attributes:
      prompt: [B, L] bool, True on the tokens of the prompt, which start at 0.
      rows: [B, R, S] int32 candidate segments; 0 marks padding.
    """

    prompt: jax.Array
    rows: jax.Array

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """query [B, L + R*S, H, E], key and value [B, L + R*S, K, E] -> [B, L + R*S, H, E]."""
        B, _, H, E = query.shape
        L, K = self.prompt.shape[1], key.shape[2]
        R, S = self.rows.shape[1:]
        G = H // K
        of_prompt = _causal(
            query[:, :L], key[:, :L], value[:, :L], self.prompt.astype(self.rows.dtype)
        )

        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        row_key, row_value = (x[:, :, L:].reshape(B, K, R, S, E) for x in (key, value))
        # No mask over all logits for the sake of the prompt's padding: its keys repeat the first
        # one, so the largest logit stays as it is, and its values and weights are multiplied by 0.
        real = self.prompt[:, None, :, None]
        prompt_key = jnp.where(real, key[:, :, :L], key[:, :, :1])
        prompt_value = jnp.where(real, value[:, :, :L], 0)
        counted = jnp.broadcast_to(real, (B, K, L, 1)).astype(value.dtype)

        query = query[:, L:].reshape(B, R, S, K, G, E).transpose(0, 3, 1, 4, 2, 5)
        over_prompt = _products(query.reshape(B, K, R * G * S, E), prompt_key)
        over_row = _products(query.reshape(B, K, R, G * S, E), row_key)
        own = _causal_mask(self.rows, 0, S)[:, None, :, None]
        over_row = jnp.where(own, over_row.reshape(B, K, R, G, S, S), MASKED)
        (prompt_weights, row_weights), _, _ = _exponentials(
            over_prompt, over_row.reshape(B, K, R * G * S, S), scale=E**-0.5
        )
        # A sum as a product: XLA's CPU backend is faster at it.
        total = _weigh(prompt_weights, counted) + row_weights.sum(axis=-1, keepdims=True)
        from_prompt = _weigh(prompt_weights, prompt_value)
        from_row = _weigh(row_weights.reshape(B, K, R, G * S, S), row_value)
        of_rows = (from_prompt + from_row.reshape(from_prompt.shape)) / total
        of_rows = of_rows.astype(value.dtype).reshape(B, K, R, G, S, E).transpose(0, 2, 4, 1, 3, 5)
        return jnp.concatenate([of_prompt, of_rows.reshape(B, R * S, H, E)], axis=1)


@flax.struct.dataclass
class Cached:
    """Each token attends to itself and all earlier tokens of its row, those of former passes too.

    Slot p of a layer holds the key and value at position p. The T tokens of a pass follow each
    other, and read the slots before the first of them. So padding at the right of rows of different
    lengths needs no further mask: its slots lie behind, until later passes overwrite them
    (`ranking.generate`). A pass without slots is the first.

    Attributes:
      starts: [B] int32 position of the first token of this pass in each row.
    """

    starts: jax.Array

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        slots: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:
        """query [B, T, H, E], key and value [B, T, K, E], slots 2 x [B, K, N, E] -> as query."""
        B, T, H, E = query.shape
        K = key.shape[2]
        if slots is None:
            return _causal(query, key, value, jnp.ones((B, T), jnp.int32))
        G = H // K
        query = query.reshape(B, T, K, G, E).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, E)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        of_slots = _products(query, slots[0])
        earlier = jnp.arange(of_slots.shape[-1]) < self.starts[:, None]
        of_slots = jnp.where(earlier[:, None, None], of_slots, MASKED)
        own = _products(query, key).reshape(B, K, G, T, T)
        own = jnp.where(jnp.tri(T, dtype=bool), own, MASKED).reshape(B, K, G * T, T)
        (slot_weights, weights), total, _ = _exponentials(of_slots, own, scale=E**-0.5)
        mean = (_weigh(slot_weights, slots[1]) + _weigh(weights, value)) / total
        mean = mean.astype(value.dtype).reshape(B, K, G, T, E)
        return mean.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def _causal(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention within segments [B, T]; the other shapes as in `Causal`."""
    if query.shape[1] < SPLASH_TOKENS:
        return by_blocks(query, key, value, segments)
    # Chosen when the program is lowered, so that a program for TPUs can be made without one.
    return jax.lax.platform_dependent(
        query, key, value, segments, tpu=splash.attend, default=by_blocks
    )


def by_blocks(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention with the softmax written out; shapes as in `_causal`.

    Each block of queries reads the keys up to its own end, which saves most of the masked half.
    """
    B, T, H, E = query.shape
    K = key.shape[2]
    query = query.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
    out = _attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), segments)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


@jax.custom_vjp
def _attend(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """query [B, K, G, T, E], key and value [B, K, T, E], segments [B, T] -> as query.

    The backward pass has the weights again from the logits and their log-sum-exp in one sweep (Dao
    et al., 2022, appendix B), where differentiating the softmax step by step needs its maximum and
    sums again and keeps or recomputes every array between.
    """
    return _attend_forward(query, key, value, segments)[0]


def _attend_forward(query, key, value, segments):
    outs, norms = [], []
    for start, stop in _spans(query.shape[3]):
        block = query[:, :, :, start:stop]
        products = _masked_products(block, key[:, :, :stop], segments, start)
        (weights,), total, largest = _exponentials(products, scale=query.shape[-1] ** -0.5)
        mean = _weigh(_folded(weights), value[:, :, :stop]).reshape(block.shape)
        outs.append((mean / total).astype(value.dtype))
        norms.append(largest + jnp.log(total))
    # Named for `llama.model.REMAT`, which keeps both instead of running this again.
    out = checkpoint_name(jnp.concatenate(outs, axis=3), ATTENDED)
    norm = checkpoint_name(jnp.concatenate(norms, axis=3), ATTENDED)
    return out, (query, key, value, segments, out, norm)


def _attend_backward(kept, out_bar):
    query, key, value, segments, out, norm = kept
    scale = query.shape[-1] ** -0.5
    inner = jnp.sum(out_bar.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    key_bar, value_bar = (jnp.zeros_like(x.swapaxes(2, 3), jnp.float32) for x in (key, value))
    query_bars = []
    for start, stop in _spans(query.shape[3]):
        block, block_bar = query[:, :, :, start:stop], _folded(out_bar[:, :, :, start:stop])
        products = _masked_products(block, key[:, :, :stop], segments, start)
        weights = jnp.exp(products * scale - norm[:, :, :, start:stop])
        weights_bar = _products(block_bar, value[:, :, :stop])
        slope = weights_bar.reshape(weights.shape) - inner[:, :, :, start:stop]
        products_bar, weights = _folded(weights * slope * scale), _folded(weights)
        of_queries = _weigh(products_bar, key[:, :, :stop])
        query_bars.append(of_queries.reshape(block.shape))
        of_keys = _transposed(products_bar, _folded(block))
        of_values = _transposed(weights, block_bar)
        key_bar = key_bar.at[..., :stop].add(of_keys)
        value_bar = value_bar.at[..., :stop].add(of_values)
    bars = jnp.concatenate(query_bars, axis=3), key_bar.swapaxes(2, 3), value_bar.swapaxes(2, 3)
    return *(bar.astype(x.dtype) for bar, x in zip(bars, (query, key, value))), None


_attend.defvjp(_attend_forward, _attend_backward)


def _spans(tokens: int) -> list[tuple[int, int]]:
    """(start, stop) of the blocks of queries."""
    size = max(LEAST_BLOCK, -(-tokens // (BLOCKS * 32)) * 32)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _masked_products(
    query: jax.Array, key: jax.Array, segments: jax.Array, start: int
) -> jax.Array:
    """[B, K, G, Q, stop] float32 of the queries from `start` and the keys up to their end."""
    stop = key.shape[2]
    products = _products(_folded(query), key).reshape(*query.shape[:-1], stop)
    return jnp.where(_causal_mask(segments, start, stop)[:, None, None], products, MASKED)


def _folded(x: jax.Array) -> jax.Array:
    """[B, K, G, Q, …] -> [B, K, G*Q, …]."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _causal_mask(segments: jax.Array, start: int, stop: int) -> jax.Array:
    """[..., T] segments -> [..., stop - start, stop]: may query start + i attend to key j?"""
    same = segments[..., start:stop, None] == segments[..., None, :stop]
    return same & jnp.tri(stop - start, stop, start, dtype=bool)


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
    """query [..., Q, E], key [..., T, E] -> [..., Q, T] float32."""
    return einsum('...qe,...te->...qt', query, key)


def _exponentials(
    *products: jax.Array, scale: float
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The softmax over the last axes of all `products` together, times `scale`.

    The logits themselves are never written down: the scale is applied where exponentials are made.

    Returns:
      The numerators of each; their sum; the largest logit, which the numerators are relative to.
    """
    largest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in products])
    largest = jax.lax.stop_gradient(largest)
    numerators = [jnp.exp((x - largest) * scale) for x in products]
    return numerators, sum(x.sum(axis=-1, keepdims=True) for x in numerators), largest * scale


def _weigh(weights: jax.Array, value: jax.Array) -> jax.Array:
    """weights [..., Q, T], value [..., T, E] -> [..., Q, E] float32."""
    return einsum('...qt,...te->...qe', weights.astype(value.dtype), value)


def _transposed(weights: jax.Array, queries: jax.Array) -> jax.Array:
    """weights [..., Q, T] float32, queries [..., Q, E] -> [..., E, T] float32, a sum over Q.

    [E, T], not [T, E]: two thirds of the time on a CPU, where no bfloat16 product with a transposed
    left side is quick: there it is one of float32.
    """
    contract = functools.partial(
        jnp.einsum, '...qt,...qe->...et', preferred_element_type=jnp.float32
    )
    return jax.lax.platform_dependent(
        weights,
        queries,
        cpu=lambda weights, queries: contract(weights, queries.astype(jnp.float32)),
        default=lambda weights, queries: contract(weights.astype(queries.dtype), queries),
    )
