"""Opening a model from either format, its identity, and what is refused before a weight is read."""

import json

import jax
import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.llama.load import load_model, open_checkpoint
from palr_jax.testing.llama import (
    random_params,
    tiny_config,
    tiny_tokenizer,
    write_gguf_file,
    write_hf_folder,
)

CONFIG = tiny_config(vocab_size=272)


@pytest.fixture(scope='module')
def tokenizer():
    return tiny_tokenizer(['Heat (1995)'])


def test_both_formats_give_the_same_model(tmp_path, tokenizer):
    params = random_params(CONFIG, seed=0)
    write_hf_folder(tmp_path / 'hf', CONFIG, params, tokenizer)
    write_gguf_file(tmp_path / 'model.gguf', CONFIG, params, tokenizer)
    one, two = load_model(tmp_path / 'hf'), load_model(str(tmp_path / 'model.gguf'))
    assert one.config.__dict__ | {'norm_eps': 0} == two.config.__dict__ | {'norm_eps': 0}
    assert two.config.norm_eps == np.float32(1e-5)  # GGUF stores float32
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    text = 'History: "Heat (1995)"<|im_end|>\n'
    assert one.tokenizer.encode(text) == two.tokenizer.encode(text) == tokenizer.encode(text)
    assert (one.tokenizer.bos_id, one.tokenizer.eos_id) == (0, 2)
    assert (two.tokenizer.bos_id, two.tokenizer.eos_id) == (0, 2)


def write(folder, config, tokenizer, seed=0, shards=1):
    write_hf_folder(folder, config, random_params(config, seed), tokenizer, shards)
    return open_checkpoint(folder).fingerprint


def test_fingerprint_names_headers_and_not_places(tmp_path, tokenizer):
    first = write(tmp_path / 'a', CONFIG, tokenizer)
    assert len(first) == 64
    assert write(tmp_path / 'b', CONFIG, tokenizer) == first
    assert write(tmp_path / 'c', tiny_config(vocab_size=273), tokenizer) != first
    assert write(tmp_path / 'd', tiny_config(vocab_size=272, rope_theta=1e6), tokenizer) != first
    assert write(tmp_path / 'e', CONFIG, tokenizer, shards=2) != first
    other = tiny_tokenizer(['Other words, other merges.'], vocab_size=tokenizer.size)
    assert write(tmp_path / 'f', CONFIG, other) != first


@pytest.mark.parametrize(
    'change',
    [{'add_bos_token': False}, {'eos_token': '<|im_start|>'}, {'pad_token': '<|im_start|>'}],
)
def test_fingerprint_names_the_special_tokens(tmp_path, tokenizer, change):
    """They change what a run computes, and are in no weight and not in tokenizer.json."""
    first = write(tmp_path, CONFIG, tokenizer)
    reconfigure(tmp_path, 'tokenizer_config.json', **change)
    assert open_checkpoint(tmp_path).fingerprint != first


def test_fingerprint_of_a_gguf_file(tmp_path, tokenizer):
    params = random_params(CONFIG, seed=0)
    prints = []
    for name, kind in ('a', 'F32'), ('b', 'F32'), ('c', 'F16'):
        write_gguf_file(tmp_path / f'{name}.gguf', CONFIG, params, tokenizer, kind)
        prints.append(open_checkpoint(tmp_path / f'{name}.gguf').fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_opening_reads_no_weight(tmp_path, tokenizer):
    """A NaN deep in the file is found when the weights are asked for, not before."""
    params = random_params(CONFIG, seed=0)
    params['layers']['mlp']['down']['kernel'][1, 2, 3] = np.nan
    write_gguf_file(tmp_path / 'x.gguf', CONFIG, params, tokenizer)
    checkpoint = open_checkpoint(tmp_path / 'x.gguf')
    assert checkpoint.config.layers == 2
    with pytest.raises(InputError, match=r'x\.gguf: blk\.1\.ffn_down\.weight holds NaN'):
        checkpoint.params()


def reconfigure(folder, file='config.json', **fields):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | fields))


# What is done to a folder of two shards, and what is said of it.
FAULTS = {
    'm09_missing_shard': (
        lambda folder: (folder / 'model-00002-of-00002.safetensors').unlink(),
        r'model-00002-of-00002\.safetensors of the 2 files that .*index\.json names is missing\.',
    ),
    'm09_missing_tensors': (
        lambda folder: reconfigure(folder, num_hidden_layers=3),
        r'lacks 9 tensors: model\.layers\.2\.input_layernorm\.weight, .* and 5 more\.',
    ),
    'm09_left_over_tensors': (
        lambda folder: reconfigure(folder, num_hidden_layers=1),
        r'holds 9 tensors: model\.layers\.1\..*, which a LLaMA of 1 layers does not have\.',
    ),
    'wrong_shape': (
        lambda folder: reconfigure(folder, intermediate_size=96),
        r'mlp\.gate_proj\.weight has shape \[64, 32\]; allowed by .*: \[96, 32\]\.',
    ),
    'm02_unknown_architecture': (
        lambda folder: reconfigure(folder, model_type='qwen2'),
        r"config\.json: model_type is 'qwen2'; allowed: llama, mistral\.",
    ),
    'm06_unknown_scaling': (
        lambda folder: reconfigure(folder, rope_scaling={'rope_type': 'yarn', 'factor': 4.0}),
        r"the rope type is 'yarn'; allowed: default, linear, llama3\.",
    ),
    'm11_vocabulary_beyond_the_rows': (
        lambda folder: tiny_tokenizer(['Jumanji (1995), Sabrina (1995)'] * 9, 300).save(folder),
        r'the tokenizer has \d+ ids, the embedding only 272 rows\.',
    ),
}


@pytest.mark.parametrize(('spoil', 'message'), FAULTS.values(), ids=FAULTS)
def test_a_faulty_folder_is_refused_in_one_sentence_before_a_weight_is_read(
    tmp_path, tokenizer, spoil, message
):
    """Every weight is NaN, which the first read would tell instead."""
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), random_params(CONFIG, 0))
    write_hf_folder(tmp_path, CONFIG, params, tokenizer, shards=2)
    with pytest.raises(InputError, match=r'embed_tokens\.weight holds NaN'):
        load_model(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=f'{message}$') as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert '. ' not in str(caught.value)
    assert '\n' not in str(caught.value)


def test_m11_a_gguf_vocabulary_beyond_the_rows_is_refused(tmp_path, tokenizer):
    config = tiny_config(vocab_size=tokenizer.size - 1)
    params = random_params(config, 0)
    params['embed']['embedding'][:] = np.nan
    write_gguf_file(tmp_path / 'x.gguf', config, params, tokenizer)
    with pytest.raises(InputError, match=f'has {tokenizer.size} ids, the embedding only'):
        load_model(tmp_path / 'x.gguf')


def test_m11_more_ids_than_rows_is_refused(tmp_path, tokenizer):
    config = tiny_config(vocab_size=tokenizer.size - 1)
    write_hf_folder(tmp_path, config, random_params(config, 0), tokenizer)
    with pytest.raises(InputError, match=f'has {tokenizer.size} ids, the embedding only'):
        load_model(tmp_path)


def test_m11_more_rows_than_ids_are_kept(tmp_path, tokenizer):
    write_hf_folder(tmp_path, CONFIG, random_params(CONFIG, 0), tokenizer)
    loaded = load_model(tmp_path)
    assert loaded.tokenizer.size < loaded.config.vocab_size == 272


def test_a_path_that_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r'none: does not exist; allowed: a Hugging Face folder'):
        load_model(tmp_path / 'none')
    with pytest.raises(InputError, match='holds no weights'):
        load_model(tmp_path)
    with pytest.raises(InputError, match='allowed: a path on a local disk'):
        load_model('gs://bucket/model')


def test_folder_without_config(tmp_path, tokenizer):
    write_hf_folder(tmp_path, CONFIG, random_params(CONFIG, 0), tokenizer)
    (tmp_path / 'config.json').unlink()
    with pytest.raises(InputError, match=r'config\.json: this file does not exist'):
        load_model(tmp_path)
    (tmp_path / 'config.json').mkdir()
    with pytest.raises(InputError, match=r'config\.json: cannot be read \(Is a directory\)\.$'):
        load_model(tmp_path)
