"""launch/local.py with a stand-in of palr_jax.main."""

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / 'launch' / 'local.py'
_MAIN = """
import os, signal, sys, time
index = os.environ.get('JAX_PROCESS_ID')
told = index, os.environ.get('JAX_NUM_PROCESSES'), os.environ.get('JAX_COORDINATOR_ADDRESS')
# In one piece: two processes may write to one pipe.
os.write(1, (' '.join(map(str, told)) + f'\\n{sys.argv[1:]}\\n').encode())
if '--wait' in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))
    print('ready', flush=True)
    time.sleep(60)
if '--fail' in sys.argv and index in ('1', None):
    sys.exit(2)
if '--fail' in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def local(tmp_path):
    (tmp_path / 'palr_jax').mkdir()
    (tmp_path / 'palr_jax' / '__init__.py').touch()
    (tmp_path / 'palr_jax' / 'main.py').write_text(_MAIN)

    def run(arguments):
        return subprocess.run(
            [sys.executable, '-S', LOCAL, *shlex.split(arguments)],
            cwd=tmp_path,
            env={'PATH': os.environ['PATH']},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def test_one_process_is_a_plain_run(local):
    done = local("-- --config=c.py --workdir='a b'")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None None None\n['--config=c.py', '--workdir=a b']\n"
    assert local('-- --fail').returncode == 2


def test_a_signal_reaches_the_one_process_which_ends_as_it_likes(local, tmp_path):
    process = subprocess.Popen(
        [sys.executable, '-S', LOCAL, '--', '--wait'],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert 'ready\n' in iter(process.stdout.readline, '')
    process.terminate()
    assert process.communicate(timeout=60)[1].endswith('\nsaved\n')
    assert process.returncode == 1


def test_several_processes_are_told_of_each_other(local):
    port = free_port()
    done = local(f"--processes=2 --port={port} -- --workdir='a b'")
    assert done.returncode == 0, done.stderr
    for index in range(2):
        assert f'[{index}] {index} 2 127.0.0.1:{port}\n' in done.stdout
        assert f"[{index}] ['--distributed', '--workdir=a b']\n" in done.stdout


def test_a_dry_run_prints_lines_for_a_shell_that_do_the_same(local, tmp_path):
    printed = local("--processes=2 --port=8476 --dry-run -- --workdir='a b'").stdout
    assert printed.splitlines()[0] == (
        'JAX_COORDINATOR_ADDRESS=127.0.0.1:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 '
        f"{sys.executable} -m palr_jax.main --distributed '--workdir=a b' &"
    )
    said = subprocess.check_output(['bash', '-c', printed], cwd=tmp_path, text=True)
    assert sorted(said.splitlines())[:2] == ['0 2 127.0.0.1:8476', '1 2 127.0.0.1:8476']


def test_when_one_process_fails_the_others_are_ended(local):
    begun = time.monotonic()
    done = local(f'--processes=3 --grace=0.1 --port={free_port()} -- --fail')
    assert done.returncode == 2
    assert time.monotonic() - begun < 30


def test_a_taken_port_is_one_sentence(local):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = local(f'--processes=2 --port={port} -- --config=c.py')
    assert done.returncode == 1
    assert done.stderr == f'error: Port {port} of this machine is taken: give another --port.\n'


@pytest.mark.parametrize('arguments', ['', '--processes=0 -- --config=c.py'])
def test_bad_input_is_one_sentence(local, arguments):
    done = local(arguments)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ')
