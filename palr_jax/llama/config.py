"""What a LLaMA is: sizes, norms and rotary positions, read strictly from a Hugging Face config.

Whatever would change the numbers and is not implemented (biases, other activations, other rotary
scalings, quantised weights, sliding windows) is refused by name, never ignored: short prompts hide
such faults.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from palr_jax.errors import InputError

# Keys that each kind of rotary scaling needs; the original context length is harmless elsewhere.
ROPE_FIELDS = {
    'default': (),
    'linear': ('factor',),
    'llama3': (
        'factor',
        'low_freq_factor',
        'high_freq_factor',
        'original_max_position_embeddings',
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pre-training.

    Attributes:
      kind: `linear` divides every frequency by `factor`; `llama3` only the low ones (Llama 3.1).
      factor: 1 or more.
      low_freq_factor: llama3: below so many turns in the original context a frequency is divided.
      high_freq_factor: llama3: above so many turns it is kept; between the two it is blended.
      original_max_positions: llama3: the original context, in tokens.
    """

    kind: Literal['linear', 'llama3']
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture of one model.

    Attributes:
      vocab_size: V, rows of the embedding.
      width: D.
      layers: N.
      heads: H, query heads.
      kv_heads: K, key-value heads; divides `heads`.
      head_dim: size of one head; even.
      hidden: width of the MLP.
      norm_eps: added to the mean square in RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None for the plain frequencies.
      tied_head: the output projection is the transposed embedding.
      max_positions: longest context that the model was made for, in tokens.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_head: bool
    max_positions: int


# By the last part of the name on the Hub, for programs that are compiled without the weights.
ARCHITECTURES = {
    'llama-7b': LlamaConfig(
        vocab_size=32000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        hidden=11008,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tied_head=False,
        max_positions=2048,
    ),
}


def from_hf(config: Mapping[str, Any], where: str) -> LlamaConfig:
    """Parses the content of a `config.json`; absent fields have the defaults of transformers.

    Args:
      config: the parsed JSON object.
      where: its path, for messages.

    Raises:
      InputError: a field is missing, malformed or asks for what is not implemented.
    """
    if not isinstance(config, Mapping):
        raise InputError(f'{where}: holds {type(config).__name__}; allowed: a JSON object.')
    family = config.get('model_type')
    if family not in ('llama', 'mistral'):
        raise InputError(f'{where}: model_type is {family!r}; allowed: llama, mistral.')
    _refuse_unimplemented(config, family, where)
    # A field that is null counts as absent, as in transformers.
    config = {key: value for key, value in config.items() if value is not None}

    heads = integer(config, 'num_attention_heads', where)
    width = integer(config, 'hidden_size', where)
    if 'head_dim' not in config and width % heads:
        raise InputError(
            f'{where}: hidden_size is {width}, num_attention_heads is {heads}; allowed without '
            'head_dim: a hidden_size that the heads divide.'
        )
    theta, scaling = _rope(config, where)
    return checked(
        LlamaConfig(
            vocab_size=integer(config, 'vocab_size', where),
            width=width,
            layers=integer(config, 'num_hidden_layers', where),
            heads=heads,
            kv_heads=integer(
                config, 'num_key_value_heads', where, heads if family == 'llama' else 8
            ),
            head_dim=integer(config, 'head_dim', where, width // heads),
            hidden=integer(config, 'intermediate_size', where),
            norm_eps=number(config, 'rms_norm_eps', where, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_head=_flag(config, 'tie_word_embeddings', where),
            max_positions=integer(
                config, 'max_position_embeddings', where, 2048 if family == 'llama' else 131072
            ),
        ),
        where,
    )


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The `config.json` of a model, in the spelling that transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    rope = None
    if scaling is not None:
        rope = {'rope_type': scaling.kind, 'factor': scaling.factor}
        if scaling.kind == 'llama3':
            rope['low_freq_factor'] = scaling.low_freq_factor
            rope['high_freq_factor'] = scaling.high_freq_factor
            rope['original_max_position_embeddings'] = scaling.original_max_positions
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'vocab_size': config.vocab_size,
        'hidden_size': config.width,
        'num_hidden_layers': config.layers,
        'num_attention_heads': config.heads,
        'num_key_value_heads': config.kv_heads,
        'head_dim': config.head_dim,
        'intermediate_size': config.hidden,
        'hidden_act': 'silu',
        'rms_norm_eps': config.norm_eps,
        'rope_theta': config.rope_theta,
        'rope_scaling': rope,
        'tie_word_embeddings': config.tied_head,
        'max_position_embeddings': config.max_positions,
        'attention_bias': False,
        'mlp_bias': False,
    }


def checked(config: LlamaConfig, where: str) -> LlamaConfig:
    """Returns `config`; refuses sizes that do not fit together.

    Raises:
      InputError: the query heads are no multiple of the key-value heads, or a head is odd.
    """
    if config.heads % config.kv_heads:
        raise InputError(
            f'{where}: {config.heads} query heads over {config.kv_heads} key-value heads; allowed: '
            'a number of key-value heads that divides the query heads.'
        )
    if config.head_dim % 2:
        raise InputError(
            f'{where}: the head dimension is {config.head_dim}; allowed: an even number.'
        )
    return config


def rope_scaling(kind: str, values: Mapping[str, Any], where: str) -> RopeScaling | None:
    """Builds a scaling from the keys of `ROPE_FIELDS`; None for kind `default`.

    Raises:
      InputError: the kind is unknown, a needed key is missing, or a key is not known.
    """
    if kind not in tuple(ROPE_FIELDS):  # a file may hold what no key can be
        raise InputError(
            f'{where}: the rope type is {kind!r}; allowed: {", ".join(sorted(ROPE_FIELDS))}.'
        )
    unknown = set(values) - set(ROPE_FIELDS[kind]) - {'original_max_position_embeddings'}
    if unknown:
        raise InputError(
            f'{where}: rope type {kind!r} comes with {", ".join(sorted(unknown))}; allowed: '
            f'{", ".join(ROPE_FIELDS[kind]) or "no further key"}.'
        )
    if kind == 'default':
        return None
    factor = number(values, 'factor', where)
    if factor < 1:
        raise InputError(f'{where}: the rope factor is {factor}; allowed: 1 or more.')
    if kind == 'linear':
        return RopeScaling('linear', factor)
    low, high = number(values, 'low_freq_factor', where), number(values, 'high_freq_factor', where)
    if low >= high:
        raise InputError(
            f'{where}: low_freq_factor is {low}, high_freq_factor is {high}; allowed: a lower low '
            'one.'
        )
    original = integer(values, 'original_max_position_embeddings', where)
    return RopeScaling('llama3', factor, low, high, original)


def integer(values: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """The positive whole number under `key`; without a default it must be there."""
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f'{where}: {key} is {value!r}; allowed: a whole number of 1 or more.')
    return value


def number(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """The positive number under `key`; without a default it must be there."""
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise InputError(f'{where}: {key} is {value!r}; allowed: a number above 0.')
    return float(value)


def _flag(values: Mapping[str, Any], key: str, where: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f'{where}: {key} is {value!r}; allowed: true, false.')
    return value


def _refuse_unimplemented(config: Mapping[str, Any], family: str, where: str) -> None:
    needed = {
        'hidden_act': 'silu',
        'attention_bias': False,
        'mlp_bias': False,
        'partial_rotary_factor': 1.0,
        'quantization_config': None,
    }
    for key, value in needed.items():
        found = config.get(key)
        if found is not None and found != value:
            allowed = 'no quantisation' if value is None else repr(value)
            raise InputError(f'{where}: {key} is {found!r}; allowed: {allowed}.')
    # In transformers an absent sliding_window means 4096 for mistral; llama has none.
    if family == 'mistral' and config.get('sliding_window', 4096) is not None:
        raise InputError(
            f'{where}: sliding_window is {config.get("sliding_window", "absent, which means 4096")}'
            '; allowed: null.'
        )


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling), in the old spelling (`rope_scaling`) or transformers 5's."""
    given = [config[key] for key in ('rope_scaling', 'rope_parameters') if config.get(key)]
    if any(not isinstance(rope, Mapping) for rope in given):
        raise InputError(f'{where}: rope_scaling is {given[0]!r}; allowed: an object or null.')
    if len(given) == 2 and _without_theta(given[0]) != _without_theta(given[1]):
        raise InputError(
            f'{where}: rope_scaling and rope_parameters differ; allowed: one of them or equal ones.'
        )
    rope: dict[str, Any] = {}
    for each in given:
        rope |= each
    kinds = [rope.pop(key) for key in ('rope_type', 'type') if key in rope]
    if kinds and kinds[0] != kinds[-1]:
        raise InputError(f'{where}: rope_type is {kinds[0]!r}, type is {kinds[1]!r}; allowed: one.')
    default_theta = number(config, 'rope_theta', where, 10000.0)
    theta = number(rope, 'rope_theta', where, default_theta)
    rope.pop('rope_theta', None)
    if rope.pop('partial_rotary_factor', None) not in (None, 1):
        raise InputError(f'{where}: partial_rotary_factor is set; allowed: 1.')
    return theta, rope_scaling(kinds[0] if kinds else 'default', rope, where)


def _without_theta(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key != 'rope_theta'}
