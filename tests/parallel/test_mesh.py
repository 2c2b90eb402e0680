"""The mesh of a config, the table of rules, and what does not divide."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from palr_jax.errors import InputError
from palr_jax.finetune.optimizer import make_optimizer
from palr_jax.llama import lora
from palr_jax.llama.load import open_checkpoint
from palr_jax.llama.lora import LoraSpec
from palr_jax.parallel import mesh as meshes
from palr_jax.parallel import rules
from palr_jax.parallel.devices import HARDWARE, peak_flops
from palr_jax.testing.llama import (
    random_params,
    tiny_config,
    tiny_tokenizer,
    write_hf_folder,
)

MODEL = tiny_config(vocab_size=96, width=64, heads=8, kv_heads=8, hidden=128)


def settings(data=1, fsdp=1, tensor=1, slices=1):
    return ConfigDict({'data': data, 'fsdp': fsdp, 'tensor': tensor, 'slices': slices})


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((8, 1, 1), (8, 1, 1)),
        ((-1, 2, 1), (4, 2, 1)),
        ((1, 1, 1), (1, 1, 1)),
    ],
)
def test_the_rest_of_the_devices_goes_where_the_config_says(given, expected):
    mesh = meshes.make_mesh(settings(*given))
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == ('data', 'fsdp', 'tensor')


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ((3, 1, 1), 'config.mesh has data 3, fsdp 1, tensor 1, but there are 8 devices; allowed: '),
        ((2, 2, 1), 'data 2, fsdp 2, tensor 1, but there are 8 devices; .* product is 8'),
        ((3, -1, 1), 'data 3, fsdp -1, tensor 1, but there are 8 devices'),
        ((-1, -1, 1), 'one -1 for the rest'),
        ((0, -1, 1), 'allowed: 1 or more'),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        meshes.make_mesh(settings(*given))


def test_slices_must_be_those_of_the_devices():
    with pytest.raises(InputError, match=r'config.mesh.slices is 2 .*: slices 1, and data'):
        meshes.make_mesh(settings(data=8, slices=2))


class Chip:
    """As much of a device as the layout of several slices reads."""

    platform, device_kind, process_index = 'cpu', 'made up', 0

    def __init__(self, number):
        self.id, self.slice_index = number, number // 4


def test_slices_divide_the_data_axis():
    mesh = meshes.make_mesh(settings(data=2, fsdp=-1, slices=2), [Chip(i) for i in range(8)])
    assert tuple(mesh.shape.values()) == (2, 4, 1)
    for index, row in enumerate(mesh.devices):
        assert {chip.slice_index for chip in row.flat} == {index}
    with pytest.raises(InputError, match=r'slices 2, and data a multiple of it'):
        meshes.make_mesh(settings(fsdp=-1, slices=2), [Chip(i) for i in range(8)])


def test_a_batch_that_does_not_divide_is_refused():
    mesh = meshes.make_mesh(settings(data=2, fsdp=2, tensor=2))
    meshes.check_rows('finetune.batch_size', 8, mesh, parts=2)
    meshes.check_rows('finetune.batch_size', 3, None)
    with pytest.raises(InputError) as error:
        meshes.check_rows('finetune.batch_size', 12, mesh, parts=2)
    assert str(error.value) == (
        'config.finetune.batch_size is 12, divided over 4 devices (data 2, fsdp 2) and accumulated '
        'in 2 parts; allowed: a multiple of 8.'
    )


def spec_of(path, shape, mesh, model=MODEL):
    return rules.partition(tuple(path.split('/')), shape, mesh, model)


def test_the_table_by_hand():
    mesh = meshes.make_mesh(settings(data=2, fsdp=2, tensor=2))
    P = PartitionSpec
    q, mlp = 'layers/attention/q', 'layers/mlp'
    for path, shape, expected in (
        ('embed/embedding', (96, 64), P(None, ('fsdp', 'tensor'))),
        (f'{q}/kernel', (2, 64, 64), P(None, 'fsdp', 'tensor')),
        (f'{q}/kernel/int8', (2, 64, 64), P(None, 'fsdp', 'tensor')),
        (f'{q}/kernel/scale', (2, 1, 64), P(None, None, 'tensor')),
        (f'{mlp}/down/kernel', (2, 128, 64), P(None, 'tensor', 'fsdp')),
        ('layers/attention_norm/scale', (2, 64), P(None, None)),
        ('head/kernel', (64, 96), P('fsdp', 'tensor')),
        # Adapters: the in axis of A and the out axis of B lie as their kernel's.
        (f'{q}/lora_a', (2, 64, 4), P(None, 'fsdp', None)),
        (f'{q}/lora_b', (2, 4, 64), P(None, None, 'tensor')),
        (f'{mlp}/down/lora_a', (2, 128, 4), P(None, 'tensor', None)),
        (f'{mlp}/down/lora_b', (2, 4, 64), P(None, None, 'fsdp')),
    ):
        assert spec_of(path, shape, mesh) == expected, path
    assert len(rules.RULES) <= 20


@pytest.mark.parametrize(
    ('path', 'shape', 'tensor', 'kept'),
    [
        ('head/kernel', (64, 32001), 2, '32001 entries of axis 1'),
        ('layers/attention/k/kernel', (2, 64, 16), 4, '2 heads of axis 2'),
    ],
)
def test_odd_sizes_are_kept_whole_with_a_message(caplog, path, shape, tensor, kept):
    """A vocabulary of 32001 on 2; 2 key-value heads on 4, whose 16 columns 4 would divide."""
    mesh = meshes.make_mesh(settings(fsdp=-1, tensor=tensor))
    rules._say_once.cache_clear()
    model = tiny_config(width=64, kv_heads=2)
    with caplog.at_level(logging.WARNING, 'absl'):
        for _ in range(2):
            assert spec_of(path, shape, mesh, model)[len(shape) - 1] is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert (
        message == f'{path}: its {kept} do not divide over the mesh axis tensor and are kept whole'
    )


def test_nf4_over_the_tensor_axis_is_warned_of(caplog):
    """A byte holds the outputs j and j + out/2, of two heads."""
    rules._warn_of_nf4.cache_clear()
    path, shape = 'layers/attention/q/kernel/nf4', (2, 64, 32)
    with caplog.at_level(logging.WARNING, 'absl'):
        spec_of(path, shape, meshes.make_mesh(settings(fsdp=-1)))
        assert not caplog.records
        for _ in range(2):
            spec_of(path, shape, meshes.make_mesh(settings(fsdp=-1, tensor=2)))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("config.model.quantize is 'nf4' and config.mesh.tensor is 2: heads")


def test_weights_adapter_and_moments_lie_by_the_rules(tmp_path):
    """Each device holds an eighth of what divides; the numbers are those of one device."""
    tokenizer = tiny_tokenizer(['Heat (1995)'])
    model = tiny_config(
        vocab_size=-(-tokenizer.size // 8) * 8, width=64, heads=8, kv_heads=8, hidden=128
    )
    write_hf_folder(tmp_path, model, random_params(model, 0), tokenizer)
    mesh = meshes.make_mesh(settings(fsdp=4, tensor=2))
    checkpoint = open_checkpoint(tmp_path)
    base = checkpoint.params(shardings=rules.shardings(mesh, model))
    whole = checkpoint.params()
    spec = LoraSpec(4, 8.0, ('q', 'down'))
    adapter = lora.init_adapter(model, spec, 0)
    sharded = rules.shard(adapter, mesh, model)
    for ours, theirs in zip(jax.tree.leaves((base, sharded)), jax.tree.leaves((whole, adapter))):
        np.testing.assert_array_equal(ours, theirs)
    assert base['layers']['mlp']['up']['kernel'].addressable_shards[0].data.size * 8 == (
        whole['layers']['mlp']['up']['kernel'].size
    )
    config = ConfigDict(
        {'learning_rate': 0.1, 'warmup': 0, 'decay_steps': 9, 'weight_decay': 0.0, 'clip_norm': 1.0}
    )
    state = jax.eval_shape(make_optimizer(config).init, lora.join(adapter, whole))
    places = rules.tree_shardings(state, mesh, model)
    [adam] = [
        leaf
        for leaf in jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
        if isinstance(leaf, optax.ScaleByAdamState)
    ]
    expected = NamedSharding(mesh, PartitionSpec(None, 'fsdp', None))
    assert adam.mu['layers']['attention']['q']['lora_a'].is_equivalent_to(expected, 3)
    assert adam.nu['layers']['attention']['q']['lora_a'].is_equivalent_to(expected, 3)
    assert adam.count.is_equivalent_to(NamedSharding(mesh, PartitionSpec()), 0)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((4, 3))
    assert meshes.constrain(x, meshes.ROW_AXES) is x
    assert meshes.shard_rows(x, None) is x
    assert meshes.join_rows(x, None) is x
    np.testing.assert_array_equal(meshes.own_rows(4, None), np.arange(4))


def test_a_lone_process_has_all_rows():
    """Of several, tests/parallel/test_processes.py."""
    mesh = meshes.make_mesh(settings(2, 2, 2))
    np.testing.assert_array_equal(meshes.own_rows(8, mesh), np.arange(8))
    x = np.arange(24.0).reshape(8, 3)
    joined, shared = meshes.join_rows(x, mesh), meshes.shard_rows(x, mesh)
    np.testing.assert_array_equal(joined, x)
    assert joined.sharding == shared.sharding


def test_hardware_and_peaks():
    """Published bf16 peaks; the longest name wins, so a v5e is no v5p."""
    assert peak_flops('TPU v5 lite') == 197e12
    assert peak_flops('TPU v5') == 459e12
    assert peak_flops('NVIDIA H100 80GB HBM3') == 989e12
    assert peak_flops('cpu') is None
    for hardware in HARDWARE.values():
        assert np.prod(hardware.mesh) == hardware.chips
        sizes = [int(n) for n in hardware.topology.partition(':')[2].split('x') if n]
        assert np.prod(sizes, initial=1) == hardware.chips
