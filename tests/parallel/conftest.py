"""Several real processes on this machine, as one run."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    status: int
    output: str


@pytest.fixture
def launch(tmp_path) -> Callable[..., list[subprocess.Popen]]:
    """Starts `count` processes of a command under one coordinator; kills what is left at the end.

    With `devices`, each has so many simulated devices. `only` leaves some of them out; with `join`
    they belong to the group that was started before.
    """
    started: list[subprocess.Popen] = []
    ports: list[int] = []

    def start(
        command: Sequence[str],
        count: int,
        *,
        devices: int = 1,
        only: Sequence[int] | None = None,
        join: bool = False,
    ) -> list[subprocess.Popen]:
        if not join:
            with socket.socket() as free:
                free.bind(('localhost', 0))
                ports.append(free.getsockname()[1])
        shared = {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
            'JAX_COORDINATOR_ADDRESS': f'localhost:{ports[-1]}',
            'JAX_NUM_PROCESSES': str(count),
            'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
        }
        group = []
        for index in range(count) if only is None else only:
            log = open(tmp_path / f'log_{len(started)}', 'w+')  # noqa: SIM115
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | shared | {'JAX_PROCESS_ID': str(index)},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
            process.log = log
            group.append(process)
            started.append(process)
        return group

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.log.close()


@pytest.fixture
def finish() -> Callable[..., list[Ended]]:
    """Waits for processes and reads what they printed."""

    def wait(processes: Sequence[subprocess.Popen], timeout: float = 120) -> list[Ended]:
        ended = []
        for process in processes:
            process.wait(timeout)
            process.log.seek(0)
            ended.append(Ended(process.returncode, process.log.read()))
        return ended

    return wait
