"""Runs palr_jax on GPUs of a Slurm cluster, one process a GPU.

    python launch/slurm.py run NAME --nodes=2 --gpus=8 --sbatch-flags='--time=12:00:00' -- \\
        --config=configs/ml1m_llama7b.py:… --workdir=/shared/runs/NAME

`run` submits the job if none of that name is queued or running, and returns; Slurm queues it again
after a preemption, and launch/slurm.sbatch does before its time is up. The checkout and its .venv
must lie on a file system that the nodes share; the job has the environment of this shell.
"""

import argparse
import shlex
from collections.abc import Callable

from commands import ROOT, Answer, LaunchError, Shell, launch, palr

SCRIPT = str(ROOT / 'launch' / 'slurm.sbatch')


def main(own: list[str], arguments: list[str]) -> int:
    options = _parser().parse_args(own)
    return options.action(Shell(dry=options.dry_run), options, arguments)


def run(shell: Shell, options: argparse.Namespace, arguments: list[str]) -> int:
    """Submits the job, unless it is queued or running."""
    submit = _sbatch(options, arguments)
    found = _find(shell, options)
    if found:
        shell.say(f'{options.name} is there already: job {found[0]}, {found[1]}')
        return 0
    answer = shell.must(submit, f'{options.name} could not be submitted')
    job = answer.out.strip().partition(';')[0]
    shell.say(f'{options.name} is job {job}; its log: {ROOT}/{options.name}-{job}.log')
    return 0


def logs(shell: Shell, options: argparse.Namespace, _: list[str]) -> int:
    found = _find(shell, options, dry=('JOB', 'RUNNING'))
    if found is None:
        raise LaunchError(f'{options.name} is not queued or running: see {options.name}-*.log.')
    return shell.run(['tail', '-n', '200', '-F', f'{ROOT}/{options.name}-{found[0]}.log'])


def status(shell: Shell, options: argparse.Namespace, _: list[str]) -> int:
    return shell.run(['squeue', '--me', f'--name={options.name}'])


def delete(shell: Shell, options: argparse.Namespace, _: list[str]) -> int:
    return shell.run(['scancel', '--me', f'--name={options.name}'])


def _find(
    shell: Shell, options: argparse.Namespace, dry: tuple[str, str] | None = None
) -> tuple[str, str] | None:
    """The job's number and state."""
    command = ['squeue', '--me', f'--name={options.name}', '--noheader', '--format=%i %T']
    answer = shell.ask(command, dry=Answer(0, ' '.join(dry or ())))
    if answer.status:
        raise LaunchError(f'The queue cannot be read: squeue says "{answer.message()}".')
    fields = answer.out.split()
    return (fields[0], fields[1]) if fields else None


def _sbatch(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    # JAX takes the process's number on its node for its GPU, so each must see all of them: the GPUs
    # are asked for by node, not by task.
    return [
        'sbatch',
        '--parsable',
        f'--job-name={options.name}',
        f'--chdir={ROOT}',
        f'--nodes={options.nodes}',
        f'--ntasks-per-node={options.gpus or 1}',
        *([f'--gpus-per-node={options.gpus}'] if options.gpus else []),
        f'--export=ALL,PALR_MAX_RETRIES={options.max_retries}',
        *shlex.split(options.sbatch_flags),
        SCRIPT,
        *palr(arguments, options.python),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    actions = parser.add_subparsers(required=True, metavar='run | logs | status | delete')
    choices: tuple[Callable[..., int], ...] = (run, logs, status, delete)
    for action in choices:
        sub = actions.add_parser(action.__name__)
        sub.set_defaults(action=action)
        sub.add_argument('name')
        sub.add_argument('--dry-run', action='store_true', help='print the commands, run nothing')
        if action is run:
            sub.add_argument('--nodes', type=int, default=1)
            sub.add_argument('--gpus', type=int, default=0, help='of a node, one process each')
            sub.add_argument('--python', default='.venv/bin/python', help='of the nodes')
            sub.add_argument(
                '--max-retries', type=int, default=10, help='when its time is up, less preemptions'
            )
            sub.add_argument('--sbatch-flags', default='', help='--partition, --time, …')
    return parser


if __name__ == '__main__':
    launch(main)
