"""Several processes as one run: who is there, who writes, and how all end when one does.

Every process runs the same command with --distributed. On Cloud TPU and under Slurm JAX finds the
others by itself; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is
where. What needs no model (data, retrieval, report) is done by process 0 while the others wait;
fine-tuning and ranking are one program over all devices. Process 0 alone writes files, but for
checkpoints, of which Orbax lets each process write its shards.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from palr_jax import __version__, storage
from palr_jax.errors import BAD_INPUT, InputError, is_local

Result = TypeVar('Result')

ENVIRONMENT = ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
HEARTBEAT = 30  # seconds of silence after which a process counts as dead
BUG = 1  # exit status, as Python's own
LOST = 142  # exit status of a process that has lost another; xpk restarts on 127 to 255
CARD_BYTES = 512  # of what a process says of itself
MESSAGE_BYTES = 2048
OF_A_PEER = ('gloo', 'heartbeat', 'coordination service', 'connection closed', 'unavailable:')


def start(timeout: int) -> None:
    """Joins the run, before any device is touched; ends the process if others are missing.

    Args:
      timeout: seconds until the others must be there.

    Raises:
      InputError: the environment does not say who is where.
    """
    found = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    for name, value in found.items():
        if not value.isdecimal():
            raise InputError(f'{name} is {value!r}; allowed: a whole number.')
    number, index = (int(found[name]) if name in found else None for name in ENVIRONMENT)
    coordinator = os.environ.get('JAX_COORDINATOR_ADDRESS', 'the coordinator that JAX found')
    # JAX aborts the process when its own time is up, with a stack trace.
    watch = threading.Timer(timeout, _give_up, [timeout, number, index, coordinator])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            num_processes=number,
            process_id=index,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f'--distributed: {coordinator}: {first_line(error)}') from error
    finally:
        watch.cancel()
    if not is_writer():
        storage.only_read()


def _give_up(timeout: int, number: int | None, index: int | None, coordinator: str) -> None:
    who = '' if number is None else f' all {number}'
    here = 'this one' if index is None else f'this one, process {index},'
    print(
        f'error: --distributed:{who} processes did not come together within {timeout} s; {here} '
        f'waited at {coordinator}: check that every worker runs this command, and the log of each '
        'that does not say this.',
        file=sys.stderr,
        flush=True,
    )
    os._exit(BAD_INPUT)  # the thread that waits cannot be interrupted


def preflight(config_hash: str) -> list[dict[str, Any]]:
    """What every process says of itself, logged; all must run the same code and config.

    Returns:
      For every process: index, host, git revision, config hash, local devices.

    Raises:
      InputError: a process runs another revision or config.
    """
    mine = {
        'process': jax.process_index(),
        'host': socket.gethostname(),
        'revision': revision(),
        'config': config_hash[:16],
        'devices': f'{jax.local_device_count()} x {jax.local_devices()[0].device_kind}',
    }
    cards = [json.loads(text) for text in _gather_text(json.dumps(mine), CARD_BYTES)]
    for card in cards:
        logging.info(
            f'process %(process)d of {len(cards)}: %(host)s, %(devices)s, revision %(revision)s, '
            'config %(config)s',
            card,
        )
    for field, what in (('revision', 'git revision'), ('config', 'config')):
        for card in cards:
            if card[field] != cards[0][field]:
                raise InputError(
                    f'--distributed: process {card["process"]} on {card["host"]} runs the {what} '
                    f'{card[field]}, process 0 on {cards[0]["host"]} runs {cards[0][field]}; all '
                    'must be the same.'
                )
    return cards


def revision() -> str:
    """Of the checkout that this code lies in, with + where it was changed; else its version."""
    root = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str:
        run = ['git', '-C', str(root), *command]
        return subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip()

    try:
        # An installed package may lie in the checkout of something else.
        if git('rev-parse', '--show-toplevel') == str(root):
            return git('describe', '--always', '--dirty=+', '--abbrev=12') or __version__
    except FileNotFoundError:
        pass
    return __version__


def is_writer() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def by_one(work: Callable[[], None]) -> None:
    """Process 0 works, the others wait and end as it does.

    Raises:
      InputError: what `work` raised, in every process; of several, all know of it then.
    """
    if jax.process_count() == 1:
        work()
        return
    problem, failure, interrupt = '', None, None
    if is_writer():
        try:
            work()
        except InputError as error:
            problem, failure = str(error), error
        except Exception as error:
            logging.exception('process 0')  # a bug: its traceback is wanted
            problem, failure = f'process 0 ended: {type(error).__name__}: {error}', error
        except BaseException as error:
            problem, interrupt = f'process 0 ended: {type(error).__name__}', error
    (problem, *_) = _gather_text(problem, MESSAGE_BYTES)
    if interrupt is not None:
        raise interrupt
    if problem:
        raise InputError(problem) from failure


def in_turn(work: Callable[[], Result]) -> Result:
    """What `work` gives in each process; process 0 goes first, for what it does to the disk."""
    first: list[Result] = []
    by_one(lambda: first.append(work()))
    return first[0] if first else work()


def agree(decision: bool) -> bool:
    """What process 0 has decided."""
    return bool(gather(np.array([decision]))[0])


def whole(tree: Any) -> Any:
    """Arrays that are divided over processes, on every host as a whole."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(array: np.ndarray) -> np.ndarray:
    """The rows of all processes, [rows, …] each of one shape, in the order of the processes."""
    if jax.process_count() == 1:
        return np.asarray(array)
    stacked = multihost_utils.process_allgather(array)
    return np.asarray(stacked).reshape(-1, *np.shape(array)[1:])


def lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another process has ended."""
    return jax.process_count() > 1 and any(word in str(error).lower() for word in OF_A_PEER)


def leave(error: Exception) -> None:
    """Ends this process after another has ended; the usual way out would wait for it."""
    print(
        'error: another process of this run has ended, see its log; the same command continues '
        f'the run ({first_line(error)}).',
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


def leave_others(error: Exception) -> None:
    """Ends this process, whose fault the others will see as its end; see `leave`."""
    if isinstance(error, InputError | OSError):
        print(f'error: {error}', file=sys.stderr, flush=True)
        os._exit(BAD_INPUT)
    traceback.print_exception(error)
    os._exit(BUG)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at once where the others do not end as it does, or one has ended before."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and is_local(error):
            lost = not isinstance(error, InputError) and lost_a_peer(error)
            (leave if lost else leave_others)(error)
        raise


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _gather_text(text: str, size: int) -> list[str]:
    data = np.zeros(size, np.uint8)
    encoded = text.encode()[:size]
    data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = gather(data[None])
    return [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in rows]
