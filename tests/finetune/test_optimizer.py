"""The optimiser: what it moves, what it must never touch, what it keeps in memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from palr_jax.finetune.input import Tokens, lay_out, stack
from palr_jax.finetune.optimizer import learning_rate, make_optimizer, update
from palr_jax.finetune.train import Program, train_step
from palr_jax.llama import lora
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import log_likelihood
from palr_jax.testing.llama import random_params, tiny_config


def settings(**fields):
    defaults = {
        'learning_rate': 0.01,
        'warmup': 0,
        'decay_steps': 1000,
        'weight_decay': 0.0,
        'clip_norm': 1.0,
    }
    return ConfigDict(defaults | fields)


def tree(base_dtype=jnp.float32):
    """A projection with an adapter, all ones."""
    return {
        'q': {
            'kernel': jnp.ones((3, 5), base_dtype),
            'lora_a': jnp.ones((3, 2)),
            'lora_b': jnp.ones((2, 5)),
        },
        'norm': {'scale': jnp.ones(3, base_dtype)},
    }


def run(optimizer, params, gradient_of, steps):
    adapter, frozen = lora.split(params)
    state = optimizer.init(params)

    @jax.jit
    def step(adapter, state):
        return update(optimizer, gradient_of(adapter), state, adapter, frozen)

    for _ in range(steps):
        adapter, state = step(adapter, state)
    return adapter, state


def ones_like(adapter):
    return jax.tree.map(jnp.ones_like, adapter)


def test_the_learning_rate_by_hand():
    """Warm-up 4 to 1.0: the first step has 1/4, none has 0; a cosine to a tenth at step 10."""
    rate = learning_rate(settings(learning_rate=1.0, warmup=4, decay_steps=10))
    half = 0.1 + 0.9 * 0.5
    expected = {1: 0.25, 2: 0.5, 4: 1.0, 7: half, 10: 0.1, 11: 0.1, 500: 0.1}
    assert {step: float(rate(step - 1)) for step in expected} == pytest.approx(expected)
    assert float(learning_rate(settings(learning_rate=1.0))(0)) == pytest.approx(1.0, abs=1e-5)


def test_the_rest_of_the_tree_gets_a_zero_update():
    """L01: optax.masked would pass the frozen gradients through, as +1.0 here."""
    params = tree()
    optimizer = make_optimizer(settings())
    everywhere = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(everywhere, optimizer.init(params), params)
    moved, frozen = lora.split(updates)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(frozen))
    assert all(np.all(leaf < 0) for leaf in jax.tree.leaves(moved))


@pytest.mark.parametrize('gradient', [0.0, 1.0])
def test_weight_decay_reaches_the_adapter_alone_and_after_adams_scaling(gradient):
    """L02, weight decay 0.1. One step by hand: -rate * (g / (|g| + eps) + decay * 1)."""
    params = tree()
    optimizer = make_optimizer(settings(weight_decay=0.1, clip_norm=1e9, decay_steps=10**9))
    everywhere = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
    updates, _ = jax.jit(optimizer.update)(everywhere, optimizer.init(params), params)
    moved, frozen = lora.split(updates)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(frozen))
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, -0.01 * (gradient + 0.1), rtol=1e-4)


def test_the_clip_sees_the_adapters_norm():
    """L04: adapter (3, 4), frozen 12, clip 1: the norm is 5, the scale 1/5; not 13.

    Adam undoes any common scale, so the clipped gradient is read off its first moment (b1 = 0.9).
    """
    params = {'q': {'kernel': jnp.ones(1), 'lora_a': jnp.ones(1), 'lora_b': jnp.ones(1)}}
    gradient = {
        'q': {'kernel': jnp.array([12.0]), 'lora_a': jnp.array([3.0]), 'lora_b': jnp.array([4.0])}
    }
    optimizer = make_optimizer(settings(clip_norm=1.0))
    _, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    [adam] = [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
        if isinstance(leaf, optax.ScaleByAdamState)
    ]
    np.testing.assert_allclose(adam.mu['q']['lora_a'], 0.1 * 3 / 5, rtol=1e-6)
    np.testing.assert_allclose(adam.mu['q']['lora_b'], 0.1 * 4 / 5, rtol=1e-6)


def test_over_a_bfloat16_base_adapter_and_moments_are_float32_and_move():
    """L05: 100 steps of 6e-4; in bfloat16 each of them would round back to 1.0."""
    assert jnp.bfloat16(1.0) - jnp.bfloat16(6e-4) == jnp.bfloat16(1.0)
    params = tree(jnp.bfloat16)
    optimizer = make_optimizer(settings(learning_rate=6e-4, decay_steps=10**6))
    adapter, state = run(optimizer, params, ones_like, steps=100)
    for leaf in jax.tree.leaves(adapter):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, 1.0 - 100 * 6e-4, atol=1e-4)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 4
    assert all(leaf.dtype == jnp.float32 for leaf in floats)


BIG = tiny_config(vocab_size=20_000, width=32, hidden=2048, head_dim=8)
PROGRAM = Program(BIG, LoraSpec(2, 4.0, ('q', 'v')), jnp.float32)


@pytest.fixture(scope='module')
def big():
    """(adapter, optimiser, its state, base, a batch): the base is large, all the rest is small."""
    base = jax.eval_shape(functools.partial(jax.tree.map, jnp.asarray), random_params(BIG, 0))
    adapter = lora.init_adapter(BIG, PROGRAM.lora, seed=0)
    optimizer = make_optimizer(settings(weight_decay=0.1))
    state = jax.eval_shape(optimizer.init, lora.join(adapter, base))
    rows = stack([lay_out([Tokens(np.arange(6, dtype=np.int32), 4)], 8, 2)])
    return adapter, optimizer, state, base, rows


def sizes(tree):
    return [math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)]


def test_the_state_holds_no_leaf_of_base_size(big):
    """L02: walked leaf by leaf: two moments of each adapter leaf and the two step counts."""
    adapter, _, state, base, _ = big
    assert sorted(sizes(state)) == sorted([1, 1, *sizes(adapter), *sizes(adapter)])
    assert max(sizes(state)) < min(size for size in sizes(base) if size > 2 * BIG.width)


def test_the_compiled_step_holds_no_gradient_of_the_base(big):
    """Measured: XLA's scratch memory is far below the base, and the outputs hold none of it.

    The control has the norm of all gradients, as `clip_by_global_norm` outside the partition would.
    """
    adapter, optimizer, state, base, rows = big
    step = functools.partial(train_step, program=PROGRAM, optimizer=optimizer)
    memory = jax.jit(step).lower(adapter, state, base, rows).compile().memory_analysis()
    embedding = 4 * BIG.vocab_size * BIG.width
    assert 4 * sum(sizes(base)) > 2 * embedding
    assert memory.temp_size_in_bytes < embedding / 2
    assert memory.output_size_in_bytes < 3.2 * 4 * sum(sizes(adapter)) + 1024

    def everything(adapter, base):
        hidden = jnp.ones((1, 2, BIG.width))
        params = lora.join(adapter, base)
        value = jnp.mean(log_likelihood(hidden, jnp.arange(2)[None], params['head']['kernel']))
        return value + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(adapter))

    def careless(adapter, base):
        gradient = jax.grad(everything, argnums=(0, 1))(adapter, base)
        scale = 1 / optax.tree.norm(gradient)
        return jax.tree.map(lambda leaf, g: leaf - scale * g, adapter, gradient[0])

    control = jax.jit(careless).lower(adapter, base).compile().memory_analysis()
    assert control.temp_size_in_bytes >= embedding
