"""The mesh of a run and what is laid over it: rows over `data` and `fsdp`, heads over `tensor`.

Three axes. `data` repeats the parameters, `fsdp` divides them and gathers each layer where it is
computed, and both divide the rows of a batch; `tensor` divides heads, hidden units and vocabulary.
Nothing here communicates: programs are jitted with shardings (what pjit was; the name is gone, the
thing is `jax.jit`), and XLA's partitioner writes the collectives.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from palr_jax.errors import InputError

AXES = ('data', 'fsdp', 'tensor')
ROW_AXES, HEAD_AXIS = ('data', 'fsdp'), 'tensor'


def make_mesh(config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.mesh` describes, over all devices.

    A mesh of one takes the first device. Slices (groups of chips that only a data-centre network
    joins) divide the axis `data`, whose one sum a step is all that crosses that network.

    Args:
      config: `config.mesh`.
      devices: by default all of JAX's.

    Raises:
      InputError: the sizes do not give the number of devices, or the slices are others.
    """
    every = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(every))
    if math.prod(sizes) == 1 and len(every) > 1:
        logging.info('1 of %d devices is used; all with --config.mesh.fsdp=-1', len(every))
        every = every[:1]
    slices = len({getattr(device, 'slice_index', 0) for device in every})
    if slices != config.slices or sizes[0] % slices:
        raise InputError(
            f'config.mesh.slices is {config.slices} and data is {sizes[0]}; allowed on these '
            f'devices: slices {slices}, and data a multiple of it.'
        )
    if slices > 1:
        inner, outer = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(
            inner, outer, every, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_device_mesh(sizes, every, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(config, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor), with the rest of the devices where `config.mesh` says -1.

    Raises:
      InputError: their product is neither the number of devices nor 1.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    named = ', '.join(f'{axis} {size}' for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f'config.mesh has {named}; allowed: 1 or more, and one -1 for the rest.')
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    alone = math.prod(sizes) == 1 and jax.process_count() == 1
    if math.prod(sizes) != devices and not alone:
        raise InputError(
            f'config.mesh has {named}, but there are {devices} devices; allowed: sizes whose '
            f'product is {devices}, one of them -1 for the rest.'
        )
    return tuple(sizes)


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Under it programs are traced and run on `mesh`: `constrain` and the splash kernel see it."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def row_shards(mesh: Mesh | None = None) -> int:
    """Parts that the rows of a batch are divided into, by default on the mesh of this context."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[axis] for axis in ROW_AXES if axis in mesh.shape)


def check_rows(field: str, rows: int, mesh: Mesh | None, parts: int = 1) -> None:
    """Refuses a batch of `rows`, run in `parts`, that the devices cannot share evenly.

    Raises:
      InputError: names `field`.
    """
    shards = 1 if mesh is None else row_shards(mesh)
    if rows % (shards * parts):
        sizes = '' if mesh is None else f' (data {mesh.shape["data"]}, fsdp {mesh.shape["fsdp"]})'
        accumulated = f' and accumulated in {parts} parts' if parts > 1 else ''
        raise InputError(
            f'config.{field} is {rows}, divided over {shards} devices{sizes}{accumulated}; '
            f'allowed: a multiple of {shards * parts}.'
        )


def shard_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays [B, …], whole in every process, with B over `data` and `fsdp`."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    return jax.tree.map(lambda array: spread(np.asarray(array), sharding), tree)


def own_rows(rows: int, mesh: Mesh | None) -> np.ndarray:
    """[own] those of a batch's `rows` that devices of this process hold, in order."""
    everyone = np.arange(rows)
    if mesh is None:
        return everyone
    held = NamedSharding(mesh, PartitionSpec(ROW_AXES)).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([everyone[index] for index in held.values()]))


def join_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays [own, …] of the rows of each process (`own_rows`) -> [B, …], as `shard_rows`."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    return jax.tree.map(
        lambda own: jax.make_array_from_process_local_data(sharding, np.asarray(own)), tree
    )


def spread(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has as a whole, each device with its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Fixes how x lies on the mesh of this context, if there is one.

    An axis of x that the mesh axes asked for do not divide is left whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting(spec, x.shape, mesh.shape)))


def fitting(spec: Sequence[Any], shape: Sequence[int], sizes: Any) -> list[Any]:
    """`spec` without the mesh axes that do not exist, or do not divide their axis of `shape`."""
    fits = []
    for axes, n in zip(spec, shape):
        axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
        axes = tuple(axis for axis in axes if axis in sizes)
        fits.append(axes if axes and n % math.prod(sizes[a] for a in axes) == 0 else None)
    return fits
