"""Runs palr_jax on this machine: one process, or several that find each other.

    python launch/local.py -- --config=configs/demo.py --workdir=runs/demo
    python launch/local.py --processes=2 -- --config=configs/demo.py --workdir=runs/two

One process drives all accelerators of a machine; several are for rehearsing a pod on its CPU.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from commands import FAILED, LaunchError, Shell, launch, palr, port_is_free

_GRACE = 60.0  # seconds in which the others are to notice that one has failed


def main(own: list[str], arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--port', type=int, default=8476, help='of the coordinator (process 0)')
    parser.add_argument('--grace', type=float, default=_GRACE, help='seconds, see docs/launch.md')
    parser.add_argument('--dry-run', action='store_true', help='print the commands, run nothing')
    options = parser.parse_args(own)
    if options.processes < 1:
        raise LaunchError(f'--processes={options.processes}: give 1 or more.')
    shell = Shell(dry=options.dry_run)
    if options.processes == 1:
        return shell.become(palr(arguments, sys.executable, distributed=False))
    command = palr(arguments, sys.executable)
    variables = [
        {
            'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{options.port}',
            'JAX_NUM_PROCESSES': str(options.processes),
            'JAX_PROCESS_ID': str(index),
        }
        for index in range(options.processes)
    ]
    for each in variables:
        settings = ' '.join(f'{name}={value}' for name, value in each.items())
        print(f'{settings} {shlex.join(command)} &', flush=True)
    if options.dry_run:
        print('wait')
        return 0
    if not port_is_free(options.port):
        raise LaunchError(f'Port {options.port} of this machine is taken: give another --port.')
    return _together(command, variables, options.grace)


def _together(command: Sequence[str], variables: list[dict[str, str]], grace: float) -> int:
    """Runs one process for each set of variables; returns the exit status of the first to fail.

    The others have `grace` seconds to end by themselves, with a message; then they are ended.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without them
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | each,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for each in variables
    ]
    readers = [
        threading.Thread(target=_relay, args=(index, process))
        for index, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    status, deadline = 0, float('inf')
    try:
        while True:
            ends = [process.poll() for process in processes]
            if not status and (status := next(filter(None, ends), 0)):
                deadline = time.monotonic() + grace
            if None not in ends or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.terminate()  # does nothing to one that has ended
        for process in processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        for reader in readers:
            reader.join()
    return FAILED if status < 0 else status  # negative: ended by a signal


def _relay(index: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            print(f'[{index}] {line}', end='', flush=True)


if __name__ == '__main__':
    launch(main)
