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
    'llama1': {'kv_heads': 4, 'norm_eps': 1e-6},
    'grouped': {},
    'one_key_head': {'kv_heads': 1, 'layers': 3},
    'tied': {'tied_head': True},
    'wide_heads': {'head_dim': 16, 'rope_theta': 5e5},
    'linear': {'rope_scaling': RopeScaling('linear', 2.0)},
    'llama3': {'rope_scaling': RopeScaling('llama3', 4.0, 1.0, 4.0, 16), 'rope_theta': 50.0},
    'llama3_tied': {
        **{'rope_scaling': RopeScaling('llama3', 8.0, 1.0, 4.0, 32), 'rope_theta': 100.0},
        **{'tied_head': True, 'head_dim': 16},
    },
}


@pytest.mark.parametrize('changes', CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize('shards', [1, 3])
def test_logits_equal(tmp_path, changes, shards):
    """M03, M04, M06: 80 tokens, far beyond the original contexts of 16 and 32."""
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


@pytest.mark.parametrize('name', ['llama1', 'grouped', 'llama3'])
@pytest.mark.parametrize('side', ['left', 'right'])
def test_logits_of_a_padded_batch_equal(tmp_path, name, side):
    """P08: rows of 80, 37 and 1 tokens, with the mask and the positions that `generate` makes."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    config = tiny_config(vocab_size=272, **CONFIGS[name])
    write_hf_folder(
        tmp_path, config, random_params(config, seed=8), tiny_tokenizer(['Heat (1995)'])
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = np.random.default_rng(8).integers(0, 272, (3, 80))
    real = np.arange(80) < np.array([80, 37, 1])[:, None]
    if side == 'left':
        real = real[:, ::-1].copy()
    with torch.no_grad():
        expected = theirs.eval()(
            torch.tensor(tokens),
            attention_mask=torch.tensor(real.astype(np.int64)),
            position_ids=torch.tensor(np.maximum(np.cumsum(real, axis=1) - 1, 0)),
        ).logits.numpy()
    ours = load_model(tmp_path)
    logits = apply_logits(ours.params, config, tokens, segments=real.astype(np.int32))
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], atol=1e-4)


def test_folder_saved_by_transformers_is_read(tmp_path):
    """M08: bfloat16 shards, config and tied head as transformers itself writes them."""
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
