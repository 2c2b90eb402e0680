"""The losses against optax, against each other, and against their definitions by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from palr_jax.retrieval.losses import (
    LOSSES,
    Loss,
    binary_ce,
    full_ce,
    gbce_beta,
    sampled_softmax,
)

rng = np.random.default_rng(0)
STATES = jnp.asarray(rng.normal(size=(300, 16)), jnp.float32)
TABLE = jnp.asarray(rng.normal(size=(40, 16)), jnp.float32)
TARGETS = rng.integers(0, 41, 300)
LOGITS = np.asarray(STATES @ TABLE.T)
REAL = TARGETS > 0
POSITIVE = LOGITS[np.arange(300), TARGETS - 1]


def log_sigmoid(x):
    return -np.log1p(np.exp(-x.astype(np.float64)))


def mean(losses):
    return losses[REAL].mean()


def test_full_ce_and_its_gradient_equal_optax():
    """In chunks by hand here, in one piece and by automatic differentiation there."""

    def reference(states, table):
        losses = optax.softmax_cross_entropy_with_integer_labels(states @ table.T, TARGETS - 1)
        return (losses * REAL).sum() / REAL.sum()

    table = 2 * TABLE
    expected = jax.jit(jax.value_and_grad(reference, (0, 1)))(STATES, table)
    found = jax.jit(jax.value_and_grad(full_ce, (0, 1)))(STATES, table, TARGETS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


def test_sampling_every_item_once_is_the_full_softmax():
    """With each item among I negatives and q = 1/I, the estimate of the partition is exact."""
    everything = jnp.arange(1, 41), jnp.full(40, -np.log(40))
    found = jax.value_and_grad(sampled_softmax, (0, 1))(STATES, TABLE, TARGETS, *everything)
    expected = jax.value_and_grad(full_ce, (0, 1))(STATES, TABLE, TARGETS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


@pytest.mark.parametrize('popular', [0.0, 0.5, 1.0])
def test_the_logq_correction_makes_the_partition_unbiased(popular):
    """Whatever the proposal: over many draws the estimated sum of exponentials is the full one."""
    counts = jnp.arange(1.0, 41)
    state, target = STATES[REAL][:1], TARGETS[REAL][:1]
    positive = np.exp(LOGITS[REAL][0, target[0] - 1])

    def partition(key):
        loss = Loss('sampled_softmax', negatives=32, popular=popular)
        return jnp.exp(loss(state, TABLE, target, counts, key)) * positive

    estimates = jax.vmap(partition)(jax.random.split(jax.random.key(0), 4000))
    error = np.std(estimates) / np.sqrt(4000)
    assert abs(estimates.mean() - np.exp(LOGITS[REAL][0]).sum()) < 4 * error
    assert error < 0.02 * estimates.mean()


def test_negatives_come_by_popularity_where_asked():
    """With all of them by popularity, items without a training event are never drawn."""
    counts = jnp.zeros(40).at[jnp.array([2, 5])].set(1.0)
    table = TABLE.at[2].set(0).at[5].set(0)  # the only two that may be drawn

    def gradient(popular, key):
        loss = Loss('sampled_softmax', negatives=8, popular=popular)
        return jax.grad(lambda t: loss(STATES[:4], t, jnp.full(4, 40), counts, key))(table)

    touched = np.abs(gradient(1.0, jax.random.key(0))).max(1) > 0
    assert touched.nonzero()[0].tolist() in ([2, 39], [5, 39], [2, 5, 39])
    assert (np.abs(gradient(0.0, jax.random.key(0))).max(1) > 0).sum() > 3


def test_binary_ce_with_own_and_with_shared_negatives_by_hand():
    own = rng.integers(1, 41, (300, 1))
    logits = LOGITS[np.arange(300), own[:, 0] - 1]
    against = np.where(own[:, 0] == TARGETS, 0, -log_sigmoid(-logits))
    expected = mean(-log_sigmoid(POSITIVE) + against)
    assert binary_ce(STATES, TABLE, TARGETS, own) == pytest.approx(expected, rel=1e-5)

    shared = np.array([[3, 9, 9, 20]])
    against = np.where(TARGETS[:, None] == shared, 0, -log_sigmoid(-LOGITS[:, shared[0] - 1]))
    expected = mean(-0.3 * log_sigmoid(POSITIVE) + against.sum(1))
    assert binary_ce(STATES, TABLE, TARGETS, shared, 0.3) == pytest.approx(expected, rel=1e-5)


def test_gbce_beta_of_the_paper():
    """alpha (t (1 - 1/alpha) + 1/alpha) with alpha = n / (I - 1); gSASRec's settings on ML-1M."""
    alpha = 256 / 3415
    assert gbce_beta(256, 3416, 0.75) == pytest.approx(alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha))
    assert gbce_beta(256, 3416, 0.0) == 1
    assert gbce_beta(256, 3416, 1.0) == pytest.approx(alpha)
    assert gbce_beta(50, 10, 0.75) == 1  # more negatives than items: nothing is sampled away


def test_gbce_with_t_1_is_calibrated():
    """At its optimum an item's sigmoid is the item's probability, up to 1 / I (gSASRec).

    One state, whose targets have these shares, and negatives of which each item is one equally
    often. With their mean in place of their sum, .3 would become .81.
    """
    items, n = 50, 10
    shares = np.array([6, 4, 3, 2, 2, 1, 1, 1]) / 20
    targets = np.repeat(np.repeat(np.arange(1, 9), (20 * shares).astype(int)), items // n)
    negatives = np.tile(np.arange(1, items + 1).reshape(-1, n), (20, 1))
    states, beta = jnp.ones((len(targets), 1)), gbce_beta(n, items, 1.0)
    optimizer, start = optax.adam(0.05), jnp.full(items, -3.0)

    def step(carry, _):
        scores, moments = carry
        gradient = jax.grad(lambda s: binary_ce(states, s[:, None], targets, negatives, beta))
        updates, moments = optimizer.update(gradient(scores), moments)
        return (optax.apply_updates(scores, updates), moments), None

    (scores, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=1000)
    np.testing.assert_allclose(jax.nn.sigmoid(scores[:8]), shares, rtol=1 / items)


@pytest.mark.parametrize('kind', LOSSES)
def test_s03_a_batch_without_targets_has_loss_zero(kind):
    def loss(states, table):
        return Loss(kind, negatives=4)(
            states, table, jnp.zeros(4, int), jnp.zeros(3), jax.random.key(0)
        )

    value, gradient = jax.value_and_grad(loss, (0, 1))(jnp.ones((4, 2)), jnp.ones((3, 2)))
    assert value == 0
    assert not np.any(gradient[0])
    assert not np.any(gradient[1])
