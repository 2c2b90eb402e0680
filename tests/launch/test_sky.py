"""launch/sky.py against a stand-in of sky, and the commands of its tasks in bash."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

TASKS = Path(__file__).parents[2] / 'launch' / 'sky'
RUN = 'run palr --accelerators=tpu-v5litepod-16 --repository=https://host/x.git --revision=abc123'
MAIN = "-- --config=configs/ml1m.py --workdir=gs://bucket/palr --config.data.path='my data'"
PROGRAM = (
    '.venv/bin/python -m palr_jax.main --distributed --config=configs/ml1m.py '
    "--workdir=gs://bucket/palr '--config.data.path=my data'"
)
NO_JOBS = {'out': '[]\n'}
# The fields of SkyPilot's ManagedJobRecord that matter, among others that do not.
IN_PROGRESS = {
    'out': 'Refreshing\n'
    + json.dumps([{'job_id': 7, 'job_name': name, 'status': 'RUNNING'} for name in ('a', 'palr')])
}


def test_happy_path_is_what_the_dry_run_prints(desk):
    desk.script(('queue', [NO_JOBS]))
    done = desk('sky.py', f'{RUN} --env=A=1 {MAIN}')
    assert done.returncode == 0, done.stderr
    queue, launch = desk.calls
    assert ' '.join(queue) == 'sky jobs queue --refresh --skip-finished --all --output json'
    at = launch.index(f'PALR_COMMAND={PROGRAM}')
    assert ' '.join(launch[:at]) == (
        'sky jobs launch --name palr --gpus tpu-v5litepod-16 --num-nodes 1 --use-spot '
        '--git-url https://host/x.git --git-ref abc123 --env'
    )
    assert launch[at + 1 :] == ['--env', 'A=1', '--yes', str(TASKS / 'tpu.yaml')]
    assert desk.dry_run('sky.py', f'{RUN} --env=A=1 {MAIN}') == desk.calls


def test_gpus_have_a_task_of_their_own(desk):
    arguments = RUN.replace('tpu-v5litepod-16', 'H100:8')
    launch = desk.dry_run('sky.py', f'{arguments} --nodes=2 --on-demand --copy {MAIN}')[1]
    assert launch[-1] == str(TASKS / 'gpu.yaml')
    assert '--no-use-spot' in launch
    assert launch[launch.index('--workdir') + 1] == str(TASKS.parents[1])
    assert '--git-url' not in launch


def test_interrupted_script_that_is_run_again_follows(desk):
    desk.script(('queue', [IN_PROGRESS]))
    assert desk('sky.py', f'{RUN} {MAIN}').returncode == 0
    assert desk.calls[1:] == [['sky', 'jobs', 'logs', '--name', 'palr']]


def test_no_controller_yet_means_no_job(desk):
    desk.script(('queue', [{'status': 1, 'err': 'No in-progress managed jobs.\n'}]))
    assert desk('sky.py', f'{RUN} {MAIN}').returncode == 0
    assert desk.calls[1][2] == 'launch'


@pytest.mark.parametrize('answer', [{'status': 1, 'err': 'no access\n'}, {'out': '[no JSON\n'}])
def test_a_queue_that_cannot_be_read_submits_nothing(desk, one_sentence, answer):
    desk.script(('queue', [answer]))
    one_sentence(desk('sky.py', f'{RUN} {MAIN}'))
    assert len(desk.calls) == 1


def test_failed_launch_is_one_sentence(desk, one_sentence):
    """No capacity, a wrong zone, a failing run: sky tells it on the terminal."""
    error = 'ResourcesUnavailableError: Failed to provision in us-west4-q\n'
    desk.script(('queue', [NO_JOBS]), ('launch', [{'status': 100, 'err': error}]))
    done = desk('sky.py', f'{RUN} --launch-flags="--infra gcp/us-west4/us-west4-q" {MAIN}')
    assert error in done.stderr
    assert 'sky jobs logs --name palr --controller' in done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert desk.calls[1][-4:-2] == ['--infra', 'gcp/us-west4/us-west4-q']


def test_delete_cancels_what_is_in_progress(desk):
    desk.script(('queue', [IN_PROGRESS, NO_JOBS]))
    assert desk('sky.py', 'delete palr').returncode == 0
    assert desk.calls[1] == ['sky', 'jobs', 'cancel', '--name', 'palr', '--yes']
    assert desk.dry_run('sky.py', 'delete palr') == desk.calls
    assert 'nothing to cancel' in desk('sky.py', 'delete palr').stderr


def test_missing_sky_is_one_sentence(desk, one_sentence):
    desk.remove('sky')
    assert "sky is not on the PATH (pip install 'skypilot" in (
        one_sentence(desk('sky.py', f'{RUN} {MAIN}'))
    )


def test_several_nodes_of_a_tpu_are_refused(desk, one_sentence):
    assert 'a TPU slice brings its hosts along' in (
        one_sentence(desk('sky.py', f'{RUN} --nodes=2 {MAIN}'))
    )


@pytest.mark.parametrize('name', ['tpu', 'gpu'])
def test_the_tasks_run_the_command_with_its_quotes(tmp_path, name):
    task = yaml.safe_load((TASKS / f'{name}.yaml').read_text())
    assert task['envs'] == {'PALR_COMMAND': None}
    python = tmp_path / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho $JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID/$JAX_NUM_PROCESSES\n'
        'for word in "$@"; do echo "$word"; done\n'
    )
    python.chmod(0o755)
    # What SkyPilot documents that it sets on every node.
    node = {
        'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2',
        'SKYPILOT_NUM_NODES': '2',
        'SKYPILOT_NODE_RANK': '1',
    }
    said = subprocess.check_output(
        ['bash', '-c', task['run']],
        cwd=tmp_path,
        env={'PATH': os.environ['PATH'], 'PALR_COMMAND': PROGRAM, **node},
        text=True,
    ).splitlines()
    assert said[0] == ('10.0.0.1:8476 1/2' if name == 'gpu' else '/')
    assert said[1:4] == ['-m', 'palr_jax.main', '--distributed']
    assert said[-1] == '--config.data.path=my data'
