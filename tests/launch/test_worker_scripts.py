"""What launch/tpu_vm.py runs on the workers, run for real in bash, with stand-ins of git and uv."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUSY, RUN_FAILED, RUN_VANISHED = 41, 42, 43


class Worker:
    """A home folder, in which `python -m palr_jax.main X` runs the shell line X."""

    def __init__(self, home: Path):
        self.home = home
        for tool, text in {
            'git': '#!/bin/sh\n[ "$1" != init ] || mkdir -p "$3"\n',
            'uv': '#!/bin/sh\n',
            'python': '#!/bin/sh\nshift 3\neval "$1"\n',
        }.items():
            path = home / 'bin' / tool
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.environment = os.environ | {
            'HOME': str(home),
            'PATH': f'{home / "bin"}{os.pathsep}{os.environ["PATH"]}',
        }

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        # A file, not a pipe: what is left running in the background must not keep the caller.
        return subprocess.run(
            ['bash', '-c', script],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def start(self, line: str) -> subprocess.CompletedProcess[str]:
        program = (
            f'import sys; sys.path.insert(0, {str(ROOT / "launch")!r}); import tpu_vm; '
            "print(tpu_vm.start_script(('git-address', 'abc'), "
            "['python', '-m', 'palr_jax.main', '--distributed', sys.argv[1]]))"
        )
        script = subprocess.check_output([sys.executable, '-S', '-c', program, line], text=True)
        return self.run(script)

    def follow(self) -> subprocess.CompletedProcess[str]:
        program = (
            f'import sys; sys.path.insert(0, {str(ROOT / "launch")!r}); import tpu_vm; '
            'print(tpu_vm.FOLLOW)'
        )
        return self.run(subprocess.check_output([sys.executable, '-S', '-c', program], text=True))


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def test_a_run_goes_on_without_its_caller_and_is_followed_to_its_end(worker):
    started = worker.start("sleep 0.5; echo it\\'s done")
    assert started.returncode == 0, started.stderr
    followed = worker.follow()
    assert followed.returncode == 0
    assert "it's done\nthe run ended with status 0\n" in followed.stdout
    assert worker.follow().returncode == 0  # again, after the end


def test_the_end_of_the_log_is_shown_on_a_slow_machine(worker):
    """Where the run is over before its log is opened."""
    tail = worker.home / 'bin' / 'tail'
    tail.write_text(f'#!/bin/sh\nsleep 1.5\nexec {shutil.which("tail")} "$@"\n')
    tail.chmod(0o755)
    worker.start('echo the last line')
    assert worker.follow().stdout == 'the last line\nthe run ended with status 0\n'


def test_a_failing_run_is_told_from_a_lost_connection(worker):
    worker.start('echo no such file; exit 2')
    followed = worker.follow()
    assert followed.returncode == RUN_FAILED
    assert 'no such file\nthe run ended with status 2\n' in followed.stdout


def test_starting_twice_starts_once(worker):
    line = 'echo started >> ~/starts; sleep 30'
    try:
        assert worker.start(line).returncode == 0
        again = worker.start(line)
        assert again.returncode == 0
        assert again.stdout == 'already in progress\n'
        other = worker.start('echo other')
        assert other.returncode == BUSY
        assert f'in progress here: python -m palr_jax.main --distributed {line}' in other.stderr
        assert (worker.home / 'starts').read_text() == 'started\n'
    finally:
        _kill(worker)


def test_a_killed_run_has_vanished_and_can_be_started_again(worker):
    worker.start('sleep 30')
    _kill(worker)
    assert worker.follow().returncode == RUN_VANISHED
    assert worker.start('echo again').returncode == 0
    assert worker.follow().returncode == 0


def test_a_worker_that_never_ran_anything_has_no_run(worker):
    assert worker.follow().returncode == RUN_VANISHED


def test_what_cannot_be_installed_is_not_started(worker):
    (worker.home / 'bin' / 'git').write_text('#!/bin/sh\necho no such revision >&2; exit 128\n')
    started = worker.start('echo started')
    assert started.returncode == 1
    assert 'no such revision' in started.stderr
    assert not (worker.home / 'palr_run' / 'log').exists()


def _kill(worker: Worker) -> None:
    """Kills, as a reboot would, whatever holds the lock of the run."""
    lock = worker.home / 'palr_run' / 'lock'
    deadline = time.monotonic() + 10
    while subprocess.run(['flock', '--nonblock', lock, 'true'], check=False).returncode:
        assert time.monotonic() < deadline
        for process in Path('/proc').glob('[0-9]*'):
            try:
                held = any(link.resolve() == lock for link in (process / 'fd').iterdir())
            except OSError:
                continue
            if held and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
        time.sleep(0.05)
