"""A tiny LLaMA with real files: configuration, weights, tokenizer, Hugging Face folder, GGUF.

>>> tokenizer = tiny_tokenizer(['Heat (1995)'])
>>> config = tiny_config(vocab_size=tokenizer.size)
>>> write_hf_folder(folder, config, random_params(config, seed=0), tokenizer)
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from palr_jax import storage
from palr_jax.llama import hf
from palr_jax.llama.config import LlamaConfig, to_hf
from palr_jax.llama.gguf import TABLE as GGUF_TABLE
from palr_jax.llama.gguf import llama3_divisors
from palr_jax.llama.tokenizer import Tokenizer
from palr_jax.llama.weights import leaf_shapes, put, tensor_names

SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')


def tiny_config(**overrides: Any) -> LlamaConfig:
    """Two layers, width 32, 4 heads over 2 key-value heads of 8; any field can be replaced."""
    config = LlamaConfig(
        vocab_size=384,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        hidden=64,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tied_head=False,
        max_positions=512,
    )
    return dataclasses.replace(config, **overrides)


def random_params(config: LlamaConfig, seed: int) -> dict[str, Any]:
    """Float32 NumPy weights in the tree of `Llama`, the same for a seed on every platform.

    Kernels have deviation 1/sqrt(inputs), so activations keep their size; norms vary around 1, so
    that a norm in the wrong place shows.
    """
    generator = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for path, shape in leaf_shapes(config).items():
        values = generator.standard_normal(shape)
        if path[-1] == 'scale':
            values = 1 + 0.2 * values
        elif path[-1] == 'kernel':
            values *= shape[-2] ** -0.5
        put(params, path, values.astype(np.float32))
    return params


def tiny_tokenizer(texts: Iterable[str], vocab_size: int = 384) -> Tokenizer:
    """Byte-level BPE trained in memory on `texts`: encodes any text, knows the chat markers.

    BOS is `<|endoftext|>` (0), EOS `<|im_end|>` (2), padding is EOS. `vocab_size` is the most that
    it has; few texts give fewer ids.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, bos_id=0, eos_id=2)


def write_hf_folder(
    folder: str | os.PathLike,
    config: LlamaConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    shards: int = 1,
) -> None:
    """Writes a folder that transformers opens: config, safetensors in `shards` files, tokenizer."""
    folder = Path(folder)
    special_ids = {
        'bos_token_id': tokenizer.bos_id,
        'eos_token_id': tokenizer.eos_id,
        'pad_token_id': tokenizer.pad_id,
    }
    storage.write_json(folder / 'config.json', to_hf(config) | special_ids)
    tokenizer.save(folder)
    # save_file writes the memory of a transposed view as it lies, hence contiguous copies.
    tensors = {name: np.ascontiguousarray(x) for name, x in hf.to_hf(params, config)}
    metadata = {'format': 'pt'}
    if shards == 1:
        save_file(tensors, folder / 'model.safetensors', metadata)
        return
    weight_map = {}
    for shard in range(shards):
        file = f'model-{shard + 1:05d}-of-{shards:05d}.safetensors'
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file, metadata)
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {'metadata': {'total_size': size}, 'weight_map': weight_map}
    storage.write_json(folder / 'model.safetensors.index.json', index)


def write_gguf_file(
    path: str | os.PathLike,
    config: LlamaConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    kind: str = 'F32',
    pre: str = 'gpt-2',
) -> None:
    """Writes a .gguf file that llama.cpp opens.

    Args:
      path: of the file.
      config: the architecture.
      params: the tree of `random_params`.
      tokenizer: a byte-level one.
      kind: of the matrices: F32, F16, BF16, Q8_0, Q4_0 or Q4_1; norms are F32.
      pre: the name of the pre-tokenizer that goes with `tokenizer`.
    """
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == 'linear':
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling is not None and scaling.kind == 'llama3':
        divisors = llama3_divisors(scaling, config.rope_theta, config.head_dim)
        writer.add_tensor('rope_freqs.weight', divisors.astype(np.float32))
    _add_vocabulary(writer, tokenizer, config.vocab_size, pre)
    for name, row, layer in tensor_names(GGUF_TABLE, config):
        leaf: Any = params
        for key in row.path.split('/'):
            leaf = leaf[key]
        tensor = np.asarray(leaf[layer] if '{}' in row.name else leaf, np.float32)
        tensor = np.ascontiguousarray(tensor.T if row.transposed else tensor)
        if 'attn_q' in name or 'attn_k' in name:
            heads = config.heads if 'attn_q' in name else config.kv_heads
            # The permutation of llama.cpp's convert_hf_to_gguf.py.
            halves = tensor.reshape(heads, 2, -1, config.width)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        stored = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else 'F32']
        writer.add_tensor(name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, rows: int, pre: str) -> None:
    state = json.loads(tokenizer.backend.to_str())
    special = {token['content'] for token in state['added_tokens']}
    tokens = sorted(state['model']['vocab'], key=state['model']['vocab'].get)
    types = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    unused = rows - len(tokens)
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f'[PAD{i}]' for i in range(unused)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * unused)
    writer.add_token_merges([' '.join(merge) for merge in state['model']['merges']])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
