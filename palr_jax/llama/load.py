"""A model from disk: configuration, tokenizer, identity, and weights when they are asked for."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.llama import gguf, hf, tokenizer, weights
from palr_jax.llama.config import LlamaConfig, from_hf
from palr_jax.llama.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose header and tokenizer are read, whose weights are not.

    Attributes:
      config: the architecture.
      tokenizer: its tokenizer.
      fingerprint: hexadecimal sha256 of the architecture, the tensors' names, shapes and types, the
        sizes of the weight files, and the tokenizer; no weight is read for it.
    """

    config: LlamaConfig
    tokenizer: Tokenizer
    fingerprint: str
    table: Collection[weights.Row]
    source: weights.TensorSource

    def params(
        self,
        dtype: str = 'float32',
        quantize: str = 'none',
        shardings: weights.Shardings | None = None,
    ) -> dict[str, Any]:
        """The parameter tree of `Llama`; see `weights.build`."""
        return weights.build(self.table, self.config, self.source, dtype, quantize, shardings)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in memory; see `Checkpoint` for the fields."""

    config: LlamaConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    fingerprint: str


def load_model(
    path: str | os.PathLike,
    dtype: str = 'float32',
    quantize: str = 'none',
    shardings: weights.Shardings | None = None,
) -> LoadedModel:
    """Reads a Hugging Face folder or a .gguf file.

    Args:
      path: folder or file on a local disk.
      dtype: of all weights: float32 or bfloat16.
      quantize: of the layers' kernels: none, int8 or nf4.
      shardings: where each leaf goes; see `weights.build`.

    Raises:
      InputError: see `open_checkpoint` and `weights.build`.
    """
    checkpoint = open_checkpoint(path)
    params = checkpoint.params(dtype, quantize, shardings)
    return LoadedModel(checkpoint.config, params, checkpoint.tokenizer, checkpoint.fingerprint)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Reads everything but the weights of a Hugging Face folder or a .gguf file.

    Raises:
      InputError: there is no model, it is damaged or of another architecture, its tensors are not
        those that its configuration needs, or its tokenizer has more ids than its embedding.
    """
    if '://' in os.fspath(path):
        raise InputError(f'{path}: weights are memory-mapped; allowed: a path on a local disk.')
    path = Path(path)
    if path.is_dir():
        checkpoint = _open_folder(path)
    elif path.is_file():
        checkpoint = _open_gguf(path)
    else:
        raise InputError(f'{path}: does not exist; allowed: a Hugging Face folder or a .gguf file.')
    size, rows = checkpoint.tokenizer.size, checkpoint.config.vocab_size
    if size > rows:
        raise InputError(f'{path}: the tokenizer has {size} ids, the embedding only {rows} rows.')
    weights.check_tensors(checkpoint.table, checkpoint.config, checkpoint.source)
    return checkpoint


def _open_folder(path: Path) -> Checkpoint:
    folder = hf.Folder(path)
    config = from_hf(storage.read_json(path / 'config.json'), str(path / 'config.json'))
    names = ('tokenizer.json', 'tokenizer.model')
    vocabulary = [(path / name).read_bytes() for name in names if (path / name).exists()]
    tokens = tokenizer.from_hf_folder(path)
    # Any of three files names these; in a GGUF file they are metadata of the tokenizer.
    vocabulary.append(json.dumps([tokens.bos_id, tokens.eos_id, tokens.pad_id]).encode())
    identity = _fingerprint(config, folder.shapes, folder.dtypes, folder.files, vocabulary)
    return Checkpoint(config, tokens, identity, hf.TABLE, folder.source(config))


def _open_gguf(path: Path) -> Checkpoint:
    file = gguf.File(path)
    vocabulary = [
        json.dumps([key, value]).encode()
        for key, value in sorted(file.metadata.items())
        if key.startswith('tokenizer.')
    ]
    identity = _fingerprint(file.config, file.shapes, file.dtypes, [path], vocabulary)
    tokens = tokenizer.from_gguf(file.metadata, str(path))
    return Checkpoint(file.config, tokens, identity, gguf.TABLE, file.source())


def _fingerprint(
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    files: Iterable[Path],
    vocabulary: Iterable[bytes],
) -> str:
    header = {
        'config': dataclasses.asdict(config),
        'tensors': [[name, list(shape), dtypes[name]] for name, shape in sorted(shapes.items())],
        'bytes': [file.stat().st_size for file in files],
        'vocabulary': [hashlib.sha256(part).hexdigest() for part in vocabulary],
    }
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
