"""Hugging Face folders: every tensor in its place, every fault named."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from palr_jax.errors import InputError
from palr_jax.llama import hf
from palr_jax.llama.load import load_model
from palr_jax.testing.llama import (
    random_params,
    tiny_config,
    tiny_tokenizer,
    write_hf_folder,
)

CONFIG = tiny_config(vocab_size=272)
WEIGHTS = 'model.safetensors'


@pytest.fixture(scope='module')
def tokenizer():
    return tiny_tokenizer(['Heat (1995)'])


@pytest.fixture(scope='module')
def params():
    return random_params(CONFIG, seed=0)


@pytest.fixture
def folder(tmp_path, params, tokenizer):
    write_hf_folder(tmp_path, CONFIG, params, tokenizer)
    return tmp_path


def rewrite(folder, **changes):
    """Replaces tensors of model.safetensors; None removes one. Dots are spelled __."""
    tensors = load_file(folder / WEIGHTS)
    for name, value in changes.items():
        name = name.replace('__', '.')
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / WEIGHTS)


def assert_equal(loaded, expected):
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_what_was_written_is_read(folder, params):
    loaded = load_model(folder)
    assert loaded.config == CONFIG
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))
    assert_equal(loaded.params, params)


def test_m03_rows_of_q_and_k_keep_their_order(folder, params):
    """Rotation of halves is Hugging Face's own: row j of q_proj is column j of the kernel."""
    tensors = load_file(folder / WEIGHTS)
    attention = load_model(folder).params['layers']['attention']
    for name in 'q', 'k':
        stored = tensors[f'model.layers.1.self_attn.{name}_proj.weight']
        np.testing.assert_array_equal(attention[name]['kernel'][1], stored.T)


def test_names_and_shapes_of_hugging_face(params):
    tensors = dict(hf.to_hf(params, CONFIG))
    assert len(tensors) == 9 * CONFIG.layers + 3
    assert tensors['model.layers.0.self_attn.k_proj.weight'].shape == (16, 32)
    assert tensors['model.layers.0.mlp.down_proj.weight'].shape == (32, 64)
    assert tensors['lm_head.weight'].shape == (272, 32)


def test_m08_bfloat16_bits_written_by_hand(folder, params):
    """By the definition of the format 1.0 is 0x3F80, -2.0 is 0xC000, 2**-9 is 0x3B00."""
    bits = np.tile(np.array([0x3F80, 0xC000, 0x3B00, 0x4049], '<u2'), 8)
    header = {'model.norm.weight': {'dtype': 'BF16', 'shape': [32], 'data_offsets': [0, 64]}}
    text = json.dumps(header).encode()
    rest = {name: x for name, x in load_file(folder / WEIGHTS).items() if name not in header}
    (folder / WEIGHTS).unlink()
    save_file(rest, folder / 'rest.safetensors')
    (folder / 'norm.safetensors').write_bytes(
        len(text).to_bytes(8, 'little') + text + bits.tobytes()
    )
    weight_map = dict.fromkeys(rest, 'rest.safetensors') | dict.fromkeys(header, 'norm.safetensors')
    (folder / f'{WEIGHTS}.index.json').write_text(json.dumps({'weight_map': weight_map}))

    loaded = load_model(folder).params['final_norm']['scale']
    assert loaded.dtype == np.float32
    assert loaded[:4].tolist() == [1.0, -2.0, 2.0**-9, 3.140625]
    loaded = load_model(folder, 'bfloat16').params['final_norm']['scale']
    assert loaded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(loaded).view(np.uint16), bits)


@pytest.mark.parametrize('stored', [np.float16, ml_dtypes.bfloat16])
def test_m08_half_precision_files(folder, params, stored):
    tensors = {name: x.astype(stored) for name, x in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    expected = jax.tree.map(lambda x: x.astype(stored).astype(np.float32), params)
    assert_equal(load_model(folder).params, expected)


def test_asked_dtype_is_that_of_every_leaf(folder, params):
    loaded = load_model(folder, 'bfloat16').params
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(ml_dtypes.bfloat16)}
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))
    with pytest.raises(InputError, match=r"'float16'; allowed: float32, bfloat16"):
        load_model(folder, 'float16')


def test_m04_tied_without_head(tmp_path, tokenizer):
    config = tiny_config(vocab_size=272, tied_head=True)
    write_hf_folder(tmp_path, config, random_params(config, 1), tokenizer)
    assert 'lm_head.weight' not in load_file(tmp_path / WEIGHTS)
    assert 'head' not in load_model(tmp_path).params


def test_m04_untied_without_head_is_refused(folder):
    rewrite(folder, lm_head__weight=None)
    with pytest.raises(InputError, match=r'lm_head\.weight is missing.*tie_word_embeddings'):
        load_model(folder)


def test_m04_tied_with_a_copy_of_the_embedding_has_no_second_copy(tmp_path, tokenizer):
    config = tiny_config(vocab_size=272, tied_head=True)
    params = random_params(config, 1)
    write_hf_folder(tmp_path, config, params, tokenizer)
    rewrite(tmp_path, lm_head__weight=params['embed']['embedding'])
    assert 'head' not in load_model(tmp_path).params
    rewrite(tmp_path, lm_head__weight=params['embed']['embedding'] + 1)
    with pytest.raises(InputError, match=r'lm_head\.weight differs'):
        load_model(tmp_path)


@pytest.fixture
def sharded(tmp_path, params, tokenizer):
    write_hf_folder(tmp_path, CONFIG, params, tokenizer, shards=2)
    return tmp_path


def test_m09_shards_with_a_stray_file(sharded, params):
    """The index counts; a model.safetensors or another file beside it does not."""
    save_file({'model.norm.weight': np.zeros(32, np.float32)}, sharded / WEIGHTS)
    save_file({'model.norm.weight': np.zeros(32, np.float32)}, sharded / 'other.safetensors')
    assert_equal(load_model(sharded).params, params)


def test_m09_missing_shard_is_named(sharded, params):
    (sharded / 'model-00002-of-00002.safetensors').unlink()
    save_file({'model.norm.weight': np.zeros(32, np.float32)}, sharded / WEIGHTS)
    with pytest.raises(InputError, match=r'model-00002-of-00002\.safetensors of the 2 files'):
        load_model(sharded)


def test_m09_index_of_other_weights_is_refused(sharded):
    index = sharded / f'{WEIGHTS}.index.json'
    content = json.loads(index.read_text())
    moved = {**content['weight_map'], 'model.norm.weight': 'model-00001-of-00002.safetensors'}
    assert moved != content['weight_map']
    index.write_text(json.dumps({'weight_map': moved}))
    with pytest.raises(InputError, match=r'holds model\.norm\.weight.*other weights'):
        load_model(sharded)
    added = {**content['weight_map'], 'model.extra': 'model-00002-of-00002.safetensors'}
    index.write_text(json.dumps({'weight_map': added}))
    with pytest.raises(InputError, match=r'names model\.extra'):
        load_model(sharded)


def test_m09_missing_and_left_over_tensors_are_listed(folder):
    norms = {name: np.ones(32, np.float32) for name in ('model__one', 'model__two')}
    rewrite(folder, **norms)
    with pytest.raises(InputError, match=r'holds 2 tensors: model\.one, model\.two, which a LLaMA'):
        load_model(folder)
    rewrite(folder, **dict.fromkeys(norms), model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(InputError, match=r'lacks 1 tensor: model\.layers\.1\.mlp\.up_proj\.weight'):
        load_model(folder)


def test_m02_unexpected_bias_is_refused(folder):
    rewrite(folder, model__layers__0__self_attn__q_proj__bias=np.zeros(32, np.float32))
    with pytest.raises(
        InputError, match=r'holds 1 tensor: model\.layers\.0\.self_attn\.q_proj\.bias'
    ):
        load_model(folder)


def test_more_layers_than_configured_are_refused(folder, params, tokenizer):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'num_hidden_layers': 1}))
    with pytest.raises(InputError, match=r'holds 9 tensors: model\.layers\.1.*and 5 more'):
        load_model(folder)


def test_rotary_leftovers_of_old_exports_are_ignored(folder, params):
    name = 'model__layers__0__self_attn__rotary_emb__inv_freq'
    rewrite(folder, **{name.replace('rotary__emb', 'rotary_emb'): np.ones(4, np.float32)})
    assert_equal(load_model(folder).params, params)


def test_wrong_shape_is_named(folder):
    rewrite(folder, model__norm__weight=np.zeros(31, np.float32))
    with pytest.raises(InputError, match=r'model\.norm\.weight has shape \[31\].*\[32\]'):
        load_model(folder)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(folder, params, value):
    bad = params['layers']['mlp']['up']['kernel'][1].T.copy()
    bad[3, 4] = value
    rewrite(folder, model__layers__1__mlp__up_proj__weight=bad)
    with pytest.raises(InputError, match=r'model\.layers\.1\.mlp\.up_proj\.weight holds NaN'):
        load_model(folder)


def test_integer_weights_are_refused(folder):
    rewrite(folder, model__norm__weight=np.ones(32, np.int8))
    with pytest.raises(InputError, match='stored as I8; allowed: F32, F16, BF16'):
        load_model(folder)


@pytest.mark.parametrize('keep', [0, 5, 300, -100])
def test_truncated_safetensors(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(InputError, match=r'model\.safetensors: is no whole safetensors file'):
        load_model(folder)


def test_html_instead_of_safetensors(folder):
    (folder / WEIGHTS).write_text('<!doctype html><html><body>404</body></html>')
    with pytest.raises(InputError, match='is no whole safetensors file'):
        load_model(folder)


def test_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r'holds no weights; allowed: model\.safetensors'):
        load_model(folder)
    (folder / 'pytorch_model.bin').write_bytes(b'\x80\x02')
    with pytest.raises(InputError, match=r'pytorch_model\.bin only'):
        load_model(folder)


def test_index_may_not_leave_the_folder(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    shutil.copy(sharded / 'model-00001-of-00002.safetensors', elsewhere)
    index = sharded / f'{WEIGHTS}.index.json'
    content = json.loads(index.read_text())
    path = f'../{elsewhere.name}/model-00001-of-00002.safetensors'
    index.write_text(json.dumps({'weight_map': {**content['weight_map'], 'lm_head.weight': path}}))
    with pytest.raises(InputError, match='a file of this folder'):
        load_model(sharded)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(InputError, match='weight_map is missing or empty'):
        load_model(sharded)
