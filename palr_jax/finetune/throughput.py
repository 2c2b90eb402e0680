"""How much work a training step is, and how a model lies in memory: what the log tells of a run."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from palr_jax.finetune.input import Rows
from palr_jax.finetune.lists import Lists
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import TARGETS, LoraSpec, projection_shape
from palr_jax.parallel.devices import peak_flops


@dataclasses.dataclass(frozen=True)
class Work:
    """What a batch asks of the model, padding left out.

    Attributes:
      tokens: read.
      scored: hidden states that go through the output projection.
      pairs: of a token and one that it attends to, itself among them.
    """

    tokens: int
    scored: int
    pairs: int

    @classmethod
    def of(cls, batch: Rows | Lists) -> 'Work':
        """Counts a batch, of NumPy arrays."""
        if isinstance(batch, Rows):
            lengths = np.concatenate([np.bincount(row)[1:] for row in batch.segments])
            tokens = np.count_nonzero(batch.segments)
            pairs = np.sum(lengths * (lengths + 1) // 2)
            return cls(int(tokens), int(np.count_nonzero(batch.weights)), int(pairs))
        real = batch.weights > 0
        prompts = np.count_nonzero(batch.batch.prompt[real], axis=1)
        # A candidate's token attends to the prompt and to its own answer up to itself: as many
        # as its position says, and itself.
        positions = batch.batch.positions[real, batch.batch.prompt.shape[1] :]
        rows = batch.batch.rows[real].reshape(len(prompts), -1) > 0
        pairs = np.sum(prompts * (prompts + 1) // 2) + np.sum((positions + 1)[rows])
        tokens = prompts.sum() + rows.sum()
        beginnings = np.count_nonzero(batch.batch.beginning[real] >= 0)
        return cls(int(tokens), int(rows.sum() + beginnings + len(prompts)), int(pairs))

    def times(self, factor: float) -> 'Work':
        """Of a whole that has `factor` times this part's rows, as full as this part."""
        return Work(*(round(factor * count) for count in dataclasses.astuple(self)))


def model_flops(config: LlamaConfig, lora: LoraSpec | None, work: Work) -> float:
    """FLOPs that one step needs, whatever is computed beyond that.

    A multiplication and an addition are two. Padding, masked pairs of tokens and what the backward
    pass computes again do not count (Chowdhery et al., 2022, appendix B). The backward pass needs
    as much as the forward pass for the activations, and as much again for the weights that are
    trained.

    Args:
      config: the architecture.
      lora: the adapter's shape; None where all weights are trained.
      work: of the batch.
    """
    kernels = sum(math.prod(projection_shape(config, name)) for name in TARGETS)
    base = 2 * work.tokens * config.layers * kernels
    base += 2 * work.scored * config.width * config.vocab_size
    attention = 4 * work.pairs * config.layers * config.heads * config.head_dim
    if lora is None:
        return 3.0 * (base + attention)
    shapes = [projection_shape(config, name) for name in lora.targets]
    adapter = 2 * work.tokens * config.layers * lora.rank * sum(a + b for a, b in shapes)
    return 2.0 * (base + attention) + 3.0 * adapter


def utilisation(program, work: Work, seconds: float, mesh: Mesh | None) -> float:
    """Share of the devices' peak that the model's own FLOPs are; NaN where no peak is known."""
    devices = jax.local_devices()[:1] if mesh is None else mesh.devices.flat
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return math.nan
    flops = model_flops(program.model, program.lora, work)
    return flops / seconds / (peak * len(devices))


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
