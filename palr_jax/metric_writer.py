"""Training curves: one JSON line a step in `metrics.jsonl`, and TensorBoard events beside it."""

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from tensorboardX import SummaryWriter

from palr_jax import storage
from palr_jax.errors import LocalError

FILE = 'metrics.jsonl'
REMOTE_SECONDS = 60.0  # between two uploads where a file cannot be appended to


class MetricWriter:
    """Appends scalars to `workdir/metrics.jsonl`; one process writes.

    On a local disk every line is on its way to the disk when `write` returns, and TensorBoard
    reads `workdir/tensorboard/STAGE`. An object store cannot append: there the file is uploaded
    as a whole once a minute, by `flush` and by `close`, and there are no TensorBoard events.

    >>> with MetricWriter(workdir, from_step={'finetune': 50}) as writer:
    ...     writer.write(50, 'finetune', loss=2.31, learning_rate=3e-4)
    """

    def __init__(self, workdir: epath.PathLike, from_step: Mapping[str, int] | None = None):
        """Opens the file, keeping what earlier runs wrote.

        Args:
          workdir: made if it is missing.
          from_step: for each resumed stage the first step that this run writes; lines of that
            stage from this step on, written after the checkpoint that the run goes on from, are
            dropped.

        Raises:
          LocalError: the file is damaged elsewhere than in a last line that was cut off, or cannot
            be written.
        """
        self._silent = not storage.writes()
        if self._silent:
            return
        self._path = epath.Path(workdir) / FILE
        self._from_step = dict(from_step or {})
        self._events: dict[str, SummaryWriter] = {}
        before = self._path.read_text() if self._path.exists() else ''
        self._text = _kept(before, self._from_step, self._path)
        self._remote = _is_remote(self._path)
        if self._text != before or not self._path.exists():
            storage.write_text(self._path, self._text)
        self._uploaded = time.monotonic()
        if self._remote:
            logging.info('%s: TensorBoard events are written on local disks only', self._path)
        else:
            with storage.writing(self._path):
                self._file = self._path.open('a')

    def write(self, step: int, stage: str, **scalars: float | None) -> None:
        """Writes one line; NaN, infinity and None become null, and no TensorBoard event.

        Raises:
          LocalError: the file cannot be written.
        """
        if self._silent:
            return
        values = {name: _number(value) for name, value in scalars.items()}
        line = json.dumps({'step': int(step), 'stage': stage} | values, allow_nan=False) + '\n'
        if self._remote:
            self._text += line
            if time.monotonic() - self._uploaded >= REMOTE_SECONDS:
                self.flush()
            return
        with storage.writing(self._path):
            self._file.write(line)
            self._file.flush()
        events = self._events.get(stage)
        if events is None:
            events = self._events[stage] = SummaryWriter(
                os.fspath(self._path.parent / 'tensorboard' / stage),
                purge_step=self._from_step.get(stage),
            )
        for name, value in values.items():
            if value is not None:
                events.add_scalar(name, value, int(step))

    def flush(self) -> None:
        """Leaves no line in memory alone.

        Raises:
          LocalError: the file cannot be written.
        """
        if not self._silent and self._remote:
            storage.write_text(self._path, self._text)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._silent or self._remote:
            return
        with storage.writing(self._path):
            self._file.close()
        for events in self._events.values():
            events.close()

    def __enter__(self) -> 'MetricWriter':
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_curve(workdir: epath.PathLike, stage: str) -> list[dict[str, Any]]:
    """The lines of a stage, in the order written; none where there is no file.

    Raises:
      InputError: the file is damaged elsewhere than in a last line that was cut off.
    """
    path = epath.Path(workdir) / FILE
    text = _kept(path.read_text(), {}, path) if path.exists() else ''
    return [entry for entry in map(json.loads, text.splitlines()) if entry['stage'] == stage]


def _is_remote(path: epath.Path) -> bool:
    return '://' in os.fspath(path)


def _kept(text: str, from_step: Mapping[str, int], path: epath.Path) -> str:
    """The lines of `text` that a run keeps which writes each stage from `from_step` on."""
    kept = []
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step, stage = entry['step'], entry['stage']
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and not line.endswith('\n'):
                break  # the process was killed while it wrote
            raise LocalError(
                f'{path}, line {number}: not a JSON object with step and stage ({line[:60]!r}).'
            ) from error
        if stage not in from_step or step < from_step[stage]:
            kept.append(line if line.endswith('\n') else f'{line}\n')
    return ''.join(kept)


def _number(value: float | None) -> float | int | None:
    """A Python number of a Python, NumPy or JAX scalar; None, which is not known, stays None."""
    if value is None:
        return None
    value = value.item() if hasattr(value, 'item') else value
    if not isinstance(value, int | float):
        raise TypeError(f'a metric must be a number, found {value!r}')
    return value if math.isfinite(value) else None
