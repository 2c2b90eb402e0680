"""From named tensors, however they are stored, to the parameter tree of `Llama`.

A format (Hugging Face, GGUF) brings a table of its tensor names and a function that reads one
tensor or a part of it; the tree is the same. Tensors are read one by one straight into the shards
of their stacked leaf that this process has, so at most one leaf is held beside the result, and of a
leaf that is spread over many hosts each reads its own part. Of a format that has only whole tensors
one is kept until the next is read, for the other shards.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from palr_jax.errors import InputError
from palr_jax.llama import quantize
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.quantize import Path
from palr_jax.progress import Progress

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}

# (path, shape) of a leaf -> how it lies on the devices
Shardings = Callable[[Path, tuple[int, ...]], jax.sharding.Sharding]
Index = tuple[slice, ...]


class Row(NamedTuple):
    """One line of a format's table.

    Attributes:
      name: the tensor's name in the file; `{}` stands for the layer.
      path: its leaf, joined by slashes.
      transposed: the file has [out, in] where the tree has [in, out].
    """

    name: str
    path: str
    transposed: bool


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The tensors of one checkpoint, whatever its format.

    Attributes:
      where: path, for messages.
      shapes: of every tensor by name, row-major, as `read` returns them.
      read: reads one tensor, or the part of it that an index of slices names, as floating-point
        numbers.
      whole: a part costs as much as its tensor.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[..., np.ndarray]  # (name, index) or (name)
    whole: bool = False


def leaf_shapes(config: LlamaConfig) -> dict[Path, tuple[int, ...]]:
    """The shape of every leaf by path, in a fixed order; no head when it is tied."""
    N, D, F, V = config.layers, config.width, config.hidden, config.vocab_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {
        'embed/embedding': (V, D),
        'layers/attention_norm/scale': (N, D),
        'layers/attention/q/kernel': (N, D, query),
        'layers/attention/k/kernel': (N, D, key),
        'layers/attention/v/kernel': (N, D, key),
        'layers/attention/o/kernel': (N, query, D),
        'layers/mlp_norm/scale': (N, D),
        'layers/mlp/gate/kernel': (N, D, F),
        'layers/mlp/up/kernel': (N, D, F),
        'layers/mlp/down/kernel': (N, F, D),
        'final_norm/scale': (D,),
    }
    if not config.tied_head:
        shapes['head/kernel'] = (D, V)
    return {tuple(path.split('/')): shape for path, shape in shapes.items()}


def put(tree: dict[str, Any], path: Path, leaf: Any) -> None:
    """Sets the leaf at `path`, making the dicts above it."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def tensor_names(table: Collection[Row], config: LlamaConfig) -> Iterator[tuple[str, Row, int]]:
    """(tensor name, row of the table, layer) of every tensor that the model needs."""
    leaves = leaf_shapes(config)
    for row in table:
        shape = leaves.get(tuple(row.path.split('/')))
        if shape is not None:
            for layer in range(shape[0] if '{}' in row.name else 1):
                yield row.name.format(layer), row, layer


def build(
    table: Collection[Row],
    config: LlamaConfig,
    source: TensorSource,
    dtype: str,
    kind: str = 'none',
    shardings: Shardings | None = None,
) -> dict[str, Any]:
    """Reads all weights into the tree of `Llama`.

    Args:
      table: the format's tensor names.
      config: the architecture.
      source: the tensors; every one must be in the table, and every needed one must be there.
      dtype: of all leaves: float32 or bfloat16.
      kind: 'none', or how the layers' kernels are quantised, each leaf as soon as it is read: see
        `quantize.py`.
      shardings: where each leaf goes, paths and shapes being those of the result; by default all
        of it to JAX's default device.

    Raises:
      InputError: a tensor is missing, unknown, of another shape, or not finite.
    """
    if dtype not in DTYPES:
        raise InputError(f'config.model.dtype is {dtype!r}; allowed: {", ".join(DTYPES)}.')
    check_tensors(table, config, source)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = shardings or (lambda path, shape: here)
    leaves = leaf_shapes(config)
    if source.whole:
        last = functools.lru_cache(maxsize=1)(source.read)
        source = dataclasses.replace(source, read=lambda name, index: last(name)[index])
    params: dict[str, Any] = {}
    with Progress('weights', sum(1 for _ in tensor_names(table, config)), 'tensors') as progress:
        for row in table:
            path = tuple(row.path.split('/'))
            if path not in leaves:
                continue
            narrow = kind != 'none' and quantize.is_quantized(path)
            # A scale needs the whole of a kernel, so a leaf that is quantised is read as a whole.
            placement = here if narrow else shardings(path, leaves[path])
            parts = _parts(leaves[path], DTYPES[dtype], placement)
            for layer in range(config.layers if '{}' in row.name else 1):
                for index, part in parts.items():
                    _read_into(part, index, source, row, layer)
                progress.update()
            if narrow:
                (leaf,) = parts.values()
                stored = quantize.quantize(leaf, kind)
                for name, array in stored.items():
                    to = shardings((*path, name), array.shape)
                    put(params, (*path, name), _spread(array, to))
            else:
                put(params, path, _assemble(leaves[path], parts, placement))
    return params


def _parts(
    shape: tuple[int, ...], dtype: np.dtype, placement: jax.sharding.Sharding
) -> dict[tuple[tuple[int, int], ...], np.ndarray]:
    """An empty array for each different part of the leaf on this process's devices.

    The keys are (start, stop) of every axis.
    """
    indices = placement.addressable_devices_indices_map(shape).values()
    bounds = {_bounds(index, shape) for index in indices}
    return {b: np.empty([stop - start for start, stop in b], dtype) for b in sorted(bounds)}


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(axis.indices(n)[:2] for axis, n in zip(index, shape))


def _read_into(
    part: np.ndarray,
    bounds: tuple[tuple[int, int], ...],
    source: TensorSource,
    row: Row,
    layer: int,
) -> None:
    """Reads what `part`, the leaf between `bounds`, holds of a layer's tensor; maybe nothing."""
    if '{}' in row.name:
        (first, stop), *bounds = bounds
        if not first <= layer < stop:
            return
        part = part[layer - first]
    index = tuple(slice(*axis) for axis in bounds)
    name = row.name.format(layer)
    tensor = source.read(name, index[::-1] if row.transposed else index)
    if not np.isfinite(tensor).all():
        raise InputError(f'{source.where}: {name} holds NaN or infinite numbers.')
    _fill(part, tensor, row.transposed)


def _assemble(
    shape: tuple[int, ...],
    parts: Mapping[tuple[tuple[int, int], ...], np.ndarray],
    placement: jax.sharding.Sharding,
) -> jax.Array:
    """The leaf, each device of this process with its part."""
    indices = placement.addressable_devices_indices_map(shape)
    on_devices = [
        jax.device_put(parts[_bounds(index, shape)], device) for device, index in indices.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, placement, on_devices)


def _spread(array: np.ndarray, placement: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])


def check_tensors(table: Collection[Row], config: LlamaConfig, source: TensorSource) -> None:
    """Refuses a checkpoint that does not hold exactly the model's tensors; reads no weight.

    Raises:
      InputError: names the tensors that are missing, left over, or of another shape.
    """
    leaves = leaf_shapes(config)
    needed: dict[str, tuple[int, ...]] = {}
    for name, row, _ in tensor_names(table, config):
        shape = leaves[tuple(row.path.split('/'))]
        shape = shape[1:] if '{}' in row.name else shape
        needed[name] = shape[::-1] if row.transposed else shape
    missing = [name for name in needed if name not in source.shapes]
    if missing:
        raise InputError(f'{source.where}: lacks {_listed(missing)}.')
    leftover = [name for name in source.shapes if name not in needed]
    if leftover:
        raise InputError(
            f'{source.where}: holds {_listed(leftover)}, which a LLaMA of {config.layers} layers '
            f'{"with a tied head " if config.tied_head else ""}does not have.'
        )
    for name, shape in needed.items():
        if tuple(source.shapes[name]) != shape:
            raise InputError(
                f'{source.where}: {name} has shape {list(source.shapes[name])}; allowed by the '
                f'configuration: {list(shape)}.'
            )


def _fill(target: np.ndarray, tensor: np.ndarray, transposed: bool) -> None:
    """Copies with a cast; a transposed matrix in blocks, which is 5 times as fast as at once."""
    if not transposed:
        target[...] = tensor
        return
    for start in range(0, len(tensor), 64):
        target[:, start : start + 64] = tensor[start : start + 64].T


def _listed(names: list[str]) -> str:
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return f'{len(names)} tensor{"s" * (len(names) > 1)}: {", ".join(names[:4])}{more}'
