"""Runs palr_jax on a GKE cluster with TPUs, through xpk.

    python launch/gke.py run NAME --cluster=CLUSTER --zone=ZONE --type=v5litepod-16 -- \\
        --config=configs/ml1m_llama7b.py:v5e-16 --workdir=gs://BUCKET/NAME

The cluster is xpk's affair (`xpk cluster create`). `run` submits the workload if it is not there
and waits for its end; the cluster restarts it after a preemption. `delete` removes the workload.
"""

import argparse
import re
import shlex
from collections.abc import Callable

from commands import (
    Answer,
    LaunchError,
    Shell,
    install,
    launch,
    palr,
    require_shared_workdir,
    source,
)

IMAGE = 'python:3.12'
UNSUCCESSFUL = 125  # of `xpk workload list --wait-for-job-completion`
_SOURCE_IN_IMAGE = '/palr_jax'


def main(own: list[str], arguments: list[str]) -> int:
    options = _parser().parse_args(own)
    return options.action(Shell(dry=options.dry_run), options, arguments)


def run(shell: Shell, options: argparse.Namespace, arguments: list[str]) -> int:
    """Submits the workload, unless it is there, and waits for its end."""
    create = _create(options, arguments)
    found = _find(shell, options)
    if found is None:
        _submit(shell, options, create)
    wait = _xpk(options, 'list', f'--wait-for-job-completion={options.name}')
    status = shell.run(wait)
    if status == UNSUCCESSFUL and found and 'Finished' in found:
        shell.say(f'{options.name} had failed before: it is deleted and submitted again')
        _delete(shell, options)
        _submit(shell, options, create)
        status = shell.run(wait)
    if status == UNSUCCESSFUL:
        raise LaunchError(
            f'{options.name} failed after {options.max_retries} restarts or by its own fault: see '
            f'`{shlex.join(_logs(options))}`.'
        )
    if status:
        raise LaunchError(
            f'xpk cannot say how {options.name} is (status {status}): see above. The workload may '
            'go on: the same command again waits for it.'
        )
    return 0


def logs(shell: Shell, options: argparse.Namespace, _: list[str]) -> int:
    """Follows the log of worker 0 of slice 0."""
    return shell.run(_logs(options))


def status(shell: Shell, options: argparse.Namespace, _: list[str]) -> int:
    return shell.run(_xpk(options, 'list', f'--filter-by-job=^{options.name}$'))


def delete(shell: Shell, options: argparse.Namespace, _: list[str]) -> int:
    if _find(shell, options, dry=options.name + ' ') is None:
        shell.say(f'{options.name} is not on {options.cluster}: nothing to delete')
    else:
        _delete(shell, options)
    return 0


def _delete(shell: Shell, options: argparse.Namespace) -> None:
    command = _xpk(options, 'delete', f'--workload={options.name}', '--force')
    shell.must(command, f'{options.name} could not be deleted')


def _find(shell: Shell, options: argparse.Namespace, dry: str = '') -> str | None:
    """The workload's row in xpk's table."""
    command = _xpk(options, 'list', f'--filter-by-job=^{options.name}$')
    answer = shell.ask(command, dry=Answer(0, dry))
    if answer.status:
        raise LaunchError(
            f'The workloads of {options.cluster} cannot be listed: xpk says "{answer.message()}".'
        )
    row = re.search(rf'^{re.escape(options.name)}\s.*$', answer.out, re.MULTILINE)
    return row.group() if row else None


def _submit(shell: Shell, options: argparse.Namespace, create: list[str]) -> None:
    shell.must(create, f'{options.name} could not be submitted to {options.cluster}')
    shell.say(f'follow it with `{shlex.join(_logs(options))}`')


def _create(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    require_shared_workdir(arguments)
    program = palr(arguments, '.venv/bin/python' if options.image is None else 'python')
    if options.image is None:
        origin = source(options.repository, options.revision)
        lines = install(*origin, extras='tpu,gcs')
    else:
        lines = [f'cd {_SOURCE_IN_IMAGE}']
    # With exec the run itself gets the signal that announces a preemption, and saves.
    command = ' && '.join([*lines, f'exec {shlex.join(program)}'])
    return _xpk(
        options,
        'create',
        f'--workload={options.name}',
        f'--tpu-type={options.type.replace("v5e-", "v5litepod-")}',
        f'--num-slices={options.slices}',
        f'--max-restarts={options.max_retries}',
        f'--docker-image={options.image or IMAGE}',
        *(f'--env={setting}' for setting in options.env or ()),
        *shlex.split(options.create_flags),
        f'--command={command}',
    )


def _xpk(options: argparse.Namespace, verb: str, *arguments: str) -> list[str]:
    where = [f'--cluster={options.cluster}', f'--zone={options.zone}']
    if options.project:
        where.append(f'--project={options.project}')
    return ['xpk', 'workload', verb, *where, *arguments]


def _logs(options: argparse.Namespace) -> list[str]:
    pod = (
        f'jobset.sigs.k8s.io/jobset-name={options.name},batch.kubernetes.io/job-completion-index=0'
    )
    return ['kubectl', 'logs', '--follow', f'--selector={pod}', '--container=jax-tpu']


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    actions = parser.add_subparsers(required=True, metavar='run | logs | status | delete')
    choices: tuple[Callable[..., int], ...] = (run, logs, status, delete)
    for action in choices:
        sub = actions.add_parser(action.__name__)
        sub.set_defaults(action=action)
        sub.add_argument('name')
        sub.add_argument('--cluster', required=True)
        sub.add_argument('--zone', required=True)
        sub.add_argument('--project', help="gcloud's own if left out")
        sub.add_argument('--dry-run', action='store_true', help='print the commands, run nothing')
        if action is run:
            sub.add_argument('--type', required=True, help='v5litepod-16, v4-32, v5p-128, …')
            sub.add_argument('--slices', type=int, default=1)
            sub.add_argument('--max-retries', type=int, default=10, help='restarts by the cluster')
            sub.add_argument('--repository', help="git address; this checkout's origin if left out")
            sub.add_argument('--revision', help='git revision; that of this checkout if left out')
            sub.add_argument(
                '--image',
                help=f'an image with palr_jax installed and its source in {_SOURCE_IN_IMAGE}; '
                f'{IMAGE} and the revision if left out',
            )
            sub.add_argument('--env', action='append', metavar='NAME=VALUE', help='repeatable')
            sub.add_argument('--create-flags', default='', help='more flags of xpk workload create')
    return parser


if __name__ == '__main__':
    launch(main)
