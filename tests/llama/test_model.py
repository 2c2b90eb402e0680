"""The architecture against NumPy written out, hand arithmetic, and its own promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palr_jax.llama.attention import Causal, OnePass
from palr_jax.llama.config import RopeScaling
from palr_jax.llama.model import (
    LOGIT_CHUNK,
    Llama,
    apply_logits,
    inverse_frequencies,
    log_likelihood,
    rms_norm,
    rotate,
    swiglu,
)
from palr_jax.testing.llama import random_params, tiny_config

CONFIG = tiny_config(vocab_size=97)


@pytest.fixture(scope='module')
def params():
    return random_params(CONFIG, seed=3)


@pytest.fixture(scope='module')
def logits():
    return jax.jit(functools.partial(apply_logits, config=CONFIG))


def numpy_attention(query, key, value, mask):
    """One row: query [T, H, E], key and value [T, K, E], mask [T, T] -> [T, H, E], head by head."""
    T, H, E = query.shape
    out = np.zeros((T, H, E))
    for head in range(H):
        shared = head // (H // key.shape[1])
        for t in range(T):
            scores = key[mask[t], shared] @ query[t, head] / math.sqrt(E)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ value[mask[t], shared]
    return out


def draw_heads(T, seed=0, B=2, H=6, K=2, E=8):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, T, n, E)).astype(np.float32) for n in (H, K, K)]


@pytest.mark.parametrize('T', [1, 7, 300])
def test_causal_attention_equals_numpy(T):
    """Grouped heads; 300 tokens are cut into three blocks of queries, the last one short."""
    query, key, value = draw_heads(T)
    segments = np.sort(np.random.default_rng(1).integers(0, 4, (2, T)))[:, ::-1]
    plan = Causal(jnp.asarray(segments))
    out = np.asarray(jax.jit(lambda *x: plan(*x))(query, key, value))
    for b in range(2):
        mask = np.tri(T, dtype=bool) & (segments[b][:, None] == segments[b])
        np.testing.assert_allclose(
            out[b], numpy_attention(query[b], key[b], value[b], mask), atol=2e-6
        )


@pytest.mark.parametrize('T', [7, 300])
def test_the_gradient_of_causal_attention_is_that_of_a_plain_softmax(T):
    """Its backward pass is written by hand; here is what JAX makes of the definition."""
    query, key, value = draw_heads(T)
    weight = draw_heads(T, seed=2)[0]
    segments = np.sort(np.random.default_rng(1).integers(0, 4, (2, T)))[:, ::-1]
    mask = np.tri(T, dtype=bool) & (segments[:, :, None] == segments[:, None])

    def plain(query, key, value):
        key, value = (jnp.repeat(x, 3, axis=2) for x in (key, value))
        scores = jnp.einsum('bqhe,bthe->bhqt', query, key) / math.sqrt(query.shape[-1])
        shares = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
        return jnp.einsum('bhqt,bthe->bqhe', shares, value)

    plan = Causal(jnp.asarray(segments))
    found, expected = (
        jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) * weight), (0, 1, 2)))(query, key, value)
        for f in (lambda *x: plan(*x), plain)
    )
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_backward_pass_does_not_attend_again(params):
    """The maximum of the logits is taken once, on the way forward; with no memory, twice."""
    tokens = jnp.ones((1, 9), jnp.int32)
    maxima = {}
    for remat in ('projections', 'full'):
        model = Llama(CONFIG, remat=remat)

        def loss(params, model=model):
            return model.apply({'params': params}, tokens, tokens, Causal(tokens)).sum()

        maxima[remat] = str(jax.make_jaxpr(jax.grad(loss))(params)).count('reduce_max')
    assert maxima == {'projections': 1, 'full': 2}


def test_one_pass_attention_equals_numpy_under_one_mask():
    L, R, S = 9, 2, 6
    query, key, value = draw_heads(L + R * S)
    lengths = [9, 4]
    rows = np.array([[[1, 1, 1, 2, 2, 0], [3, 3, 4, 0, 0, 0]], [[2, 1, 1, 1, 1, 1], [0] * 6]])
    prompt = np.arange(L) < np.array(lengths)[:, None]
    key[1, 4:9] *= 1e3  # of padding: it must not even decide what the largest logit is
    plan = OnePass(jnp.asarray(prompt), jnp.asarray(rows))
    out = np.asarray(jax.jit(lambda *x: plan(*x))(query, key, value))
    for b in range(2):
        # Candidate tokens see the prompt and their own segment; a segment lies within one row.
        segments = np.concatenate([np.where(prompt[b], 9, -1), rows[b].ravel()])
        mask = np.tri(L + R * S, dtype=bool) & (segments[:, None] == segments)
        mask[L:, : lengths[b]] = True
        real = segments > 0
        expected = numpy_attention(query[b], key[b], value[b], mask)
        np.testing.assert_allclose(out[b][real], expected[real], atol=2e-6)
    assert np.isfinite(out).all()


def numpy_forward(params, tokens):
    """Logits [T, V] of one unpadded row: the layers of CONFIG one after another, in float64."""
    leaf = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    params, c, T = leaf(params), CONFIG, len(tokens)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    def turn(x):
        """[T, H, E]: (first, second) half of each head as a complex number, turned."""
        half = c.head_dim // 2
        angle = np.arange(T)[:, None] * c.rope_theta ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    x = params['embed']['embedding'][tokens]
    for n in range(c.layers):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], params['layers'])
        at = {k: v['kernel'] for k, v in layer['attention'].items()}
        mlp = {k: v['kernel'] for k, v in layer['mlp'].items()}
        h = norm(x, layer['attention_norm']['scale'])
        query = turn((h @ at['q']).reshape(T, c.heads, c.head_dim))
        key = turn((h @ at['k']).reshape(T, c.kv_heads, c.head_dim))
        value = (h @ at['v']).reshape(T, c.kv_heads, c.head_dim)
        mixed = numpy_attention(query, key, value, np.tri(T, dtype=bool))
        x = x + mixed.reshape(T, -1) @ at['o']
        h = norm(x, layer['mlp_norm']['scale'])
        gate = h @ mlp['gate']
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp['up'])) @ mlp['down']
    return norm(x, params['final_norm']['scale']) @ params['head']['kernel']


def test_scanned_model_equals_unrolled_numpy(params, logits):
    tokens = np.random.default_rng(0).integers(0, 97, (2, 12))
    out = np.asarray(logits(params, tokens=tokens))
    for b in range(2):
        np.testing.assert_allclose(out[b], numpy_forward(params, tokens[b]), atol=5e-5)


def test_tied_head_is_the_transposed_embedding(params, logits):
    tied = {name: leaf for name, leaf in params.items() if name != 'head'}
    untied = tied | {'head': {'kernel': params['embed']['embedding'].T}}
    tokens = np.arange(7)[None]
    of_tied = jax.jit(
        functools.partial(apply_logits, config=tiny_config(vocab_size=97, tied_head=True))
    )
    np.testing.assert_allclose(
        of_tied(tied, tokens=tokens), logits(untied, tokens=tokens), atol=1e-5
    )


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_and_batch_mates_change_nothing(params, logits, side):
    """P08: a prompt alone and beside a longer one, padded left and right."""
    rng = np.random.default_rng(1)
    short, long = rng.integers(0, 97, 7), rng.integers(0, 97, 12)
    alone = np.asarray(logits(params, tokens=short[None]))[0]
    padding = np.zeros(5, int)
    order = [padding, short] if side == 'left' else [short, padding]
    real = np.concatenate([np.full(len(part), part is short) for part in order])
    tokens = np.stack([np.concatenate(order), long])
    segments = np.stack([real, np.ones(12, bool)]).astype(np.int32)
    together = np.asarray(logits(params, tokens=tokens, segments=segments))
    np.testing.assert_allclose(together[0, real], alone, atol=1e-5)
    given = np.maximum(np.cumsum(segments, axis=1) - 1, 0)  # the usual cumsum(mask) - 1
    explicit = logits(params, tokens=tokens, segments=segments, positions=given)
    np.testing.assert_allclose(np.asarray(explicit)[0, real], alone, atol=1e-5)
    np.testing.assert_allclose(
        together[1], np.asarray(logits(params, tokens=long[None]))[0], atol=1e-5
    )


def test_packed_segments_equal_rows_of_their_own(params, logits):
    rng = np.random.default_rng(2)
    parts = [rng.integers(0, 97, n) for n in (7, 5)]
    segments = np.repeat([1, 2], [7, 5])[None]
    packed = np.asarray(logits(params, tokens=np.concatenate(parts)[None], segments=segments))[0]
    for number, part in enumerate(parts, start=1):
        alone = np.asarray(logits(params, tokens=part[None]))[0]
        np.testing.assert_allclose(packed[segments[0] == number], alone, atol=1e-5)


def test_inverse_frequencies_by_hand():
    """M06. llama3 in an original context of 2048: 0.01 makes 3.2595 turns, between 1 and 4."""

    def of(scaling):
        config = tiny_config(head_dim=8, rope_theta=10000.0, rope_scaling=scaling)
        return np.asarray(inverse_frequencies(config))

    np.testing.assert_allclose(of(None), [1, 0.1, 0.01, 0.001], rtol=1e-6)
    np.testing.assert_allclose(
        of(RopeScaling('linear', 4.0)), [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6
    )
    # kept, kept, 0.753165 * 0.01 + 0.246835 * 0.01 / 8, divided by 8
    llama3 = of(RopeScaling('llama3', 8.0, 1.0, 4.0, 2048))
    np.testing.assert_allclose(llama3, [1, 0.1, 0.00784019, 0.000125], rtol=1e-5)


def test_rotation_turns_halves():
    """A quarter turn of (first half, second half): (1, 0) -> (0, 1) and (0, 1) -> (-1, 0)."""
    x = jnp.array([[1.0, 0.0, 0.0, 1.0]]).reshape(1, 1, 1, 4)  # pairs (1, 0) and (0, 1)
    quarter = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2))
    np.testing.assert_array_equal(rotate(x, quarter).ravel(), [0, -1, 1, 0])


def test_swiglu_and_its_gradients():
    """By the definition in float64; the slope of x * sigmoid(x) by central differences."""
    rng = np.random.default_rng(8)
    gate, up, weight = rng.standard_normal((3, 2, 5))

    def silu(x):
        return x / (1 + np.exp(-x))

    slope = (silu(gate + 1e-5) - silu(gate - 1e-5)) / 2e-5
    out, pull = jax.vjp(swiglu, *(jnp.asarray(x, jnp.float32) for x in (gate, up)))
    np.testing.assert_allclose(out, silu(gate) * up, atol=1e-6)
    gate_bar, up_bar = pull(jnp.asarray(weight, jnp.float32))
    np.testing.assert_allclose(gate_bar, weight * up * slope, atol=1e-6)
    np.testing.assert_allclose(up_bar, weight * silu(gate), atol=1e-6)


def test_rms_norm_by_hand():
    """rms of (3, 4) is sqrt(12.5); in bfloat16 the mean is still taken in float32."""
    out = rms_norm(jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0]), eps=0.0)
    np.testing.assert_allclose(out, [3 / math.sqrt(12.5), 8 / math.sqrt(12.5)], rtol=1e-6)
    wide = jnp.full(1000, 1.0078125, jnp.bfloat16)  # a sum in bfloat16 would stop at 256
    np.testing.assert_array_equal(rms_norm(wide, jnp.ones(1000), 0.0), jnp.ones(1000))


@pytest.mark.parametrize(
    ('B', 'each'),
    [(1, 1), (1, LOGIT_CHUNK), (2, LOGIT_CHUNK // 2 + 1), (3, LOGIT_CHUNK), (LOGIT_CHUNK + 1, 2)],
)
def test_log_likelihood_in_chunks_equals_the_whole(B, each):
    rng = np.random.default_rng(4)
    N = B * each
    hidden, head = rng.standard_normal((N, 6)), rng.standard_normal((6, 11))
    targets = rng.integers(0, 11, N)
    logits = hidden @ head
    whole = logits[np.arange(N), targets] - np.log(np.exp(logits).sum(-1))
    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, head)]

    def mean(hidden, head, axis=0):
        rows = hidden.reshape(B, each, 6), jnp.asarray(targets).reshape(B, each)
        values = log_likelihood(*rows, head, axis).ravel()
        return jnp.mean(values), values

    gradients = functools.partial(jax.value_and_grad, has_aux=True)
    (_, values), (by_hidden, by_head) = jax.jit(gradients(mean, (0, 1)))(*arrays)
    np.testing.assert_allclose(values, whole, atol=1e-5)
    error = np.eye(11)[targets] - np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(by_hidden, error @ head.T / N, atol=1e-6)
    np.testing.assert_allclose(by_head, hidden.T @ error / N, atol=1e-6)

    # A frozen head takes another way, here with a tied one: [V, D].
    frozen = jax.jit(gradients(functools.partial(mean, axis=1)))
    (_, values), by_hidden = frozen(arrays[0], arrays[1].T)
    np.testing.assert_allclose(values, whole, atol=1e-5)
    np.testing.assert_allclose(by_hidden, error @ head.T / N, atol=1e-6)


def test_a_token_outside_the_vocabulary_is_no_number(params, logits):
    """An out-of-range gather clamps silently in JAX; here it must not pass for a score."""
    targets = jnp.array([[3, -1, -3, -4]])
    found = log_likelihood(jnp.ones((1, 4, 2)), targets, jnp.ones((2, 3)))
    assert np.isnan(found).all()
    assert np.isnan(logits(params, tokens=np.array([[1, 2, 3, 4, 5, 6, 97]]))[0, 6]).all()


def test_init_makes_the_documented_tree(params):
    plan = Causal(jnp.ones((1, 2), jnp.int32))
    made = jax.eval_shape(
        Llama(CONFIG).init, jax.random.key(0), jnp.ones((1, 2), int), jnp.ones((1, 2), int), plan
    )['params']
    assert jax.tree.map(lambda leaf: leaf.shape, made) == jax.tree.map(np.shape, params)


def test_activations_have_the_dtype_asked_for(params):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    tokens = np.arange(6)[None]
    arguments = {'params': half}, tokens, tokens, Causal(jnp.ones((1, 6), jnp.int32))
    for dtype in (jnp.bfloat16, jnp.float32):
        assert jax.eval_shape(Llama(CONFIG, None, dtype).apply, *arguments).dtype == dtype
    of_half = functools.partial(apply_logits, config=CONFIG)
    assert jax.eval_shape(of_half, half, tokens=tokens).dtype == jnp.float32
