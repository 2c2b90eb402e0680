"""Runs palr_jax on Cloud TPU VMs, through gcloud.

    python launch/tpu_vm.py run NAME --zone=ZONE --type=v5litepod-16 --spot -- \\
        --config=configs/ml1m_llama7b.py:v5e-16 --workdir=gs://BUCKET/NAME

`run` creates the machines if they do not exist, waits for them, installs this revision on every
worker, starts the run there and follows its log. After a preemption it does the same again, and the
run resumes from its workdir. A `run` that was interrupted finds by itself where it was. `delete`
ends the costs.
"""

import argparse
import json
import shlex
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from commands import (
    ROOT,
    Answer,
    LaunchError,
    Shell,
    install,
    launch,
    palr,
    require_shared_workdir,
    source,
)

# https://cloud.google.com/tpu/docs/runtimes
RUNTIMES = {
    'v2': 'tpu-ubuntu2204-base',
    'v3': 'tpu-ubuntu2204-base',
    'v4': 'tpu-ubuntu2204-base',
    'v5litepod': 'v2-alpha-tpuv5-lite',
    'v5p': 'v2-alpha-tpuv5',
    'v6e': 'v2-alpha-tpuv6e',
}
# States of queued resources (first) and of TPU VMs; what is in no set is waited for.
READY = {'ACTIVE', 'READY'}
PREEMPTED = {'SUSPENDING', 'SUSPENDED', 'PREEMPTED', 'TERMINATED'}
LOST = PREEMPTED | {'FAILED'}
STOPPED = {'STOPPED', 'STOPPING', 'HIDING', 'HIDDEN'}

# Exit statuses of the scripts below. gcloud has its own (1, 255), when the connection is lost.
BUSY, RUN_FAILED, RUN_VANISHED = 41, 42, 43
RECONNECTIONS = 20  # in a row, with no connection between them that lasted
LASTED = 60.0  # seconds


@dataclass(frozen=True)
class State:
    """What gcloud says of the machines; no name: they do not exist."""

    name: str | None
    reason: str = ''


@dataclass(frozen=True)
class Machines:
    """A TPU slice, or several, asked for as a queued resource or directly as a TPU VM."""

    name: str
    zone: str
    project: str | None
    queued: bool
    interval: float  # seconds between two looks at the state
    shell: Shell = field(repr=False)

    def gcloud(self, verb: str, *arguments: str) -> list[str]:
        kind = 'queued-resources' if self.queued else 'tpu-vm'
        where = [f'--zone={self.zone}']
        if self.project:
            where.append(f'--project={self.project}')
        return ['gcloud', 'compute', 'tpus', kind, verb, *where, *arguments]

    def state(self, dry: str | None) -> State:
        """Asks for the state; a dry run goes on as if it were `dry`."""
        imagined = Answer(0, json.dumps({'state': dry})) if dry else Answer(1, err='NOT_FOUND')
        answer = self.shell.ask(
            self.gcloud('describe', self.name, '--format=json(state)'), dry=imagined
        )
        if answer.status:
            if 'NOT_FOUND' in answer.err:
                return State(None)
            raise LaunchError(
                f'The state of {self.name} in {self.zone} is not to be had: gcloud says '
                f'"{answer.message()}".'
            )
        found = (json.loads(answer.out or '{}') or {}).get('state', {})
        if isinstance(found, str):
            return State(found)
        error = found.get('failedData', {}).get('error', {})
        return State(found.get('state', 'UNKNOWN'), error.get('message', ''))

    def delete(self) -> None:
        """Deletes the machines and waits until they are gone."""
        # Without --force a queued resource is deleted only once its machines are.
        force = ['--force'] if self.queued else []
        command = self.gcloud('delete', self.name, *force, '--quiet')
        self.shell.must(command, f'{self.name} could not be deleted')

    def ssh(self, script: str, worker: str = 'all', *, node: str = 'all') -> list[str]:
        nodes = [f'--node={node}'] if self.queued else []
        return self.gcloud('ssh', self.name, *nodes, f'--worker={worker}', f'--command={script}')


def main(own: list[str], arguments: list[str]) -> int:
    options = _parser().parse_args(own)
    machines = Machines(
        options.name,
        options.zone,
        options.project,
        options.queued,
        options.interval,
        Shell(dry=options.dry_run),
    )
    return options.action(machines, options, arguments)


def run(machines: Machines, options: argparse.Namespace, arguments: list[str]) -> int:
    """Brings the run to its end, through preemptions; returns its exit status as 0 or 1."""
    shell = machines.shell
    require_shared_workdir(arguments)
    command = palr(arguments, '.venv/bin/python')
    if options.env:
        command = ['env', *options.env, *command]
    request = _create(machines, options)
    origin = _origin(machines, options)
    for attempt in range(options.max_retries + 1):
        if attempt:
            shell.say(f'{machines.name} was preempted: retry {attempt} of {options.max_retries}')
        if not _bring_up(machines, request):
            continue
        _copy(machines, options)
        status = shell.run(machines.ssh(start_script(origin, command)))
        if status == BUSY:
            raise LaunchError(f'{machines.name} is at work on another run: see above.')
        if status == 0:
            status = _follow(machines)
        if status == 0 or not _interrupted(machines, status):
            return _end(machines, options, status)
    raise LaunchError(
        f'{machines.name} was preempted {options.max_retries + 1} times, and --max-retries='
        f'{options.max_retries}: the same command again goes on from the last checkpoint.'
    )


def create(machines: Machines, options: argparse.Namespace, _: list[str]) -> int:
    """Creates the machines and installs palr_jax, for work by hand."""
    request = _create(machines, options)
    origin = _origin(machines, options)
    if not _bring_up(machines, request):
        raise LaunchError(f'{machines.name} was preempted before it was ready.')
    _copy(machines, options)
    return machines.shell.run(machines.ssh(_install(origin)))


def logs(machines: Machines, options: argparse.Namespace, _: list[str]) -> int:
    """Follows the log of one worker."""
    return machines.shell.run(machines.ssh(FOLLOW, options.worker, node=options.node))


def status(machines: Machines, _: argparse.Namespace, __: list[str]) -> int:
    state = machines.state(dry='ACTIVE')
    if not machines.shell.dry:
        print(' '.join(filter(None, (machines.name, state.name or 'does not exist', state.reason))))
    return 0


def delete(machines: Machines, _: argparse.Namespace, __: list[str]) -> int:
    if machines.state(dry='ACTIVE').name is None:
        machines.shell.say(f'{machines.name} does not exist: nothing to delete')
    else:
        machines.delete()
    return 0


def _create(machines: Machines, options: argparse.Namespace) -> list[str]:
    """The command that creates the machines."""
    kind = options.type.replace('v5e-', 'v5litepod-')
    generation = kind.partition('-')[0]
    runtime = options.runtime or RUNTIMES.get(generation)
    if runtime is None:
        raise LaunchError(
            f'--type={options.type}: no runtime is known for it (only for '
            f'{", ".join(RUNTIMES)}): give --runtime.'
        )
    further = shlex.split(options.create_flags) + (['--spot'] if options.spot else [])
    if not machines.queued:
        if options.slices > 1:
            raise LaunchError('--slices needs a queued resource: leave out --no-queue.')
        hardware = [f'--accelerator-type={kind}', f'--version={runtime}']
        return machines.gcloud('create', machines.name, *hardware, *further)
    nodes = [f'--node-id={machines.name}']
    if options.slices > 1:
        nodes = [f'--node-count={options.slices}', f'--node-prefix={machines.name}']
    hardware = [f'--accelerator-type={kind}', f'--runtime-version={runtime}']
    return machines.gcloud('create', machines.name, *nodes, *hardware, *further, '--async')


def _bring_up(machines: Machines, create: list[str]) -> bool:
    """Leaves the machines ready; False if they were preempted before that.

    Raises:
      LaunchError: they cannot be had.
    """
    name, shell = machines.name, machines.shell
    state = machines.state(dry=None)
    while state.name in {'SUSPENDING', 'DELETING'}:
        shell.pause(machines.interval)
        state = machines.state(dry=None)
    if state.name in LOST:
        shell.say(f'{name} is {state.name}: it is deleted and created again')
        machines.delete()
        state = State(None)
    if state.name is None:
        shell.must(create, f'{name} could not be created in {machines.zone}')
        state = machines.state(dry='ACTIVE')
    seen = None
    while state.name not in READY:
        if state.name in PREEMPTED:
            return False
        if state.name is None or state.name in LOST | STOPPED:
            reason = f': gcloud says "{state.reason}"' if state.reason else ''
            raise LaunchError(
                f'{name} in {machines.zone} is {state.name or "gone"}{reason}; it can be removed '
                f'with `python launch/tpu_vm.py delete {name} --zone={machines.zone}`.'
            )
        if state != seen:
            shell.say(f'{name} is {state.name}, waiting')
        seen = state
        shell.pause(machines.interval)
        state = machines.state(dry='ACTIVE')
    return True


def _follow(machines: Machines) -> int:
    """Shows the log of worker 0 until the run ends; connects again while the machines are there."""
    lost = 0
    while lost < RECONNECTIONS:
        began = time.monotonic()
        status = machines.shell.run(machines.ssh(FOLLOW, '0', node='0'))
        if status in (0, RUN_FAILED, RUN_VANISHED):
            return status
        lost = 1 if time.monotonic() - began > LASTED else lost + 1
        machines.shell.pause(machines.interval)
        if machines.state(dry='ACTIVE').name not in READY:
            return RUN_VANISHED
        machines.shell.say('the connection was lost, the machines are there: connecting again')
    raise LaunchError(
        f'{machines.name} is ready but does not answer; see what gcloud says above. The run may go '
        'on there: the same command again follows it.'
    )


def _interrupted(machines: Machines, status: int) -> bool:
    """Whether the machines, and not the run, are why it ended."""
    if status == RUN_VANISHED:
        return True
    machines.shell.pause(machines.interval)  # a preemption shows in the state a little later
    return machines.state(dry='ACTIVE').name not in READY


def _origin(machines: Machines, options: argparse.Namespace) -> tuple[str, str]:
    """The git address and revision that the workers fetch; with --copy, those of a bundle."""
    if not options.copy:
        return source(options.repository, options.revision)
    revision = options.revision or 'HEAD'
    bundle = _bundle(machines)
    command = ['git', '-C', str(ROOT), 'bundle', 'create', '--quiet', str(bundle), revision]
    machines.shell.must(command, 'The code could not be packed')
    return f'../{bundle.name}', revision


def _copy(machines: Machines, options: argparse.Namespace) -> None:
    """Copies the bundle into the home folder of every worker."""
    if options.copy:
        nodes = ['--node=all'] if machines.queued else []
        bundle, home = str(_bundle(machines)), f'{machines.name}:'
        command = machines.gcloud('scp', bundle, home, *nodes, '--worker=all')
        machines.shell.must(command, f'The code could not be copied to {machines.name}')


def _bundle(machines: Machines) -> Path:
    return Path(tempfile.gettempdir()) / f'palr_jax-{machines.name}.bundle'


def _end(machines: Machines, options: argparse.Namespace, status: int) -> int:
    if options.delete:
        machines.delete()
    else:
        machines.shell.say(
            f'{machines.name} still exists and costs: python launch/tpu_vm.py delete '
            f'{machines.name} --zone={machines.zone}'
        )
    if status == RUN_FAILED:
        raise LaunchError(f'The run failed on {machines.name}: its log is above.')
    if status:
        raise LaunchError(
            f'The run could not be started on every worker of {machines.name}: see above.'
        )
    return 0


def start_script(origin: tuple[str, str], command: list[str]) -> str:
    """What a worker does to start a run: nothing, if that run is in progress there already.

    The lock is held by whatever runs, so it cannot outlive a process nor a reboot.
    """
    return f"""set -- {shlex.join(command)}
mkdir -p ~/palr_run && cd ~/palr_run && exec 9> lock || exit 1
if ! flock --timeout 1 9; then
  if [ "$(cat command)" = "$*" ]; then echo 'already in progress'; exit 0; fi
  echo "in progress here: $(cat command)" >&2; exit {BUSY}
fi
rm -f status
echo "$*" > command
({_install(origin)}) 9>&- || exit 1
cd ~/palr_jax
nohup bash -c '"$@"; echo $? > ~/palr_run/status' palr_jax "$@" \\
  > ~/palr_run/log 2>&1 < /dev/null &"""


def _install(origin: tuple[str, str]) -> str:
    return ' &&\n'.join(install(*origin, extras='tpu,gcs'))


FOLLOW = f"""cd ~/palr_run || exit {RUN_VANISHED}
flock --shared lock true &
tail -n 200 -F --pid=$! log
[ -f status ] || exit {RUN_VANISHED}
echo "the run ended with status $(cat status)"
[ "$(cat status)" = 0 ] || exit {RUN_FAILED}"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    actions = parser.add_subparsers(required=True, metavar='run | create | logs | status | delete')
    for action in (run, create, logs, status, delete):
        sub = actions.add_parser(action.__name__)
        sub.set_defaults(action=action)
        sub.add_argument('name')
        sub.add_argument('--zone', required=True)
        sub.add_argument('--project', help="gcloud's own if left out")
        sub.add_argument(
            '--no-queue',
            dest='queued',
            action='store_false',
            help='a TPU VM at once or not at all, instead of a queued resource',
        )
        sub.add_argument('--interval', type=float, default=30.0, help='seconds between polls')
        sub.add_argument('--dry-run', action='store_true', help='print the commands, run nothing')
        if action is logs:
            sub.add_argument('--worker', default='0', help='a number or all')
            sub.add_argument('--node', default='0', help='the slice: a number or all')
        if action in (run, create):
            sub.add_argument('--type', required=True, help='v5litepod-16, v4-32, v5p-128, …')
            sub.add_argument('--slices', type=int, default=1)
            sub.add_argument('--runtime', help='the software of the machines')
            sub.add_argument('--spot', action='store_true', help='cheaper, may be preempted')
            sub.add_argument('--create-flags', default='', help='more flags of gcloud create')
            sub.add_argument('--repository', help="git address; this checkout's origin if left out")
            sub.add_argument('--revision', help='git revision; that of this checkout if left out')
            sub.add_argument(
                '--copy', action='store_true', help='copy the revision from this checkout instead'
            )
        if action is run:
            sub.add_argument('--env', action='append', metavar='NAME=VALUE', help='repeatable')
            sub.add_argument('--max-retries', type=int, default=10, help='after preemptions')
            sub.add_argument('--delete', action='store_true', help='when the run has ended')
    return parser


if __name__ == '__main__':
    launch(main)
