"""Whether a config fits a TPU, told without one: both programs are compiled ahead of time.

    pip install libtpu
    python -m palr_jax.compile_check --config=configs/ml1m_llama7b.py:v5e-16 --out=check.json

The training step of `finetune.batch_size` rows of `finetune.length` tokens, and the ranking of
`ranking.batch_size` users with prompts of `prompts.length` tokens, each with `ranking.candidates`
titles, are compiled for the hardware of the config, or for another --topology. Parameters are
shapes: no weight is read or made. Every field can be set: --config.finetune.accumulate=4.

FLOPs and bytes are XLA's for one chip, loops multiplied out; of a kernel XLA counts none.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from palr_jax import cli, data, storage
from palr_jax.config import validate
from palr_jax.errors import InputError
from palr_jax.finetune.input import Rows
from palr_jax.finetune.optimizer import make_optimizer
from palr_jax.finetune.throughput import bytes_a_device
from palr_jax.finetune.train import Program, make_step
from palr_jax.llama import lora, quantize
from palr_jax.llama.config import ARCHITECTURES, LlamaConfig
from palr_jax.llama.load import open_checkpoint
from palr_jax.llama.weights import leaf_shapes, put
from palr_jax.parallel import hlo, rules
from palr_jax.parallel.devices import GIB, HARDWARE, Hardware
from palr_jax.parallel.mesh import ROW_AXES, check_rows, make_mesh
from palr_jax.project import lora_spec
from palr_jax.ranking.score import Batch, one_pass_scores, pack

CONFIG = config_flags.DEFINE_config_file('config', None, 'The config file, with its :DEVICE.')
TOPOLOGY = flags.DEFINE_string(
    'topology', '', f"Instead of the config's hardware: v5e:4x4, or one of {', '.join(HARDWARE)}."
)
# convert.py has an --out, too; a test imports both.
OUT = flags.DEFINE_string('out', None, 'JSON file for the result.', allow_override=True)
PROGRAMS = flags.DEFINE_list('programs', ['train', 'rank'], 'Which to compile: train, rank.')
ANSWER = flags.DEFINE_integer('answer_tokens', 24, 'Of a title that is ranked.', lower_bound=1)

# Read when libtpu is loaded; without them it looks for a machine with a TPU.
ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
ANSWER_SHARE = 4  # a training row has one answer token in so many; the data decides in a run
ADVICE = {
    'train': 'raise config.finetune.accumulate (parts of a batch), or set config.model.remat=full '
    'or config.model.quantize=int8, or divide the model by more chips (config.mesh.fsdp)',
    'rank': 'lower config.ranking.batch_size or config.prompts.length, or set '
    'config.model.quantize=int8, or divide the model by more chips (config.mesh.fsdp)',
}


def check(config: ConfigDict, topology: str, programs: list[str], answer_tokens: int) -> dict:
    """Compiles `programs` of a config for a topology; see `report` for the result.

    Raises:
      InputError: no libtpu, an unknown topology, a mesh or a batch that does not divide.
    """
    validate(config)
    if unknown := set(programs) - set(ADVICE):
        raise InputError(f'--programs has {sorted(unknown)}; allowed: {", ".join(ADVICE)}.')
    field = '--topology' if topology else 'config.mesh.hardware'
    hardware = find_hardware(topology or config.mesh.hardware, field)
    model = architecture(config.model.path)
    mesh = make_mesh(config.mesh, chips(hardware, config.mesh.slices))
    dtype = jnp.dtype(config.model.dtype)
    build = {'train': train_program, 'rank': rank_program}
    found = {}
    for name in programs:
        function, arguments, shape = build[name](config, model, mesh, answer_tokens)
        found[name] = {'shape': shape} | compile_one(name, function, arguments, mesh, hardware)
    return {
        'hardware': topology or config.mesh.hardware,
        'topology': hardware.topology,
        'chips': mesh.size,
        'mesh': dict(mesh.shape) | {'slices': config.mesh.slices},
        'model': config.model.path,
        'dtype': str(dtype),
        'quantize': config.model.quantize,
        'remat': config.model.remat,
        'accumulate': config.finetune.accumulate,
        'full': config.finetune.full,
        'programs': found,
        'versions': {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')},
    }


def find_hardware(name: str, field: str) -> Hardware:
    """The hardware of a name, or of a TPU topology of a generation that is known.

    Args:
      name: of `HARDWARE`, or a topology.
      field: that holds the name, for messages.

    Raises:
      InputError: it is not known, or no TPU.
    """
    tpus = {known: hardware for known, hardware in HARDWARE.items() if hardware.topology}
    if name in tpus:
        return tpus[name]
    generations = {tpu.topology.partition(':')[0]: tpu for tpu in tpus.values()}
    generation, colon, _ = name.partition(':')
    if colon and generation in generations:
        return dataclasses.replace(generations[generation], topology=name)
    raise InputError(
        f'{field} is {name!r}; allowed, since only programs for TPUs can be compiled without the '
        f'device: {", ".join(tpus)}, or sizes as in v5e:4x4, of {", ".join(sorted(generations))}.'
    )


def chips(hardware: Hardware, slices: int = 1) -> list[Any]:
    """The devices of `slices` slices, which can be compiled for and nothing else.

    Raises:
      InputError: libtpu is not installed, or refuses the topology.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise InputError('compile_check needs the TPU compiler: pip install libtpu.')
    options = {'num_slices': slices} if slices > 1 else {}
    if hardware.megacore:
        options['chip_config_name'] = 'megacore'
    try:
        topology = topologies.get_topology_desc(
            platform='tpu', topology_name=hardware.topology, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f'The topology {hardware.topology} is refused: {reason}') from error
    return topology.devices


def architecture(path: str) -> LlamaConfig:
    """Of the weights at `path`, or of a name that ends with a known architecture.

    Raises:
      InputError: there is neither.
    """
    name = path.rpartition('/')[2].partition('@')[0]
    if name in ARCHITECTURES and not os.path.exists(path):
        return ARCHITECTURES[name]
    return open_checkpoint(data.resolve(path)).config


def train_program(config: ConfigDict, model: LlamaConfig, mesh: Mesh, _: int):
    """(the jitted step, its abstract arguments, its sizes)."""
    tuning = config.finetune
    check_rows('finetune.batch_size', tuning.batch_size, mesh, tuning.accumulate)
    dtype = jnp.dtype(config.model.dtype)
    spec = None if tuning.full else lora_spec(config)
    program = Program(model, spec, dtype, config.model.remat, tuning.accumulate)
    optimizer = make_optimizer(tuning, tuning.full)
    if tuning.full:
        adapter, frozen = abstract_base(model, 'float32', 'none'), {}
    else:
        adapter, frozen = lora.adapter_shapes(model, spec), base_of(config, model)
    state = jax.eval_shape(optimizer.init, lora.join(adapter, frozen))
    adapter, state, frozen = (placed(tree, mesh, model) for tree in (adapter, state, frozen))
    B, T, M = tuning.batch_size, tuning.length, tuning.length // ANSWER_SHARE
    places = jax.tree.map(lambda leaf: leaf.sharding, (adapter, state))
    rows = Rows(
        **{name: array(mesh, B, T) for name in ('tokens', 'positions', 'segments')},
        **{name: array(mesh, B, M) for name in ('before', 'targets')},
        weights=array(mesh, B, M, dtype=jnp.float32),
    )
    shape = {'rows': B, 'tokens': T, 'answer_tokens': M}
    return make_step(program, optimizer, places), (adapter, state, frozen, rows), shape


def rank_program(config: ConfigDict, model: LlamaConfig, mesh: Mesh, answer_tokens: int):
    """(the jitted ranking, its abstract arguments, its sizes)."""
    ranking = config.ranking
    check_rows('ranking.batch_size', ranking.batch_size, mesh)
    B, L, C, S = ranking.batch_size, config.prompts.length, ranking.candidates, ranking.row_length
    S = max(S, answer_tokens - 1)
    R = len(pack([answer_tokens - 1] * C, S))
    spec = None if config.finetune.full else lora_spec(config)
    adapter = {} if spec is None else lora.adapter_shapes(model, spec)
    params = placed(lora.join(adapter, base_of(config, model)), mesh, model)
    batch = Batch(
        tokens=array(mesh, B, L + R * S),
        positions=array(mesh, B, L + R * S),
        prompt=array(mesh, B, L, dtype=bool),
        rows=array(mesh, B, R, S),
        targets=array(mesh, B, R * S),
        beginning=array(mesh, B, 1),  # the quote before a title
        first=array(mesh, B, C),
        answers=array(mesh, B, C),
    )
    dtype = jnp.dtype(config.model.dtype)
    scores = functools.partial(one_pass_scores, config=model, lora=spec, dtype=dtype)
    program = jax.jit(scores, out_shardings=NamedSharding(mesh, PartitionSpec()))
    shape = {'users': B, 'prompt': L, 'candidates': C, 'answer_tokens': answer_tokens}
    return program, (params, batch), shape | {'row_tokens': R * S}


def base_of(config: ConfigDict, model: LlamaConfig) -> dict[str, Any]:
    return abstract_base(model, config.model.dtype, config.model.quantize)


def abstract_base(model: LlamaConfig, dtype: str, kind: str) -> dict[str, Any]:
    """What `weights.build` would read, as shapes and types alone."""
    params: dict[str, Any] = {}
    for path, shape in leaf_shapes(model).items():
        leaf = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        if kind != 'none' and quantize.is_quantized(path):
            leaf = jax.eval_shape(jax.vmap(functools.partial(quantize.encode, kind=kind)), leaf)
        put(params, path, leaf)
    return params


def placed(tree: Any, mesh: Mesh, model: LlamaConfig) -> Any:
    """Shapes with the shardings of the rules."""
    return jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
        tree,
        rules.tree_shardings(tree, mesh, model),
    )


def array(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """A part of a batch, as `shard_rows` lays it out."""
    sharding = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compile_one(name: str, function: Any, arguments: Any, mesh: Mesh, hardware: Hardware) -> dict:
    """Compiles one program; {'fits': …} with its memory a chip in GiB, its work, its advice."""
    began, began_cpu = time.monotonic(), time.process_time()
    memory = {'hbm_gib': hardware.memory / GIB}
    arrays = jax.tree.leaves(arguments)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = function.trace(*arguments)
        compiled = traced.lower(lowering_platforms=('tpu',)).compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler gives up when its temporaries alone are more than a chip has.
        wanted = re.search(r'([\d.]+)G\)? (?:exceeds available HBM|of [\d.]+G hbm)', str(error))
        if 'RESOURCE_EXHAUSTED' not in str(error) or wanted is None:
            raise
        needed = round(float(wanted[1]) + sum(map(bytes_a_device, arrays)) / GIB, 3)
        return memory | {'fits': False, 'needed_gib': needed, 'advice': ADVICE[name]}
    seconds = {
        'compile_seconds': round(time.monotonic() - began, 1),
        'compile_cpu_seconds': round(time.process_time() - began_cpu, 1),
    }
    sizes = compiled.memory_analysis()
    arguments_, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    # Donated arguments are the memory of outputs.
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    needed = arguments_ + temporaries + outputs + sizes.generated_code_size_in_bytes
    memory |= {
        'arguments_gib': round(arguments_ / GIB, 3),
        'temporaries_gib': round(temporaries / GIB, 3),
        'outputs_gib': round(outputs / GIB, 3),
        'needed_gib': round(needed / GIB, 3),
        'fits': needed <= hardware.memory,
    }
    if not memory['fits']:
        memory['advice'] = ADVICE[name]
    return memory | seconds | hlo.summary(compiled.as_text())


def describe(result: dict) -> str:
    """The result for people, a few lines a program."""
    sizes = ' x '.join(f'{axis} {size}' for axis, size in result['mesh'].items())
    lines = [
        f'{result["model"]} on {result["hardware"]} ({result["topology"]}, {result["chips"]} '
        f'chips, {sizes}), libtpu {result["versions"]["libtpu"]}'
    ]
    for name, found in result['programs'].items():
        shape = ', '.join(f'{n} {what.replace("_", " ")}' for what, n in found['shape'].items())
        lines.append(f'{name}: {shape}')
        needed = f'{found["needed_gib"]:.2f} of {found["hbm_gib"]:.2f} GiB a chip'
        if not found['fits']:
            lines.append(f'  does not fit: {needed}; {found["advice"]}')
            continue
        lines.append(
            f'  fits: {needed} (arguments {found["arguments_gib"]:.2f}, temporaries '
            f'{found["temporaries_gib"]:.2f}), compiled in {found["compile_seconds"]:.0f} s'
        )
        work = found['work']
        lines.append(
            f'  {work["flops"] / 1e12:.1f} TFLOP and {work["bytes"] / 1e9:.0f} GB a chip; '
            + '; '.join(
                f'{kind} {x["count"]:.0f} times, {x["bytes"] / 1e9:.2f} GB'
                for kind, x in found['collectives'].items()
            )
        )
    return '\n'.join(lines)


def main(_: list[str]) -> None:
    os.environ |= ENVIRONMENT
    jax.config.update('jax_platforms', 'cpu')
    result = check(CONFIG.value, TOPOLOGY.value, PROGRAMS.value, ANSWER.value)
    print(describe(result))
    if OUT.value is not None:
        storage.write_json(OUT.value, result)
    if not all(found['fits'] for found in result['programs'].values()):
        raise SystemExit(1)


if __name__ == '__main__':
    flags.mark_flags_as_required(['config'])
    cli.run(main)
