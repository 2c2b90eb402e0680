"""Opening a model from either format, and its identity."""

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
