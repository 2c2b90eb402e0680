"""How much work a training step is, and how a model lies in memory: what the log tells of a run."""

import math
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from palr_jax.finetune.input import Rows
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import TARGETS, LoraSpec, projection_shape
from palr_jax.parallel.devices import peak_flops


def model_flops(config: LlamaConfig, lora: LoraSpec | None, rows: Rows) -> float:
    """FLOPs that one step on `rows` needs, whatever is computed beyond that.

    A multiplication and an addition are two. Padding, masked pairs of tokens and what the backward
    pass computes again do not count (Chowdhery et al., 2022, appendix B). The backward pass needs
    as much as the forward pass for the activations, and as much again for the weights that are
    trained.

    Args:
      config: the architecture.
      lora: the adapter's shape; None where all weights are trained.
      rows: packed rows, as NumPy arrays.
    """
    segments = np.asarray(rows.segments)
    tokens = np.count_nonzero(segments)
    scored = np.count_nonzero(rows.weights)
    lengths = np.concatenate([np.bincount(row)[1:] for row in segments])
    pairs = float(np.sum(lengths * (lengths + 1) / 2))
    kernels = sum(math.prod(projection_shape(config, name)) for name in TARGETS)
    base = 2 * tokens * config.layers * kernels + 2 * scored * config.width * config.vocab_size
    attention = 4 * pairs * config.layers * config.heads * config.head_dim
    if lora is None:
        return 3.0 * (base + attention)
    shapes = [projection_shape(config, name) for name in lora.targets]
    adapter = 2 * tokens * config.layers * lora.rank * sum(a + b for a, b in shapes)
    return 2.0 * (base + attention) + 3.0 * adapter


def utilisation(program, rows: Rows, seconds: float, mesh: Mesh | None) -> float:
    """Share of the devices' peak that the model's own FLOPs are; NaN where no peak is known."""
    devices = jax.local_devices()[:1] if mesh is None else mesh.devices.flat
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return math.nan
    return model_flops(program.model, program.lora, rows) / seconds / (peak * len(devices))


class Trace:
    """Writes a profile of `config.profile_steps` steps from `config.profile_at` on (0: none).

    TensorBoard's profile plugin and Perfetto read it.
    """

    def __init__(self, folder: epath.Path, config):
        self._folder, self._first, self._steps = folder, config.profile_at, config.profile_steps
        self._running = False

    def at(self, step: int) -> None:
        """Begins or ends with this step, counted from 1; a step's work is over when it returns."""
        if self._running and step == self._first + self._steps:
            self.__exit__()
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def __enter__(self) -> 'Trace':
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            logging.info('finetune: the profile is in %s', self._folder)


def log_overview(trees: dict[str, Any]) -> None:
    """Logs every leaf: shape, type, bytes, and how it lies on the devices; and the sums.

    Args:
      trees: by name, of arrays.
    """
    for name, tree in trees.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for path, leaf in leaves:
            spec = getattr(getattr(leaf, 'sharding', None), 'spec', 'one device')
            logging.info(
                '%s %-36s %-22s %-9s %9.2f MiB, %9.2f a device, %s',
                name,
                '/'.join(str(getattr(key, 'key', key)) for key in path),
                list(leaf.shape),
                leaf.dtype,
                leaf.nbytes / 2**20,
                bytes_a_device(leaf) / 2**20,
                spec,
            )
        logging.info(
            '%s: %d numbers, %.1f MiB, %.1f MiB a device',
            name,
            sum(leaf.size for _, leaf in leaves),
            sum(leaf.nbytes for _, leaf in leaves) / 2**20,
            sum(bytes_a_device(leaf) for _, leaf in leaves) / 2**20,
        )


def bytes_a_device(leaf: jax.Array | np.ndarray) -> int:
    """Bytes of a leaf on each device that holds a part of it."""
    if not hasattr(leaf, 'sharding'):  # still NumPy's
        return leaf.nbytes
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
