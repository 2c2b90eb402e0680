"""The checkpoints of fine-tuning: Orbax steps, and what tells them from those of another run."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from etils import epath

from palr_jax.errors import InputError, LocalError

Params = Any
FORMAT = 1


class Checkpoints:
    """The steps in a folder: one every `every` steps, written in the background, the last two kept.

    A machine that announces its preemption gets one more. A step's folder has its name only once it
    is whole.

    >>> with Checkpoints(folder, every=50) as checkpoints:
    ...     if checkpoints.latest:
    ...         adapter, state = checkpoints.restore(adapter, state)
    """

    def __init__(self, folder: epath.PathLike, every: int):
        self.folder = epath.Path(folder).absolute()
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.AnySavePolicy(
                [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
            ),
            max_to_keep=2,
            create=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier()),
        )
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    @property
    def latest(self) -> int:
        """The newest step that is whole; 0 is none."""
        return self._manager.latest_step() or 0

    def due(self, step: int) -> bool:
        """Whether the step is one of those in the folder, or the machine ends before the next."""
        return self._manager.should_save(step)

    def save(self, step: int, adapter: Params, state: optax.OptState) -> None:
        """Begins to write the step.

        Raises:
          InputError: this step or the one before it cannot be written.
        """
        items = ocp.args.StandardSave({'adapter': adapter, 'state': state})
        about = {'format': FORMAT, 'trained': describe(adapter)}
        try:
            self._manager.save(step, args=items, force=True, custom_metadata=about)
        except (OSError, ValueError) as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Returns when the last step is on the disk.

        Raises:
          InputError: it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._unwritten(error) from error

    def restore(self, adapter: Params, state: optax.OptState) -> tuple[Params, optax.OptState]:
        """Reads the newest step into the structure, types and places of `adapter` and `state`.

        Raises:
          InputError: it was written by another version of this code, or for another model or
            adapter.
        """
        step = self.latest
        about = self._manager.metadata(step).custom_metadata or {}
        if about.get('format') != FORMAT:
            raise InputError(
                f'{self.folder / str(step)}: this checkpoint has format {about.get("format")}; '
                f'this version reads {FORMAT}.'
            )
        stored, wanted = about['trained'], describe(adapter)
        for path in sorted(stored.keys() | wanted.keys()):
            if stored.get(path) != wanted.get(path):
                raise InputError(
                    f'{self.folder / str(step)}: this checkpoint is of another model or adapter; '
                    f'{path} is {stored.get(path, "missing")} there and '
                    f'{wanted.get(path, "missing")} in this run; use another workdir.'
                )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {'adapter': adapter, 'state': state})
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        return restored['adapter'], restored['state']

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # it would wait for the other processes, which wait for this one
        try:
            self._manager.close()
        except (OSError, ValueError) as failure:
            if kind is None:  # else the first failure tells more
                raise self._unwritten(failure) from failure

    def _unwritten(self, error: Exception) -> LocalError:
        good = f'step {self.latest} is the last good one' if self.latest else 'there is none yet'
        return LocalError(
            f'{self.folder}: a checkpoint cannot be written, {good}; make room and repeat the '
            f'command ({str(error).splitlines()[0][:300]}).'
        )


def _barrier() -> ocp.multihost.BarrierSyncFn:
    """Orbax's barrier, but a process does not wait in it on its way out of an error.

    The others are then in an earlier barrier, and all would wait until the time is up.
    """
    meet = ocp.multihost.get_barrier_sync_fn()

    def barrier(*, key: str, timeout_ms: int) -> None:
        failure = sys.exc_info()[1]
        if failure is not None:
            raise failure
        meet(key=key, timeout_ms=timeout_ms)

    return barrier


def describe(params: Params) -> Mapping[str, str]:
    """Each leaf by its path: 'float32[30, 576, 8]'."""
    return {
        '/'.join(str(getattr(key, 'key', key)) for key in path): f'{leaf.dtype}{list(leaf.shape)}'
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
