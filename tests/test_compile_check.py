"""The check that a config fits a TPU, told without one."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palr_jax import compile_check
from palr_jax.compile_check import architecture, describe, find_hardware
from palr_jax.config import default_config
from palr_jax.errors import InputError
from palr_jax.parallel.devices import GIB, HARDWARE
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

ROOT = Path(__file__).parent.parent


def test_hardware_by_name_and_by_topology():
    assert find_hardware('v5e-16', '--topology') == HARDWARE['v5e-16']
    other = find_hardware('v4:2x2x2', '--topology')
    assert (other.topology, other.memory, other.megacore) == ('v4:2x2x2', 32 * GIB, True)


@pytest.mark.parametrize('name', ['v9-8', 'v9:2x2', 'v5e', '', 'gpu-80gb'])
def test_what_is_no_tpu_that_is_known_is_refused(name):
    message = rf"--topology is '{name}'; allowed, .*: v5e-8, .*-256, or .* of v4, v5e, v5p\.$"
    with pytest.raises(InputError, match=message):
        find_hardware(name, '--topology')


def test_the_field_that_is_at_fault_is_named():
    config = default_config()
    for hardware, topology, field in (
        ('gpu-80gb', '', 'config.mesh.hardware'),
        ('gpu-80gb', 'v9-8', '--topology'),
        ('', '', 'config.mesh.hardware'),
    ):
        config.mesh.hardware = hardware
        with pytest.raises(InputError) as caught:
            compile_check.check(config, topology, ['train'], 24)
        assert str(caught.value).startswith(f'{field} is {topology or hardware!r}; allowed')


def test_the_architecture_needs_no_weights():
    """6,738,415,616 weights, by hand."""
    model = architecture('hf:huggyllama/llama-7b')
    shapes = compile_check.leaf_shapes(model).values()
    assert sum(math.prod(shape) for shape in shapes) == 6_738_415_616


def result(**program):
    return {
        'model': 'm',
        'hardware': 'v5e-8',
        'topology': 'v5e:2x4',
        'chips': 8,
        'mesh': {'data': 1, 'fsdp': 8, 'tensor': 1},
        'versions': {'libtpu': '1'},
        'programs': {'train': {'shape': {'rows': 8}, 'hbm_gib': 16.0} | program},
    }


def test_what_does_not_fit_says_what_to_change():
    text = describe(
        result(fits=False, needed_gib=20.46, advice=compile_check.ADVICE['train'])
    ).splitlines()
    assert text[-1].startswith(
        '  does not fit: 20.46 of 16.00 GiB a chip; raise config.finetune.acc'
    )


def run(*flags):
    """(exit status, standard output, standard error) of the command."""
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip('libtpu is not installed (pip install libtpu)')
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, (str(ROOT), *sys.path)))
    done = subprocess.run(
        [sys.executable, '-m', 'palr_jax.compile_check', *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    tokenizer = tiny_tokenizer(['Heat (1995)'])
    config = tiny_config(
        vocab_size=512, width=256, layers=4, heads=8, kv_heads=2, head_dim=32, hidden=512
    )
    write_hf_folder(folder, config, random_params(config, 0), tokenizer)
    return folder


@pytest.mark.tpu_backend
@pytest.mark.slow
def test_both_programs_of_a_small_model(model, tmp_path):
    """The adapters' gradients are summed, the layers' kernels gathered, work is by arithmetic."""
    out = tmp_path / 'check.json'
    status, text, error = run(
        '--config=configs/ml1m_llama7b.py:v5e-8',
        f'--config.model.path={model}',
        '--config.finetune.length=256',
        '--config.prompts.length=256',
        f'--out={out}',
    )
    assert status == 0, error[-3000:]
    assert text.count('  fits: ') == 2
    found = json.loads(out.read_text())
    assert found['versions'].keys() == {'jax', 'libtpu'}
    train, rank = (found['programs'][name] for name in ('train', 'rank'))
    assert rank['shape'] == {
        **{'users': 8, 'prompt': 256, 'candidates': 50, 'answer_tokens': 24, 'row_tokens': 1600},
    }
    assert train['arguments_gib'] < 0.01
    assert 'all-gather' in train['collectives'] | rank['collectives']
    # Forward, once more, and backward: 4 layers, 4 of 32 rows a chip.
    kernels = 2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 512
    products = 2 * 4 * 256 * 4 * kernels
    assert 2.5 * products < train['work']['flops'] < 5 * products


@pytest.mark.tpu_backend
@pytest.mark.slow
def test_a_config_that_does_not_fit_says_so(model):
    status, text, error = run(
        '--config=configs/ml1m_llama7b.py:v5e-8',
        f'--config.model.path={model}',
        '--config.model.remat=none',
        '--config.finetune.batch_size=16384',
        '--programs=train',
    )
    assert status == 1, error[-3000:]
    assert '  does not fit: ' in text
    assert 'raise config.finetune.accumulate' in text


@pytest.mark.tpu_backend
@pytest.mark.slow
@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--config.mesh.fsdp=3',), 'config.mesh has data 1, fsdp 3, tensor 1, but there are 8'),
        (('--config.finetune.batch_size=12',), 'config.finetune.batch_size is 12, divided over 8'),
        (('--topology=v5e:3x5',), 'The topology v5e:3x5 is refused: INVALID_ARGUMENT'),
    ],
)
def test_bad_input_is_one_sentence(model, flags, message):
    status, _, error = run(
        '--config=configs/ml1m_llama7b.py:v5e-8', f'--config.model.path={model}', *flags
    )
    assert status == 2
    assert f'error: {message}' in error
    assert 'Traceback' not in error


@pytest.mark.tpu_backend
@pytest.mark.slow
def test_llama_7b_on_16_chips(tmp_path):
    """The LoRA step at 32 x 512: at most 1.6 GiB a chip, the compiler within three minutes."""
    out = tmp_path / 'check.json'
    flags = ('--config.finetune.length=512', '--programs=train', f'--out={out}')
    status, _, error = run('--config=configs/ml1m_llama7b.py:v5e-16', *flags)
    assert status == 0, error[-3000:]
    found = json.loads(out.read_text())['programs']['train']
    assert found['fits']
    assert found['arguments_gib'] + found['temporaries_gib'] <= 1.6
    # Of two cores; the seconds by the clock depend on what else runs.
    assert found['compile_cpu_seconds'] < 2 * 180
