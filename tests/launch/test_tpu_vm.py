"""launch/tpu_vm.py against a stand-in of gcloud."""

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / 'launch'
RUN = (
    'run palr --zone=us-west4-a --type=v5litepod-16 --interval=0 --repository=https://host/x.git '
    '--revision=abc123'
)
MAIN = "-- --config=configs/ml1m.py --workdir=gs://bucket/palr --config.data.path='my data'"
ABSENT = {'status': 1, 'err': 'ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found\n'}
LOST_CONNECTION = {'status': 1, 'err': 'ERROR: [/usr/bin/ssh] exited with return code [255].\n'}
START, FOLLOW = 'ssh --worker=all', 'ssh --worker=0'


def queued(*states, message=None):
    """Answers of `queued-resources describe`, as in the REST reference of QueuedResourceState."""
    answers = []
    for state in states:
        found = {'state': state}
        if state == 'FAILED' and message:
            found['failedData'] = {'error': {'code': 8, 'message': message}}
        answers.append(ABSENT if state is None else {'out': json.dumps({'state': found})})
    return answers


def verbs(calls):
    """create, describe, … and, of ssh, which of the two scripts."""
    return [
        {'--worker=all': 'start', '--worker=0': 'follow'}[call[-2]] if call[4] == 'ssh' else call[4]
        for call in calls
    ]


def test_happy_path_is_what_the_dry_run_prints(desk):
    states = queued(None, 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'PROVISIONING', 'ACTIVE')
    desk.script(('describe', states), (FOLLOW, [{'out': 'loss 1.0\n'}]))
    done = desk('tpu_vm.py', f'{RUN} --spot {MAIN}')
    assert done.returncode == 0, done.stderr
    assert 'loss 1.0' in done.stdout
    assert 'PROVISIONING' in done.stderr
    assert 'still exists and costs: python launch/tpu_vm.py delete palr' in done.stderr
    calls = desk.calls
    assert verbs(calls) == ['describe', 'create', *['describe'] * 4, 'start', 'follow']
    assert ' '.join(calls[1]) == (
        'gcloud compute tpus queued-resources create --zone=us-west4-a palr --node-id=palr '
        '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot --async'
    )
    script = calls[-2][-1]
    assert 'git fetch --quiet https://host/x.git abc123 ' in script
    assert (
        'set -- .venv/bin/python -m palr_jax.main --distributed --config=configs/ml1m.py '
        "--workdir=gs://bucket/palr '--config.data.path=my data'\n"
    ) in script
    assert calls[-2][-3:-1] == ['--node=all', '--worker=all']
    assert calls[-1][-3:-1] == ['--node=0', '--worker=0']
    assert desk.dry_run('tpu_vm.py', f'{RUN} --spot {MAIN}') == desk.different_calls


def test_a_tpu_vm_without_a_queue(desk):
    states = [ABSENT, *({'out': json.dumps({'state': state})} for state in ('CREATING', 'READY'))]
    desk.script(('describe', states))
    arguments = f'{RUN} --no-queue --project=mine --create-flags="--network=net" --delete {MAIN}'
    done = desk('tpu_vm.py', arguments)
    assert done.returncode == 0, done.stderr
    assert verbs(desk.calls) == (
        ['describe', 'create', 'describe', 'describe', 'start', 'follow', 'delete']
    )
    assert ' '.join(desk.calls[1]) == (
        'gcloud compute tpus tpu-vm create --zone=us-west4-a --project=mine palr '
        '--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --network=net'
    )
    assert desk.calls[-1][-2:] == ['palr', '--quiet']
    assert desk.dry_run('tpu_vm.py', arguments) == desk.different_calls


@pytest.mark.parametrize(
    ('kind', 'accelerator', 'runtime'),
    [
        ('v5e-8', 'v5litepod-8', 'v2-alpha-tpuv5-lite'),
        ('v5litepod-256', 'v5litepod-256', 'v2-alpha-tpuv5-lite'),
        ('v4-32', 'v4-32', 'tpu-ubuntu2204-base'),
        ('v5p-128', 'v5p-128', 'v2-alpha-tpuv5'),
        ('v6e-8', 'v6e-8', 'v2-alpha-tpuv6e'),
    ],
)
def test_runtimes_are_those_of_googles_table(desk, kind, accelerator, runtime):
    arguments = RUN.replace('v5litepod-16', kind)
    create = desk.dry_run('tpu_vm.py', f'{arguments} {MAIN}')[1]
    assert f'--accelerator-type={accelerator}' in create
    assert f'--runtime-version={runtime}' in create


def test_several_slices_are_one_request(desk):
    create = desk.dry_run('tpu_vm.py', f'{RUN} --slices=2 {MAIN}')[1]
    assert {'--node-count=2', '--node-prefix=palr'} <= set(create)
    assert '--node-id=palr' not in create


def test_copy_sends_a_bundle_to_every_worker(desk):
    (desk.folder / 'git').write_text((desk.folder / 'gcloud').read_text())
    (desk.folder / 'git').chmod(0o755)
    desk.script(('describe', queued('ACTIVE')))
    arguments = f'{RUN} --copy {MAIN}'.replace(' --revision=abc123', '')
    done = desk('tpu_vm.py', arguments)
    assert done.returncode == 0, done.stderr
    bundle, _, scp, start, _ = desk.calls
    assert bundle[0] == 'git'
    assert bundle[3:5] == ['bundle', 'create']
    path = bundle[-2]
    assert bundle[-1] == 'HEAD'
    assert scp[4:] == ['scp', '--zone=us-west4-a', path, 'palr:', '--node=all', '--worker=all']
    assert 'git fetch --quiet ../palr_jax-palr.bundle HEAD ' in start[-1]


@pytest.mark.parametrize(
    'message',
    [
        'RESOURCE_EXHAUSTED: There is no more capacity in the zone "us-west4-a"',
        'RESOURCE_EXHAUSTED: Quota limit TPUV5sPreemptibleLitepodPerProjectPerZone exceeded',
    ],
)
def test_failed_create_is_one_sentence(desk, one_sentence, message):
    error = f'Create request issued for: [palr]\nERROR: (gcloud.x.create) {message}\n'
    desk.script(('describe', [ABSENT]), ('create', [{'status': 1, 'err': error}]))
    sentence = one_sentence(desk('tpu_vm.py', f'{RUN} {MAIN}'))
    assert sentence == (
        'error: palr could not be created in us-west4-a: gcloud says '
        f'"ERROR: (gcloud.x.create) {message}".'
    )
    assert verbs(desk.calls) == ['describe', 'create']


def test_a_request_that_fails_in_the_queue_is_one_sentence(desk, one_sentence):
    states = queued(None, 'ACCEPTED', 'FAILED', message='The valid until time has passed.')
    desk.script(('describe', states))
    sentence = one_sentence(desk('tpu_vm.py', f'{RUN} {MAIN}'))
    assert (
        'palr in us-west4-a is FAILED: gcloud says "The valid until time has passed."' in sentence
    )
    assert 'python launch/tpu_vm.py delete palr --zone=us-west4-a' in sentence
    assert verbs(desk.calls).count('create') == 1


def test_what_failed_before_is_created_again(desk):
    desk.script(('describe', queued('FAILED', 'ACTIVE', message='no capacity')))
    assert desk('tpu_vm.py', f'{RUN} {MAIN}').returncode == 0
    assert verbs(desk.calls) == ['describe', 'delete', 'create', 'describe', 'start', 'follow']


def test_wrong_zone_is_one_sentence_and_creates_nothing(desk, one_sentence):
    error = (
        'ERROR: (gcloud.compute.tpus.queued-resources.describe) PERMISSION_DENIED: Permission '
        "denied on 'locations/us-west4-q' (or it may not exist).\n- '@type': type.googleapis.com\n"
    )
    desk.script(('describe', [{'status': 1, 'err': error}]))
    sentence = one_sentence(desk('tpu_vm.py', f'{RUN} {MAIN}'.replace('west4-a', 'west4-q')))
    assert "Permission denied on 'locations/us-west4-q' (or it may not exist)" in sentence
    assert verbs(desk.calls) == ['describe']


def test_preemption_in_mid_run_deletes_creates_and_runs_the_same_again(desk):
    states = queued('ACTIVE', *['SUSPENDING'] * 2, 'SUSPENDED', 'PROVISIONING', 'ACTIVE')
    desk.script(('describe', states), (FOLLOW, [LOST_CONNECTION, {}]))
    done = desk('tpu_vm.py', f'{RUN} --spot {MAIN}')
    assert done.returncode == 0, done.stderr
    assert 'retry 1 of 10' in done.stderr
    assert ' '.join(verbs(desk.calls)) == (
        'describe start follow describe describe describe delete create describe describe '
        'start follow'
    )
    delete = next(call for call in desk.calls if call[4] == 'delete')
    assert delete[-3:] == ['palr', '--force', '--quiet']
    starts = [call for call in desk.calls if '--worker=all' in call]
    assert starts[0] == starts[1]


def test_preemption_may_show_as_a_failed_run(desk):
    """The other workers notice first: the run ends badly, then the machines go."""
    states = queued('ACTIVE', 'SUSPENDED', 'SUSPENDED', 'ACTIVE')
    desk.script(('describe', states), (FOLLOW, [{'status': 42}, {}]))
    done = desk('tpu_vm.py', f'{RUN} {MAIN}')
    assert done.returncode == 0, done.stderr
    assert verbs(desk.calls).count('create') == 1


def test_preempted_too_often_ends_with_one_sentence(desk, one_sentence):
    states = queued('ACTIVE', 'SUSPENDED', 'SUSPENDED', 'ACTIVE', 'SUSPENDED')
    desk.script(('describe', states), (FOLLOW, [LOST_CONNECTION]))
    sentence = one_sentence(desk('tpu_vm.py', f'{RUN} --max-retries=1 {MAIN}'))
    assert 'palr was preempted 2 times' in sentence
    assert verbs(desk.calls).count('create') == 1


def test_lost_connection_to_machines_that_are_there_is_made_again(desk):
    desk.script(('describe', queued('ACTIVE')), (FOLLOW, [LOST_CONNECTION, {'status': 255}, {}]))
    done = desk('tpu_vm.py', f'{RUN} {MAIN}')
    assert done.returncode == 0, done.stderr
    assert verbs(desk.calls) == (
        ['describe', 'start', 'follow', 'describe', 'follow', 'describe', 'follow']
    )


def test_machines_that_never_answer_end_with_one_sentence(desk, one_sentence):
    desk.script(('describe', queued('ACTIVE')), (FOLLOW, [LOST_CONNECTION]))
    assert 'does not answer' in one_sentence(desk('tpu_vm.py', f'{RUN} {MAIN}'))


def test_connections_of_a_long_run_that_are_lost_now_and_then_are_all_made_again(desk):
    desk.script(('describe', queued('ACTIVE')), (FOLLOW, [LOST_CONNECTION] * 21 + [{}]))
    program = 'import tpu_vm; tpu_vm.LASTED = 0.0; tpu_vm.launch(tpu_vm.main)'
    python, *options, _ = desk.command('tpu_vm.py', '')
    done = subprocess.run(
        [python, *options, '-c', program, *shlex.split(f'{RUN} {MAIN}')],
        env=desk.environment() | {'PYTHONPATH': str(LAUNCH)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert verbs(desk.calls).count('follow') == 22


def test_a_run_that_a_reboot_ended_is_started_again(desk):
    desk.script(('describe', queued('ACTIVE')), (FOLLOW, [{'status': 43}, {}]))
    done = desk('tpu_vm.py', f'{RUN} {MAIN}')
    assert done.returncode == 0, done.stderr
    assert [verb for verb in verbs(desk.calls) if verb != 'describe'] == ['start', 'follow'] * 2


def test_a_run_that_fails_by_itself_is_not_repeated(desk, one_sentence):
    desk.script(('describe', queued('ACTIVE')), (FOLLOW, [{'status': 42}]))
    done = desk('tpu_vm.py', f'{RUN} --delete {MAIN}')
    assert 'The run failed on palr' in one_sentence(done)
    assert verbs(desk.calls) == ['describe', 'start', 'follow', 'describe', 'delete']


def test_machines_at_work_on_another_run_are_left_alone(desk, one_sentence):
    desk.script(('describe', queued('ACTIVE')), (START, [{'status': 41}]))
    done = desk('tpu_vm.py', f'{RUN} --delete {MAIN}')
    assert 'palr is at work on another run' in one_sentence(done)
    assert 'delete' not in verbs(desk.calls)


def test_interrupted_script_that_is_run_again_goes_on(desk):
    desk.script(('describe', queued(None, 'PROVISIONING')))
    arguments = RUN.replace('--interval=0', '--interval=0.05')
    process = subprocess.Popen(
        desk.command('tpu_vm.py', f'{arguments} {MAIN}'),
        env=desk.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(desk.calls) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert 'the same command again' in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert verbs(desk.calls)[:2] == ['describe', 'create']

    desk.forget()
    desk.script(('describe', queued('PROVISIONING', 'ACTIVE')))
    assert desk('tpu_vm.py', f'{RUN} {MAIN}').returncode == 0
    assert verbs(desk.calls) == ['describe', 'describe', 'start', 'follow']


def test_missing_gcloud_is_one_sentence(desk, one_sentence):
    desk.remove('gcloud')
    sentence = one_sentence(desk('tpu_vm.py', f'{RUN} {MAIN}'))
    assert 'gcloud is not on the PATH' in sentence
    assert 'https://cloud.google.com/sdk/docs/install' in sentence


def test_delete_and_status_ask_the_cloud(desk):
    desk.script(('describe', queued('ACTIVE', None)))
    where = 'palr --zone=us-west4-a'
    assert desk('tpu_vm.py', f'delete {where}').returncode == 0
    assert verbs(desk.calls) == ['describe', 'delete']
    again = desk('tpu_vm.py', f'delete {where}')
    assert again.returncode == 0
    assert 'nothing to delete' in again.stderr
    assert desk('tpu_vm.py', f'status {where}').stdout == 'palr does not exist\n'
    assert verbs(desk.dry_run('tpu_vm.py', f'delete {where}')) == ['describe', 'delete']


def test_create_and_logs(desk):
    desk.script(('describe', queued('ACTIVE')))
    assert desk('tpu_vm.py', RUN.replace('run', 'create', 1)).returncode == 0
    assert verbs(desk.calls) == ['describe', 'start']
    assert 'palr_jax.main' not in desk.calls[-1][-1]
    desk.forget()
    assert desk('tpu_vm.py', 'logs palr --zone=z --worker=3').returncode == 0
    assert '--worker=3' in desk.calls[0]


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (f'{RUN} -- --config=c.py --workdir=runs/x', '--workdir=runs/x lies on the disk of one'),
        (f'{RUN} -- --config=c.py --workdir runs/x', '--workdir=runs/x lies on the disk of one'),
        (RUN, 'Nothing to run'),
        (f'{RUN} {MAIN}'.replace('v5litepod-16', 'v9-8'), 'no runtime is known for it'),
        (f'{RUN} --no-queue --slices=2 {MAIN}', '--slices needs a queued resource'),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_asked(
    desk, one_sentence, arguments, sentence
):
    assert sentence in one_sentence(desk('tpu_vm.py', arguments))
    assert desk.calls == []


def test_a_stopped_machine_is_not_deleted(desk, one_sentence):
    desk.script(('describe', [{'out': json.dumps({'state': 'STOPPED'})}]))
    assert 'is STOPPED' in one_sentence(desk('tpu_vm.py', f'{RUN} --no-queue {MAIN}'))
    assert verbs(desk.calls) == ['describe']
