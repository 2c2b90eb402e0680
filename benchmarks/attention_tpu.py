"""Three ways to compute causal attention, compiled for TPU chips without having one.

    pip install libtpu
    python benchmarks/attention_tpu.py --out=attention_tpu.json [--chips=v5e,v5p]

LLaMA-7B's shapes in bfloat16, four packed rows a chip. `ours` is the softmax that is written out in
`llama/attention.py`; `jax.nn` is `jax.nn.dot_product_attention`; `splash` is the Pallas kernel that
comes with JAX, as `llama/splash.py` calls it. Each is compiled
alone and in decoder layers (scanned, recomputed in the backward pass as the model does it, the
gradient that of a LoRA adapter), forward and with gradients. The same command again continues.

Nothing runs. What the figures are:

- Temporaries: what the compiler reserves. Those of layers are of `LAYERS` layers.
- FLOPs, bytes: XLA's count of what it compiled, a loop body once, so that of layers it is one.
  XLA sees no FLOPs in a kernel; those of the blocks that it computes are added.
- Milliseconds: XLA's own estimate of every fusion and copy (`estimated_cycles`) and, for a kernel,
  the instructions of its schedule. A block takes at least what its products need of the matrix
  units. No stall is counted, but that each step of the grid begins and ends an output block is.
  `optimal_seconds` is of no use: a custom call counts as minus one second.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import re
import tempfile
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from palr_jax import storage
from palr_jax.llama import lora, splash
from palr_jax.llama.attention import Causal, by_blocks
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.model import Llama

ROWS, HEADS, HEAD_DIM, LAYERS = 4, 32, 128, 2
BLOCK = splash.BLOCKS[0]  # queries and keys of a block of the kernel
LORA = lora.LoraSpec(8, 16.0, ('q', 'v'))
# Read when libtpu is loaded; without them it looks for a machine with a TPU.
ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
PRODUCTS = {'fwd': 2, 'dq': 3, 'dkv': 4}  # matrix products of a block in each kernel


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU; peak FLOP/s of bfloat16 as published."""

    topology: str
    cores: int
    peak: float
    core_flops: int = 4 * 2 * 128 * 128  # a cycle: four matrix units of 128 x 128

    @property
    def hertz(self) -> float:
        return self.peak / self.cores / self.core_flops


CHIPS = {'v5e': Chip('v5e:2x2', 1, 197e12), 'v5p': Chip('v5p:2x2x1', 2, 459e12)}


@flax.struct.dataclass
class Library:
    segments: jax.Array

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        mask = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True)


@flax.struct.dataclass
class Ours:
    segments: jax.Array

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return by_blocks(query, key, value, self.segments)


@flax.struct.dataclass
class Splash:
    segments: jax.Array

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return splash.attend(query, key, value, self.segments)


PLANS = {'ours': Ours, 'jax.nn': Library, 'splash': Splash}


def attention(plan, gradient: bool, tokens: int, rows: int = ROWS, heads: int = HEADS):
    """A function and its arguments: attention alone."""

    def forward(query, key, value, segments):
        return plan(segments)(query, key, value)

    def loss(query, key, value, segments):
        return jnp.mean(forward(query, key, value, segments).astype(jnp.float32) ** 2)

    x = jax.ShapeDtypeStruct((rows, tokens, heads, HEAD_DIM), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    return jax.value_and_grad(loss, (0, 1, 2)) if gradient else forward, (x, x, x, segments)


def layers(plan, gradient: bool, tokens: int):
    """A function and its arguments: decoder layers between an embedding of 256 words and a norm."""
    config = LlamaConfig(
        vocab_size=256,
        width=HEADS * HEAD_DIM,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        hidden=11008,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tied_head=True,
        max_positions=2048,
    )
    model = Llama(config, LORA, jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((ROWS, tokens), jnp.int32)
    init = lambda ids: model.init(jax.random.key(0), ids, ids, Causal(ids))['params']  # noqa: E731
    adapter, frozen = lora.split(jax.eval_shape(init, ids))

    def forward(adapter, frozen, ids, positions, segments):
        params = lora.join(adapter, frozen)
        return model.apply({'params': params}, ids, positions, plan(segments))

    def loss(*arguments):
        return jnp.mean(forward(*arguments).astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss) if gradient else forward, (adapter, frozen, ids, ids, ids)


PROGRAMS = {
    'attention': (attention, False),
    'attention+grad': (attention, True),
    'layer': (layers, False),
    'layer+grad': (layers, True),
}


def compiled(chip: Chip, function, arguments):
    """`function` compiled for one chip."""
    jax.config.update('jax_platforms', 'cpu')
    devices = topologies.get_topology_desc(platform='tpu', topology_name=chip.topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ('data',), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    return jax.jit(function).trace(*placed).lower(lowering_platforms=('tpu',)).compile()


def kernel_schedules(chip: Chip, folder: str) -> dict[str, list[int]]:
    """Instruction bundles of each kernel: of a step of its grid, and of these its block's.

    The largest piece of a kernel that is skipped under a condition is what it does with a block
    that the mask leaves.
    """
    for gradient in (False, True):
        compiled(chip, *attention(Splash, gradient, 2 * BLOCK, rows=2, heads=2))
    found = {}
    for path in sorted(Path(folder).glob('*splash_mha*-final_bundles.txt')):
        name = re.search(r'splash_mha_[a-z_]*', path.name)[0]
        if 'schedule-analysis' in path.name:
            continue
        address, starts, regions = 0, {}, []
        for line in path.read_text().splitlines():
            if number := re.match(r'\s*(0x[0-9a-f]+)\s', line):
                address = int(number[1], 16)
            for edge, region in re.findall(r'(Start|End) region (\d+)', line):
                if edge == 'Start':
                    starts[region] = address
                elif region in starts:
                    regions.append((starts[region], address))
        inner = [
            b - a + 1
            for a, b in regions
            if not any(a < c and d < b and d - c > 40 for c, d in regions)
        ]
        found[name] = [address, max(inner)]
    return found


def kernel_cost(chip: Chip, name: str, bundles: list[int], tokens: int) -> tuple[float, float]:
    """Cycles and FLOPs of one call."""
    size = min(BLOCK, tokens)
    blocks = tokens // size
    calls = ROWS * HEADS / chip.cores
    flops = PRODUCTS[name.split('_')[2]] * 2 * size * size * HEAD_DIM
    total, block = bundles
    steps, computed = calls * blocks**2, calls * blocks * (blocks + 1) / 2
    cycles = steps * (total - block) + computed * max(block, flops / chip.core_flops)
    return cycles, computed * chip.cores * flops


def measure(chip: Chip, schedules, program: str, plan: str, tokens: int) -> dict:
    build, gradient = PROGRAMS[program]
    began = time.monotonic()
    try:
        found = compiled(chip, *build(PLANS[plan], gradient, tokens))
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return {'error': str(error).splitlines()[0][:200]}
    seconds = time.monotonic() - began
    text = found.as_text()
    parts = dict(re.findall(r'^(?:ENTRY )?%([\w.-]+) \([^\n]*\{\n(.*?)^\}$', text, re.M | re.S))
    names = re.findall(r' while\([^\n]*body=%([\w.-]+)', text)
    names = names or re.findall(r'^ENTRY %([\w.-]+)', text, re.M)
    counted = ''.join(parts[name] for name in names)
    cycles = sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', counted))
    kernels = re.findall(r'%(splash_mha_[a-z_]+)[.\d]* = [^\n]* custom-call\(', counted)
    costs = [kernel_cost(chip, name, schedules[name], tokens) for name in kernels]
    kernel_cycles, kernel_flops = (sum(x) for x in zip(*costs)) if costs else (0.0, 0.0)
    cost = found.cost_analysis()
    return {
        'temporaries_gib': round(found.memory_analysis().temp_size_in_bytes / 2**30, 3),
        'tflop': round((cost['flops'] + kernel_flops) / 1e12, 3),
        'gbyte': round(cost['bytes accessed'] / 1e9, 2),
        'ms': round((cycles + kernel_cycles) / chip.hertz * 1e3, 2),
        'kernel_ms': round(kernel_cycles / chip.hertz * 1e3, 2),
        'kernels': sorted(kernels),
        'compile_seconds': round(seconds, 1),
    }


def show(results: list[dict]) -> None:
    columns = ('chip', 'tokens', 'program', 'attention')
    print(f'{"chip":4} {"tokens":>6} {"program":15} {"attention":9}', end='')
    print(f'{"temp GiB":>9} {"TFLOP":>7} {"GB":>7} {"ms":>8} {"in kernels":>11}')
    for result in results:
        chip, tokens, program, plan = (result[x] for x in columns)
        print(f'{chip:4} {tokens:6} {program:15} {plan:9}', end='')
        if 'error' in result:
            print(f' {result["error"][:60]}')
            continue
        print(f'{result["temporaries_gib"]:9.2f} {result["tflop"]:7.2f}', end='')
        print(f' {result["gbyte"]:7.1f} {result["ms"]:8.1f} {result["kernel_ms"]:11.1f}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--chips', default='v5e')
    parser.add_argument('--lengths', default='2048,1024,512', help='tokens a row')
    parser.add_argument('--out', type=Path, required=True, help='JSON file of the result')
    arguments = parser.parse_args()

    os.environ |= ENVIRONMENT
    result = {'rows': ROWS, 'block': BLOCK, 'layers': LAYERS, 'schedules': {}, 'programs': []}
    if arguments.out.exists():
        result = storage.read_json(arguments.out)
    result |= {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')}
    done = {tuple(list(x.values())[:4]) for x in result['programs']}
    for name in arguments.chips.split(','):
        if name in result['schedules']:
            continue
        # libtpu reads where to write schedules once, and writing them slows every compilation.
        with tempfile.TemporaryDirectory() as folder:
            os.environ['LIBTPU_INIT_ARGS'] = (
                f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
                '--xla_jf_dump_llo_pass_label_regex=final_bundles'
            )
            context = multiprocessing.get_context('spawn')
            with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
                found = pool.submit(kernel_schedules, CHIPS[name], folder).result()
            del os.environ['LIBTPU_INIT_ARGS']
        result['schedules'][name] = found
        print(json.dumps({name: found}), flush=True)
        storage.write_json(arguments.out, result)
    for name in arguments.chips.split(','):
        for tokens in map(int, arguments.lengths.split(',')):
            for program in PROGRAMS:
                for plan in PLANS:
                    key = (name, tokens, program, plan)
                    if key in done:
                        continue
                    row = dict(zip(('chip', 'tokens', 'program', 'attention'), key))
                    row |= measure(CHIPS[name], result['schedules'][name], program, plan, tokens)
                    print(json.dumps(row), flush=True)
                    result['programs'].append(row)
                    storage.write_json(arguments.out, result)
    show(result['programs'])


if __name__ == '__main__':
    main()
