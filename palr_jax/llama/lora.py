"""LoRA (Hu et al., 2021): which projections carry an adapter, and how the rest is kept frozen.

Adapters live in the parameter tree beside the kernels that they adapt, as `lora_a` [in, r] and
`lora_b` [r, out] (with a leading layer axis under `layers`). One label tree, `labels`, says of each
leaf whether it is trained; the optimiser, the gradient, the checkpoint and the export all follow
it. `split` and `join` take the tree apart and put it together along those labels.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from palr_jax.errors import InputError
from palr_jax.llama.config import LlamaConfig

ADAPTER, FROZEN = 'adapter', 'frozen'
TARGETS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')

Params = Any


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """The shape of an adapter.

    Attributes:
      rank: r, columns of `lora_a`.
      alpha: the adapter's output is multiplied by `scaling`, which follows from it.
      targets: the adapted projections, of q k v o gate up down.
      rslora: scales by alpha / sqrt(r), which keeps the output's size when r grows
        (Kalajdzievski, 2023), instead of alpha / r.
      dropout: share of the adapter's inputs that a training step zeroes; the others are scaled up.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f'lora.rank is {self.rank}; allowed: 1 or more.')
        if not 0 < self.alpha < math.inf:
            raise InputError(f'lora.alpha is {self.alpha}; allowed: a number above 0.')
        if not 0 <= self.dropout < 1:
            raise InputError(f'lora.dropout is {self.dropout}; allowed: from 0 to below 1.')
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise InputError(
                f'lora.targets holds {unknown or "nothing"}; allowed: one or more of '
                f'{" ".join(TARGETS)}.'
            )

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied by: in training, in `merge` and in PEFT."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def labels(params: Params) -> Params:
    """The label tree: ADAPTER on every `lora_a` and `lora_b`, FROZEN elsewhere.

    It is derived from `params`, so it cannot have another structure than they.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: ADAPTER if path[-1].key.startswith('lora_') else FROZEN, params
    )


def split(params: Params) -> tuple[Params, Params]:
    """Takes the tree apart: (adapter leaves, frozen leaves), each a nested dict of its own."""
    flat = traverse_util.flatten_dict(params)
    flat_labels = traverse_util.flatten_dict(labels(params))
    parts = [
        traverse_util.unflatten_dict({k: v for k, v in flat.items() if flat_labels[k] == label})
        for label in (ADAPTER, FROZEN)
    ]
    return parts[0], parts[1]


def join(adapter: Params, frozen: Params) -> Params:
    """Puts together what `split` took apart."""
    flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(adapter)
    return traverse_util.unflatten_dict(flat)


def merge(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, spec: LoraSpec) -> np.ndarray:
    """kernel [in, out] + scaling * a [in, r] @ b [r, out], in float32 whatever the kernel has.

    The caller casts the sum, once: a delta that is rounded before it is added is another delta.
    """
    delta = np.asarray(a, np.float32) @ np.asarray(b, np.float32)
    return np.asarray(kernel, np.float32) + np.float32(spec.scaling) * delta


def target_path(name: str) -> tuple[str, str, str]:
    """Where a projection lies in the parameter tree: 'q' -> ('layers', 'attention', 'q')."""
    return ('layers', 'attention' if name in ('q', 'k', 'v', 'o') else 'mlp', name)


def init_adapter(config: LlamaConfig, spec: LoraSpec, seed: int) -> Params:
    """A fresh float32 adapter tree: A uniform within 1/sqrt(fan_in) as PEFT draws it, B zero.

    NumPy draws it: it is the same on every machine, whatever the devices.
    """

    def draw(path, leaf):
        *_, name, letter = (key.key for key in path)
        if letter == 'lora_b':
            return jnp.zeros(leaf.shape)
        rng = np.random.default_rng([seed, TARGETS.index(name)])
        bound = leaf.shape[1] ** -0.5
        return jnp.asarray(rng.uniform(-bound, bound, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, adapter_shapes(config, spec))


def adapter_shapes(config: LlamaConfig, spec: LoraSpec) -> Params:
    """The adapter tree as shapes alone."""
    flat = {}
    for name in spec.targets:
        fan_in, fan_out = projection_shape(config, name)
        for letter, shape in (('lora_a', (fan_in, spec.rank)), ('lora_b', (spec.rank, fan_out))):
            path = (*target_path(name), letter)
            flat[path] = jax.ShapeDtypeStruct((config.layers, *shape), jnp.float32)
    return traverse_util.unflatten_dict(flat)


def projection_shape(config: LlamaConfig, name: str) -> tuple[int, int]:
    """(inputs, outputs) of a projection of `config`."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        'q': (config.width, queries),
        'k': (config.width, keys),
        'v': (config.width, keys),
        'o': (queries, config.width),
        'gate': (config.width, config.hidden),
        'up': (config.width, config.hidden),
        'down': (config.hidden, config.width),
    }[name]
