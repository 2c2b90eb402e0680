"""The PEFT format, read and written; `peft` itself opens our files elsewhere."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from palr_jax.errors import InputError
from palr_jax.llama import lora
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.peft import load_adapter, save_adapter
from palr_jax.testing.llama import tiny_config

CONFIG = tiny_config(width=32)  # q is square, 32 x 32; k and v are 32 x 16
SPEC = LoraSpec(rank=4, alpha=8.0, targets=('q', 'k', 'down'))
KEY = 'base_model.model.model.layers.{}.{}_proj.lora_{}.weight'

# The form in which peft writes a plain LoRA: all that is off is there too.
WRITTEN_BY_PEFT = {
    'alora_invocation_tokens': None,
    'alpha_pattern': {},
    'arrow_config': None,
    'auto_mapping': None,
    'base_model_name_or_path': 'base',
    'bias': 'none',
    'corda_config': None,
    'ensure_weight_tying': False,
    'eva_config': None,
    'exclude_modules': None,
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'layer_replication': None,
    'layers_pattern': None,
    'layers_to_transform': None,
    'loftq_config': {},
    'lora_alpha': 8,
    'lora_bias': False,
    'lora_dropout': 0.05,
    'megatron_config': None,
    'megatron_core': 'megatron.core',
    'modules_to_save': None,
    'peft_type': 'LORA',
    'peft_version': '0.18.0',
    'qalora_group_size': 16,
    'r': 4,
    'rank_pattern': {},
    'revision': None,
    'target_modules': ['k_proj', 'q_proj', 'down_proj'],
    'target_parameters': None,
    'task_type': 'CAUSAL_LM',
    'trainable_token_indices': None,
    'use_dora': False,
    'use_qalora': False,
    'use_rslora': False,
}


@pytest.fixture
def adapter():
    rng = np.random.default_rng(0)
    drawn = lora.init_adapter(CONFIG, SPEC, seed=0)
    return jax.tree.map(lambda x: x + rng.standard_normal(x.shape, np.float32), drawn)


@pytest.fixture
def folder(tmp_path, adapter):
    save_adapter(tmp_path, adapter, SPEC, 'base')
    return tmp_path


def rewrite(folder, change):
    """Passes the tensors of a folder through `change`."""
    path = folder / 'adapter_model.safetensors'
    tensors = safetensors.numpy.load(path.read_bytes())
    path.write_bytes(safetensors.numpy.save(change(tensors)))


def reconfigure(folder, **fields):
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_keys_are_those_that_peft_looks_for(folder):
    """X01: with both `model.` levels, and no adapter name inside."""
    tensors = safetensors.numpy.load((folder / 'adapter_model.safetensors').read_bytes())
    assert set(tensors) == {
        KEY.format(layer, module, letter)
        for layer in (0, 1)
        for module in ('self_attn.q', 'self_attn.k', 'mlp.down')
        for letter in 'AB'
    }


def test_factors_are_stored_as_peft_orients_them(folder, adapter):
    """X02: A is [r, in] and B [out, r], for a square and for two rectangular projections."""
    tensors = safetensors.numpy.load((folder / 'adapter_model.safetensors').read_bytes())
    for part, name, fan_in, fan_out in (
        ('attention', 'q', 32, 32),
        ('attention', 'k', 32, 16),
        ('mlp', 'down', 64, 32),
    ):
        module = f'{"self_attn" if part == "attention" else "mlp"}.{name}'
        leaf = adapter['layers'][part][name]
        for layer in (0, 1):
            a, b = (tensors[KEY.format(layer, module, letter)] for letter in 'AB')
            assert (a.shape, b.shape) == ((4, fan_in), (fan_out, 4))
            # nn.Linear computes x @ weight.T: the product is the transposed delta of our kernel.
            ours = np.asarray(leaf['lora_a'][layer]) @ np.asarray(leaf['lora_b'][layer])
            np.testing.assert_allclose(b @ a, ours.T, rtol=1e-5, atol=1e-5)
    settings = json.loads((folder / 'adapter_config.json').read_text())
    assert settings['fan_in_fan_out'] is False
    assert (settings['r'], settings['lora_alpha'], settings['peft_type']) == (4, 8.0, 'LORA')
    assert sorted(settings['target_modules']) == ['down_proj', 'k_proj', 'q_proj']


def test_round_trip_keeps_every_bit(folder, adapter):
    loaded, spec = load_adapter(folder, CONFIG)
    assert spec == SPEC
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    for ours, theirs in zip(jax.tree.leaves(adapter), jax.tree.leaves(loaded)):
        np.testing.assert_array_equal(ours, theirs)


def test_a_config_written_by_peft_is_read(folder):
    (folder / 'adapter_config.json').write_text(json.dumps(WRITTEN_BY_PEFT))
    assert load_adapter(folder, CONFIG)[1] == dataclasses.replace(SPEC, dropout=0.05)


@pytest.mark.parametrize(
    'changes',
    [
        {
            'init_lora_weights': 'eva',
            'eva_config': {
                'adjust_scaling_factors': True,
                'label_mask_value': -100,
                'rho': 2.0,
                'tau': 0.99,
                'use_label_mask': True,
                'whiten': False,
            },
        },
        {'init_lora_weights': 'orthogonal'},
    ],
)
def test_starts_that_keep_the_base_are_read(folder, changes):
    """As peft 0.21 writes them."""
    (folder / 'adapter_config.json').write_text(json.dumps(WRITTEN_BY_PEFT | changes))
    assert load_adapter(folder, CONFIG)[1].rank == 4


def test_rslora_and_dropout_go_out_and_in(folder, adapter):
    """L06: r = 16, alpha = 32 is exported with the flag that makes its factor 8."""
    spec = LoraSpec(16, 32.0, ('q',), rslora=True, dropout=0.25)
    save_adapter(folder, lora.init_adapter(CONFIG, spec, seed=0), spec, 'base')
    settings = json.loads((folder / 'adapter_config.json').read_text())
    assert (settings['r'], settings['lora_alpha']) == (16, 32.0)
    assert settings['use_rslora'] is True
    assert settings['lora_dropout'] == 0.25
    loaded = load_adapter(folder, CONFIG)[1]
    assert loaded == spec
    assert loaded.scaling == 8.0


def test_half_precision_factors_are_read_exactly(folder, adapter):
    """M08: NumPy has no bfloat16 of its own."""
    rewrite(folder, lambda t: {k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()})
    loaded, _ = load_adapter(folder, CONFIG)
    for ours, theirs in zip(jax.tree.leaves(adapter), jax.tree.leaves(loaded)):
        assert theirs.dtype == np.float32
        rounded = np.asarray(ours).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(theirs, rounded)


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('use_rslora', 'yes', 'use_rslora is "yes"; allowed: true, false'),
        ('lora_dropout', '0.1', 'lora_dropout is "0.1"; allowed: a number'),
        ('lora_dropout', 1.5, 'lora.dropout is 1.5; allowed: from 0 to below 1'),
        ('use_dora', True, 'use_dora is true; allowed: null, false or empty'),
        ('fan_in_fan_out', True, 'fan_in_fan_out is true'),
        ('lora_bias', True, 'lora_bias is true'),
        ('modules_to_save', ['lm_head'], r'modules_to_save is \["lm_head"\]'),
        ('rank_pattern', {'q_proj': 8}, 'rank_pattern is {"q_proj": 8}'),
        ('layers_to_transform', [0], r'layers_to_transform is \[0\]'),
        ('an_invention_of_2031', 'on', 'an_invention_of_2031 is "on"'),
        ('bias', 'all', 'bias is "all"; allowed: "none"'),
        ('peft_type', 'LOHA', 'peft_type is "LOHA"; allowed: "LORA"'),
        ('init_lora_weights', 'pissa', 'init_lora_weights is "pissa"; allowed: true, false'),
        ('r', '4', 'r is "4"; allowed: a whole number'),
        ('r', 0, 'lora.rank is 0'),
        ('lora_alpha', None, 'lora_alpha is null; allowed: a number'),
        ('target_modules', 'all-linear', 'target_modules is "all-linear"; allowed: a list'),
        ('target_modules', ['q_proj', 'lm_head'], 'target_modules is .*lm_head'),
        ('target_modules', ['q'], r'target_modules is \["q"\]'),
        ('target_modules', ['c_attn', 'wte'], r'target_modules is \["c_attn", "wte"\]; allowed: a'),
        ('target_modules', [], r'target_modules is \[\]'),
    ],
)
def test_unsupported_settings_are_refused_by_name(folder, field, value, message):
    """DoRA, for one, would be another function."""
    reconfigure(folder, **{field: value})
    with pytest.raises(InputError, match=rf'adapter_config\.json: {message}'):
        load_adapter(folder, CONFIG)


@pytest.mark.parametrize('field', ['r', 'lora_alpha', 'target_modules', 'peft_type'])
def test_a_missing_setting_is_named(folder, field):
    path = folder / 'adapter_config.json'
    settings = json.loads(path.read_text())
    del settings[field]
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f'{field} is missing'):
        load_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    ('base', 'message'),
    [
        (tiny_config(width=64), r'has shape \(4, 32\); allowed for this base and rank: \(4, 64\)'),
        (tiny_config(layers=3), r'layers\.2\.self_attn\.q_proj\.lora_A\.weight is missing'),
        (tiny_config(layers=1), r'layers\.1\.mlp\.down_proj\.lora_A\.weight has no place in this'),
        (
            tiny_config(kv_heads=4),
            r'k_proj\.lora_B\.weight has shape \(16, 4\); allowed .*\(32, 4\)',
        ),
    ],
)
def test_the_adapter_of_another_base_is_refused(folder, base, message):
    with pytest.raises(InputError, match=message):
        load_adapter(folder, base)


def test_missing_and_extra_tensors_are_refused(folder):
    key = KEY.format(1, 'self_attn.k', 'B')
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != key})
    with pytest.raises(InputError, match=r'layers\.1\.self_attn\.k_proj\.lora_B\.weight is miss'):
        load_adapter(folder, CONFIG)
    save_adapter(folder, jax.tree.map(np.asarray, lora.init_adapter(CONFIG, SPEC, 0)), SPEC, 'base')
    rewrite(folder, lambda t: t | {'base_model.model.lm_head.weight': np.zeros((2, 2), np.float32)})
    with pytest.raises(InputError, match=r'lm_head\.weight has no place in this base \(1 such\)'):
        load_adapter(folder, CONFIG)


def test_keys_without_the_model_level_are_refused(folder):
    """X01: an adapter whose keys do not match must not count as loaded."""
    rewrite(folder, lambda t: {k.replace('model.model.', 'model.'): v for k, v in t.items()})
    with pytest.raises(InputError, match='is missing'):
        load_adapter(folder, CONFIG)


@pytest.mark.parametrize('name', ['adapter_config.json', 'adapter_model.safetensors'])
def test_missing_and_damaged_files_are_named(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    with pytest.raises(InputError, match=name):
        load_adapter(folder, CONFIG)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f'{name}: this file does not exist'):
        load_adapter(folder, CONFIG)


def test_integer_tensors_are_refused(folder):
    rewrite(folder, lambda t: {k: v.astype(np.int8) for k, v in t.items()})
    with pytest.raises(InputError, match='is stored as I8; allowed: F32, F16, BF16'):
        load_adapter(folder, CONFIG)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_factors_that_are_not_finite_are_refused(folder, value):
    rewrite(folder, lambda t: t | {min(t): np.full_like(t[min(t)], value)})
    with pytest.raises(InputError, match=r'tensor .*lora_A\.weight holds NaN or infinite numbers'):
        load_adapter(folder, CONFIG)
