"""config.json of Hugging Face: what is read, what is refused."""

import pytest

from palr_jax.errors import InputError
from palr_jax.llama.config import LlamaConfig, RopeScaling, from_hf, to_hf
from palr_jax.testing.llama import tiny_config

# Sizes of Llama 3.1 8B.
BASE = {
    'model_type': 'llama',
    'vocab_size': 128256,
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 131072,
}
LLAMA3 = {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
}


def parse(**changes) -> LlamaConfig:
    return from_hf({**BASE, **changes}, 'config.json')


def test_every_size_is_read():
    assert parse(rope_theta=500000.0, tie_word_embeddings=True, head_dim=64) == LlamaConfig(
        vocab_size=128256,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=64,
        hidden=14336,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        tied_head=True,
        max_positions=131072,
    )


def test_absent_fields_have_the_defaults_of_transformers():
    from transformers import LlamaConfig as Theirs

    few = {key: BASE[key] for key in list(BASE)[:6]}
    ours, theirs = from_hf(few, 'config.json'), Theirs(**few)
    assert ours.kv_heads == theirs.num_key_value_heads == 32
    assert ours.head_dim == theirs.head_dim == 128
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rope_theta == theirs.rope_parameters['rope_theta']
    assert ours.tied_head is theirs.tie_word_embeddings is False


def test_null_counts_as_absent():
    config = parse(num_key_value_heads=None, head_dim=None, rope_scaling=None)
    assert (config.kv_heads, config.head_dim, config.rope_scaling) == (32, 128, None)


def test_m06_llama3_scaling():
    expected = RopeScaling('llama3', 8.0, 1.0, 4.0, 8192)
    assert parse(rope_scaling=LLAMA3).rope_scaling == expected


def test_m06_old_spelling_of_linear_scaling():
    config = parse(rope_scaling={'type': 'linear', 'factor': 2})
    assert config.rope_scaling == RopeScaling('linear', 2.0)


def test_m06_transformers_5_spelling_holds_theta_inside():
    config = parse(rope_parameters={**LLAMA3, 'rope_theta': 500000.0})
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling('llama3', 8.0, 1.0, 4.0, 8192)
    assert parse(rope_parameters={'rope_type': 'default', 'rope_theta': 1e5}).rope_theta == 1e5


@pytest.mark.parametrize(
    ('rope', 'part'),
    [
        ({'rope_type': 'yarn', 'factor': 4.0}, "'yarn'; allowed: default, linear, llama3"),
        ({'type': 'dynamic', 'factor': 4.0}, "'dynamic'"),
        ({'rope_type': ['llama3']}, "the rope type is ['llama3']; allowed: default"),
        ({'rope_type': ['llama3'], 'type': 'llama3'}, "rope_type is ['llama3'], type is"),
        ({'type': 'linear'}, 'factor is None'),
        ({'type': 'linear', 'factor': 0.5}, 'factor is 0.5'),
        ({'type': 'linear', 'factor': '2'}, "factor is '2'"),
        ({'type': 'linear', 'factor': 2.0, 'beta_fast': 32}, 'beta_fast'),
        ({'rope_type': 'default', 'factor': 2.0}, 'factor'),
        ({'rope_type': 'llama3', 'type': 'linear', 'factor': 2.0}, "type is 'linear'"),
        ({**LLAMA3, 'low_freq_factor': 4.0}, 'low_freq_factor is 4.0'),
        ({k: v for k, v in LLAMA3.items() if k != 'high_freq_factor'}, 'high_freq_factor is None'),
        ({'rope_type': 'default', 'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
        ('linear', 'rope_scaling'),
    ],
)
def test_m06_other_scalings_are_refused_by_name(rope, part):
    with pytest.raises(InputError, match=r'^config\.json: ') as caught:
        parse(rope_scaling=rope)
    assert part in str(caught.value)


def test_m06_two_spellings_that_differ_are_refused():
    with pytest.raises(InputError, match='differ'):
        parse(rope_scaling={'type': 'linear', 'factor': 2}, rope_parameters=LLAMA3)


@pytest.mark.parametrize(
    ('changes', 'part'),
    [
        ({'model_type': 'qwen2'}, "model_type is 'qwen2'; allowed: llama, mistral"),
        ({'model_type': None}, 'model_type is None'),
        ({'attention_bias': True}, 'attention_bias is True'),
        ({'mlp_bias': True}, 'mlp_bias is True'),
        ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'"),
        ({'quantization_config': {'bits': 4}}, 'quantization_config'),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5'),
        ({'vocab_size': '32000'}, "vocab_size is '32000'"),
        ({'num_hidden_layers': 0}, 'num_hidden_layers is 0'),
        ({'num_hidden_layers': True}, 'num_hidden_layers is True'),
        ({'hidden_size': None}, 'hidden_size is None'),
        ({'num_key_value_heads': 5}, '5 key-value heads'),
        ({'num_attention_heads': 24}, 'num_attention_heads is 24'),
        ({'head_dim': 63}, 'head dimension is 63'),
        ({'rms_norm_eps': -1e-5}, 'rms_norm_eps is -1e-05'),
        ({'rope_theta': float('nan')}, 'rope_theta is nan'),
        ({'tie_word_embeddings': 'yes'}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, part):
    with pytest.raises(InputError) as caught:
        parse(**changes)
    assert part in str(caught.value)


def test_mistral_only_without_a_sliding_window():
    mistral = {'model_type': 'mistral', 'num_key_value_heads': None}
    assert parse(**mistral, sliding_window=None).kv_heads == 8
    with pytest.raises(InputError, match='sliding_window is 4096'):
        parse(**mistral, sliding_window=4096)
    with pytest.raises(InputError, match='sliding_window is absent'):
        parse(**mistral)


@pytest.mark.parametrize(
    'scaling', [None, RopeScaling('linear', 4.0), RopeScaling('llama3', 8.0, 1.0, 4.0, 64)]
)
def test_written_config_reads_back_and_means_the_same_to_transformers(scaling):
    from transformers import LlamaConfig as Theirs

    config = tiny_config(rope_scaling=scaling, tied_head=True, head_dim=16, rope_theta=5e5)
    written = to_hf(config)
    assert from_hf(written, 'config.json') == config
    theirs = Theirs(**written)
    assert from_hf(theirs.to_dict(), 'config.json') == config
    assert theirs.rope_parameters['rope_type'] == (scaling.kind if scaling else 'default')
