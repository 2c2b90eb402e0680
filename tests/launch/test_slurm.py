"""launch/slurm.py against stand-ins of sbatch and squeue, and the job script in bash."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'launch' / 'slurm.sbatch'
RUN = "run palr --nodes=2 --gpus=8 --sbatch-flags='--partition=a100 --time=12:00:00'"
MAIN = "-- --config=configs/ml1m.py --workdir=/shared/palr --config.data.path='my data'"


def test_happy_path_is_what_the_dry_run_prints(desk):
    desk.script(('sbatch', [{'out': '4711;cluster\n'}]))
    done = desk('slurm.py', f'{RUN} {MAIN}')
    assert done.returncode == 0, done.stderr
    assert f'palr is job 4711; its log: {ROOT}/palr-4711.log' in done.stderr
    queue, submit = desk.calls
    assert queue == ['squeue', '--me', '--name=palr', '--noheader', '--format=%i %T']
    assert ' '.join(submit[:-1]) == (
        f'sbatch --parsable --job-name=palr --chdir={ROOT} --nodes=2 --ntasks-per-node=8 '
        '--gpus-per-node=8 --export=ALL,PALR_MAX_RETRIES=10 --partition=a100 --time=12:00:00 '
        f'{SCRIPT} .venv/bin/python -m palr_jax.main --distributed --config=configs/ml1m.py '
        '--workdir=/shared/palr'
    )
    assert submit[-1] == '--config.data.path=my data'
    assert desk.dry_run('slurm.py', f'{RUN} {MAIN}') == desk.calls


def test_a_variant_of_a_study_is_launched_too(desk, one_sentence):
    study = '--config=configs/ablations/tasks.py --workdir=/shared/tasks --variant=v1'
    _, submit = desk.dry_run('slurm.py', f'{RUN} -- palr_jax.ablate {study}')
    wanted = f'.venv/bin/python -m palr_jax.ablate --distributed {study}'
    assert ' '.join(submit).endswith(f' {wanted}')
    assert one_sentence(desk('slurm.py', f'{RUN} -- palr_jax.convert {study}')) == (
        'error: palr_jax.convert cannot be launched; allowed: palr_jax.main, palr_jax.ablate.'
    )
    assert 'arguments of palr_jax.ablate' in one_sentence(
        desk('slurm.py', f'{RUN} -- palr_jax.ablate')
    )


def test_interrupted_script_that_is_run_again_submits_nothing(desk):
    desk.script(('squeue', [{'out': '4711 PENDING\n'}]))
    done = desk('slurm.py', f'{RUN} {MAIN}')
    assert done.returncode == 0
    assert 'palr is there already: job 4711, PENDING' in done.stderr
    assert len(desk.calls) == 1


def test_failed_submission_is_one_sentence(desk, one_sentence):
    error = 'sbatch: error: invalid partition specified: a100\nsbatch: error: Batch job failed\n'
    desk.script(('sbatch', [{'status': 1, 'err': error}]))
    assert one_sentence(desk('slurm.py', f'{RUN} {MAIN}')) == (
        'error: palr could not be submitted: sbatch says '
        '"sbatch: error: invalid partition specified: a100 sbatch: error: Batch job failed".'
    )


def test_missing_slurm_is_one_sentence(desk, one_sentence):
    desk.remove('squeue')
    assert 'squeue is not on the PATH' in one_sentence(desk('slurm.py', f'{RUN} {MAIN}'))


def test_status_logs_and_delete(desk, one_sentence):
    assert desk('slurm.py', 'status palr').returncode == 0
    assert desk('slurm.py', 'delete palr').returncode == 0
    assert desk.calls[1] == ['scancel', '--me', '--name=palr']
    assert 'not queued or running' in one_sentence(desk('slurm.py', 'logs palr'))
    assert desk.dry_run('slurm.py', 'logs palr')[1][0] == 'tail'


@pytest.fixture
def start_job(tmp_path):
    """Starts the job script, with srun running a program and the other tools only recorded."""
    jobs = []

    def start(program, **variables):
        tools = {
            'srun': 'shift; exec "$@"',
            'scancel': f'echo "scancel $@" >> {tmp_path}/calls; kill $(cat {tmp_path}/up)',
            'scontrol': f'echo "scontrol $@" >> {tmp_path}/calls',
            'program': program,
        }
        for tool, text in tools.items():
            (tmp_path / tool).write_text(f'#!/usr/bin/env bash\n{text}\n')
            (tmp_path / tool).chmod(0o755)
        job = subprocess.Popen(
            ['bash', SCRIPT, 'program', 'an argument'],
            env={
                'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}',
                'SLURM_JOB_ID': '4711',
                **variables,
            },
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):  # no process of it is left
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def test_the_job_ends_as_its_program_does(start_job):
    job = start_job('echo "got $1"; exit 3')
    assert job.communicate(timeout=20)[0] == 'got an argument\n'
    assert job.returncode == 3


def test_a_job_whose_time_is_up_saves_and_is_queued_again(tmp_path, start_job):
    job = start_job(
        f'trap "echo saved; exit 143" TERM\necho $$ > {tmp_path}/up.tmp\n'
        f'mv {tmp_path}/up.tmp {tmp_path}/up\nwhile :; do sleep 0.1; done'
    )
    _await(tmp_path / 'up')
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=20)[0]
    assert 'job 4711 is queued again' in said
    assert 'saved' in said
    assert (tmp_path / 'calls').read_text() == (
        'scancel --signal=TERM 4711\nscontrol requeue 4711\n'
    )


@pytest.mark.parametrize('command', ['srun', 'wait'])
def test_a_signal_as_the_run_is_started_queues_the_job_again(tmp_path, start_job, command):
    # Before each command bash looks whether it is the one that the signal shall precede.
    (tmp_path / 'early').write_text(
        f"trap 'case $BASH_COMMAND in {command}*) trap - DEBUG; kill -USR1 $$;; esac' DEBUG\n"
    )
    program = f'echo $$ > {tmp_path}/up; sleep 1; echo end'
    job = start_job(program, BASH_ENV=str(tmp_path / 'early'))
    assert 'job 4711 is queued again' in job.communicate(timeout=20)[0]
    assert (tmp_path / 'calls').read_text() == (
        'scancel --signal=TERM 4711\nscontrol requeue 4711\n'
    )


def test_a_job_that_was_queued_too_often_is_not_queued_again(tmp_path, start_job):
    job = start_job(
        f'touch {tmp_path}/up; sleep 1; echo end',
        SLURM_RESTART_COUNT='2',
        PALR_MAX_RETRIES='2',
    )
    _await(tmp_path / 'up')
    job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=20)[0] == 'end\n'
    assert job.returncode == 0
    assert not (tmp_path / 'calls').exists()


def _await(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
