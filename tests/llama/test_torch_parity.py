"""The same folder opened here and in transformers + torch: equal logits."""

import jax
import numpy as np
import pytest

from palr_jax.llama.config import RopeScaling
from palr_jax.llama.load import load_model
from palr_jax.llama.model import apply_logits
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

pytestmark = pytest.mark.torch

CONFIGS = {
    'grouped': {},
    'one_key_head': {'kv_heads': 1, 'layers': 3},
    'tied': {'tied_head': True},
    'wide_heads': {'head_dim': 16, 'rope_theta': 5e5},
    'linear': {'rope_scaling': RopeScaling('linear', 2.0)},
    'llama3': {'rope_scaling': RopeScaling('llama3', 4.0, 1.0, 4.0, 16), 'rope_theta': 50.0},
}


@pytest.mark.parametrize('changes', CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize('shards', [1, 3])
def test_logits_equal(tmp_path, changes, shards):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    config = tiny_config(vocab_size=272, **changes)
    tokenizer = tiny_tokenizer(['Heat (1995)'])
    write_hf_folder(tmp_path, config, random_params(config, seed=7), tokenizer, shards)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = np.random.default_rng(7).integers(0, 272, (2, 80))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    ours = load_model(tmp_path)
    logits = apply_logits(ours.params, ours.config, tokens)
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4)


def test_folder_saved_by_transformers_is_read(tmp_path):
    """bfloat16 shards, config and tied head as transformers itself writes them."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    config = transformers.LlamaConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 5000.0},
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size='30KB')
    tiny_tokenizer(['Heat (1995)']).save(tmp_path)
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    ours = load_model(tmp_path)
    assert ours.config.tied_head
    assert ours.config.rope_scaling == RopeScaling('linear', 2.0)
    assert len(jax.tree.leaves(ours.params)) == 11
    tokens = np.random.default_rng(0).integers(0, 272, (1, 40))
    with torch.no_grad():
        expected = theirs.float().eval()(torch.tensor(tokens)).logits.numpy()
    logits = apply_logits(ours.params, ours.config, tokens)
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4)
