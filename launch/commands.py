"""What the launchers share: they compose commands of other tools, show each one, and run it.

Only the standard library, so that a laptop launches without having JAX. A launcher keeps no state
of its own: what exists is asked of the tool every time.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FAILED = 1  # exit status
INTERRUPTED = 128 + 2  # what shells expect after Ctrl-C, signal 2
PROGRAMS = ('palr_jax.main', 'palr_jax.ablate')  # what can be launched, the usual one first

_HOW_TO_GET = {
    'gcloud': 'it is the Google Cloud CLI, https://cloud.google.com/sdk/docs/install',
    'git': 'https://git-scm.com/downloads',
    'kubectl': 'gcloud components install kubectl',
    'xpk': 'pip install xpk, https://github.com/AI-Hypercomputer/xpk',
    'sky': "pip install 'skypilot[gcp]', https://docs.skypilot.co",
    'sbatch': 'it is part of Slurm: run this on a login node of the cluster',
    'squeue': 'it is part of Slurm: run this on a login node of the cluster',
    'scancel': 'it is part of Slurm: run this on a login node of the cluster',
}


class LaunchError(Exception):
    """One sentence for whoever launches; it ends the script with status 1."""


class Answer(NamedTuple):
    """What a command said."""

    status: int
    out: str = ''
    err: str = ''

    def message(self) -> str:
        """The tool's own words on one line, from its ERROR line where it has one."""
        text = self.err.strip() or self.out.strip() or f'exit status {self.status}'
        at = re.search(r'^ERROR', text, re.MULTILINE)
        lines = text[at.start() :] if at else '\n'.join(text.splitlines()[-5:])
        return ' '.join(lines.split())[:600]


class Shell:
    """Shows commands and runs them; with `dry` it shows them on stdout and runs nothing."""

    def __init__(self, *, dry: bool):
        self.dry = dry
        self._shown = ''

    def run(self, command: Sequence[str]) -> int:
        """Runs a command on this terminal; returns its exit status (0 if dry)."""
        if not self._begin(command):
            return 0
        return subprocess.run(command, check=False).returncode

    def become(self, command: Sequence[str]) -> int:
        """Runs a command in place of this process, so that signals reach it; returns 0 if dry."""
        if self._begin(command):
            os.execvp(command[0], command)
        return 0

    def ask(self, command: Sequence[str], dry: Answer = Answer(0)) -> Answer:  # noqa: B008
        """Runs a command and returns what it said; a dry run goes on as if it had said `dry`."""
        if not self._begin(command):
            return dry
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        return Answer(done.returncode, done.stdout, done.stderr)

    def must(self, command: Sequence[str], failed: str) -> Answer:
        """Like `ask`.

        Raises:
          LaunchError: the command failed; the sentence begins with `failed` and quotes the tool.
        """
        answer = self.ask(command)
        if answer.status:
            raise LaunchError(f'{failed}: {command[0]} says "{answer.message()}".')
        return answer

    def _begin(self, command: Sequence[str]) -> bool:
        line = shlex.join(command)
        if self.dry:
            print(line)
            return False
        if line != self._shown:  # a poll is shown once
            print(f'+ {line}', file=sys.stderr, flush=True)
        self._shown = line
        require(command[0])
        return True

    def say(self, text: str) -> None:
        """Tells what happens; a dry run prints nothing but commands."""
        if not self.dry:
            print(text, file=sys.stderr, flush=True)

    def pause(self, seconds: float) -> None:
        if not self.dry:
            time.sleep(seconds)


def require(tool: str) -> None:
    """Raises LaunchError, with where to get it, if `tool` is not on the PATH."""
    if shutil.which(tool) is None:
        how = _HOW_TO_GET.get(tool, 'name an executable that is')
        raise LaunchError(f'{tool} is not on the PATH ({how}).')


def launch(program: Callable[[list[str], list[str]], int]) -> None:
    """Runs `program(own arguments, arguments after --)` and exits with what it returns."""
    argv = sys.argv[1:]
    at = argv.index('--') if '--' in argv else len(argv)
    try:
        sys.exit(program(argv[:at], argv[at + 1 :]))
    except LaunchError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print('interrupted; the same command again goes on from here', file=sys.stderr)
        sys.exit(INTERRUPTED)


def palr(arguments: Sequence[str], python: str, *, distributed: bool = True) -> list[str]:
    """The command line of a run: of palr_jax.main, or of the program that the arguments begin with.

    Raises:
      LaunchError: there are no arguments, or the program is none that makes runs.
    """
    program, arguments = PROGRAMS[0], list(arguments)
    if arguments and not arguments[0].startswith('-'):
        program = arguments.pop(0)
    if program not in PROGRAMS:
        raise LaunchError(f'{program} cannot be launched; allowed: {", ".join(PROGRAMS)}.')
    if not arguments:
        raise LaunchError(f'Nothing to run: give the arguments of {program} after --.')
    flag = ['--distributed'] if distributed and '--distributed' not in arguments else []
    return [python, '-m', program, *flag, *arguments]


def require_shared_workdir(arguments: Sequence[str]) -> None:
    """Raises LaunchError if the run would write to a disk that goes with its machine."""
    for argument, following in zip(arguments, [*arguments[1:], '']):
        name, _, value = argument.lstrip('-').partition('=')
        if name == 'workdir' and not (value or following).startswith(('gs://', 's3://', '/')):
            raise LaunchError(
                f'--workdir={value or following} lies on the disk of one machine and goes with it: '
                'give a bucket (gs://BUCKET/FOLDER) or the absolute path of a shared mount.'
            )


def source(repository: str | None, revision: str | None) -> tuple[str, str]:
    """The git address and revision to run: those of this checkout unless they are given.

    The revision is a hash, so that a machine made again after a preemption runs the same code.
    """
    return (
        repository or _git('remote', 'get-url', 'origin'),
        revision or _git('rev-parse', 'HEAD'),
    )


def _git(*arguments: str) -> str:
    require('git')
    command = ['git', '-C', str(ROOT), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        answer = Answer(done.returncode, done.stdout, done.stderr)
        raise LaunchError(
            f'{shlex.join(command)} says "{answer.message()}": give --repository and --revision.'
        )
    return done.stdout.strip()


def install(repository: str, revision: str, *, extras: str) -> list[str]:
    """Shell lines that bring ~/palr_jax to a revision, with a Python of its own.

    The images of TPU machines come with Python 3.10, which is too old; uv brings another one.
    """
    return [
        'export PATH="$HOME/.local/bin:$PATH"',
        '(command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh)',
        'git init --quiet ~/palr_jax',
        'cd ~/palr_jax',
        f'git fetch --quiet {shlex.join([repository, revision])}',
        'git checkout --quiet --detach FETCH_HEAD',
        'uv venv --quiet --allow-existing --python 3.12 .venv',
        'uv pip install --quiet --python .venv/bin/python --constraint constraints/py312.txt '
        f"--editable '.[{extras}]'",
    ]


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('127.0.0.1', port))
        except OSError:
            return False
    return True
