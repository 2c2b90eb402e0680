"""Weights of a Hugging Face folder (safetensors, whole or in shards), both ways.

No rows are permuted: Hugging Face stores q and k for rotation of halves, as this model rotates.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.weights import DTYPES, Index, Row, TensorSource, tensor_names

TABLE = (
    Row('model.embed_tokens.weight', 'embed/embedding', False),
    Row('model.layers.{}.input_layernorm.weight', 'layers/attention_norm/scale', False),
    Row('model.layers.{}.self_attn.q_proj.weight', 'layers/attention/q/kernel', True),
    Row('model.layers.{}.self_attn.k_proj.weight', 'layers/attention/k/kernel', True),
    Row('model.layers.{}.self_attn.v_proj.weight', 'layers/attention/v/kernel', True),
    Row('model.layers.{}.self_attn.o_proj.weight', 'layers/attention/o/kernel', True),
    Row('model.layers.{}.post_attention_layernorm.weight', 'layers/mlp_norm/scale', False),
    Row('model.layers.{}.mlp.gate_proj.weight', 'layers/mlp/gate/kernel', True),
    Row('model.layers.{}.mlp.up_proj.weight', 'layers/mlp/up/kernel', True),
    Row('model.layers.{}.mlp.down_proj.weight', 'layers/mlp/down/kernel', True),
    Row('model.norm.weight', 'final_norm/scale', False),
    Row('lm_head.weight', 'head/kernel', True),
)
FLOATS = ('F32', 'F16', 'BF16')
EMBEDDING, HEAD = TABLE[0].name, TABLE[-1].name
SHARD_BYTES = 5 * 10**9  # a file that holds more than one tensor is no larger
_STORED = {'float32': 'F32', 'bfloat16': 'BF16'}
# Written by old versions of transformers; the angles follow from the configuration.
IGNORED_SUFFIX = 'rotary_emb.inv_freq'


class Folder:
    """The tensors of a folder, opened but not read.

    Attributes:
      path: the folder.
      files: the weight files that count: those of the index, or `model.safetensors`.
      shapes: [out, in] of every tensor by name.
      dtypes: its stored type: F32, F16 or BF16.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the headers alone.

        Raises:
          InputError: no weights, a missing or damaged shard, a stale index, an unknown type.
        """
        self.path = Path(path)
        index = self.path / 'model.safetensors.index.json'
        whole = self.path / 'model.safetensors'
        if index.exists():
            weight_map = _weight_map(index)
            self.files = tuple(self.path / name for name in sorted(set(weight_map.values())))
            missing = [file.name for file in self.files if not file.exists()]
            if missing:
                raise InputError(
                    f'{self.path}: {", ".join(missing)} of the {len(self.files)} files that '
                    f'{index.name} names {"is" if len(missing) == 1 else "are"} missing.'
                )
        elif whole.exists():
            self.files = (whole,)
            weight_map = None
        else:
            raise InputError(f'{self.path}: {_without_weights(self.path)}')

        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in self.files:
            handle = _opened(file)
            for name in handle.keys():  # noqa: SIM118  (the handle is no dict)
                if weight_map is not None and weight_map.get(name) != file.name:
                    raise InputError(
                        f'{file}: holds {name}, which {index.name} '
                        f'{"has in " + weight_map[name] if name in weight_map else "lacks"}; '
                        'the index belongs to other weights.'
                    )
                if name.endswith(IGNORED_SUFFIX):
                    continue
                header = handle.get_slice(name)
                if header.get_dtype() not in FLOATS:
                    raise InputError(
                        f'{file}: {name} is stored as {header.get_dtype()}; allowed: '
                        f'{", ".join(FLOATS)}.'
                    )
                self._file_of[name] = file
                self.shapes[name] = tuple(header.get_shape())
                self.dtypes[name] = header.get_dtype()
        lost = sorted(set(weight_map or ()) - set(self.shapes))
        lost = [name for name in lost if not name.endswith(IGNORED_SUFFIX)]
        if lost:
            raise InputError(f'{index}: names {lost[0]}, which {weight_map[lost[0]]} lacks.')

    def read(self, name: str, index: Index = (slice(None),)) -> np.ndarray:
        """One tensor, or a part of it, in its stored type (bfloat16 as that of ml_dtypes).

        The file is mapped for as long as this takes: the pages of a mapping that stays would count
        as this process's memory.
        """
        with _opened(self._file_of[name]) as handle:
            return handle.get_slice(name)[index]

    def source(self, config: LlamaConfig) -> TensorSource:
        """The tensors under the rules of tied heads.

        Raises:
          InputError: the head is missing but not tied, or tied but differs from the embedding; that
            is seen when the embedding is read.
        """
        shapes = dict(self.shapes)
        if not config.tied_head and HEAD not in shapes and EMBEDDING in shapes:
            raise InputError(
                f'{self.path}: {HEAD} is missing; allowed only where config.json has '
                'tie_word_embeddings true.'
            )
        if not (config.tied_head and HEAD in shapes):
            return TensorSource(str(self.path), shapes, self.read)
        # Some exports write the shared matrix twice.
        del shapes[HEAD]
        return TensorSource(str(self.path), shapes, self._read_tied)

    def _read_tied(self, name: str, index: Index = (slice(None),)) -> np.ndarray:
        tensor = self.read(name, index)
        if name == EMBEDDING:
            same = self.shapes[HEAD] == self.shapes[EMBEDDING]
            if not same or not np.array_equal(self.read(HEAD, index), tensor, equal_nan=True):
                raise InputError(
                    f'{self.path}: tie_word_embeddings is true, but {HEAD} differs from '
                    f'{EMBEDDING}; set it to false to use the head.'
                )
        return tensor


def to_hf(params: Mapping[str, Any], config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, NumPy array) of every tensor as Hugging Face has it; a tied head is left out.

    The transposed arrays are views; `safetensors` wants them contiguous.
    """
    for name, row, layer in tensor_names(TABLE, config):
        leaf: Any = params
        for key in row.path.split('/'):
            leaf = leaf[key]
        tensor = np.asarray(leaf[layer] if '{}' in row.name else leaf)
        yield name, tensor.T if row.transposed else tensor


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes safetensors, one file or an index and shards, holding one tensor at a time.

    The headers are known before the first tensor is, so nothing is collected: the format is the
    header's length, the header as JSON, and the bytes of the tensors in its order.

    Args:
      folder: exists.
      shapes: of every tensor by name, in the order in which they come.
      tensors: (name, values); they are cast to `dtype`, which happens nowhere else.
      dtype: float32 or bfloat16.
      shard_bytes: of the tensors in a file, at most, unless one alone has more.
    """
    kind = DTYPES[dtype]
    sizes = {name: math.prod(shape) * kind.itemsize for name, shape in shapes.items()}
    shards: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    files = [f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ['model.safetensors']
    coming = iter(tensors)
    for file, shard in zip(files, shards):
        with (folder / file).open('wb') as out:
            out.write(_header(shard, shapes, dtype))
            for expected, (name, tensor) in zip(shard, coming):
                assert (name, tensor.shape) == (expected, shapes[name])
                out.write(np.ascontiguousarray(tensor, kind).view(np.uint8).data)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
        storage.write_json(folder / 'model.safetensors.index.json', index)


def _header(sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    at = 0
    for name, size in sizes.items():
        entry = {'dtype': _STORED[dtype], 'shape': shapes[name], 'data_offsets': [at, at + size]}
        header[name] = entry
        at += size
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, 'little') + text


def _weight_map(index: Path) -> dict[str, str]:
    content = storage.read_json(index)
    weight_map = content.get('weight_map') if isinstance(content, Mapping) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f'{index}: weight_map is missing or empty.')
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f'{index}: {name} lies in {file!r}; allowed: a file of this folder.')
    return weight_map


def _opened(file: Path):
    try:
        return safe_open(file, framework='numpy')
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f'{file}: is no whole safetensors file ({error}).') from error


def _without_weights(folder: Path) -> str:
    torch_files = sorted(file.name for file in folder.glob('*.bin'))
    torch_files += sorted(file.name for file in folder.glob('*.pth'))
    if torch_files:
        return (
            f'holds weights as {torch_files[0]} only, a format that can run code; allowed: '
            'model.safetensors (transformers converts with save_pretrained).'
        )
    return 'holds no weights; allowed: model.safetensors, model.safetensors.index.json.'
