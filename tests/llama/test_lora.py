"""Adapters: which leaves are theirs, where they start, what they add."""

import dataclasses
import functools
import math
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.llama import lora
from palr_jax.llama.attention import Causal
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import Llama, Projection, apply_logits
from palr_jax.llama.products import low_rank
from palr_jax.testing.llama import random_params, tiny_config

CONFIG = tiny_config(vocab_size=61)
SPEC = LoraSpec(rank=4, alpha=8.0, targets=lora.TARGETS)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))


@pytest.fixture(scope='module')
def base():
    return random_params(CONFIG, seed=1)


@pytest.fixture(scope='module')
def adapted():
    return jax.jit(functools.partial(apply_logits, config=CONFIG, lora=SPEC))


@pytest.fixture(scope='module')
def plain(base):
    return np.asarray(jax.jit(functools.partial(apply_logits, config=CONFIG))(base, tokens=TOKENS))


def trained(spec=SPEC):
    """An adapter as after training: no factor is zero."""
    rng = np.random.default_rng(7)
    adapter = lora.init_adapter(CONFIG, spec, seed=0)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), adapter)


def test_split_takes_the_tree_apart_and_join_mends_it(base):
    params = lora.join(trained(), base)
    adapter, frozen = lora.split(params)
    flat = jax.tree_util.tree_leaves_with_path(adapter)
    assert len(flat) == 2 * len(lora.TARGETS)
    assert all(path[-1].key in ('lora_a', 'lora_b') for path, _ in flat)
    assert jax.tree.structure(frozen) == jax.tree.structure(base)
    again = lora.join(adapter, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params)))


def test_gradients_of_the_low_rank_product():
    """Of sum(y * weight): by the chain rule in float64."""
    rng = np.random.default_rng(3)
    x, a, b = (rng.standard_normal(shape) for shape in ((2, 5, 7), (7, 3), (3, 4)))
    weight = rng.standard_normal((2, 5, 4))
    narrow = [jnp.asarray(array, jnp.float32) for array in (x, a, b)]
    out, pull = jax.vjp(low_rank, *narrow)
    np.testing.assert_allclose(out, x @ a @ b, atol=1e-5)
    tokens, wanted = x.reshape(-1, 7), weight.reshape(-1, 4)
    expected = (
        weight @ (a @ b).T,
        tokens.T @ wanted @ b.T,
        (tokens @ a).T @ wanted,
    )
    for found, known in zip(pull(jnp.asarray(weight, jnp.float32)), expected):
        np.testing.assert_allclose(found, known, atol=1e-5)


def test_labels_have_the_structure_of_the_parameters(base):
    """L03: one label tree, derived from the parameters, for all that treats them differently."""
    params = lora.join(trained(), base)
    labels = lora.labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert labels['layers']['attention']['q'] == {
        'kernel': lora.FROZEN,
        'lora_a': lora.ADAPTER,
        'lora_b': lora.ADAPTER,
    }
    assert set(jax.tree.leaves(lora.labels(base))) == {lora.FROZEN}


def test_init_adapter_has_the_shapes_that_the_model_declares(base):
    one = np.ones((1, 2), np.int32)
    made = jax.eval_shape(Llama(CONFIG, SPEC).init, jax.random.key(0), one, one, Causal(one))
    shape = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    drawn = lora.join(lora.init_adapter(CONFIG, SPEC, seed=0), base)
    assert shape(drawn) == shape(made['params'])


def test_a_is_random_and_b_is_zero_so_the_adapted_model_starts_as_the_base(base, plain, adapted):
    """Two zero factors would never train; two random ones would spoil the base from the start."""
    adapter = lora.init_adapter(CONFIG, SPEC, seed=0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        if path[-1].key == 'lora_b':
            assert not np.any(leaf)
        else:
            assert_drawn_as_peft_draws(leaf, fan_in=leaf.shape[1])
            assert not np.array_equal(leaf[0], leaf[1])  # each layer draws its own
    np.testing.assert_allclose(adapted(lora.join(adapter, base), tokens=TOKENS), plain, atol=1e-5)


def test_the_model_declares_the_same_start():
    drawn = Projection(8, SPEC, jnp.float32).init(jax.random.key(0), jnp.ones((1, 300)))['params']
    assert_drawn_as_peft_draws(drawn['lora_a'], fan_in=300)
    assert not np.any(drawn['lora_b'])
    assert drawn['lora_a'].dtype == drawn['lora_b'].dtype == jnp.float32


def assert_drawn_as_peft_draws(a, fan_in):
    """kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    assert np.abs(a).max() <= bound
    assert np.std(a) == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_the_seed_decides_the_start():
    first, same, other = (lora.init_adapter(CONFIG, SPEC, seed) for seed in (0, 0, 1))
    a = lambda adapter: np.asarray(adapter['layers']['attention']['q']['lora_a'])  # noqa: E731
    np.testing.assert_array_equal(a(first), a(same))
    assert not np.array_equal(a(first), a(other))


@pytest.mark.parametrize(
    ('rank', 'alpha', 'scaling'), [(16, 32.0, 2.0), (8, 16.0, 2.0), (8, 4.0, 0.5)]
)
def test_scaling_is_alpha_over_rank(rank, alpha, scaling):
    """L06: not alpha, not alpha / sqrt(rank)."""
    assert LoraSpec(rank, alpha, ('q',)).scaling == scaling


@pytest.mark.parametrize(
    ('rank', 'alpha', 'scaling'), [(16, 32.0, 8.0), (4, 8.0, 4.0), (64, 16.0, 2.0)]
)
def test_rslora_scales_by_alpha_over_the_root_of_the_rank(rank, alpha, scaling):
    """L06: r = 16, alpha = 32 gives 8, where plain LoRA gives 2."""
    assert LoraSpec(rank, alpha, ('q',), rslora=True).scaling == scaling


@pytest.mark.parametrize(('rslora', 'factor'), [(False, 2.0), (True, 4.0)])
def test_an_adapter_equals_its_merged_kernels(base, plain, rslora, factor):
    """L06: forward pass and merge add the same multiple of A B to every adapted kernel."""
    spec = dataclasses.replace(SPEC, rslora=rslora)
    adapter = trained()
    merged = jax.tree.map(np.array, base)
    for name in lora.TARGETS:
        part = 'attention' if name in 'qkvo' else 'mlp'
        a, b = (np.asarray(adapter['layers'][part][name][f'lora_{x}']) for x in 'ab')
        kernels = merged['layers'][part][name]['kernel']
        ours = [lora.merge(*parts, spec) for parts in zip(kernels, a, b)]
        kernels += factor * np.einsum('nir,nro->nio', a, b)
        np.testing.assert_allclose(ours, kernels, atol=1e-5)
    both = jax.jit(functools.partial(apply_logits, config=CONFIG, lora=spec))
    out = both(lora.join(adapter, base), tokens=TOKENS)
    expected = jax.jit(functools.partial(apply_logits, config=CONFIG))(merged, tokens=TOKENS)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert np.abs(expected - plain).max() > 0.1


def test_merging_into_bfloat16_rounds_once():
    """X04: 1 + 2**-8 + 2**-8 is 1 + 2**-7, which bfloat16 holds; a first rounding would lose it.

    The delta is the product of factors whose own bfloat16 forms would give another one.
    """
    kernel = np.array([[1.0 + 2**-8]], np.float32)
    a, b = np.array([[1.0 + 2**-9]], np.float32), np.array([[2**-8 / (1.0 + 2**-9)]], np.float32)
    merged = lora.merge(kernel, a, b, LoraSpec(1, 1.0, ('q',)))
    assert merged.dtype == np.float32
    assert merged.astype(jnp.bfloat16) == 1.0 + 2**-7
    assert merged[0, 0] == pytest.approx(1.0 + 2**-7, abs=1e-7)
    half = np.ones((1, 1), jnp.bfloat16)  # a base in bfloat16 is widened before the sum
    assert lora.merge(half, a, 0.25 * b, LoraSpec(1, 1.0, ('q',))).item() > 1.0
    # A delta in bfloat16 would be 2**-8, and 1 + 2**-8 a tie, which goes down to 1.
    delta = np.array([[2**-8 + 2**-17]], np.float32)
    merged = lora.merge(half, np.ones((1, 1), np.float32), delta, LoraSpec(1, 1.0, ('q',)))
    assert merged.astype(jnp.bfloat16) == 1.0 + 2**-7


def test_dropout_zeroes_inputs_of_the_adapter_and_none_of_the_kernel():
    """With A = B = 1 and alpha = r the output is the kernel's plus the dropped input itself."""
    x = jnp.arange(1.0, 401.0).reshape(1, 400)
    eye = jnp.eye(400)
    params = {'params': {'kernel': -3 * eye, 'lora_a': eye, 'lora_b': eye}}
    layer = Projection(400, LoraSpec(400, 400.0, ('q',), dropout=0.75), jnp.float32)
    kept = np.asarray(layer.apply(params, x, rngs={'dropout': jax.random.key(0)}) + 3 * x)
    zeros = kept == 0
    np.testing.assert_allclose(kept[~zeros], 4 * x[~zeros], rtol=1e-6)  # 1 / (1 - 0.75)
    assert 0.7 < zeros.mean() < 0.8  # 400 draws: 0.75 +- 0.022
    np.testing.assert_array_equal(layer.apply(params, x), -2 * x)  # no rng: evaluation


@pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason='flax 0.12.12, which Python 3.12 has, lets no debug callback through nn.scan.',
)
def test_each_projection_and_layer_drops_inputs_of_its_own(base, monkeypatch):
    seen, call = [], nn.Dropout.__call__

    def recorded(self, x, **options):
        out = call(self, x, **options)
        jax.debug.callback(lambda values: seen.append(np.asarray(values == 0)), out)
        return out

    monkeypatch.setattr(nn.Dropout, '__call__', recorded)
    model = Llama(CONFIG, dataclasses.replace(SPEC, dropout=0.5))
    variables = {'params': lora.join(trained(), base)}
    inputs = TOKENS, np.arange(9)[None].repeat(2, 0), Causal(jnp.ones_like(TOKENS))
    first, again, other = (
        model.apply(variables, *inputs, rngs={'dropout': jax.random.key(seed)})
        for seed in (3, 3, 4)
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert len(seen) == 3 * 2 * len(lora.TARGETS)
    masks = [mask for mask in seen[: 2 * len(lora.TARGETS)] if mask.shape == (2, 9, 32)]
    assert len(masks) == 2 * 6  # all but `down`, whose input is wider
    for i, mask in enumerate(masks):
        assert 0.4 < mask.mean() < 0.6
        assert all(0.4 < (mask != earlier).mean() < 0.6 for earlier in masks[:i])


def test_only_the_named_projections_are_adapted():
    spec = LoraSpec(4, 8.0, ('q', 'down'))
    assert jax.tree.map(lambda leaf: leaf.shape, lora.init_adapter(CONFIG, spec, seed=0)) == {
        'layers': {
            'attention': {'q': {'lora_a': (2, 32, 4), 'lora_b': (2, 4, 32)}},
            'mlp': {'down': {'lora_a': (2, 64, 4), 'lora_b': (2, 4, 32)}},
        }
    }


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((0, 8.0, ('q',)), 'lora.rank is 0; allowed: 1 or more'),
        ((4, 0.0, ('q',)), 'lora.alpha is 0.0; allowed: a number above 0'),
        ((4, math.nan, ('q',)), 'lora.alpha is nan'),
        ((4, 8.0, ()), 'lora.targets holds nothing; allowed: one or more of q k v o'),
        ((4, 8.0, ('q', 'q_proj')), r"lora.targets holds \['q_proj'\]"),
        ((4, 8.0, ('q',), False, 1.0), 'lora.dropout is 1.0; allowed: from 0 to below 1'),
        ((4, 8.0, ('q',), False, -0.1), 'lora.dropout is -0.1'),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        LoraSpec(*arguments)
