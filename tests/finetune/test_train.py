"""The fine-tuning loop: what it moves, and that a run in pieces is the run in one piece."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from palr_jax import metric_writer
from palr_jax.errors import InputError
from palr_jax.finetune import checkpoints as checkpoints_module
from palr_jax.finetune.checkpoints import Checkpoints
from palr_jax.finetune.input import Tokens, lay_out, stack
from palr_jax.finetune.optimizer import make_optimizer
from palr_jax.finetune.train import Program, answer_losses, loss_and_gradient, train
from palr_jax.llama import lora
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import apply_logits
from palr_jax.metric_writer import MetricWriter
from palr_jax.testing.llama import random_params, tiny_config

MODEL = tiny_config(vocab_size=41)
PROGRAM = Program(MODEL, LoraSpec(4, 8.0, ('q', 'v', 'o')), jnp.float32)


def settings(**fields):
    defaults = {
        'steps': 10,
        'batch_size': 2,
        'length': 32,
        'learning_rate': 0.02,
        'warmup': 2,
        'decay_steps': 100,
        'weight_decay': 0.1,
        'clip_norm': 1.0,
        'checkpoint_every': 4,
        'profile_at': 0,
        'profile_steps': 3,
        'pack': True,
        'max_shapes': 4,
    }
    return ConfigDict(defaults | fields)


def draw_examples(number=5):
    """8 to 15 tokens, the last 4 of them the answer; an epoch of five is shorter than the runs."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 16, number)
    return [Tokens(rng.integers(0, 41, n).astype(np.int32), int(n) - 4) for n in lengths]


@pytest.fixture(scope='module', autouse=True)
def compiled_once(tmp_path_factory):
    """`train` jits its step anew in every run; the tests of this file share the program."""
    options = {
        'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('programs')),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def base():
    return jax.tree.map(jnp.asarray, random_params(MODEL, seed=1))


def run(base, workdir, examples=None, **fields):
    examples = examples or draw_examples()
    return train(base, PROGRAM, examples, settings(**fields), seed=0, workdir=workdir)


@pytest.fixture(scope='module')
def mean_loss(base):
    """Rows -> the loss at the start."""
    compiled = jax.jit(functools.partial(loss_and_gradient, program=PROGRAM))
    adapter = lora.init_adapter(MODEL, PROGRAM.lora, seed=0)
    return lambda rows: float(compiled(adapter, base, rows)[0])


@pytest.fixture(scope='module')
def uninterrupted(base, tmp_path_factory):
    """(workdir, adapter) of ten steps in one go."""
    workdir = tmp_path_factory.mktemp('uninterrupted')
    return workdir, run(base, workdir)


SPEED = ('tokens_per_second', 'model_flops_utilisation')


def curve(workdir):
    """Every line of metrics.jsonl without the speed, which differs from run to run."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


def steps_stored(workdir):
    return sorted(int(path.name) for path in (workdir / 'finetune' / 'checkpoints').iterdir())


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_array_equal(a, b)


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


class Killed(BaseException):
    """Stands for the end of the process."""


def dies_at(monkeypatch, step):
    write = MetricWriter.write

    def last_words(self, at, *args, **scalars):
        write(self, at, *args, **scalars)
        if at == step:
            raise Killed

    monkeypatch.setattr(MetricWriter, 'write', last_words)


def test_the_base_keeps_every_bit_and_the_loss_falls(base, uninterrupted):
    """L01, L02 with weight decay 0.1: ten steps; the base as it was drawn and as it is now."""
    folder, adapter = uninterrupted
    assert_same_bits(base, random_params(MODEL, seed=1))
    start = lora.init_adapter(MODEL, PROGRAM.lora, seed=0)
    assert jax.tree.structure(adapter) == jax.tree.structure(start)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(adapter)):
        assert after.dtype == jnp.float32
        assert np.all(before != after)
    losses = [line['loss'] for line in curve(folder)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_over_a_bfloat16_base_the_adapter_moves_in_float32(tmp_path):
    """L05: adapter, moments and checkpoint stay float32; the base keeps its bits."""
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(MODEL, seed=1))
    copy = jax.tree.map(np.array, half)
    program = Program(MODEL, PROGRAM.lora, jnp.bfloat16)
    config = settings(steps=4, learning_rate=6e-4, warmup=0)
    adapter = train(half, program, draw_examples(), config, seed=0, workdir=tmp_path)
    assert_same_bits(half, copy)
    start = lora.init_adapter(MODEL, PROGRAM.lora, seed=0)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(adapter)):
        assert after.dtype == jnp.float32
        assert 0 < np.abs(after - before).max() < 4 * 6e-4 * 2
    state = make_optimizer(config).init(lora.join(start, half))
    with Checkpoints(tmp_path / 'finetune' / 'checkpoints', 4) as checkpoints:
        stored = checkpoints.restore(start, state)
    floats = [x for x in jax.tree.leaves(stored) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 3 * 6  # the adapter and its two moments
    assert all(leaf.dtype == jnp.float32 for leaf in floats)


def test_loss_is_the_mean_over_answer_tokens_alone(base, mean_loss):
    """Two examples in one row; each answer token has the weight 1, the prompt none."""
    examples = draw_examples()[:2]
    rows = stack([lay_out(examples, 32, 16)])
    tokens = np.stack([np.pad(e.tokens, (0, 15 - len(e.tokens))) for e in examples])
    of_all = jax.jit(functools.partial(apply_logits, config=MODEL))
    each = np.asarray(jax.nn.log_softmax(of_all(base, tokens=tokens)))
    values = [
        each[row, t - 1, example.tokens[t]]
        for row, example in enumerate(examples)
        for t in range(example.answer, len(example.tokens))
    ]
    assert len(values) == 8
    assert mean_loss(rows) == pytest.approx(-np.mean(values), abs=1e-5)
    assert mean_loss(rows.replace(weights=0 * rows.weights)) == 0.0  # P01: not 0 / 0


@pytest.mark.parametrize(('dies', 'stored'), [(4, []), (9, [4, 8])])
def test_a_run_in_two_pieces_is_the_run_in_one(
    base, uninterrupted, tmp_path, monkeypatch, dies, stored
):
    """O05, O02: goes on from the newest checkpoint, with every bit equal and each step once.

    An epoch is about two rows, one step, so many end within the run. Step 4 dies before its
    checkpoint is written: the second piece starts anew.
    """
    folder, expected = uninterrupted
    with monkeypatch.context() as patch:
        dies_at(patch, dies)
        with pytest.raises(Killed):
            run(base, tmp_path)
    assert [line['step'] for line in curve(tmp_path)] == list(range(1, dies + 1))
    assert steps_stored(tmp_path) == stored
    assert_same_bits(run(base, tmp_path), expected)
    assert curve(tmp_path) == curve(folder)
    assert [line['step'] for line in curve(tmp_path)] == list(range(1, 11))


def test_where_nothing_can_be_appended_no_step_of_a_preempted_run_is_missing(
    base, uninterrupted, tmp_path, monkeypatch
):
    """Told in step 6 and gone in step 7, without a word."""
    folder, expected = uninterrupted
    monkeypatch.setattr(metric_writer, '_is_remote', lambda path: True)
    manager = checkpoints_module.ocp.CheckpointManager
    with monkeypatch.context() as patch:
        dies_at(patch, 7)
        patch.setattr(MetricWriter, 'close', lambda self: None)
        patch.setattr(manager, 'reached_preemption', lambda self, step: step == 6)
        with pytest.raises(Killed):
            run(base, tmp_path)
    assert steps_stored(tmp_path) == [4, 6]
    assert [line['step'] for line in curve(tmp_path)] == list(range(1, 7))
    assert_same_bits(run(base, tmp_path), expected)
    assert curve(tmp_path) == curve(folder)


@pytest.mark.slow
def test_a_run_in_batches_of_several_shapes(base, tmp_path):
    """O05 without packing: in two pieces as in one, and the loss falls."""
    runs = functools.partial(train, base, PROGRAM, draw_examples(), seed=0)
    runs(settings(steps=4, pack=False), workdir=tmp_path / 'pieces')
    pieces = runs(settings(pack=False), workdir=tmp_path / 'pieces')
    assert_same_bits(runs(settings(pack=False), workdir=tmp_path / 'one'), pieces)
    losses = [line['loss'] for line in curve(tmp_path / 'one')]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_with_dropout_a_run_in_two_pieces_is_the_run_in_one(base, tmp_path, uninterrupted):
    """O05: what step n drops follows from the seed and n, not from where the run began."""
    spec = dataclasses.replace(PROGRAM.lora, dropout=0.3)
    program = dataclasses.replace(PROGRAM, lora=spec)
    runs = functools.partial(train, base, program, draw_examples(), workdir=tmp_path / 'pieces')
    runs(settings(steps=4), seed=0)
    expected = train(base, program, draw_examples(), settings(), seed=0, workdir=tmp_path / 'one')
    assert_same_bits(runs(settings(), seed=0), expected)
    assert curve(tmp_path / 'pieces') == curve(tmp_path / 'one')
    losses = [line['loss'] for line in curve(tmp_path / 'one')]
    without = [line['loss'] for line in curve(uninterrupted[0])]
    assert losses[0] == pytest.approx(without[0], abs=1e-5)  # B is zero: nothing to drop yet
    assert abs(losses[3] - without[3]) > 1e-3
    assert losses[-1] < losses[0] - 0.3

    # Off in evaluation.
    params = lora.join(expected, base)
    np.testing.assert_array_equal(
        answer_losses(params, program, draw_examples(), 32),
        answer_losses(params, PROGRAM, draw_examples(), 32),
    )


def test_more_steps_continue_and_fewer_are_refused(base, uninterrupted, tmp_path):
    """Three steps, then ten: the same bits. The last step is kept, whatever the interval."""
    folder, expected = uninterrupted
    run(base, tmp_path, steps=3)
    assert steps_stored(tmp_path) == [3]
    assert_same_bits(run(base, tmp_path), expected)
    assert curve(tmp_path) == curve(folder)
    assert steps_stored(tmp_path) == [8, 10]
    with pytest.raises(InputError, match=r'finetune.steps is 9, but .* holds a run of 10 steps'):
        run(base, tmp_path, steps=9)
    assert curve(tmp_path) == curve(folder)


def test_the_same_command_again_changes_nothing(base, uninterrupted):
    folder, expected = uninterrupted
    before = (folder / 'metrics.jsonl').read_text()
    assert_same_bits(run(base, folder), expected)
    assert (folder / 'metrics.jsonl').read_text() == before


def test_restoring_keeps_the_types_of_the_optimiser_state(base, uninterrupted):
    """O02: NamedTuples, MaskedNodes and EmptyStates come back as what they were."""
    folder, expected = uninterrupted
    start = lora.init_adapter(MODEL, PROGRAM.lora, seed=0)
    state = make_optimizer(settings()).init(lora.join(start, base))
    with Checkpoints(folder / 'finetune' / 'checkpoints', 4) as checkpoints:
        adapter, restored = checkpoints.restore(start, state)
    assert_same_bits(adapter, expected)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    counts = [int(x) for x in jax.tree.leaves(restored) if x.ndim == 0]
    assert counts == [10, 10]  # Adam's clock and the schedule's
    moments = [x for x in jax.tree.leaves(restored, is_leaf=is_adam) if is_adam(x)]
    assert len(moments) == 1


def test_a_checkpoint_of_another_model_is_refused(base, uninterrupted):
    """Orbax would hand out whatever shapes it finds."""
    folder, _ = uninterrupted
    narrow = dataclasses.replace(PROGRAM, lora=dataclasses.replace(PROGRAM.lora, rank=2))
    with pytest.raises(
        InputError,
        match=r'checkpoints/10: this checkpoint is of another model or adapter; '
        r'layers/attention/o/lora_a is float32\[.*, 4\] there and float32\[.*, 2\] in this run',
    ):
        train(base, narrow, draw_examples(), settings(steps=12), seed=0, workdir=folder)
    fewer = dataclasses.replace(PROGRAM, lora=dataclasses.replace(PROGRAM.lora, targets=('q',)))
    with pytest.raises(
        InputError, match=r'o/lora_a is float32\[.*\] there and missing in this run'
    ):
        train(base, fewer, draw_examples(), settings(steps=12), seed=0, workdir=folder)


def test_a_checkpoint_of_a_newer_format_is_refused(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, 'FORMAT', 2)
        run(base, tmp_path, steps=2)
    with pytest.raises(InputError, match=r'/2: this checkpoint has format 2; this version reads 1'):
        run(base, tmp_path)


def test_an_interrupted_checkpoint_is_passed_over(base, uninterrupted, tmp_path):
    """A kill in the middle of a write leaves a folder under a temporary name."""
    folder, expected = uninterrupted
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    checkpoint = tmp_path / 'finetune' / 'checkpoints'
    (checkpoint / '10').rename(checkpoint / '10.orbax-checkpoint-tmp')
    assert_same_bits(run(base, tmp_path), expected)
    assert curve(tmp_path) == curve(folder)


def test_a_loss_that_is_no_number_names_the_step(base, tmp_path):
    """And no checkpoint holds what came of it."""
    broken = base | {'final_norm': {'scale': jnp.full(32, jnp.nan, jnp.float32)}}
    with pytest.raises(InputError, match=r'finetune: loss is nan at step 1; lower finetune\.learn'):
        run(broken, tmp_path, checkpoint_every=1)
    assert steps_stored(tmp_path) == []


def test_answer_losses_do_not_depend_on_what_else_is_measured(base, mean_loss):
    params = lora.join(lora.init_adapter(MODEL, PROGRAM.lora, seed=0), base)
    examples = draw_examples()
    together = answer_losses(params, PROGRAM, examples, 32)
    assert answer_losses(params, PROGRAM, examples[2:3], 32) == pytest.approx(together[2:3])
    expected = [mean_loss(stack([lay_out([example], 32, 16)])) for example in examples]
    np.testing.assert_allclose(together, expected, rtol=1e-5)
    assert answer_losses(params, PROGRAM, [], 32).shape == (0,)
