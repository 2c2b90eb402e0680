"""Two processes that answer in turns, so that one library never disturbs the other's timing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Side:
    """A process that answers; between two questions it sleeps."""

    def __init__(self, name: str, python: str, script: str, folder: Path):
        self.name = name
        self._process = subprocess.Popen(
            [python, script, '--side', name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps([question, arguments]) + '\n')
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f'The process of {self.name} ended; what it said is above.')
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(answer: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """The other end: reads questions from the standard input until it is closed."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        question, arguments = json.loads(line)
        try:
            result = answer[question](**arguments)
        except Exception as error:  # such as a compiler that is not there
            result = {'error': f'{type(error).__name__}: {str(error).strip().splitlines()[0]}'}
        print(json.dumps(result), file=answers, flush=True)
