"""Fine-tuning and ranking on the accelerator at hand: tokens and users a second, and their MFU.

    python benchmarks/accelerator.py --out=accelerator.json [--models=smollm2-135m,llama-7b]

Weights are random, of the shapes named, in bfloat16; nothing is read. A training row is full, a
quarter of it answers, and the adapter is LoRA of rank 8 on q and v. A ranked user has 1,024 prompt
tokens and 50 candidates of 12. MFU is the multiply-adds that the mode needs (twice, as FLOPs) a
second, over the rate of a plain bfloat16 product of 8,192 x 8,192 on the same device in the same
process. Frozen kernels need no gradient of their own, so training is two passes over them, not
three. What rematerialisation computes again does not count.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from palr_jax import storage
from palr_jax.config import default_config
from palr_jax.finetune.input import Rows
from palr_jax.finetune.optimizer import make_optimizer
from palr_jax.finetune.train import Program, train_step
from palr_jax.llama import lora
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.weights import leaf_shapes
from palr_jax.ranking.score import Query, make_batch, make_scorer, plan_batches

ROW, PROMPT, CANDIDATES, TITLE = 1024, 1024, 50, 12
LLAMA_7B = LlamaConfig(
    32000, 4096, 32, 32, 32, 128, 11008, 1e-5, 10000.0, None, False, 2048
)  # fmt: skip
SMOLLM2 = LlamaConfig(49152, 576, 30, 9, 3, 64, 1536, 1e-5, 100000.0, None, True, 2048)
# Rows of a training step and users of a ranking batch: as many as keep the device busy.
MODELS = {'smollm2-135m': (SMOLLM2, 32, 16), 'llama-7b': (LLAMA_7B, 8, 4)}
SPEC = lora.LoraSpec(8, 16.0, ('q', 'v'), False, 0.0)


def random_params(config: LlamaConfig) -> dict[str, Any]:
    """bfloat16 leaves of about the scale of trained ones, made on the device."""

    @functools.partial(jax.jit, static_argnums=1)
    def leaf(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16) * 0.02

    flat = {}
    for number, (path, shape) in enumerate(leaf_shapes(config).items()):
        scale = path[-1] == 'scale'
        key = jax.random.key(number)
        flat[path] = jnp.ones(shape, jnp.bfloat16) if scale else leaf(key, shape)
    return traverse_util.unflatten_dict(flat)


def layer_multiply_adds(config: LlamaConfig) -> int:
    """Of one token in all layers' kernels."""
    per_layer = [shape for path, shape in leaf_shapes(config).items() if path[-1] == 'kernel']
    return sum(int(np.prod(shape)) for shape in per_layer if len(shape) == 3)


def attention_multiply_adds(config: LlamaConfig, pairs: float) -> float:
    """Of `pairs` of query and key in all layers: a logit and a weighed value each."""
    return 2 * config.layers * config.heads * config.head_dim * pairs


def fine_tuning(config: LlamaConfig, params: Any, rows: int) -> tuple[Callable, dict[str, float]]:
    """A step as a call, and what it does."""
    rng = np.random.default_rng(0)
    answers = ROW // 4
    shape = (rows, answers)
    before = np.broadcast_to(np.arange(ROW - answers - 1, ROW - 1, dtype=np.int32), shape)
    tokens = rng.integers(0, config.vocab_size, (rows, ROW)).astype(np.int32)
    batch = Rows(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(ROW, dtype=np.int32), (rows, ROW)),
        segments=np.ones((rows, ROW), np.int32),
        before=before,
        targets=np.take_along_axis(tokens, before + 1, 1),
        weights=np.ones(shape, np.float32),
    )
    batch = jax.device_put(batch)
    program = Program(config, SPEC, jnp.dtype(jnp.bfloat16))
    optimizer = make_optimizer(default_config().finetune)
    adapter = lora.init_adapter(config, SPEC, 0)
    state = optimizer.init(lora.join(adapter, params))
    step = jax.jit(
        functools.partial(train_step, program=program, optimizer=optimizer), donate_argnums=(0, 1)
    )

    def call() -> jax.Array:
        nonlocal adapter, state
        adapter, state, metrics = step(adapter, state, params, batch)
        return metrics['loss']

    layers = ROW * layer_multiply_adds(config) + attention_multiply_adds(config, ROW**2 / 2)
    head = answers * config.width * config.vocab_size
    # Forward, and the gradient of the inputs; of attention, the gradient is twice the forward.
    needed = 2 * (layers + head) + attention_multiply_adds(config, ROW**2 / 2)
    return call, {'tokens': rows * ROW, 'rows': rows, 'flops': 2 * rows * needed}


def ranking(config: LlamaConfig, params: Any, users: int) -> tuple[Callable, dict[str, float]]:
    rng = np.random.default_rng(0)

    def some(count: int) -> np.ndarray:
        return rng.integers(0, config.vocab_size, count).astype(np.int32)

    queries = [
        Query(some(PROMPT), tuple(some(TITLE) for _ in range(CANDIDATES))) for _ in range(users)
    ]
    ((_, shape),) = plan_batches(queries, users, 64, 1, config.max_positions)
    batch = jax.device_put(make_batch(queries, shape))
    scorer = make_scorer(config, None, jnp.dtype(jnp.bfloat16))
    inputs = CANDIDATES * (TITLE - 1)
    pairs = PROMPT**2 / 2 + inputs * PROMPT + CANDIDATES * (TITLE - 1) ** 2 / 2
    needed = (PROMPT + inputs) * layer_multiply_adds(config) + attention_multiply_adds(
        config, pairs
    )
    needed += (inputs + 1) * config.width * config.vocab_size
    return functools.partial(scorer, params, batch), {
        'tokens': users * (PROMPT + inputs),
        'users': users,
        'flops': 2 * users * needed,
    }


def seconds(call: Callable[[], jax.Array], calls: int) -> float:
    """Of one call: the median of five rounds of `calls`, after one that compiles."""
    jax.block_until_ready(call())
    rounds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(calls):
            value = call()
        jax.block_until_ready(value)
        rounds.append((time.perf_counter() - began) / calls)
    return statistics.median(rounds)


def product_rate() -> float:
    """FLOPs a second of a bfloat16 product of 8,192 x 8,192, without the time to start one."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    multiply = jax.jit(lambda a, b: a @ b)
    return 2 * 8192**3 / seconds(lambda: multiply(a, a), 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', default=','.join(MODELS))
    parser.add_argument('--out', type=Path, help='JSON file of the result')
    arguments = parser.parse_args()
    device, rate = jax.devices()[0], product_rate()
    result = {
        'device': device.device_kind,
        'jax': jax.__version__,
        'product_tflops': round(rate / 1e12, 1),
        'runs': [],
    }
    print(f'{device.device_kind}: {rate / 1e12:.0f} TFLOP/s in a plain product', flush=True)
    for name in arguments.models.split(','):
        config, rows, users = MODELS[name]
        params = random_params(config)
        for mode, make, size in (('finetune', fine_tuning, rows), ('rank', ranking, users)):
            call, done = make(config, params, size)
            began = time.perf_counter()
            duration = seconds(call, 3)
            run = {'model': name, 'mode': mode} | done
            run |= {
                'seconds': round(duration, 5),
                'tokens_per_second': round(done['tokens'] / duration),
                'mfu': round(done['flops'] / duration / rate, 3),
                'wall_seconds': round(time.perf_counter() - began, 1),
            }
            if mode == 'rank':
                run['users_per_second'] = round(size / duration, 2)
            result['runs'].append(run)
            print(json.dumps(run), flush=True)
            if arguments.out:
                storage.write_json(arguments.out, result)


if __name__ == '__main__':
    main()
