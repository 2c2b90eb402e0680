"""Reading and writing files so that nothing is ever left half-written.

Paths go through `etils.epath`, so `gs://…` works where a local path does. A local file is written
under a temporary name and renamed. Object stores have no rename, but a write there appears whole
or not at all. Of several processes in one run, one writes.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import socket
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from absl import logging
from etils import epath

from palr_jax.errors import InputError, LocalError

LOCK = '.lock'  # in a folder that one run has at a time
# How file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

# What `np.load` raises; RuntimeError where the damage reads as a password or an unknown packing.
_DAMAGE = (ValueError, TypeError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)

_reads_only = False


def only_read() -> None:
    """From now on this process writes nothing, without a word: another one does."""
    global _reads_only
    _reads_only = True


def writes() -> bool:
    """Whether this process writes files."""
    return not _reads_only


@contextlib.contextmanager
def locked(folder: epath.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Keeps a local folder for this process, until the block or the process ends, however it ends.

    An object store has no locks, and some file systems have none: there nobody is kept out.

    Args:
      folder: made if it is missing.
      wait: until another process is done with it, instead of refusing.

    Raises:
      InputError: another process has it, or it cannot be written.
    """
    if '://' in os.fspath(folder):
        yield
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, 'a+')  # noqa: SIM115
    except OSError as error:
        raise InputError(f'{folder}: cannot be written ({error.strerror}).') from error
    with file:
        if not _lock(file, folder):
            file.seek(0)
            who = file.read().strip()
            if not wait:
                raise InputError(
                    f'{folder} is in use by another run ({who}); wait for it, stop it or use '
                    'another workdir.'
                )
            logging.info('%s: waiting for another run (%s)', folder, who)
            _lock(file, folder, wait=True)
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield


def _lock(file: IO[str], folder: Path, wait: bool = False) -> bool:
    """Locks a file of `folder`; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise InputError(f'{folder}: cannot be locked ({error.strerror}).') from error
        logging.warning(
            '%s: its file system has no locks (%s): take care that no other run uses it.',
            folder,
            error.strerror,
        )
    return True


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """For what writes to `path`.

    Raises:
      LocalError: it cannot be written; the processes that write nothing do not meet that.
    """
    try:
        yield
    except OSError as error:
        raise LocalError(f'{path}: cannot be written ({error.strerror or error}).') from error


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all; makes the parent folders.

    Raises:
      LocalError: it cannot be written.
    """
    path = epath.Path(path)
    if not writes():
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if '://' in os.fspath(path):
            path.write_bytes(data)
            return
        temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes `text` as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as JSON; NaN and infinity are refused (unknown is null)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + '\n')


def write_arrays(path: epath.PathLike, **arrays: np.ndarray) -> None:
    """Writes named numeric arrays as one `.npz` file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: the file is missing, cannot be read or is not JSON.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f'{path}: this file does not exist.') from error
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror or error}).') from error
    except ValueError as error:
        raise InputError(f'{path}: this file is not valid JSON ({error}).') from error


def read_arrays(path: epath.PathLike) -> Mapping[str, np.ndarray]:
    """Reads what `write_arrays` wrote; pickled content is refused.

    Raises:
      InputError: the file is missing or damaged.
    """
    path = epath.Path(path)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise InputError(f'{path}: this file does not exist.') from error
    except _DAMAGE as error:
        raise InputError(f'{path}: this file is damaged ({error}).') from error
