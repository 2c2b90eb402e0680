"""Writes a model as a Hugging Face folder that transformers opens, with an adapter merged into it.

    python -m palr_jax.convert --model=base.gguf --adapter=runs/demo/finetune/adapter --out=merged

One tensor is in memory at a time. The folder appears whole or not at all.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath
from flax import traverse_util

from palr_jax import cli, data
from palr_jax.errors import InputError
from palr_jax.llama import export, hf, lora, peft
from palr_jax.llama.load import Checkpoint, open_checkpoint
from palr_jax.llama.weights import DTYPES, tensor_names
from palr_jax.progress import Progress

MODEL = flags.DEFINE_string('model', None, 'What config.model.path allows: a folder, a .gguf, …')
ADAPTER = flags.DEFINE_string('adapter', None, 'A folder in PEFT format; none converts the base.')
OUT = flags.DEFINE_string('out', None, 'The folder to write; it must not exist.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', list(DTYPES), 'Of the weights that are written.')

MERGED = 'palr_jax_merged'  # in config.json: SHA-256 of the adapters that the weights contain


def convert(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    dtype: str = 'float32',
    shard_bytes: int = hf.SHARD_BYTES,
) -> None:
    """Writes the folder `out`.

    Args:
      model: as `config.model.path`.
      out: a folder that does not exist yet.
      adapter: a PEFT folder whose deltas are added to the kernels.
      dtype: of the weights: float32 or bfloat16.
      shard_bytes: see `hf.write_weights`.

    Raises:
      InputError: the model or the adapter cannot be read, they do not fit, the adapter is merged
        already, or `out` exists or cannot be written.
    """
    if '://' in os.fspath(out):
        raise InputError(f'--out={out}: allowed: a folder on a local disk.')
    out = Path(out)
    if out.exists():
        raise InputError(f'--out={out} exists; allowed: the name of a folder that is yet to be.')
    path = data.resolve(model)
    checkpoint = open_checkpoint(path)
    more = {}
    leaves, spec = None, None
    if adapter is not None:
        leaves, spec = peft.load_adapter(adapter, checkpoint.config)
        digest = hashlib.sha256((epath.Path(adapter) / peft.WEIGHTS).read_bytes()).hexdigest()
        before = export.settings_of(path, checkpoint).get(MERGED) or []
        if digest in before:
            raise InputError(f'{path}: has --adapter={adapter} merged into it already.')
        more = {MERGED: [*before, digest]}

    try:
        tensors = merged(checkpoint, leaves, spec)
        export.write_folder(out, path, checkpoint, tensors, dtype, more, shard_bytes)
    except OSError as error:
        raise InputError(f'--out={out}: cannot be written ({error.strerror or error}).') from error
    logging.info('Wrote %s.', out)


def merged(
    checkpoint: Checkpoint, adapter: Any = None, spec: lora.LoraSpec | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) as Hugging Face has them, each read when it is asked for.

    A kernel that has an adapter comes in float32; the others as they are stored.

    Raises:
      InputError: a tensor is not finite.
    """
    stored = {row.path: row for row in checkpoint.table}
    factors = traverse_util.flatten_dict(adapter or {}, sep='/')
    total = len(export.tensor_shapes(checkpoint))
    with Progress('convert', total, 'tensors') as progress:
        for name, row, layer in tensor_names(hf.TABLE, checkpoint.config):
            source = stored[row.path]
            tensor = checkpoint.source.read(source.name.format(layer))
            tensor = tensor.T if source.transposed else tensor
            a, b = (
                factors.get(row.path.replace('kernel', letter)) for letter in ('lora_a', 'lora_b')
            )
            if a is not None:
                tensor = lora.merge(tensor, a[layer], b[layer], spec)
            if not np.isfinite(tensor).all():
                raise InputError(
                    f'{checkpoint.source.where}: {source.name.format(layer)} holds NaN or infinite '
                    f'numbers{" when the adapter is added" if a is not None else ""}.'
                )
            yield name, tensor.T if row.transposed else tensor
            progress.update()


def main(_: list[str]) -> None:
    convert(MODEL.value, OUT.value, adapter=ADAPTER.value, dtype=DTYPE.value)


if __name__ == '__main__':
    flags.mark_flags_as_required(['model', 'out'])
    cli.run(main)
