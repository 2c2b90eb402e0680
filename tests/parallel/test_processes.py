"""The whole system in one, two and four real processes: the same numbers, and what a kill does."""

import json
import signal
import time

import numpy as np
import pytest

from palr_jax.config import default_config
from palr_jax.stages import flatten
from palr_jax.testing import write_ml100k
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
DEVICES = 4  # of all processes together


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
    """A config of a small run on four devices, made-up ratings and a tiny model."""
    folder = tmp_path_factory.mktemp('inputs')
    write_ml100k(folder / 'ml-100k', users=40, items=60, seed=0)
    lines = (folder / 'ml-100k' / 'u.item').read_bytes().decode('latin-1')
    tokenizer = tiny_tokenizer([lines])
    model = tiny_config(vocab_size=tokenizer.size, max_positions=1024)
    write_hf_folder(folder / 'model', model, random_params(model, 0), tokenizer)
    config = default_config()
    config.data.path, config.model.path = str(folder / 'ml-100k'), str(folder / 'model')
    config.mesh.update({'data': 2, 'fsdp': 2})
    config.retrieval.update({'width': 16, 'epochs': 2, 'candidates': 12})
    config.prompts.update({'history': 4, 'length': 700})
    config.tasks.update({'candidates': 6, 'targets': 2, 'users': 0.5})
    config.finetune.update({'steps': 6, 'batch_size': 4, 'length': 700, 'held_out': 4})
    config.finetune.checkpoint_every = 2
    config.ranking.update({'candidates': 10, 'users': 12, 'valid_users': 10, 'batch_size': 4})
    config.evaluation.resamples = 100
    path = folder / 'config.py'
    path.write_text(
        'from palr_jax.config import restore\n'
        f'def get_config(): return restore({flatten(config)!r})\n'
    )
    return path


def command(config_file, workdir, *more):
    start = ['-m', 'palr_jax.main', '--distributed', '--wait=60', f'--config={config_file}']
    return [*start, f'--workdir={workdir}', *more]


def losses(workdir):
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return {line['step']: line['loss'] for line in lines if line['stage'] == 'finetune'}


def metrics(workdir):
    report = json.loads((workdir / 'report' / 'metrics.json').read_text())
    names = ('HR@1', 'HR@10', 'NDCG@10', 'MRR')
    return [[run[name] for name in names] for run in report['runs']]


def run(launch, finish, config_file, workdir, count):
    ended = finish(launch(command(config_file, workdir), count, devices=DEVICES // count), 300)
    for status, output in ended:
        assert status == 0, output
    return ended


@pytest.fixture(scope='module')
def alone(config_file, tmp_path_factory):
    return tmp_path_factory.mktemp('alone')


def test_two_and_four_processes_do_what_one_does(launch, finish, config_file, alone, tmp_path):
    run(launch, finish, config_file, alone, 1)
    for count in (2, 4):
        workdir = tmp_path / f'of_{count}'
        ended = run(launch, finish, config_file, workdir, count)
        assert f'process {count - 1} of {count}: ' in ended[0].output
        assert 'NDCG@10' in ended[0].output
        assert all(f'{4 // count} of each 4 rows are laid out here' in e.output for e in ended)
        assert 'NDCG@10  95' not in ended[1].output  # process 0 alone prints the report
        expected, found = losses(alone), losses(workdir)
        assert sorted(found) == sorted(expected) == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
        np.testing.assert_allclose(metrics(workdir), metrics(alone), atol=1e-5)


@pytest.mark.parametrize('victim', [0, 1])
def test_a_kill_ends_all_and_the_same_command_continues(
    launch, finish, config_file, tmp_path, victim
):
    """Bit-equal to the uninterrupted run of two processes; on another number, to 1e-5."""
    reference, workdir = tmp_path / 'reference', tmp_path / 'killed'
    run(launch, finish, config_file, reference, 2)
    group = launch(command(config_file, workdir), 2, devices=2)
    checkpoint, deadline = workdir / 'finetune' / 'checkpoints' / '2', time.monotonic() + 200
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in group)
        time.sleep(0.02)
    group[victim].send_signal(signal.SIGKILL)
    ended = finish(group, 90)
    assert ended[victim].status == -signal.SIGKILL
    survivor = ended[1 - victim]
    assert survivor.status not in (0, -signal.SIGKILL)
    assert 'another process of this run has ended' in survivor.output or (
        'another task died' in survivor.output
    )

    run(launch, finish, config_file, workdir, 2)
    assert losses(workdir) == losses(reference)
    weights = [
        w / 'finetune' / 'adapter' / 'adapter_model.safetensors' for w in (workdir, reference)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert metrics(workdir) == metrics(reference)


def test_a_run_continues_with_another_number_of_processes(launch, finish, config_file, tmp_path):
    workdir, reference = tmp_path / 'changed', tmp_path / 'reference'
    fewer = command(config_file, workdir, '--config.finetune.steps=4')
    assert {e.status for e in finish(launch(fewer, 2, devices=2), 300)} == {0}
    run(launch, finish, config_file, workdir, 4)
    run(launch, finish, config_file, reference, 2)
    expected, found = losses(reference), losses(workdir)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_a_full_disk_ends_all_and_the_run_goes_on_with_room(launch, finish, config_file, tmp_path):
    """No file may grow beyond 64 kB: each matrix of this wide adapter does, a log does not."""
    workdir, reference = tmp_path / 'full', tmp_path / 'reference'
    wide = ("--config.stages=('data','finetune')", '--config.lora.rank=2048')
    whole = {folder: command(config_file, folder, *wide) for folder in (workdir, reference)}
    first = [*whole[workdir], '--config.finetune.steps=2']
    limited = (
        'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**16,) * 2); '
        'import runpy; runpy.run_module("palr_jax.main", run_name="__main__", alter_sys=True)'
    )
    for arguments in (whole[reference], first):
        assert {e.status for e in finish(launch(arguments, 2, devices=2), 300)} == {0}
    ended = finish(launch(['-c', limited, *whole[workdir][2:]], 2, devices=2), 300)
    outputs = '\n'.join(e.output for e in ended)
    assert 0 not in {e.status for e in ended}, outputs
    assert 'step 2 is the last good one; make room' in outputs
    assert {e.status for e in finish(launch(whole[workdir], 2, devices=2), 300)} == {0}
    assert losses(workdir) == losses(reference)


def test_bad_data_is_one_sentence_of_every_process(launch, finish, config_file, tmp_path):
    wrong = command(config_file, tmp_path / 'w', '--config.data.path=/nowhere')
    for status, output in finish(launch(wrong, 2, devices=2)):
        assert status == 2, output
        assert 'error: config.data.path: /nowhere does not exist' in output
        assert 'Traceback' not in output


# The base has a bug in what process 0 does alone; in the next variant, in the middle of what all do
# together, process 0 cannot write.
STUDY = """
import runpy
import numpy as np
from palr_jax import pipeline, storage
from palr_jax.parallel import distributed
def run(config, folder, shared):
    if folder.name == 'base':
        distributed.by_one(lambda: 1 / 0)
    for step in range(100):
        distributed.gather(np.array([step]))
        if step == 3:
            storage.write_text(folder / 'config.json' / 'scores', '')
pipeline.run = run
runpy.run_module('palr_jax.ablate', run_name='__main__', alter_sys=True)
"""


def test_what_process_0_alone_meets_ends_all(launch, finish, tmp_path):
    config, workdir = tmp_path / 'study.py', tmp_path / 'study'
    config.write_text(
        'from palr_jax.config import default_config\nfrom palr_jax.study import define\n'
        "def get_config(): return define('s', default_config(), ('a', {'seed': 1}))\n"
    )
    blocked = workdir / 'variants' / 'a' / 'config.json'
    blocked.parent.mkdir(parents=True)
    blocked.write_text('{}')
    flags = ['--distributed', '--wait=60', f'--config={config}', f'--workdir={workdir}']
    ended = finish(launch(['-c', STUDY, *flags], 2), 90)
    outputs = '\n'.join(e.output for e in ended)
    assert outputs.count('variant base: process 0 ended: ZeroDivisionError') == 2
    assert ended[0].status == 2, outputs
    assert 'error: ' in ended[0].output
    assert 'config.json/scores: cannot be written' in ended[0].output
    assert ended[1].status not in (0, 2), outputs


def test_a_process_with_another_config_is_named(launch, finish, config_file, tmp_path):
    group = [
        *launch(command(config_file, tmp_path / 'w'), 2, only=(0,), devices=2),
    ]
    other = command(config_file, tmp_path / 'w', '--config.seed=1')
    group += launch(other, 2, only=(1,), devices=2, join=True)
    for status, output in finish(group, 120):
        assert status == 2, output
        assert 'process 1 on' in output
        assert 'runs the config' in output
