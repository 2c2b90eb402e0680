"""Exact resume, many times over: `python tests/finetune/repeat_resume.py --repeats=20`.

The training of a tiny model is interrupted in three ways, each repeated. Every time the rest of the
run must end with the adapter of the uninterrupted one, to the bit, and with each step once in
metrics.jsonl:

* `random step`: the run ends after a step that is drawn, and is asked for more;
* `end of an epoch`: the same after a step that reads the last row of an epoch;
* `kill during a save`: SIGKILL while an asynchronous save has written a part of its folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name('training.py')
STEPS, SAVE_EVERY = 30, 5  # as training.py has them
EPOCH = 3  # steps
DONE = list(range(1, STEPS + 1))


def start(workdir: Path, steps: int = STEPS) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(workdir), str(steps)],
        env=os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """The hash of the adapter."""
    out, errors = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f'The run failed:\n{errors[-2000:]}')
    return out.split('adapter ')[1].strip()


def kill_during_a_save(workdir: Path, save: int) -> bool:
    """Whether a part of the checkpoint of step `save` was there when the process was killed."""
    process = start(workdir)
    folder = workdir / 'finetune' / 'checkpoints'
    while process.poll() is None:
        parts = [path for path in folder.glob(f'{save}*') if path.name != str(save)]
        if parts or (folder / str(save)).exists():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return not (folder / str(save)).exists()
        time.sleep(0.0005)
    raise SystemExit(f'The run ended before the checkpoint of step {save}.')


def interrupted(kind: str, number: int, workdir: Path) -> tuple[int, bool]:
    """Interrupts a run; (the step, whether it happened as meant)."""
    draw = random.Random(number)
    if kind == 'kill during a save':
        save = draw.randrange(SAVE_EVERY, STEPS, SAVE_EVERY)
        return save, kill_during_a_save(workdir, save)
    step = draw.randrange(1, STEPS)
    if kind == 'end of an epoch':
        step = draw.randrange(EPOCH, STEPS, EPOCH)
    finish(start(workdir, step))
    return step, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--out', type=Path, help='JSON file of the result')
    arguments = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as name:
        expected = finish(start(Path(name) / 'reference'))
        for kind in ('random step', 'end of an epoch', 'kill during a save'):
            steps, hits, equal = [], 0, 0
            for number in range(arguments.repeats):
                workdir = Path(name) / 'run'
                step, hit = interrupted(kind, number, workdir)
                same = finish(start(workdir)) == expected
                lines = (workdir / 'metrics.jsonl').read_text().splitlines()
                once = [json.loads(line)['step'] for line in lines] == DONE
                equal += same and once
                hits += hit
                steps.append(step)
                shutil.rmtree(workdir)
            result[kind] = {
                'repeats': arguments.repeats,
                'interrupted_as_meant': hits,
                'equal_to_the_bit': equal,
                'steps': steps,
            }
            print(f'{kind}: {equal} of {arguments.repeats} equal, {hits} as meant', flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + '\n')
    if any(found['equal_to_the_bit'] < found['repeats'] for found in result.values()):
        raise SystemExit('A resumed run differs from the uninterrupted one.')


if __name__ == '__main__':
    main()
