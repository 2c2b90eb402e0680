"""Real processes: who is there, what differs, who is missing, and who ends first."""

import signal

import pytest

pytestmark = pytest.mark.multiprocess

PROGRAM = """
import os, sys, time
import numpy as np
from palr_jax.errors import InputError
from palr_jax.parallel import distributed
index = int(os.environ['JAX_PROCESS_ID'])
def main():
    distributed.start(timeout={timeout})
    cards = distributed.preflight({config})
    print('CARDS', [card['process'] for card in cards], flush=True)
    {body}
try:
    main()
except InputError as error:
    print('ERROR', error, flush=True)
    os._exit(2)
except Exception as error:
    print('LOST' if distributed.lost_a_peer(error) else 'BUG', type(error), error, flush=True)
    os._exit(3)
"""


def program(body='pass', config="'same'", timeout=20):
    return ['-c', PROGRAM.format(body=body, config=config, timeout=timeout)]


def test_every_process_knows_the_others(launch, finish):
    body = 'print(distributed.gather(np.array([[index, 7]])).tolist(), distributed.is_writer())'
    for index, (status, output) in enumerate(finish(launch(program(body), 3))):
        assert status == 0, output
        assert 'CARDS [0, 1, 2]' in output
        assert f'[[0, 7], [1, 7], [2, 7]] {index == 0}' in output


def test_another_config_is_named_by_all(launch, finish):
    for status, output in finish(launch(program(config="f'config {index % 2}'"), 2)):
        assert status == 2
        assert 'process 1 on' in output
        assert 'runs the config config 1, process 0' in output


def test_a_missing_worker_ends_the_others_in_time(launch, finish):
    for status, output in finish(launch(program(timeout=5), 3, only=(0, 1)), timeout=60):
        assert status == 2, output
        assert 'all 3 processes did not come together within 5 s' in output


def test_work_of_one_process_ends_all_of_them_alike(launch, finish):
    body = """
    def work():
        print('WORK', index, flush=True)
        raise InputError('data.csv, line 3: found x; allowed: numbers.')
    distributed.by_one(lambda: print('FIRST', index, flush=True))
    distributed.by_one(work)"""
    ended = finish(launch(program(body), 2))
    assert ['FIRST 0' in output for _, output in ended] == [True, False]
    for status, output in ended:
        assert status == 2
        assert 'ERROR data.csv, line 3: found x; allowed: numbers.' in output
        assert 'WORK 1' not in output


@pytest.mark.parametrize('victim', [0, 1])
def test_the_death_of_a_process_ends_the_others(launch, finish, victim):
    body = """
    if index == VICTIM:
        os.kill(os.getpid(), 9)
    distributed.barrier('all')""".replace('VICTIM', str(victim))
    ended = finish(launch(program(body), 2), timeout=90)
    assert ended[victim].status == -signal.SIGKILL
    assert ended[1 - victim].status not in (0, -signal.SIGKILL)
    print(ended[1 - victim].output)
