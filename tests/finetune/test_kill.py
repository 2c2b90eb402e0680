"""Real processes: killed in the middle of a run and started again, and on a full disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
PROGRAM = Path(__file__).with_name('training.py')
ROOT = Path(__file__).parents[2]
MINUTES = 5  # at most, on a busy machine


def start(workdir, *stop, most_bytes=None, steps=30):
    """`stop`: a step to wait after; `most_bytes`: no file of the process may grow beyond."""
    command = [sys.executable, str(PROGRAM), str(workdir), str(steps), *map(str, stop)]
    if most_bytes:
        limit = (
            f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most_bytes},) * 2); '
            'import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name="__main__")'
        )
        command = [sys.executable, '-c', limit, *command[1:]]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    return subprocess.Popen(
        command,
        env=os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(the hash of the adapter, or None; what was written to stderr)."""
    out, errors = process.communicate(timeout=60 * MINUTES)
    if process.returncode:
        return None, errors
    return out.split('adapter ')[1].strip(), errors


def steps(workdir):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line)['step'] for line in lines]


def test_a_killed_run_ends_with_the_same_adapter(tmp_path):
    """O05, O01: SIGKILL after the second checkpoint appears; then the same command again."""
    reference = start(tmp_path / 'reference')
    killed = start(tmp_path / 'killed', 12)
    checkpoints = tmp_path / 'killed' / 'finetune' / 'checkpoints'
    deadline = time.monotonic() + 60 * MINUTES
    try:
        while not (checkpoints / '10').exists():
            assert killed.poll() is None, killed.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        killed.kill()
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    expected, errors = finish(reference)
    assert expected, errors
    assert not (checkpoints / '30').exists()
    assert 10 <= len(steps(tmp_path / 'killed')) <= 12

    found, errors = finish(start(tmp_path / 'killed'))
    assert found == expected, errors
    assert steps(tmp_path / 'killed') == list(range(1, 31))


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path):
    """O03: a full disk, here files of at most 4 kB; a checkpoint is larger, a curve is not.

    The last good checkpoint still loads: with room again, the run ends as if nothing had been.
    """
    reference = start(tmp_path / 'reference')
    found, errors = finish(start(tmp_path / 'full', most_bytes=4096))
    assert found is None
    assert 'a checkpoint cannot be written, there is none yet; make room' in errors
    assert 'File too large' in errors
    assert len(steps(tmp_path / 'full')) < 30

    shorter, errors = finish(start(tmp_path / 'full', steps=5))
    assert shorter, errors
    found, errors = finish(start(tmp_path / 'full', most_bytes=4096))
    assert found is None
    assert 'step 5 is the last good one' in errors
    expected, errors = finish(reference)
    assert expected, errors
    found, errors = finish(start(tmp_path / 'full'))
    assert found == expected, errors
