"""Fine-tuning at scale: accumulation, what the backward pass keeps, memory, what is logged."""

import functools
import importlib.util
import json
import logging
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax import config as configs
from palr_jax.errors import InputError
from palr_jax.finetune import throughput
from palr_jax.finetune.input import Tokens, lay_out, stack
from palr_jax.finetune.optimizer import make_optimizer
from palr_jax.finetune.train import Program, loss_and_gradient, make_step, train
from palr_jax.llama import lora, quantize
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import REMAT
from palr_jax.testing.llama import random_params, tiny_config

MODEL = tiny_config(vocab_size=41)
SPEC = LoraSpec(4, 8.0, ('q', 'v', 'down'))
SETTINGS = {
    'steps': 4,
    'batch_size': 4,
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


@pytest.fixture(scope='module')
def base():
    return jax.tree.map(jnp.asarray, random_params(MODEL, seed=1))


@pytest.fixture(scope='module')
def adapter():
    """Past its start: B is not zero, so every factor has a gradient."""
    rng = np.random.default_rng(2)
    start = lora.init_adapter(MODEL, SPEC, 0)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), start)


def draw(number, answers=4):
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 16, number)
    return [Tokens(rng.integers(0, 41, n).astype(np.int32), int(n) - answers) for n in lengths]


def by_program(adapter, base, rows, **fields):
    program = Program(MODEL, SPEC, jnp.float32, **fields)
    return jax.jit(functools.partial(loss_and_gradient, program=program))(adapter, base, rows)


@pytest.mark.parametrize('parts', [2, 4])
def test_accumulated_gradients_are_those_of_the_large_batch(base, adapter, parts):
    # Rows with different numbers of answer tokens: a mean of means would be another number.
    rows = stack([lay_out(draw(4)[: 1 + i % 2], 32, 16) for i in range(4)])
    expected = by_program(adapter, base, rows)
    found = by_program(adapter, base, rows, parts=parts)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize('remat', sorted(REMAT))
def test_what_is_kept_for_the_backward_pass_changes_no_number(base, adapter, remat):
    rows = stack([lay_out(draw(4)[:2], 32, 16)])
    expected = by_program(adapter, base, rows)
    found = by_program(adapter, base, rows, remat=remat)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


LONG = tiny_config(vocab_size=41, layers=16, width=64, hidden=128)


def abstract(kind, program, model, rows, length, answers):
    """(adapter, state, base, batch, optimiser) as shapes."""
    base = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_params(model, 0)))
    if kind == 'bfloat16':
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), base)
    if kind == 'int8':
        encode = jax.vmap(functools.partial(quantize.encode, kind='int8'))
        for group in ('attention', 'mlp'):
            for leaf in base['layers'][group].values():
                leaf['kernel'] = jax.eval_shape(encode, leaf['kernel'])
    adapter = lora.adapter_shapes(model, program.lora)
    optimizer = make_optimizer(ConfigDict(SETTINGS))
    state = jax.eval_shape(optimizer.init, lora.join(adapter, base))
    example = Tokens(np.arange(6, dtype=np.int32), 4)
    batch = stack([lay_out([example], length, answers)] * rows)
    return adapter, state, base, batch, optimizer


def memory_of(program, kind='float32', model=LONG, rows=8, length=64, answers=8):
    """What the compiled step needs; nothing is run."""
    *arguments, optimizer = abstract(kind, program, model, rows, length, answers)
    return make_step(program, optimizer).lower(*arguments).compile().memory_analysis()


def test_less_is_kept_from_policy_to_policy_and_part_to_part():
    scratch = {
        remat: memory_of(Program(LONG, SPEC, jnp.float32, remat)).temp_size_in_bytes
        for remat in REMAT
    }
    assert scratch['none'] > 1.2 * scratch['projections'] > 2 * scratch['full']
    whole = scratch['projections']
    parts = memory_of(Program(LONG, SPEC, jnp.float32, parts=4)).temp_size_in_bytes
    assert parts < 0.5 * whole


# The base is large, everything else is small.
BIG = tiny_config(vocab_size=20_000, width=32, hidden=2048, head_dim=8)


@pytest.mark.parametrize('kind', ['float32', 'int8'])
def test_with_accumulation_no_buffer_of_base_size_exists_beside_the_base(kind):
    """L02, L05: XLA's scratch is far below one frozen leaf.

    The step's results are its inputs' memory, but for the two numbers that the NaN guard reads. In
    bfloat16 XLA's CPU backend has float32 copies of what it multiplies: the next test needs none.
    """
    program = Program(BIG, LoraSpec(2, 4.0, ('q', 'v')), jnp.float32, parts=2)
    memory = memory_of(program, kind, BIG, rows=2, length=8, answers=2)
    assert memory.temp_size_in_bytes < 4 * BIG.vocab_size * BIG.width / 2
    adapter = jax.tree.leaves(lora.adapter_shapes(BIG, program.lora))
    assert memory.output_size_in_bytes < 3.2 * sum(4 * math.prod(x.shape) for x in adapter) + 1024
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 512


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int8'])
def test_no_value_of_the_traced_step_is_a_gradient_of_the_base(kind):
    """The jaxpr of the step, loops included: what has the shape of a base leaf is cast or read."""
    dtype = jnp.bfloat16 if kind == 'bfloat16' else jnp.float32
    program = Program(BIG, LoraSpec(2, 4.0, ('q', 'v')), dtype, parts=2)
    adapter, _, base, batch, _ = abstract(kind, program, BIG, 2, 8, 2)
    traced = jax.make_jaxpr(functools.partial(loss_and_gradient, program=program))
    whole = {leaf.shape for leaf in jax.tree.leaves(base) if math.prod(leaf.shape) > 10_000}
    large = whole | {shape[1:] for shape in whole if len(shape) == 3}  # of one layer

    def made(*arguments):
        found = equations(traced(*arguments).jaxpr, large)
        return {equation.primitive.name for equation in found}

    # A gradient would be a product, a sum or a scatter; an accumulator a sum of two.
    work = {'dot_general', 'add', 'add_any', 'scatter-add', 'mul'}
    assert made(adapter, base, batch).isdisjoint(work)
    if kind == 'float32':  # the control: all leaves trained
        assert {'dot_general', 'add'} <= made(lora.join(adapter, base), {}, batch)


def equations(jaxpr, shapes):
    """The equations, inner ones too, whose results have one of `shapes`."""
    for equation in jaxpr.eqns:
        if any(getattr(out.aval, 'shape', None) in shapes for out in equation.outvars):
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner, shapes)


def test_model_flops_by_hand():
    """One layer of width 4: two rows with segments of 3 and 2 and of 4 tokens, 3 scored."""
    model = tiny_config(vocab_size=10, width=4, layers=1, heads=2, kv_heads=1, head_dim=2, hidden=8)
    rows = stack(
        [
            lay_out([Tokens(np.arange(3), 2), Tokens(np.arange(2), 1)], 6, 2),
            lay_out([Tokens(np.arange(4), 3)], 6, 2),
        ]
    )
    work = throughput.Work.of(rows)
    kernels = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8  # q, k and v, o, and the MLP
    pairs = 6 + 3 + 10
    forward = 2 * 9 * kernels + 2 * 3 * 4 * 10 + 4 * pairs * 2 * 2
    assert throughput.model_flops(model, None, work) == 3 * forward
    adapter = 2 * 9 * 2 * ((4 + 4) + (8 + 4))
    spec = LoraSpec(2, 4.0, ('q', 'down'))
    assert throughput.model_flops(model, spec, work) == 2 * forward + 3 * adapter


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is not None,
    reason='with libtpu JAX 0.10 starts a profile of a TPU, and crashes where there is none',
)
def test_a_run_logs_its_parameters_speed_and_a_profile(base, tmp_path, caplog):
    """The overview comes first; utilisation is null where no peak is known; two steps traced."""
    config = ConfigDict(SETTINGS | {'profile_at': 2, 'profile_steps': 2})
    program = Program(MODEL, SPEC, jnp.float32, parts=2)
    with caplog.at_level(logging.INFO, 'absl'):
        train(base, program, draw(8), config, seed=0, workdir=tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    (kernel,) = [m for m in messages if 'layers/attention/q/kernel' in m]
    assert kernel.split()[:2] == ['frozen', 'layers/attention/q/kernel']
    assert '[2, 32, 32]' in kernel
    assert 'float32' in kernel
    numbers = sum(leaf.size for leaf in jax.tree.leaves(base))
    assert any(m.startswith(f'frozen: {numbers} numbers, ') for m in messages)
    assert any('the profile is in' in m for m in messages)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['model_flops_utilisation'] for line in lines] == [None] * 4
    assert all(line['tokens_per_second'] > 0 for line in lines)
    assert len(list((tmp_path / 'finetune' / 'profile').rglob('*.xplane.pb'))) == 1


def test_a_batch_that_does_not_divide_into_its_parts_is_refused(base, tmp_path):
    program = Program(MODEL, SPEC, jnp.float32, parts=3)
    with pytest.raises(InputError, match=r'config.finetune.batch_size is 4.*a multiple of 3\.'):
        train(base, program, draw(8), ConfigDict(SETTINGS), seed=0, workdir=tmp_path)


def test_codes_are_not_trained():
    config = configs.default_config()
    config.finetune.full = True
    config.model.quantize = 'int8'
    with pytest.raises(InputError, match=r"in full fine-tuning config\.model\.quantize='none'"):
        configs.validate(config)
