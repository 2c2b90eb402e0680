"""Adapters in the real `peft`: ours give our logits there, theirs give their logits here."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax.finetune.input import Tokens
from palr_jax.finetune.train import Program, train
from palr_jax.llama import lora
from palr_jax.llama.load import load_model
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import apply_logits
from palr_jax.llama.peft import load_adapter, save_adapter
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

pytestmark = [
    pytest.mark.torch,
    # peft asks transformers under a name that transformers is about to drop.
    pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning'),
]

# q and o are square (32 x 32), k and v 32 x 16, gate and up 32 x 64, down 64 x 32.
CONFIG = tiny_config(vocab_size=272)
TOKENS = np.random.default_rng(3).integers(0, 272, (2, 40))
SPECS = {
    'square': LoraSpec(4, 8.0, ('q',)),
    'rectangular': LoraSpec(4, 8.0, ('k', 'down')),
    'all': LoraSpec(3, 6.0, lora.TARGETS),
    'rslora': LoraSpec(16, 8.0, ('q', 'v', 'up'), rslora=True, dropout=0.1),
}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp('base')
    write_hf_folder(folder, CONFIG, random_params(CONFIG, 7), tiny_tokenizer(['Heat (1995)']))
    return folder


def torch_model(folder):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(base, folder):
    ours = load_model(base)
    adapter, spec = load_adapter(folder, ours.config)
    return np.asarray(apply_logits(lora.join(adapter, ours.params), ours.config, TOKENS, lora=spec))


def trained_here(base, spec, folder):
    """Four steps of the real training loop, at a rate that moves B far from zero."""
    config = ConfigDict(
        {
            **{'steps': 4, 'batch_size': 2, 'length': 32, 'learning_rate': 0.05, 'warmup': 0},
            **{'decay_steps': 9, 'weight_decay': 0.0, 'clip_norm': 1.0, 'checkpoint_every': 9},
            **{'pack': True, 'profile_at': 0, 'profile_steps': 1},
        }
    )
    rng = np.random.default_rng(0)
    examples = [Tokens(rng.integers(0, 272, 12).astype(np.int32), 8) for _ in range(4)]
    program = Program(CONFIG, spec, np.dtype(np.float32))
    params = load_model(base).params
    return train(params, program, examples, config, seed=0, workdir=folder / 'work')


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_an_adapter_trained_here_works_in_peft(base, tmp_path, spec):
    """X01, X02, L06: no key is missing or left over, and the logits are ours."""
    peft = pytest.importorskip('peft')
    save_adapter(tmp_path / 'adapter', trained_here(base, spec, tmp_path), spec, str(base))
    model = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / 'adapter')
    found = model.load_adapter(tmp_path / 'adapter', adapter_name='again')
    assert [key for key in found.missing_keys if 'lora_' in key] == []
    assert found.unexpected_keys == []
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == CONFIG.layers * len(spec.targets)
    assert {layer.scaling['default'] for layer in layers} == {spec.scaling}

    theirs, ours = torch_logits(model.eval()), our_logits(base, tmp_path / 'adapter')
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    with model.disable_adapter():
        assert np.abs(torch_logits(model) - ours).max() > 0.1


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_an_adapter_of_peft_works_here(base, tmp_path, spec):
    """X01, X02, L06: A and B drawn at random, saved by `peft` itself."""
    torch = pytest.importorskip('torch')
    peft = pytest.importorskip('peft')
    settings = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=[f'{name}_proj' for name in spec.targets],
        use_rslora=spec.rslora,
        task_type='CAUSAL_LM',
    )
    model = peft.get_peft_model(torch_model(base), settings).eval()
    plain = torch_logits(model)  # B is zero
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'lora_' in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    expected = torch_logits(model)
    assert np.abs(expected - plain).max() > 0.1
    assert load_adapter(tmp_path, CONFIG)[1] == spec
    np.testing.assert_allclose(our_logits(base, tmp_path), expected, atol=1e-5)


def test_what_peft_merges_is_what_we_merge(base, tmp_path):
    """X04: `merge_and_unload` and `lora.merge`, both in float32."""
    peft = pytest.importorskip('peft')
    spec = SPECS['rslora']
    fresh = lora.init_adapter(CONFIG, spec, seed=0)
    rng = np.random.default_rng(2)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), fresh)
    save_adapter(tmp_path, adapter, spec, str(base))
    model = peft.PeftModel.from_pretrained(torch_model(base), tmp_path).merge_and_unload()
    kernels = load_model(base).params['layers']['attention']['v']['kernel']
    factors = adapter['layers']['attention']['v']
    for layer, block in enumerate(model.model.layers):
        merged = lora.merge(
            kernels[layer], factors['lora_a'][layer], factors['lora_b'][layer], spec
        )
        theirs = block.self_attn.v_proj.weight.detach().numpy()
        np.testing.assert_allclose(merged, theirs.T, atol=1e-6)
