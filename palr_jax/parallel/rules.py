"""Where each parameter lies on the mesh: one table, from the path of a leaf to its axes.

It holds for whatever has the paths of the parameters in it: quantised kernels, adapters, the
moments of the optimiser. A byte of an nf4 kernel holds outputs that are half the kernel apart, so
over the tensor axis heads are cut, and XLA puts them together again: correct, but slow.
"""

import functools
import math
import re
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from palr_jax.llama.config import LlamaConfig
from palr_jax.parallel.mesh import fitting, spread

# The first row whose pattern is found in the path decides. Kernels are [layer, in, out]: what a
# layer reads is divided over fsdp, what its heads or hidden units are over tensor, so of a pair of
# projections the first needs no communication over tensor and the second one sum. The embedding is
# divided by width, so that a lookup moves vectors of tokens and not the table.
RULES = (
    (r'embed/embedding$', PartitionSpec(None, ('fsdp', 'tensor'))),
    (r'attention/[qkv]/kernel', PartitionSpec(None, 'fsdp', 'tensor')),
    (r'attention/o/kernel', PartitionSpec(None, 'tensor', 'fsdp')),
    (r'mlp/(gate|up)/kernel', PartitionSpec(None, 'fsdp', 'tensor')),
    (r'mlp/down/kernel', PartitionSpec(None, 'tensor', 'fsdp')),
    (r'head/kernel$', PartitionSpec('fsdp', 'tensor')),
    (r'', PartitionSpec()),  # norms and counters are whole everywhere
)
# An axis that holds heads is divided between heads, never within one.
HEADS = {'q': 'heads', 'o': 'heads', 'k': 'kv_heads', 'v': 'kv_heads'}


def partition(
    path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, config: LlamaConfig
) -> PartitionSpec:
    """How a leaf is divided; an axis that the mesh does not divide is whole, and the log says so.

    Args:
      path: of the leaf; what stands before the parameter's own path does not matter.
      shape: of the leaf.
      mesh: with axes data, fsdp, tensor.
      config: the architecture, for its numbers of heads.
    """
    spec = _rule(path)
    if path[-1:] == ('nf4',) and mesh.shape['tensor'] > 1:
        _warn_of_nf4(mesh.shape['tensor'])
    wanted = (*spec, *(None,) * (len(shape) - len(spec)))
    units = list(shape)
    for axis, name in enumerate(wanted):
        if name == 'tensor' and (heads := HEADS.get(_projection(path))) and units[axis] > 1:
            units[axis] = math.gcd(getattr(config, heads), units[axis])
    fits = fitting(wanted, units, mesh.shape)
    for axis, (asked, got) in enumerate(zip(wanted, fits)):
        if asked is not None and got is None and shape[axis] > 1:
            what = 'heads' if units[axis] != shape[axis] else 'entries'
            _say_once('/'.join(path), axis, units[axis], what, str(asked))
    return PartitionSpec(*(axes[0] if axes and len(axes) == 1 else axes for axes in fits))


def shardings(mesh: Mesh, config: LlamaConfig):
    """(path, shape) -> sharding: what `weights.build` asks of each leaf."""
    return lambda path, shape: NamedSharding(mesh, partition(path, shape, mesh, config))


def tree_shardings(tree: Any, mesh: Mesh, config: LlamaConfig) -> Any:
    """The sharding of every leaf of a tree of arrays or of their shapes, optimiser states too."""
    place = shardings(mesh, config)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(
            tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), leaf.shape
        ),
        tree,
    )


def shard(tree: Any, mesh: Mesh | None, config: LlamaConfig) -> Any:
    """Arrays that every process has as a whole, laid out by the rules."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf, to: spread(np.asarray(leaf), to), tree, tree_shardings(tree, mesh, config)
    )


def _rule(path: tuple[str, ...]) -> PartitionSpec:
    if path and path[-1] in ('lora_a', 'lora_b'):
        layer, inputs, outputs = _rule((*path[:-1], 'kernel'))
        return PartitionSpec(layer, *((inputs, None) if path[-1] == 'lora_a' else (None, outputs)))
    joined = '/'.join(path)
    return next(spec for pattern, spec in RULES if re.search(pattern, joined))


def _projection(path: tuple[str, ...]) -> str:
    """'q' of …/attention/q/kernel/int8; '' of what is no projection."""
    return path[path.index('attention') + 1] if 'attention' in path[:-1] else ''


@functools.cache
def _warn_of_nf4(tensor: int) -> None:
    logging.warning(
        "config.model.quantize is 'nf4' and config.mesh.tensor is %d: heads are cut, which costs "
        "much communication; config.mesh.fsdp and 'int8' do not cut them",
        tensor,
    )


@functools.cache  # a leaf, its moments, every program: once is enough
def _say_once(leaf: str, axis: int, number: int, what: str, asked: str) -> None:
    logging.warning(
        '%s: its %d %s of axis %d do not divide over the mesh axis %s and are kept whole',
        leaf,
        number,
        what,
        axis,
        asked,
    )
