"""Weights, configuration and metadata of a GGUF file, dequantised with the `gguf` package.

llama.cpp rotates neighbouring pairs where this model rotates halves, so its converter interleaves
the rows of q and k within each head; they are put back here.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from palr_jax.errors import InputError
from palr_jax.llama.config import (
    LlamaConfig,
    RopeScaling,
    checked,
    integer,
    number,
    rope_scaling,
)
from palr_jax.llama.weights import Index, Row, TensorSource

TABLE = (
    Row('token_embd.weight', 'embed/embedding', False),
    Row('blk.{}.attn_norm.weight', 'layers/attention_norm/scale', False),
    Row('blk.{}.attn_q.weight', 'layers/attention/q/kernel', True),
    Row('blk.{}.attn_k.weight', 'layers/attention/k/kernel', True),
    Row('blk.{}.attn_v.weight', 'layers/attention/v/kernel', True),
    Row('blk.{}.attn_output.weight', 'layers/attention/o/kernel', True),
    Row('blk.{}.ffn_norm.weight', 'layers/mlp_norm/scale', False),
    Row('blk.{}.ffn_gate.weight', 'layers/mlp/gate/kernel', True),
    Row('blk.{}.ffn_up.weight', 'layers/mlp/up/kernel', True),
    Row('blk.{}.ffn_down.weight', 'layers/mlp/down/kernel', True),
    Row('output_norm.weight', 'final_norm/scale', False),
    Row('output.weight', 'head/kernel', True),
)
TYPES = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q6_K')
EMBEDDING, HEAD, ROPE_FREQUENCIES = 'token_embd.weight', 'output.weight', 'rope_freqs.weight'
# All that a file may say about the architecture; a key beyond these could change the numbers.
KEYS = {
    'vocab_size',
    'context_length',
    'embedding_length',
    'block_count',
    'feed_forward_length',
    'attention.head_count',
    'attention.head_count_kv',
    'attention.key_length',
    'attention.value_length',
    'attention.layer_norm_rms_epsilon',
    'rope.dimension_count',
    'rope.freq_base',
    'rope.scaling.type',
    'rope.scaling.factor',
    'rope.scaling.original_context_length',
    'rope.scaling.finetuned',
    'rope.scale_linear',
    'tensor_data_layout',
}


class File:
    """A GGUF file, memory-mapped; no weight is read before `read` is called.

    Attributes:
      path: the file.
      metadata: every key with its value.
      config: the architecture; tied where there is no output.weight.
      shapes: row-major shape of every tensor by name, without the rotary frequencies.
      dtypes: its stored type, of `TYPES`.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the header.

        Raises:
          InputError: no whole GGUF file, another architecture, or a tensor type not in `TYPES`.
        """
        self.path = Path(path)
        reader, self.metadata = _opened(self.path)
        architecture = self.metadata.get('general.architecture')
        if architecture != 'llama':
            raise InputError(
                f'{self.path}: general.architecture is {architecture!r}; allowed: llama.'
            )
        parts = self.metadata.get('split.count', 1)
        if parts > 1:
            raise InputError(
                f'{self.path}: is one of {parts} parts; allowed: a file in one part '
                '(llama-gguf-split --merge joins them).'
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.dtypes = {name: t.tensor_type.name for name, t in self._tensors.items()}
        for name, kind in self.dtypes.items():
            if kind not in TYPES:
                raise InputError(
                    f'{self.path}: {name} is stored as {kind}; allowed: {", ".join(TYPES)}.'
                )
        self.shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))  # GGUF lists the innermost first
            for name, tensor in self._tensors.items()
            if name != ROPE_FREQUENCIES
        }
        self.config = self._config()

    def read(self, name: str, index: Index = (slice(None),)) -> np.ndarray:
        """One tensor, dequantised, with the rows of q and k in the order of Hugging Face."""
        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith('attn_q.weight'):
            values = deinterleave(values, self.config.heads)
        if name.endswith('attn_k.weight'):
            values = deinterleave(values, self.config.kv_heads)
        return values[index]

    def source(self) -> TensorSource:
        return TensorSource(str(self.path), self.shapes, self.read, whole=True)

    def _config(self) -> LlamaConfig:
        where = str(self.path)
        prefix = 'llama.'
        values = {
            key.removeprefix(prefix): value
            for key, value in self.metadata.items()
            if key.startswith(prefix)
        }
        unknown = sorted(set(values) - KEYS)
        if unknown:
            raise InputError(
                f'{where}: {prefix}{unknown[0]} is {values[unknown[0]]!r}, which is not '
                'implemented; allowed: plain LLaMA.'
            )
        if EMBEDDING not in self.shapes:
            raise InputError(f'{where}: lacks {EMBEDDING}.')
        whole = functools.partial(integer, values, where=where)
        width, heads = whole('embedding_length'), whole('attention.head_count')
        head_dim = whole('attention.key_length', default=max(width // heads, 1))
        for key in ('attention.value_length', 'rope.dimension_count'):
            if values.get(key, head_dim) != head_dim:
                raise InputError(
                    f'{where}: {prefix}{key} is {values[key]}; allowed: {head_dim}, the head '
                    'dimension.'
                )
        return checked(
            LlamaConfig(
                vocab_size=self.shapes[EMBEDDING][0],
                width=width,
                layers=whole('block_count'),
                heads=heads,
                kv_heads=whole('attention.head_count_kv', default=heads),
                head_dim=head_dim,
                hidden=whole('feed_forward_length'),
                norm_eps=number(values, 'attention.layer_norm_rms_epsilon', where),
                rope_theta=number(values, 'rope.freq_base', where, 10000.0),
                rope_scaling=self._rope_scaling(values, head_dim),
                tied_head=HEAD not in self.shapes,
                max_positions=whole('context_length'),
            ),
            where,
        )

    def _rope_scaling(self, values: Mapping[str, Any], head_dim: int) -> RopeScaling | None:
        where = str(self.path)
        # As llama.cpp reads them: a factor without a type is linear, 0 means none.
        factor = values.get('rope.scaling.factor') or values.get('rope.scale_linear') or 1.0
        kind = values.get('rope.scaling.type', 'linear')
        if kind not in ('none', 'linear'):
            raise InputError(f'{where}: rope.scaling.type is {kind!r}; allowed: none, linear.')
        linear = kind == 'linear' and factor != 1.0
        if ROPE_FREQUENCIES not in self._tensors:
            return rope_scaling('linear', {'factor': factor}, where) if linear else None
        divisors = np.asarray(self._tensors[ROPE_FREQUENCIES].data, np.float64)
        if (divisors == 1).all() and not linear:
            return None
        theta = number(values, 'rope.freq_base', where, 10000.0)
        guess = RopeScaling('llama3', float(divisors.max()), 1.0, 4.0, 8192)
        expected = llama3_divisors(guess, theta, head_dim)
        if linear or divisors.shape != expected.shape or not np.allclose(divisors, expected, 1e-4):
            raise InputError(
                f'{where}: {ROPE_FREQUENCIES} is not that of Llama 3.1 to 3.3 (low_freq_factor 1, '
                'high_freq_factor 4, original context 8192); allowed: that, or no such tensor.'
            )
        return guess


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order of llama.cpp: in each head [0 4 1 5 2 6 3 7] back to [0 1 2 … 7].

    Args:
      rows: [heads * head_dim, D].
      heads: query heads for q, key-value heads for k.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """[head_dim / 2] what llama.cpp's converter writes to `rope_freqs.weight` for Llama 3.1.

    Each rotary frequency is divided by its entry: 1 for the high ones, `factor` for the low ones.
    """
    turns = scaling.original_max_positions / (2 * np.pi)
    turns = turns * theta ** -(np.arange(0, head_dim, 2) / head_dim)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return 1 / (blend + (1 - blend) / scaling.factor)


def _opened(path: Path) -> tuple[gguf.GGUFReader, dict[str, Any]]:
    try:
        with open(path, 'rb') as file:
            magic = file.read(4)
        if magic != b'GGUF':
            raise InputError(f'{path}: begins with {magic!r}; allowed: b"GGUF", a GGUF file.')
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror or error}).') from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise InputError(f'{path}: is no whole GGUF file of a known version ({error}).') from error
    if reader.byte_order != 'I':
        raise InputError(f"{path}: has the byte order of another machine; allowed: this one's.")
    return reader, metadata
