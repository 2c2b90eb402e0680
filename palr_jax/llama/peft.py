"""Adapters in the format of Hugging Face PEFT: `adapter_config.json` + `adapter_model.safetensors`.

PEFT stores, for every layer, A as [r, in] and B as [out, r]; here they are [in, r] and [r, out]
with a leading layer axis. Whatever a config asks for beyond plain LoRA is refused by name, settings
that PEFT has yet to invent included.
"""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import TARGETS, LoraSpec, projection_shape, target_path

Params = Any

WEIGHTS, SETTINGS = 'adapter_model.safetensors', 'adapter_config.json'
_MODULE = {name: 'self_attn' if name in ('q', 'k', 'v', 'o') else 'mlp' for name in TARGETS}
_FLOATS = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
# Settings that are read below, and those that change nothing once the tensors are trained.
_READ = {
    *('peft_type', 'bias', 'init_lora_weights', 'target_modules'),
    *('r', 'lora_alpha', 'lora_dropout', 'use_rslora'),
}
_HARMLESS = {
    'auto_mapping',
    'base_model_name_or_path',
    'eva_config',
    'inference_mode',
    'megatron_core',
    'peft_version',
    'qalora_group_size',
    'revision',
    'task_type',
}
# The other ways of starting (pissa, olora, corda, loftq) change the base weights.
_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal')


def save_adapter(folder: epath.PathLike, adapter: Params, spec: LoraSpec, base: str) -> None:
    """Writes an adapter tree as a PEFT folder.

    Args:
      folder: made if need be.
      adapter: the adapter leaves, as `lora.split` gives them.
      spec: their shape.
      base: the name of the base model, for the reader.
    """
    flat = traverse_util.flatten_dict(adapter)
    tensors = {}
    for name in spec.targets:
        for letter in 'AB':
            stacked = np.asarray(flat[(*target_path(name), f'lora_{letter.lower()}')], np.float32)
            for layer, matrix in enumerate(stacked):
                # safetensors writes the memory of a transposed view, not its values.
                tensors[_key(layer, name, letter)] = np.ascontiguousarray(matrix.T)
    storage.write_bytes(
        epath.Path(folder) / WEIGHTS,
        safetensors.numpy.save(tensors, metadata={'format': 'pt'}),
    )
    storage.write_json(
        epath.Path(folder) / SETTINGS,
        {
            'peft_type': 'LORA',
            'task_type': 'CAUSAL_LM',
            'base_model_name_or_path': base,
            'r': spec.rank,
            'lora_alpha': spec.alpha,
            'lora_dropout': spec.dropout,
            'target_modules': [f'{name}_proj' for name in spec.targets],
            'bias': 'none',
            'fan_in_fan_out': False,
            'use_rslora': spec.rslora,
            'use_dora': False,
            'inference_mode': True,
        },
    )


def load_adapter(folder: epath.PathLike, config: LlamaConfig) -> tuple[Params, LoraSpec]:
    """Reads a PEFT folder for a base of architecture `config`: (float32 leaves, their shape).

    Raises:
      InputError: a file is missing or damaged, the adapter uses what is not supported, or its
        tensors do not fit the base.
    """
    folder = epath.Path(folder)
    spec = _spec(storage.read_json(folder / SETTINGS), folder / SETTINGS)
    return _stack(_tensors(folder / WEIGHTS), folder / WEIGHTS, config, spec), spec


def _spec(settings: Any, path: epath.Path) -> LoraSpec:
    def refuse(field: str, allowed: str) -> None:
        found = json.dumps(settings[field]) if field in settings else 'missing'
        raise InputError(f'{path}: {field} is {found}; allowed: {allowed}.')

    if not isinstance(settings, Mapping):
        raise InputError(f'{path}: holds {type(settings).__name__}; allowed: a JSON object.')
    if settings.get('peft_type') != 'LORA':
        refuse('peft_type', '"LORA"')
    if settings.get('bias', 'none') != 'none':
        refuse('bias', '"none"')
    if settings.get('init_lora_weights') not in _STARTS:
        refuse('init_lora_weights', ', '.join(map(json.dumps, _STARTS)))
    for field in sorted(set(settings) - _READ - _HARMLESS):
        if settings[field]:
            refuse(field, 'null, false or empty')
    rank, alpha = settings.get('r'), settings.get('lora_alpha')
    if type(rank) is not int:
        refuse('r', 'a whole number')
    if type(alpha) not in (int, float):
        refuse('lora_alpha', 'a number')
    rslora, dropout = settings.get('use_rslora') or False, settings.get('lora_dropout') or 0.0
    if type(rslora) is not bool:
        refuse('use_rslora', 'true, false')
    if type(dropout) not in (int, float):
        refuse('lora_dropout', 'a number')
    modules = settings.get('target_modules')
    known = [f'{name}_proj' for name in TARGETS]
    if not isinstance(modules, list) or not modules or not set(map(str, modules)) <= set(known):
        refuse('target_modules', f'a list of one or more of {" ".join(known)}')
    try:
        targets = tuple(name for name in TARGETS if f'{name}_proj' in modules)
        return LoraSpec(rank, float(alpha), targets, rslora, float(dropout))
    except InputError as error:
        raise InputError(f'{path}: {error}') from error


def _tensors(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        views = safetensors.deserialize(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f'{path}: this file does not exist.') from error
    except safetensors.SafetensorError as error:
        raise InputError(f'{path}: this file is damaged ({error}).') from error
    tensors = {}
    for key, view in views:
        if view['dtype'] not in _FLOATS:
            raise InputError(
                f'{path}: tensor {key} is stored as {view["dtype"]}; allowed: {", ".join(_FLOATS)}.'
            )
        tensors[key] = np.frombuffer(view['data'], _FLOATS[view['dtype']]).reshape(view['shape'])
    return tensors


def _stack(
    tensors: dict[str, np.ndarray], path: epath.Path, config: LlamaConfig, spec: LoraSpec
) -> Params:
    flat = {}
    for name in spec.targets:
        fan_in, fan_out = projection_shape(config, name)
        for letter, shape in (('A', (spec.rank, fan_in)), ('B', (fan_out, spec.rank))):
            leaf = np.empty((config.layers, *shape[::-1]), np.float32)
            for layer in range(config.layers):
                key = _key(layer, name, letter)
                if key not in tensors:
                    raise InputError(f'{path}: tensor {key} is missing.')
                if tensors[key].shape != shape:
                    raise InputError(
                        f'{path}: tensor {key} has shape {tensors[key].shape}; allowed for this '
                        f'base and rank: {shape}.'
                    )
                if not np.isfinite(tensors[key]).all():
                    raise InputError(f'{path}: tensor {key} holds NaN or infinite numbers.')
                leaf[layer] = tensors.pop(key).T
            flat[(*target_path(name), f'lora_{letter.lower()}')] = leaf
    if tensors:
        raise InputError(
            f'{path}: tensor {min(tensors)} has no place in this base ({len(tensors)} such).'
        )
    return traverse_util.unflatten_dict(flat)


def _key(layer: int, name: str, letter: str) -> str:
    return f'base_model.model.model.layers.{layer}.{_MODULE[name]}.{name}_proj.lora_{letter}.weight'
