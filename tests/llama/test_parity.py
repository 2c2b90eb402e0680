"""Logits against those that transformers + torch gave for the same weights (reference/logits.*)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from palr_jax import storage
from palr_jax.llama.config import LlamaConfig, RopeScaling
from palr_jax.llama.load import load_model
from palr_jax.llama.model import apply_logits
from palr_jax.testing.llama import random_params, tiny_tokenizer, write_gguf_file, write_hf_folder

REFERENCE = Path(__file__).parent / 'reference'
CASES = {
    case['name']: case for case in json.loads((REFERENCE / 'logits.json').read_text())['cases']
}


def config_of(case) -> LlamaConfig:
    values = dict(case['config'])
    scaling = values.pop('rope_scaling')
    return LlamaConfig(**values, rope_scaling=RopeScaling(**scaling) if scaling else None)


@pytest.mark.parametrize('name', CASES)
def test_logits_equal_those_of_torch(name, tmp_path):
    """M01, M03, M04, M06, P08: LLaMA 1's heads, grouped and wide ones, tied, scaled, padded.

    The scaled cases run far beyond the original context of 32: short prompts would hide a fault.
    """
    case = CASES[name]
    config = config_of(case)
    params = random_params(config, case['seed'])
    checksum = sum(float(np.abs(x).sum(dtype=np.float64)) for x in jax.tree.leaves(params))
    assert checksum == pytest.approx(case['checksum']), 'NumPy draws other numbers than it did'
    stored = storage.read_arrays(REFERENCE / 'logits.npz')
    tokens, expected = stored[f'{name}/tokens'], stored[f'{name}/logits']

    tokenizer = tiny_tokenizer(['Heat (1995)'])
    write_hf_folder(tmp_path / 'hf', config, params, tokenizer)
    models = [load_model(tmp_path / 'hf')]
    if name in ('llama1', 'grouped', 'tied', 'linear'):
        write_gguf_file(tmp_path / 'model.gguf', config, params, tokenizer)
        models.append(load_model(tmp_path / 'model.gguf'))
    real = np.arange(tokens.shape[1]) < np.array(case['lengths'])[:, None]
    if case['padding'] == 'left':
        real = real[:, ::-1]
    compared = real[:, case['positions']]
    assert compared.any(axis=1).all()
    for model in models:
        logits = apply_logits(model.params, model.config, tokens, segments=real.astype(np.int32))
        assert logits.dtype == np.float32
        logits = np.asarray(logits)[:, case['positions']]
        np.testing.assert_allclose(logits[compared], expected[compared], atol=1e-4)
