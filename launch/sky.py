"""Runs palr_jax as a managed job of SkyPilot, on TPUs or GPUs of any of its clouds.

    python launch/sky.py run NAME --accelerators=tpu-v5litepod-16 -- \\
        --config=configs/ml1m_llama7b.py:v5e-16 --workdir=gs://BUCKET/NAME
    python launch/sky.py run NAME --accelerators=H100:8 --nodes=2 -- …

`run` submits the job if none of that name is in progress, and follows its log. SkyPilot finds a
region with capacity, brings machines up again after a preemption, and takes them down at the end.
"""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path

from commands import (
    ROOT,
    Answer,
    LaunchError,
    Shell,
    launch,
    palr,
    require_shared_workdir,
    source,
)

TASKS = Path(__file__).resolve().parent / 'sky'


def main(own: list[str], arguments: list[str]) -> int:
    options = _parser().parse_args(own)
    return options.action(Shell(dry=options.dry_run), options, arguments)


def run(shell: Shell, options: argparse.Namespace, arguments: list[str]) -> int:
    """Submits the job, unless it is in progress, and follows its log to the end."""
    submit = _launch(options, arguments)
    if _in_progress(shell, options.name):
        shell.say(f'{options.name} is in progress: following it')
        status = logs(shell, options, [])
    else:
        status = shell.run(submit)
    if status:
        raise LaunchError(
            f'{options.name} did not end well (sky ended with {status}): see above, and '
            f'`sky jobs logs --name {options.name} --controller`.'
        )
    return 0


def logs(shell: Shell, options: argparse.Namespace, _: list[str]) -> int:
    return shell.run(['sky', 'jobs', 'logs', '--name', options.name])


def status(shell: Shell, _: argparse.Namespace, __: list[str]) -> int:
    return shell.run(['sky', 'jobs', 'queue', '--refresh'])


def delete(shell: Shell, options: argparse.Namespace, _: list[str]) -> int:
    """Cancels the job, which takes its machines down."""
    if _in_progress(shell, options.name, dry=True):
        command = ['sky', 'jobs', 'cancel', '--name', options.name, '--yes']
        shell.must(command, f'{options.name} could not be cancelled')
    else:
        shell.say(f'{options.name} is not in progress: nothing to cancel')
    return 0


def _in_progress(shell: Shell, name: str, *, dry: bool = False) -> bool:
    imagined = Answer(0, json.dumps([{'job_name': name}] if dry else []))
    command = ['sky', 'jobs', 'queue', '--refresh', '--skip-finished', '--all', '--output', 'json']
    answer = shell.ask(command, dry=imagined)
    if answer.status:
        if 'No in-progress managed jobs' in answer.out + answer.err:  # nothing was ever launched
            return False
        raise LaunchError(f'The jobs cannot be listed: sky says "{answer.message()}".')
    start = answer.out.find('[')  # sky may say something before its JSON
    try:
        jobs = json.loads(answer.out[start:]) if start >= 0 else []
    except ValueError as error:
        raise LaunchError(f'sky lists its jobs as "{answer.message()}", not as JSON.') from error
    return any(job['job_name'] == name for job in jobs)


def _launch(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    require_shared_workdir(arguments)
    kind = 'tpu' if options.accelerators.startswith('tpu-') else 'gpu'
    if kind == 'tpu' and options.nodes > 1:
        raise LaunchError(
            f'--nodes={options.nodes}: a TPU slice brings its hosts along; ask for a larger one.'
        )
    program = palr(arguments, '.venv/bin/python')
    command = ['sky', 'jobs', 'launch', '--name', options.name, '--gpus', options.accelerators]
    command += ['--num-nodes', str(options.nodes)]
    command += ['--no-use-spot'] if options.on_demand else ['--use-spot']
    if options.copy:
        command += ['--workdir', str(ROOT)]
    else:
        repository, revision = source(options.repository, options.revision)
        command += ['--git-url', repository, '--git-ref', revision]
    command += ['--env', f'PALR_COMMAND={shlex.join(program)}']
    for setting in options.env or ():
        command += ['--env', setting]
    return [*command, *shlex.split(options.launch_flags), '--yes', str(TASKS / f'{kind}.yaml')]


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
            sub.add_argument('--accelerators', required=True, help='tpu-v5litepod-16, H100:8, …')
            sub.add_argument('--nodes', type=int, default=1, help='machines with GPUs')
            sub.add_argument('--on-demand', action='store_true', help='instead of spot machines')
            sub.add_argument('--repository', help="git address; this checkout's origin if left out")
            sub.add_argument('--revision', help='git revision; that of this checkout if left out')
            sub.add_argument('--copy', action='store_true', help='copy this working tree instead')
            sub.add_argument('--env', action='append', metavar='NAME=VALUE', help='repeatable')
            sub.add_argument('--launch-flags', default='', help='more flags of sky jobs launch')
    return parser


if __name__ == '__main__':
    launch(main)
