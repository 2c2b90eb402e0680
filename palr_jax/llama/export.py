"""A Hugging Face folder from tensors: weights, configuration and tokenizer, whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from palr_jax import storage
from palr_jax.llama import hf
from palr_jax.llama.config import to_hf
from palr_jax.llama.load import Checkpoint
from palr_jax.llama.weights import leaf_shapes, tensor_names

# Of a Hugging Face folder, what goes with the weights unchanged.
COMPANIONS = (
    *('tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json'),
    *('added_tokens.json', 'chat_template.jinja', 'generation_config.json'),
)


def write_folder(
    out: Path,
    path: Path,
    checkpoint: Checkpoint,
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    more: Mapping[str, Any] | None = None,
    shard_bytes: int = hf.SHARD_BYTES,
) -> None:
    """Writes `out`, under another name until it is whole.

    Args:
      out: a local folder; it must not exist.
      path: where `checkpoint` is from; its configuration and tokenizer are copied.
      checkpoint: whose architecture the tensors have.
      tensors: every one by its name in Hugging Face, in the order of `tensor_shapes`.
      dtype: of the weights that are written: float32 or bfloat16.
      more: what is added to config.json.
      shard_bytes: see `hf.write_weights`.

    Raises:
      OSError: the disk.
    """
    temporary = out.with_name(f'.{out.name}.{os.getpid()}.tmp')
    try:
        temporary.mkdir(parents=True)
        settings = settings_of(path, checkpoint) | {'torch_dtype': dtype} | dict(more or {})
        storage.write_json(temporary / 'config.json', settings)
        hf.write_weights(temporary, tensor_shapes(checkpoint), tensors, dtype, shard_bytes)
        _write_tokenizer(path, checkpoint, temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, as Hugging Face has it."""
    leaves = leaf_shapes(checkpoint.config)
    shapes = {}
    for name, row, _ in tensor_names(hf.TABLE, checkpoint.config):
        shape = leaves[tuple(row.path.split('/'))]
        shape = shape[1:] if '{}' in row.name else shape
        shapes[name] = shape[::-1] if row.transposed else shape
    return shapes


def settings_of(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json: a folder's own, so that nothing of it is lost, or one made from a GGUF."""
    if path.is_dir():
        # Under one name: transformers 5 calls it `dtype` and reads both.
        return {k: v for k, v in storage.read_json(path / 'config.json').items() if k != 'dtype'}
    tokenizer = checkpoint.tokenizer
    return to_hf(checkpoint.config) | {
        'bos_token_id': tokenizer.bos_id,
        'eos_token_id': tokenizer.eos_id,
        'pad_token_id': tokenizer.pad_id,
    }


def _write_tokenizer(path: Path, checkpoint: Checkpoint, folder: Path) -> None:
    if not path.is_dir():
        checkpoint.tokenizer.save(folder)
        return
    for name in COMPANIONS:
        if (path / name).exists():
            shutil.copyfile(path / name, folder / name)


def hash_weights(folder: epath.Path) -> str:
    """The SHA-256 of the safetensors in a folder, whatever their size."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob('*.safetensors')):
        with path.open('rb') as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()
