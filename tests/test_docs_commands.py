"""Every command of README and docs is one that its program understands.

Fields, flags, config files and their arguments are checked by the programs themselves; launch
scripts print what they would do. What the commands then do is tested beside each program.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
FENCED = re.compile(r'^```[a-z]*\n(.*?)^```', re.MULTILINE | re.DOTALL)

# Parses each command line in a process of its own, forked after the imports, which are long.
CHECK = """
import argparse, json, os, runpy, sys
import palr_jax.pipeline  # what most of them import

def parse_alone(parser, *arguments, parse=argparse.ArgumentParser.parse_args):
    parse(parser, *arguments)
    sys.exit(0)

failed = []
for command in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1), os.dup2(write, 2)
        status = 1  # of one that does not stop after reading its arguments
        try:
            if command[0] == '-m':
                sys.argv = [*command[1:], '--only_check_args']
                runpy.run_module(command[1], run_name='__main__', alter_sys=True)
            else:
                sys.argv, sys.path[0] = command, os.path.dirname(command[0])
                argparse.ArgumentParser.parse_args = parse_alone
                runpy.run_path(command[0], run_name='__main__')
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException as error:
            print(repr(error))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)  # the usual way out takes long
    os.close(write)
    with open(read) as output:
        told = output.read()
    if os.waitpid(child, 0)[1]:
        failed.append([command, told[-500:]])
json.dump(failed, sys.stdout)
"""


def commands(page):
    """The command lines of a page that start Python, without `python`."""
    found = []
    for block in FENCED.findall(page.read_text()):
        for line in block.replace('\\\n', ' ').splitlines():
            line = line.strip().removeprefix('$ ')
            if not line.startswith('python '):
                continue
            line = re.sub(r'\[(--[^]]*)\]', r'\1', line)  # what may be left out
            line = line.replace(' … ', ' --config=configs/base.py --workdir=runs/x ')  # as above it
            found.append(shlex.split(line, comments=True)[1:])
    return found


ALL = [command for page in PAGES for command in commands(page)]


def test_the_pages_have_commands():
    """So that the tests below check something: most programs are shown somewhere."""
    modules = {command[1] for command in ALL if command[0] == '-m'}
    programs = ('main', 'ablate', 'recommend', 'probe', 'prompts', 'convert', 'compile_check')
    assert {f'palr_jax.{name}' for name in programs} <= modules
    scripts = {command[0] for command in ALL}
    assert {f'launch/{name}.py' for name in ('tpu_vm', 'gke', 'sky', 'slurm', 'local')} <= scripts


def wrong(commands):
    """[command, what its program said] of those that are refused."""
    done = subprocess.run(
        [sys.executable, '-c', CHECK],
        input=json.dumps(commands),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_programs_and_benchmarks_understand_them():
    beam = importlib.util.find_spec('apache_beam')
    checked = [
        command
        for command in ALL
        if command[0] == '-m' or command[0].startswith('benchmarks/')
        if beam or 'palr_jax.data.beam_builder' not in command
    ]
    assert len(checked) > 20
    assert wrong(checked) == []


@pytest.mark.slow
def test_what_is_wrong_is_seen():
    main = ['-m', 'palr_jax.main', '--config=configs/demo.py', '--workdir=runs/x']
    bad = [
        [*main, '--config.finetune.step=3'],
        [*main, '--config.finetune.steps=many'],
        [*main, '--workdirs=x'],
        ['-m', 'palr_jax.main', '--config=configs/demos.py', '--workdir=runs/x'],
        ['benchmarks/ranking_speed.py', '--data=x', '--seed=3'],
    ]
    assert [command for command, _ in wrong([main, *bad])] == bad


def launched():
    return [command for command in ALL if command[0].startswith('launch/')]


@pytest.mark.parametrize('command', launched(), ids=' '.join)
def test_launch_scripts_understand_them(command):
    at = command.index('--') if '--' in command else len(command)
    # Those that install a revision on their machines would look for it where this checkout is from.
    source = ['--repository=https://example.org/palr.git', f'--revision={"0" * 40}']
    installs = command[1:2] == ['run'] and 'slurm' not in command[0]
    words = [*command[:at], *(source if installs else []), '--dry-run', *command[at:]]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
