"""Scoring, fine-tuning and writing compile for four TPU chips, without having one."""

import pytest

pytestmark = [pytest.mark.tpu_backend, pytest.mark.slow]
PROGRAM = """
import functools, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from palr_jax.finetune.input import Rows
from palr_jax.finetune.optimizer import make_optimizer
from palr_jax.finetune.train import Program, train_step
from palr_jax.llama import lora
from palr_jax.ranking.generate import greedy
from palr_jax.ranking.score import Query, Shape, make_batch, make_scorer
from palr_jax.testing.llama import random_params, tiny_config

mesh = jax.sharding.Mesh(np.array(chips), ('data',), axis_types=(AxisType.Auto,))

def placed(tree, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    leaf = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(leaf, tree)

def measure(program, *arguments):
    compiled = program.trace(*arguments).lower(lowering_platforms=('tpu',)).compile()
    collective = r'= [^=]*? (all-[a-z]+|collective-[a-z]+|reduce-scatter)'
    text = compiled.as_text()
    return {
        'temp': compiled.memory_analysis().temp_size_in_bytes,
        'collectives': sorted(set(re.findall(collective, text))),
        'kernels': text.count('custom_call_target="tpu_custom_call"'),
    }

model = tiny_config(
    vocab_size=4096, width=256, layers=4, heads=8, kv_heads=2, head_dim=64, hidden=512)
spec = lora.LoraSpec(8, 16.0, ('q', 'v'))
base = jax.eval_shape(lambda: jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16), random_params(model, 0)))
adapter = lora.init_adapter(model, spec, 0)
params = placed(lora.join(adapter, base))

query = Query(np.arange(200), tuple(np.arange(n) for n in (1, 12, 30)))
batch = make_batch([query], Shape(users=8, length=256, rows=3, row_length=64, candidates=20))
scorer = make_scorer(model, spec, jnp.bfloat16)
found = {'one_pass': measure(scorer, params, placed(batch, 'data'))}

write = functools.partial(
    greedy, config=model, lora=spec, dtype=jnp.bfloat16, eos_id=0, most=16)
prompts = np.zeros((8, 1024), np.int32), np.ones(8, np.int32)
with jax.set_mesh(mesh):
    found['write'] = measure(jax.jit(write), params, *placed(prompts, 'data'))

config = ConfigDict({'learning_rate': 1e-3, 'warmup': 1, 'decay_steps': 9, 'weight_decay': 0.1,
                     'clip_norm': 1.0})
optimizer = make_optimizer(config)
state = placed(jax.eval_shape(optimizer.init, lora.join(adapter, base)))
whole = np.zeros((8, 256), np.int32)
answers = np.zeros((8, 64), np.int32)
rows = Rows(whole, whole, whole, answers, answers, answers.astype(np.float32))
step = functools.partial(
    train_step, program=Program(model, spec, jnp.bfloat16), optimizer=optimizer)
step = jax.jit(step, donate_argnums=(0, 1))
found['train'] = measure(step, placed(adapter), state, placed(base), placed(rows, 'data'))
found['base'] = sum(2 * x.size for x in jax.tree.leaves(base))
report(found)
"""


@pytest.fixture(scope='module')
def report(tpu_report):
    return tpu_report(PROGRAM)


def test_one_pass_scoring_needs_no_communication(report):
    """Each chip scores its own users, the logits in chunks included."""
    assert report['one_pass']['collectives'] == []
    # Two users a chip: no logits of all their 896 tokens (14 MiB), let alone of all eight users.
    assert report['one_pass']['temp'] < 896 * 4096 * 4


def test_the_training_step_sums_adapter_gradients_alone(report):
    """No gather of activations or logits; no gradient of base size among the buffers."""
    assert report['train']['collectives'] == ['all-reduce']
    assert report['train']['temp'] < report['base'] / 2


def test_prompts_are_read_by_the_kernel_before_anything_is_written(report):
    """Of two users a chip nothing as large as their prompts' attention logits is stored."""
    assert report['write']['kernels'] == 1
    assert report['write']['temp'] < 2 * 8 * 1024 * 1024 * 4
