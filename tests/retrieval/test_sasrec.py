"""The encoders' forward passes against independent NumPy ones, and the field cases of padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palr_jax.retrieval.losses import Loss, full_ce
from palr_jax.retrieval.sasrec import (
    ENCODERS,
    SASRec,
    SasrecConfig,
    attention_mask,
    distance_bias,
    drop,
    init_params,
    mix,
    silu,
    softmax,
)
from palr_jax.retrieval.train import Rows, make_step

CONFIG = SasrecConfig('sasrec', items=9, width=8, blocks=2, heads=2, length=6)
MODEL = SASRec(CONFIG)


def random_params(config):
    """Every leaf random: zeros and ones of the initial biases and scales would hide mistakes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), init_params(config, 0)
    )


@pytest.fixture(scope='module')
def params():
    return random_params(CONFIG)


@jax.jit
def apply(params, ids, *args):
    return MODEL.apply({'params': params}, ids, *args)


def states(params, ids, *args):
    return np.asarray(apply(params, jnp.array(ids), *args))


def norm(x, at):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * at['scale'] + at['bias']


def linear(x, at):
    return x @ at['kernel'] + at['bias']


def silu_of(x):
    return x / (1 + np.exp(-x))


def sasrec_by_hand(x, p, heads):
    """One block, position by position and head by head; x is a list of vectors."""
    size = len(x[0]) // heads
    normed = [norm(v, p['attention_norm']) for v in x]
    q, k, v = ([linear(y, p['attention'][name]) for y in normed] for name in 'qkv')
    out = []
    for t in range(len(x)):
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            logits = np.array([q[t][part] @ k[s][part] / np.sqrt(size) for s in range(t + 1)])
            if 'distance' in p:
                logits += p['distance']['bias'][h][t::-1]
            weights = np.exp(logits) / np.exp(logits).sum()
            mixed.append(sum(w * v[s][part] for s, w in enumerate(weights)))
        y = x[t] + linear(np.concatenate(mixed), p['attention']['o'])
        up = linear(norm(y, p['mlp_norm']), p['mlp']['up'])
        out.append(y + linear(np.maximum(up, 0), p['mlp']['down']))
    return out


def hstu_by_hand(x, p, heads):
    size = len(x[0]) // heads
    rows = [silu_of(linear(norm(v, p['input_norm']), p['hstu']['uqkv'])) for v in x]
    u, q, k, v = ([row[i * len(x[0]) : (i + 1) * len(x[0])] for row in rows] for i in range(4))
    out = []
    for t in range(len(x)):
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = [
                silu_of(q[t][part] @ k[s][part] / np.sqrt(size) + p['distance']['bias'][h][t - s])
                for s in range(t + 1)
            ]
            mixed.append(sum(w * v[s][part] for s, w in enumerate(weights)))
        gated = norm(np.concatenate(mixed), p['mixed_norm']) * u[t]
        out.append(x[t] + linear(gated, p['hstu']['o']))
    return out


def by_hand(params, items, encoder, heads=2):
    """One history of real items in float64."""
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    n, width = len(items), p['items']['embedding'].shape[1]
    x = [p['items']['embedding'][item - 1] * np.sqrt(width) for item in items]
    if encoder == 'sasrec':
        x = [v + p['positions']['embedding'][n - 1 - place] for place, v in enumerate(x)]
    for i in range(2):
        block = hstu_by_hand if encoder == 'hstu' else sasrec_by_hand
        x = block(x, p[f'block_{i}'], heads)
    return np.array([norm(v, p['final_norm']) for v in x])


@pytest.mark.parametrize('encoder', ENCODERS)
@pytest.mark.parametrize('items', [[5], [5, 7], [1, 9, 9, 4, 2, 3]])
def test_equals_a_forward_pass_by_hand(encoder, items):
    config = dataclasses.replace(CONFIG, encoder=encoder)
    params = random_params(config)
    padded = [0] * (6 - len(items)) + items
    found = SASRec(config).apply({'params': params}, jnp.array([padded]))
    expected = by_hand(params, items, encoder)
    np.testing.assert_allclose(found[0, 6 - len(items) :], expected, rtol=2e-5, atol=2e-5)


def test_distance_bias_by_hand():
    """What lies above the diagonal is masked."""
    first, second = distance_bias(jnp.array([[1.0, 2, 3], [4, 5, 6]]), 3)
    assert first.tolist() == [[1, 1, 1], [2, 1, 1], [3, 2, 1]]
    assert second.tolist() == [[4, 4, 4], [5, 4, 4], [6, 5, 4]]
    assert distance_bias(jnp.array([[4.0, 5, 6]]), 2)[0].tolist() == [[4, 4], [5, 4]]


@pytest.mark.parametrize('weigh', [softmax, silu])
def test_queries_in_blocks_are_as_in_one_piece(weigh):
    """70 tokens are three blocks of 32, 32 and 6."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 2, 70, 4)).astype(np.float32)
    bias = rng.normal(size=(2, 70, 70)).astype(np.float32)
    mask = np.asarray(attention_mask(jnp.array(np.sort(rng.integers(0, 3, (2, 70))))))
    weights = weigh(np.einsum('bhqe,bhte->bhqt', q, k) / 2 + bias, mask[:, None])
    expected = np.einsum('bhqt,bhte->bhqe', weights, v)
    found = mix(weigh, *map(jnp.array, (q, k, v)), mask, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_s01_more_padding_in_front_changes_nothing(params):
    short, long = states(params, [[0, 5, 7]]), states(params, [[0, 0, 0, 5, 7]])
    np.testing.assert_allclose(short[0, -2:], long[0, -2:], rtol=1e-6, atol=1e-6)


def test_s01_padding_is_a_zero_vector_after_training_too():
    """The table has no row for padding, so neither initialisation nor a step can fill one."""
    params = init_params(CONFIG, 0)
    assert params['items']['embedding'].shape == (9, 8)
    optimizer, step = make_step(CONFIG, Loss(), 0.1, 0.1)
    moments = optimizer.init(params)
    ids = np.array([[0, 0, 5, 7], [0, 0, 0, 0]], np.int32)
    targets = np.array([[0, 0, 7, 1], [0, 0, 0, 0]], np.int32)
    batch = Rows(ids, targets, np.array([[3, 2, 1, 0]] * 2, np.int32), (ids > 0).astype(np.int32))
    first = np.array(params['items']['embedding'])
    for number in range(3):
        params, moments, loss = step(params, moments, batch, jnp.ones(9), jax.random.key(number))
        assert np.isfinite(loss)
    assert not states(params, [[0, 0, 5, 7]])[0, :2].any()
    moved = np.abs(np.asarray(params['items']['embedding']) - first).max(1)
    assert moved[[4, 6]].min() > 0.01
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_s02_later_items_change_nothing_at_earlier_positions(params):
    one, other = states(params, [[1, 2, 3, 4]]), states(params, [[1, 2, 3, 8]])
    np.testing.assert_array_equal(one[0, :3], other[0, :3])
    assert np.abs(one[0, 3] - other[0, 3]).max() > 0.01


def test_s02_padding_is_never_attended_to(params):
    """Whatever the vectors at padding are: here its positions become enormous."""
    changed = jax.tree.map(np.copy, params)
    changed['positions']['embedding'][2:] = 1e3
    ids = [[0, 0, 0, 5, 7]]
    np.testing.assert_array_equal(states(params, ids)[0, 3:], states(changed, ids)[0, 3:])
    assert not states(changed, ids)[0, :3].any()


@pytest.mark.slow
def test_s03_a_row_of_padding_is_finite_and_disturbs_no_other(params):
    both, alone = states(params, [[0, 0, 0, 0], [0, 1, 2, 3]]), states(params, [[0, 1, 2, 3]])
    assert not both[0].any()
    np.testing.assert_allclose(both[1], alone[0], rtol=1e-6, atol=1e-6)

    @jax.jit
    @jax.value_and_grad
    def loss(params, ids, targets):
        x = MODEL.apply({'params': params}, ids).reshape(-1, 8)
        return full_ce(x, params['items']['embedding'], targets.ravel())

    ids, targets = np.array([[0, 0, 0, 0], [0, 1, 2, 3]]), np.array([[0, 0, 0, 0], [0, 2, 3, 4]])
    with_row, without = loss(params, ids, targets)[1], loss(params, ids[1:], targets[1:])[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), with_row, without)

    value, gradient = loss(params, ids[:1], targets[:1])
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize('encoder', ENCODERS)
def test_histories_in_one_row_are_as_if_alone(encoder):
    config = dataclasses.replace(CONFIG, encoder=encoder)
    params = random_params(config)

    def states(ids, *args):
        return SASRec(config).apply({'params': params}, jnp.array(ids), *map(jnp.array, args))

    packed = states([[1, 2, 3, 8, 9, 0]], [[2, 1, 0, 1, 0, 0]], [[1, 1, 1, 2, 2, 0]])
    first, second = states([[1, 2, 3]]), states([[8, 9]])
    np.testing.assert_allclose(packed[0, :3], first[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(packed[0, 3:5], second[0], rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean_and_is_off_without_a_key(params):
    x = jnp.ones((200, 100))
    dropped = drop(x, 0.25, jax.random.key(0))
    np.testing.assert_allclose(np.unique(dropped), [0, 4 / 3], rtol=1e-6)
    assert abs(float(dropped.mean()) - 1) < 0.02

    @jax.jit
    def apply_dropout(params, ids, rngs):
        return MODEL.apply({'params': params}, ids, dropout=0.5, rngs=rngs)

    ids, clean = jnp.array([[1, 2]]), states(params, [[1, 2]])
    np.testing.assert_allclose(apply_dropout(params, ids, {}), clean, rtol=1e-5)
    noisy = apply_dropout(params, ids, {'dropout': jax.random.key(1)})
    assert np.abs(noisy - clean).max() > 0.01
