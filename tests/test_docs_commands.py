"""Every command of README and docs is one that its program understands.

Fields, flags, config files and their arguments are checked by the programs themselves; launch
scripts print what they would do. What the commands then do is tested beside each program.
"""

import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import config_flags

from palr_jax.parallel.devices import HARDWARE
from palr_jax.parallel.mesh import AXES, axis_sizes, check_rows

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


def devices(command):
    """How many devices the machines have that a command asks for."""
    words = ' '.join(command)
    if found := re.search(r'--topology=v5e:(\d+)x(\d+)', words):
        return int(found[1]) * int(found[2])
    slice_type = r'--type=(\S+)|--accelerators=tpu-(\S+)|compile_check.* --config=\S+:(\S+)'
    if found := re.search(slice_type, words):
        return HARDWARE[next(filter(None, found.groups())).replace('v5litepod', 'v5e')].chips
    counts = re.findall(r'--(?:nodes|gpus|processes)=(\d+)|--accelerators=\w+:(\d+)', words)
    return math.prod(int(one or other) for one, other in counts)


def shared_out(monkeypatch):
    """[command, its config, its devices] of those that say what runs on which machines."""
    for command in ALL:
        if command[1:2] != ['palr_jax.compile_check'] and '--' not in command:
            continue
        values = flags.FlagValues()
        argv = ['main', *(word for word in command if word.startswith('--config'))]
        monkeypatch.setattr(sys, 'argv', argv)  # ml_collections makes the fields' flags from it
        config_flags.DEFINE_config_file('config', flag_values=values)
        values(argv)
        yield command, values.config.get('base', values.config), devices(command)  # of a study


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # ml_collections'
def test_the_devices_that_are_asked_for_can_share_the_work(monkeypatch):
    checked = 0
    for command, config, count in shared_out(monkeypatch):
        sizes = axis_sizes(config.mesh, count)
        assert math.prod(sizes) == count, command
        mesh = AbstractMesh(sizes, AXES)
        tuning = config.finetune
        check_rows('finetune.batch_size', tuning.batch_size, mesh, tuning.accumulate)
        check_rows('ranking.batch_size', config.ranking.batch_size, mesh)
        checked += 1
    assert checked > 8


def test_what_the_faq_quotes_is_said():
    sources = [path.read_text() for path in (ROOT / 'palr_jax').rglob('*.py')]
    said = ' '.join(re.sub(r"'\s+f?'", '', source) for source in sources)
    table = (ROOT / 'docs' / 'faq.md').read_text().partition('| --- | --- |')[2]
    quoted = [row.split('`')[1] for row in table.splitlines() if row.startswith('| `')]
    assert len(quoted) > 6
    for quote in quoted:
        pieces = (piece.strip(' ,.') for piece in re.split(r"…|'2024-01-01'", quote))
        assert all(piece in said for piece in pieces if piece), quote
