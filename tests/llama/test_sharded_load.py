"""Weights read straight into the shards of a mesh: the same numbers, and each part read once."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from palr_jax.llama import gguf
from palr_jax.llama.load import open_checkpoint
from palr_jax.testing.llama import (
    random_params,
    tiny_config,
    tiny_tokenizer,
    write_gguf_file,
    write_hf_folder,
)

AXES = ('fsdp', 'tensor')


@pytest.fixture(scope='module')
def mesh():
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), AXES, axis_types=auto, devices=jax.devices()[:8])


@pytest.fixture(scope='module', params=['hf', 'gguf'])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    tokenizer = tiny_tokenizer(['Heat (1995)'])
    size = -(-tokenizer.size // 8) * 8
    config = tiny_config(vocab_size=size, width=64, heads=8, kv_heads=4, head_dim=8, hidden=64)
    params = random_params(config, seed=4)
    if request.param == 'gguf':
        write_gguf_file(folder / 'model.gguf', config, params, tokenizer)
        return open_checkpoint(folder / 'model.gguf')
    write_hf_folder(folder, config, params, tokenizer)
    return open_checkpoint(folder)


def place(mesh):
    """Kernels over both axes, the embedding over one, norms whole on every device."""

    def sharding(path, shape):
        if path[-1] in ('kernel', 'int8', 'nf4') and path[0] == 'layers':
            return NamedSharding(mesh, PartitionSpec(None, *AXES))
        if path[0] == 'head':
            return NamedSharding(mesh, PartitionSpec(*AXES))
        if path[0] == 'embed':
            return NamedSharding(mesh, PartitionSpec('tensor'))
        return NamedSharding(mesh, PartitionSpec())

    return sharding


@pytest.mark.parametrize('kind', ['none', 'int8', 'nf4'])
def test_sharded_weights_are_the_weights(checkpoint, mesh, kind):
    whole = checkpoint.params(quantize=kind)
    sharded = checkpoint.params(quantize=kind, shardings=place(mesh))

    def same(path, found, expected):
        path = tuple(step.key for step in path)
        assert found.sharding.is_equivalent_to(place(mesh)(path, found.shape), found.ndim)
        np.testing.assert_array_equal(found, expected)

    jax.tree_util.tree_map_with_path(same, sharded, whole)
    kernel = sharded['layers']['mlp']['up']['kernel']
    part = (kernel if kind == 'none' else kernel[kind]).addressable_shards[0].data
    assert part.size * 8 == (kernel if kind == 'none' else kernel[kind]).size


@pytest.mark.parametrize('checkpoint', ['hf'], indirect=True)
def test_each_number_is_read_once(checkpoint, mesh):
    """Also where several devices hold the same part, as they do of the norms."""
    read = []

    def counting(name, index):
        tensor = checkpoint.source.read(name, index)
        read.append(tensor.size)
        return tensor

    source = dataclasses.replace(checkpoint.source, read=counting)
    dataclasses.replace(checkpoint, source=source).params(shardings=place(mesh))
    assert sum(read) == sum(math.prod(shape) for shape in source.shapes.values())
    assert max(read) <= max(math.prod(shape) for shape in source.shapes.values()) // 4


@pytest.mark.parametrize('checkpoint', ['gguf'], indirect=True)
def test_a_gguf_tensor_is_dequantised_once_for_all_devices(checkpoint, mesh, monkeypatch):
    calls = []
    dequantize = gguf.dequantize
    monkeypatch.setattr(gguf, 'dequantize', lambda *args: calls.append(0) or dequantize(*args))
    checkpoint.params(shardings=place(mesh))
    assert len(calls) == len(checkpoint.source.shapes)
