"""Every field of the config on the command line: set, of a wrong type, misspelt; and its page."""

import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from palr_jax import cli, config_docs
from palr_jax.config import CHOICES, MEMBERS, default_config, validate
from palr_jax.errors import BAD_INPUT, InputError
from palr_jax.stages import flatten

ROOT = pathlib.Path(__file__).parent.parent
# How ml_collections reads a config file.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
DEFAULTS = flatten(default_config())
PAGE = (ROOT / 'docs' / 'config.md').read_text()


@pytest.fixture
def parse(tmp_path, monkeypatch, capsys):
    """Parses a command line as the programs do; (config, '') or (None, the error's sentence)."""
    file = tmp_path / 'defaults.py'
    file.write_text('from palr_jax.config import default_config as get_config\n')

    def run(*arguments, file=file):
        argv = ['main', f'--config={file}', *arguments]
        holder = flags.FlagValues()
        monkeypatch.setattr(flags, 'FLAGS', holder)  # what cli fills; each call is a new program
        monkeypatch.setattr(sys, 'argv', argv)  # the fields' flags are made from it
        config_flags.DEFINE_config_file('config', None, 'The config.', flag_values=holder)
        try:
            cli._guarded(lambda _: validate(holder['config'].value), cli._parse_flags(argv))
        except SystemExit as ended:
            status = ended.code
        else:
            return holder['config'].value, ''
        (line,) = capsys.readouterr().err.splitlines()
        assert status == BAD_INPUT
        assert line.startswith('error: ')
        return None, line.removeprefix('error: ')

    return run


def another(field, default):
    """(what to write on the command line, the value that must arrive), not the default."""
    if field in MEMBERS:
        return f"('{MEMBERS[field][-1]}',)", [MEMBERS[field][-1]]
    if isinstance(default, list):
        return '(0, 3, 7)' if 0 in default else '(3, 7)', [0, 3, 7] if 0 in default else [3, 7]
    if field in CHOICES:
        value = next(choice for choice in CHOICES[field] if choice != default)
        return value, value
    if isinstance(default, bool):
        return str(not default), not default
    if isinstance(default, str):
        return 'a text, with (5', 'a text, with (5'
    if isinstance(default, int):
        return str(default + 1), default + 1
    return '3e-1', 0.3


@pytest.mark.parametrize('field', DEFAULTS)
def test_every_field_is_set_on_the_command_line(field, parse):
    """The value arrives with its type, and nothing else changes (`G04`, `G05`)."""
    text, value = another(field, DEFAULTS[field])
    config, error = parse(f'--config.{field}={text}')
    if config is None:  # allowed by itself; the sentence comes from the rules between fields
        assert field in {name for fields, _, _ in config_docs.rules() for name in fields}
        assert f'config.{field} is {value!r}' in error
        return
    found = flatten(config)
    assert found == DEFAULTS | {field: value}
    assert type(found[field]) is type(DEFAULTS[field])


@pytest.mark.parametrize('field', DEFAULTS)
def test_every_field_refuses_a_wrong_type_in_one_sentence(field, parse):
    """Any text is a text, so of those only the choices can be wrong (`G01`)."""
    default = DEFAULTS[field]
    if isinstance(default, str) and field not in CHOICES:
        config, _ = parse(f'--config.{field}=1e-5')
        assert flatten(config)[field] == '1e-5'
        return
    _, error = parse(f'--config.{field}=nonsense')
    assert error.startswith((f'config.{field}=nonsense; ', f'config.{field} is '))
    assert 'nonsense' in error
    assert '; allowed: ' in error
    if isinstance(default, bool | int | float):
        assert error.endswith(f'a value of type {type(default).__name__}.')
    if isinstance(default, list) and field not in MEMBERS:
        _, error = parse(f'--config.{field}=(0.0,')
        assert error == f'config.{field}=(0.0,; allowed: a value of type tuple.'
    if type(default) is int:
        _, error = parse(f'--config.{field}=1.5')
        assert error == f'config.{field}=1.5; allowed: a value of type int.'


@pytest.mark.parametrize('field', DEFAULTS)
def test_every_misspelt_field_gets_its_name(field, parse):
    misspelt = {
        'doubled': field + field[-1],
        'dropped': field[:-2] + field[-1],
        'swapped': field[:-2] + field[-1] + field[-2],
    }
    if field == 'data.columns.item':
        del misspelt['swapped']  # itme is as near to data.columns.time
    for name in set(misspelt.values()) - {field}:
        _, error = parse(f'--config.{name}=1')
        assert error == f'config.{name} is not a field; did you mean config.{field}?'


@pytest.mark.parametrize(
    ('arguments', 'field', 'value'),
    [
        (['--config.finetune.full'], 'finetune.full', True),
        (['--noconfig.tasks.enrich'], 'tasks.enrich', False),
        (['--config.seed', '7'], 'seed', 7),
        (['--config.mesh.fsdp=-1'], 'mesh.fsdp', -1),
        (['--config.data.items_path='], 'data.items_path', ''),
        (['--config.lora.targets=q'], 'lora.targets', ['q']),
        (["--config.lora.targets=['q','o']"], 'lora.targets', ['q', 'o']),
        (['--config.evaluation.ks=1,20'], 'evaluation.ks', [1, 20]),
        (['--config.ranking.fusion_weights=(0,1e-5)'], 'ranking.fusion_weights', [0, 1e-5]),
    ],
)
def test_the_documented_ways_to_write_a_value(arguments, field, value, parse):
    config, _ = parse(*arguments)
    assert flatten(config)[field] == value


@pytest.mark.parametrize(
    'argument',
    [
        *('lora.targets=5)', 'lora.targets=q,v', 'lora.targets=()', "evaluation.ks=(1,'a')"),
        *('evaluation.ks=(1', 'evaluation.ks=-1', 'tasks.swap=-0.1', 'tasks.swap=nan', 'seed=-1'),
        *('ranking.fusion_weights=("1e-5",)', 'finetune.full=maybe', 'tasks.swap='),
        *('seed=1e3', 'seed=True', 'seed=None', 'seed='),
    ],
)
def test_g05_fragments_of_tuples_and_odd_numbers_are_refused(argument, parse):
    _, error = parse(f'--config.{argument}')
    assert error.startswith(f'config.{argument.partition("=")[0]}')
    assert '; allowed: ' in error


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        ('config.finetun.steps = 3', 'AttributeError: \'finetun\' Did you mean "finetune"'),
        ('import palr_jaxx', "ModuleNotFoundError: No module named 'palr_jaxx'"),
        ('None + 1', 'TypeError: unsupported operand'),
    ],
)
def test_what_is_wrong_in_a_config_file_is_told_with_its_line(text, told, parse, tmp_path):
    file = tmp_path / 'wrong.py'
    file.write_text(
        'from palr_jax.config import default_config\ndef get_config():\n'
        f'    config = default_config()\n    {text}\n'
    )
    _, error = parse(file=file)
    assert error.startswith((f'{file}, line 4: {told}', f'flag --config={file}: '))
    assert told in error


def test_what_is_no_config_file_and_an_argument_too_many_are_told(parse, tmp_path):
    (tmp_path / 'README.md').write_text("It's a text.")
    _, error = parse(file=tmp_path / 'README.md')
    assert 'README.md, line 1' in error
    _, error = parse(file=f'{ROOT / "configs" / "demo.py"}:x')
    assert error == (
        f'flag --config={ROOT}/configs/demo.py:x: Error whilst parsing config file: '
        'TypeError: get_config() takes 0 positional arguments but 1 was given'
    )


def test_a_wrong_value_of_two_lines_is_told_in_one(parse):
    _, error = parse('--config.seed=1\n2')
    assert error == 'config.seed=1 2; allowed: a value of type int.'


@pytest.mark.slow
def test_a_real_program_with_a_config_file_says_the_same(tmp_path):
    for argument, told in (
        ('tasks.swap=much', 'config.tasks.swap=much; allowed: a value of type float.'),
        ('lora.targets=5)', "config.lora.targets is ['5)']; allowed: a tuple of one or more of q"),
        ('lora.rannk=4', 'config.lora.rannk is not a field; did you mean config.lora.rank?'),
    ):
        flags_given = (f'--workdir={tmp_path / "run"}', f'--config.{argument}')
        done = subprocess.run(
            [sys.executable, '-m', 'palr_jax.main', '--config=configs/demo.py', *flags_given],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == BAD_INPUT
        assert [line for line in done.stderr.splitlines() if told in line]
        assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'run' / 'data').exists()


def test_the_page_is_what_the_generator_prints_today():
    assert config_docs.page() == PAGE


def test_the_page_has_every_field_once_with_its_comment():
    """The rows counted and two of them written out by hand."""
    rows = [line for line in PAGE.splitlines() if line.startswith('| `') and line.count(' | ') == 4]
    assert len(rows) == len(DEFAULTS)
    assert (
        '| `heads` | int | `2` | 1 or more | attention heads |'
        in PAGE.partition('## `config.retrieval`')[2]
    )
    assert "| `dtype` | str | `'float32'` | `'float32'`, `'bfloat16'` | of the frozen base" in PAGE
    assert config_docs.field_comments()['retrieval.negatives'].startswith('of sampled_softmax')
    assert config_docs.field_comments()['retrieval.profile_decay'] == 'see `profile_share`'


NUMBERS = [f for f, value in DEFAULTS.items() if type(value) in (int, float)]


@pytest.mark.parametrize('field', NUMBERS)
def test_the_limits_on_the_page_are_those_of_validate(field):
    """The least and the largest are allowed, if by themselves, and one beyond is not."""
    least, largest = config_docs.limits(field)
    for value, allowed in (
        (least - 1, False),
        (least, True),
        (largest, True),
        (largest + 1, False),
    ):
        if value == float('inf'):
            continue
        config, error = default_config(), ''
        config.update_from_flattened_dict({field: type(DEFAULTS[field])(value)})
        try:
            validate(config)
        except InputError as refused:
            error = str(refused)
        beyond = error.endswith(f'; allowed: {config_docs.allowed(field)}.')
        assert beyond != allowed
