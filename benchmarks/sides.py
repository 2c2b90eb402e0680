"""Two processes that answer in turns, so that one library never disturbs the other's timing."""

import json
import os
import statistics
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


def movielens(folder: Path, data: str, **prompts: Any) -> Any:
    """The project of MovieLens-1M at `data`, its model written to `folder/model` for both sides."""
    from palr_jax.config import default_config
    from palr_jax.data import Dataset
    from palr_jax.project import Project, load_data
    from palr_jax.testing.llama import write_hf_folder

    config = default_config()
    config.data.source, config.data.path = 'ml1m', data
    config.prompts.update(prompts)
    source, split = load_data(config.data)
    project = Project(config, None)
    project.dataset = Dataset(source.catalogue, split, source.interactions.user_ids, source.record)
    (folder / 'model').mkdir()
    checkpoint = project.checkpoint
    write_hf_folder(folder / 'model', checkpoint.config, project.base, checkpoint.tokenizer)
    return project


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


def report(result: dict[str, Any], ours: str, unit: str) -> None:
    """Adds the medians of the runs and the ratios to `ours`, and prints them."""
    for system in result['systems'].values():
        rates = [run['tokens_per_second'] for run in system['runs']]
        system['tokens_per_second'] = statistics.median(rates)
    best = result['systems'][ours]['tokens_per_second']
    print(f'\n{"system":42} {unit:>9} {"lowest":>9} {"highest":>9} {ours + " / it":>14}')
    for name, system in result['systems'].items():
        rates = [run['tokens_per_second'] for run in system['runs']]
        system['ratio'] = round(best / system['tokens_per_second'], 3)
        print(
            f'{name:42} {system["tokens_per_second"]:9,.0f} {min(rates):9,.0f} {max(rates):9,.0f} '
            f'{system["ratio"]:14.2f}'
        )
