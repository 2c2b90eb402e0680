"""Sharded equals unsharded: training steps and ranking on eight simulated devices and on one."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax.evaluation import hit_rate, rank_targets
from palr_jax.finetune.input import Tokens, lay_out, stack
from palr_jax.finetune.optimizer import make_optimizer
from palr_jax.finetune.train import Program, answer_losses, init_state, make_step, train
from palr_jax.llama import lora, quantize
from palr_jax.llama.lora import LoraSpec
from palr_jax.parallel import rules
from palr_jax.parallel.mesh import make_mesh, shard_rows, using
from palr_jax.ranking.score import Query, Shape, make_batch, make_scorer, score_queries
from palr_jax.testing.llama import random_params, tiny_config

# Odd on purpose: 4 key-value heads and 97 words do not divide over a tensor axis of 8 or of 2.
MODEL = tiny_config(vocab_size=97, width=64, heads=8, kv_heads=4, head_dim=8, hidden=96)
SPEC = LoraSpec(4, 8.0, ('q', 'v', 'o', 'down'))
MESHES = {
    'data': (8, 1, 1),
    'fsdp': (1, 8, 1),
    'tensor': (1, 1, 8),
    'data-fsdp': (2, 4, 1),
    'fsdp-tensor': (1, 4, 2),
    'all': (2, 2, 2),
}
BASES = ('float32', 'bfloat16', 'int8', 'full')
OPTIMISER = ConfigDict(
    {
        'learning_rate': 0.01,
        'warmup': 0,
        'decay_steps': 100,
        'weight_decay': 0.1,
        'clip_norm': 1.0,
    }
)


def mesh_of(sizes):
    """Over the first devices, as many as the sizes give."""
    config = ConfigDict(dict(zip(('data', 'fsdp', 'tensor'), sizes)) | {'slices': 1})
    return make_mesh(config, jax.devices()[: math.prod(sizes)])


def base_params(kind):
    """The base in float32, of bfloat16 numbers, in int8 or nf4; computed in float32 throughout.

    Activations in bfloat16 would round differently with every order of summation.
    """
    params = random_params(MODEL, seed=1)
    if kind in ('int8', 'nf4'):
        layers = params['layers']
        for group in ('attention', 'mlp'):
            for leaf in layers[group].values():
                leaf['kernel'] = quantize.quantize(leaf['kernel'], kind)
    if kind == 'bfloat16':
        params = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), params)
    return params


def batch_of_rows():
    rng = np.random.default_rng(0)
    draw = lambda n: Tokens(rng.integers(0, 97, n).astype(np.int32), n - 5)  # noqa: E731
    return stack([lay_out([draw(9 + i % 4), draw(12)], 32, 12) for i in range(8)])


def three_steps(kind, mesh, parts=1):
    """(losses and norms, trained leaves) as NumPy."""
    full = kind == 'full'
    program = Program(MODEL, None if full else SPEC, jnp.float32, parts=parts)
    optimizer = make_optimizer(OPTIMISER, full)
    base = rules.shard(jax.tree.map(jnp.asarray, base_params(kind)), mesh, MODEL)
    if full:
        adapter, frozen = base, {}
    else:
        adapter, frozen = rules.shard(lora.init_adapter(MODEL, SPEC, 0), mesh, MODEL), base
    state, places = init_state(optimizer, adapter, frozen, MODEL, mesh)
    step = make_step(program, optimizer, places)
    found = []
    with using(mesh):
        for _ in range(3):
            adapter, state, metrics = step(
                adapter, state, frozen, shard_rows(batch_of_rows(), mesh)
            )
            found.append([float(metrics['loss']), float(metrics['gradient_norm'])])
    return np.array(found), adapter


@functools.cache
def on_one_device(kind):
    return three_steps(kind, None)


def assert_close(found, expected, rtol=1e-5):
    """Of each leaf the norm of the difference, relative to the norm.

    Not number by number: Adam's first steps have the size of the learning rate however small a
    gradient is, so they carry the rounding of a gradient near zero to full size.
    """
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        difference = np.linalg.norm(np.asarray(ours) - np.asarray(theirs))
        assert difference <= rtol * np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kind'),
    [('data', 'float32'), ('tensor', 'float32')]
    + [(n, k) for n in ('fsdp', 'data-fsdp', 'fsdp-tensor', 'all') for k in BASES],
)
def test_training_steps_equal_those_of_one_device(name, kind):
    mesh = mesh_of(MESHES[name])
    metrics, trained = three_steps(kind, mesh)
    expected, of_one = on_one_device(kind)
    np.testing.assert_allclose(metrics, expected, rtol=1e-5)
    for leaf, to in zip(
        jax.tree.leaves(trained), jax.tree.leaves(rules.tree_shardings(trained, mesh, MODEL))
    ):
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim)
    assert_close(trained, of_one)


@functools.cache
def queries():
    rng = np.random.default_rng(3)
    draw = lambda n: rng.integers(0, 97, n).astype(np.int32)  # noqa: E731
    return [Query(draw(20 + i), tuple(draw(1 + (i + c) % 7) for c in range(6))) for i in range(8)]


def scores(kind, mesh, adapter):
    params = lora.join(adapter, jax.tree.map(jnp.asarray, base_params(kind)))
    batch = make_batch(queries(), Shape(8, 32, 2, 16, 6))
    return np.asarray(
        make_scorer(MODEL, SPEC, jnp.float32, mesh)(rules.shard(params, mesh, MODEL), batch)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kind'),
    [('data', 'float32'), ('tensor', 'float32'), ('all', 'nf4')]
    + [(n, k) for n in ('fsdp', 'data-fsdp', 'fsdp-tensor', 'all') for k in BASES[:3]],
)
def test_ranking_equals_that_of_one_device(name, kind):
    adapter = jax.tree.map(np.asarray, on_one_device('float32')[1])
    expected = scores(kind, None, adapter)
    np.testing.assert_allclose(scores(kind, mesh_of(MESHES[name]), adapter), expected, rtol=1e-5)


@functools.cache
def sums_of_three(sizes, batch_size):
    """(indices of the queries, their sums [n, C]), the batches one after the other."""
    mesh = sizes and mesh_of(sizes)
    batches = score_queries(
        make_scorer(MODEL, None, jnp.float32, mesh),
        rules.shard(jax.tree.map(jnp.asarray, base_params('float32')), mesh, MODEL),
        queries()[:3],
        batch_size=batch_size,
        row_length=16,
        max_shapes=1,
        max_positions=64,
    )
    indices, sums = zip(*batches)
    return np.concatenate(indices), np.concatenate(sums)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('sizes', 'batch_size'),
    [(None, 1), (None, 2), (None, 3), (None, 8)]
    + [(sizes, n) for sizes in ((1, 1, 1), (2, 1, 1), (2, 2, 1)) for n in (4, 8)],
)
def test_e06_three_users_are_three_users(sizes, batch_size):
    """E06: hits 1, 0 and 1 are 2/3 in batches of any size and on 1, 2 and 4 devices.

    The mean of the means of batches of two would be 0.75; the users that fill a batch up are hits.
    """
    order, together = sums_of_three(None, 3)
    expected = together[np.argsort(order)]
    indices, sums = sums_of_three(sizes, batch_size)
    assert sorted(indices.tolist()) == [0, 1, 2]
    np.testing.assert_allclose(sums, expected[indices], rtol=1e-5)
    best, worst = expected.argmax(axis=1), expected.argmin(axis=1)
    items = np.tile(np.arange(1, 7), (3, 1))
    targets = 1 + np.array([best[0], worst[1], best[2]])
    hits = hit_rate(rank_targets(items, sums, targets[indices]), 1)
    assert hits.mean() == pytest.approx(2 / 3)


TUNING = OPTIMISER.copy_and_resolve_references()
TUNING.update(
    {
        'steps': 4,
        'batch_size': 8,
        'length': 32,
        'checkpoint_every': 2,
        'profile_at': 0,
        'profile_steps': 1,
        'pack': True,
        'max_shapes': 4,
    }
)


def losses(workdir):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line)['loss'] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['float32', 'full'])
def test_a_run_goes_on_with_other_devices(tmp_path, kind):
    """O01: two steps on 8 devices, then two on one, or on 4 x 2: as four steps on one device.

    Of all weights the losses are compared: Adam's first steps are as long for a gradient of 1e-9 as
    for any other, so rounding shows in weights that hardly matter.
    """
    rng = np.random.default_rng(0)
    examples = [Tokens(rng.integers(0, 97, n).astype(np.int32), n - 4) for n in range(9, 20)]
    full = kind == 'full'
    program = Program(MODEL, None if full else SPEC, jnp.float32, parts=1)

    def run(steps, folder, mesh):
        base = rules.shard(jax.tree.map(jnp.asarray, base_params('float32')), mesh, MODEL)
        config = ConfigDict(TUNING.to_dict() | {'steps': steps})
        return train(base, program, examples, config, seed=0, workdir=folder, mesh=mesh)

    expected = run(4, tmp_path / 'one', None)
    for name, first, then in (('to-one', (1, 8, 1), None), ('to-mesh', (2, 2, 2), (1, 4, 2))):
        run(2, tmp_path / name, mesh_of(first))
        mesh = then and mesh_of(then)
        found = run(4, tmp_path / name, mesh)
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / 'one'), rtol=1e-5)
        if not full:
            assert_close(found, expected)
        if mesh is not None:
            places = jax.tree.leaves(rules.tree_shardings(found, mesh, MODEL))
            for leaf, to in zip(jax.tree.leaves(found), places):
                assert leaf.sharding.is_equivalent_to(to, leaf.ndim)


@pytest.mark.slow
def test_held_out_losses_equal_those_of_one_device():
    """Eleven examples on eight devices: the last call is filled up."""
    rng = np.random.default_rng(0)
    examples = [Tokens(rng.integers(0, 97, n).astype(np.int32), n - 4) for n in range(9, 20)]
    params = jax.tree.map(jnp.asarray, base_params('float32'))
    program = Program(MODEL, None, jnp.float32)
    expected = answer_losses(params, program, examples, 32)
    mesh = mesh_of((2, 4, 1))
    found = answer_losses(rules.shard(params, mesh, MODEL), program, examples, 32, mesh)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
