"""Stand-ins for the command lines of clouds and clusters: they record calls, answer by script."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ('gcloud', 'xpk', 'kubectl', 'sky', 'sbatch', 'squeue', 'scancel')

# The first rule with all of its words in the call answers: its first answer, which is then used up
# unless it is the last one. What has no rule is answered with success and nothing.
_STAND_IN = """#!{python} -SE
import json, os, sys
here = os.path.dirname(os.path.abspath(sys.argv[0]))
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(here + '/calls.jsonl', 'a') as file:
    file.write(json.dumps(call) + '\\n')
with open(here + '/script.json') as file:
    rules = json.load(file)
line = ' '.join(call)
for rule in rules:
    if all(word in line for word in rule['words'].split()):
        answer = rule['answers'][0]
        if len(rule['answers']) > 1:
            del rule['answers'][0]
            with open(here + '/script.json', 'w') as file:
                json.dump(rules, file)
        sys.stdout.write(answer.get('out', ''))
        sys.stderr.write(answer.get('err', ''))
        sys.exit(answer.get('status', 0))
"""


@dataclass(frozen=True)
class Desk:
    """A PATH that holds nothing but stand-ins, and the launchers run on it."""

    folder: Path

    def script(self, *rules: tuple[str, list[dict[str, Any]]]) -> None:
        """(words of the call, answers one after the other) for each kind of call."""
        written = [{'words': words, 'answers': answers} for words, answers in rules]
        (self.folder / 'script.json').write_text(json.dumps(written))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / 'calls.jsonl'
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def different_calls(self) -> list[list[str]]:
        """The calls, a repeated poll once."""
        calls = self.calls
        return [call for call, before in zip(calls, [[], *calls]) if call != before]

    def forget(self) -> None:
        (self.folder / 'calls.jsonl').unlink(missing_ok=True)

    def remove(self, tool: str) -> None:
        (self.folder / tool).unlink()

    def environment(self) -> dict[str, str]:
        return {'PATH': str(self.folder), 'HOME': str(self.folder)}

    def command(self, launcher: str, arguments: str) -> list[str]:
        # -S: a launcher needs nothing but the standard library.
        return [sys.executable, '-S', str(ROOT / 'launch' / launcher), *shlex.split(arguments)]

    def __call__(self, launcher: str, arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(launcher, arguments),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def dry_run(self, launcher: str, arguments: str) -> list[list[str]]:
        """The commands that a dry run prints, read as a shell would; it must run none of them."""
        before = self.calls
        own, separator, rest = arguments.partition(' -- ')
        done = self(launcher, f'{own} --dry-run{separator}{rest}')
        assert done.returncode == 0, done.stderr
        assert done.stderr == ''
        assert self.calls == before
        commands: list[list[str]] = [[]]
        for word in shlex.split(done.stdout.replace('\n', ' \x00 ')):
            if word == '\x00':
                commands.append([])
            else:
                commands[-1].append(word.replace(' \x00 ', '\n'))
        return [command for command in commands if command]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    for tool in TOOLS:
        path = tmp_path / tool
        path.write_text(_STAND_IN.format(python=sys.executable))
        path.chmod(0o755)
    desk = Desk(tmp_path)
    desk.script()
    return desk


@pytest.fixture
def one_sentence() -> Callable[[subprocess.CompletedProcess[str]], str]:
    """The sentence that a launcher ended with; fails if there was more than that."""

    def read(done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 1
        errors = [line for line in done.stderr.splitlines() if not line.startswith('+ ')]
        assert 'Traceback' not in done.stderr
        assert errors[-1].startswith('error: ')
        assert errors[-1].endswith('.')
        return errors[-1]

    return read
