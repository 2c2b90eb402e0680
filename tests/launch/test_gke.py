"""launch/gke.py against a stand-in of xpk."""

RUN = (
    'run palr --cluster=pods --zone=us-central2-b --type=v5e-16 --repository=https://host/x.git '
    '--revision=abc123'
)
MAIN = "-- --config=configs/ml1m.py --workdir=gs://bucket/palr --config.data.path='my data'"
LIST, WAIT = 'list --filter-by-job', 'list --wait-for-job-completion'
# Rows as in xpk's documentation of `workload list`.
HEAD = 'Jobset Name  Created Time  Priority  TPU VMs Needed  Status  Status Message  Status Time\n'
RUNNING = {'out': f'{HEAD}palr  2026-1-1T1:15:00Z  medium  4  Admitted  Admitted by ClusterQueue\n'}
FAILED = {'out': f'{HEAD}palr  2026-1-1T1:00:00Z  medium  4  Finished  JobSet failed  2026\n'}
NONE = {'out': f'[XPK] Starting workload list\n{HEAD}'}


def verbs(calls):
    return [
        'wait' if any(word.startswith('--wait-for') for word in call) else call[2] for call in calls
    ]


def test_happy_path_is_what_the_dry_run_prints(desk):
    desk.script((LIST, [NONE]))
    done = desk('gke.py', f'{RUN} --slices=2 --env=A=1 {MAIN}')
    assert done.returncode == 0, done.stderr
    assert 'kubectl logs --follow' in done.stderr
    assert verbs(desk.calls) == ['list', 'create', 'wait']
    create = desk.calls[1]
    assert ' '.join(create[:-1]) == (
        'xpk workload create --cluster=pods --zone=us-central2-b --workload=palr '
        '--tpu-type=v5litepod-16 --num-slices=2 --max-restarts=10 --docker-image=python:3.12 '
        '--env=A=1'
    )
    assert 'git fetch --quiet https://host/x.git abc123 && ' in create[-1]
    assert create[-1].endswith(
        '&& exec .venv/bin/python -m palr_jax.main --distributed --config=configs/ml1m.py '
        "--workdir=gs://bucket/palr '--config.data.path=my data'"
    )
    assert desk.dry_run('gke.py', f'{RUN} --slices=2 --env=A=1 {MAIN}') == desk.calls


def test_an_image_of_ones_own_is_not_installed_into(desk):
    create = desk.dry_run('gke.py', f'{RUN} --image=gcr.io/p/palr {MAIN}')[1]
    assert '--docker-image=gcr.io/p/palr' in create
    assert create[-1].startswith('--command=cd /palr_jax && exec python -m palr_jax.main ')


def test_failed_create_is_one_sentence(desk, one_sentence):
    error = '[XPK] Cluster pods has no v5litepod-16 capacity\n[XPK] XPK failed, error code 1\n'
    desk.script((LIST, [NONE]), ('create', [{'status': 1, 'out': error}]))
    sentence = one_sentence(desk('gke.py', f'{RUN} {MAIN}'))
    assert sentence.startswith(
        'error: palr could not be submitted to pods: xpk says "[XPK] Cluster'
    )
    assert verbs(desk.calls) == ['list', 'create']


def test_wrong_zone_is_one_sentence(desk, one_sentence):
    error = 'ERROR: (gcloud.container.clusters.get-credentials) NOT_FOUND: pods in us-central2-b\n'
    desk.script((LIST, [{'status': 1, 'err': error}]))
    assert 'The workloads of pods cannot be listed: xpk says "ERROR: (gcloud.container' in (
        one_sentence(desk('gke.py', f'{RUN} {MAIN}'))
    )


def test_interrupted_script_that_is_run_again_only_waits(desk):
    desk.script((LIST, [RUNNING]))
    assert desk('gke.py', f'{RUN} {MAIN}').returncode == 0
    assert verbs(desk.calls) == ['list', 'wait']


def test_what_failed_before_is_submitted_again(desk):
    desk.script((LIST, [FAILED]), (WAIT, [{'status': 125}, {}]))
    assert desk('gke.py', f'{RUN} {MAIN}').returncode == 0
    assert verbs(desk.calls) == ['list', 'wait', 'delete', 'create', 'wait']


def test_what_fails_now_is_not(desk, one_sentence):
    desk.script((LIST, [NONE]), (WAIT, [{'status': 125}]))
    assert 'palr failed after 10 restarts' in one_sentence(desk('gke.py', f'{RUN} {MAIN}'))
    assert verbs(desk.calls) == ['list', 'create', 'wait']


def test_waiting_that_breaks_off_says_so(desk, one_sentence):
    desk.script((LIST, [NONE]), (WAIT, [{'status': 1}]))
    assert 'the same command again waits' in one_sentence(desk('gke.py', f'{RUN} {MAIN}'))


def test_delete_status_and_logs(desk):
    desk.script((LIST, [RUNNING, NONE]))
    where = 'palr --cluster=pods --zone=us-central2-b'
    assert desk('gke.py', f'delete {where}').returncode == 0
    assert desk.calls[-1][2:] == (
        ['delete', '--cluster=pods', '--zone=us-central2-b', '--workload=palr', '--force']
    )
    assert desk.dry_run('gke.py', f'delete {where}') == desk.calls
    assert 'nothing to delete' in desk('gke.py', f'delete {where}').stderr
    desk.forget()
    assert desk('gke.py', f'status {where}').returncode == 0
    assert desk('gke.py', f'logs {where}').returncode == 0
    assert [call[0] for call in desk.calls] == ['xpk', 'kubectl']


def test_missing_xpk_is_one_sentence(desk, one_sentence):
    desk.remove('xpk')
    sentence = one_sentence(desk('gke.py', f'{RUN} {MAIN}'))
    assert 'xpk is not on the PATH (pip install xpk' in sentence


def test_a_workdir_in_the_pod_is_refused(desk, one_sentence):
    sentence = one_sentence(desk('gke.py', f'{RUN} -- --config=c.py --workdir=runs/x'))
    assert '--workdir=runs/x lies on the disk of one machine' in sentence
    assert desk.calls == []
