"""The config: every field is checked, every default is allowed, every field is read."""

import json
import pathlib
import re
import runpy
import sys

import pytest
from absl import flags
from ml_collections import FrozenConfigDict, config_flags

from palr_jax.config import CHOICES, RANGES, default_config, restore, validate
from palr_jax.errors import InputError
from palr_jax.stages import flatten

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(  # those of studies are read by test_ablate.py
    p
    for p in (ROOT / 'configs').rglob('*.py')
    if p.name != '__init__.py' and (p.parent.name != 'ablations' or p.stem == 'base')
)
FIELDS = sorted(flatten(default_config()))


def changed(field, value):
    """The defaults with one field replaced, whatever its type."""
    config = default_config()
    config.unlock()
    *groups, name = field.split('.')
    at = config
    for group in groups:
        at = at[group]
    with at.ignore_type():
        at[name] = value
    return config


def test_the_defaults_are_allowed():
    assert validate(default_config()) is None


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_allowed_and_says_how_to_run_it(path):
    name = path.relative_to(ROOT).as_posix()
    module = runpy.run_path(str(path))
    validate(module['get_config']())
    assert re.search(
        rf'^Command: python -m palr_jax\.main --config={re.escape(name)}.* --workdir=runs/\w+',
        module['__doc__'],
        re.MULTILINE,
    )


@pytest.mark.parametrize('field', FIELDS)
def test_g01_none_and_a_wrong_type_name_the_field(field):
    """A field set to None does not lose its type: nothing else passes after it."""
    for value in (None, 1j, ()):
        with pytest.raises(InputError, match=re.escape(f'config.{field} is ')):
            validate(changed(field, value))


@pytest.mark.parametrize('field', sorted(CHOICES))
def test_an_unknown_choice_names_the_field_and_what_is_allowed(field):
    with pytest.raises(InputError) as error:
        validate(changed(field, 'nonsense'))
    assert str(error.value).startswith(f"config.{field} is 'nonsense'; allowed: '")
    assert all(repr(choice) in str(error.value) for choice in CHOICES[field])


@pytest.mark.parametrize('field', sorted(RANGES))
def test_a_number_out_of_range_names_the_field(field):
    kind = type(flatten(default_config())[field])
    below = kind(min(-1, RANGES[field][0] - 1))
    with pytest.raises(InputError, match=re.escape(f'config.{field} is {below}')):
        validate(changed(field, below))


def test_not_a_number_is_refused():
    with pytest.raises(InputError, match=r'config\.finetune\.learning_rate is nan'):
        validate(changed('finetune.learning_rate', float('nan')))


@pytest.mark.parametrize(
    ('field', 'value', 'allowed'),
    [
        ('evaluation.ks', (0, 5), 'int, 1 or larger'),
        ('ranking.fusion_weights', (0.0, float('inf')), 'float, 0 or larger'),
        ('ranking.fusion_weights', (0.0, float('nan')), 'float, 0 or larger'),
        ('ranking.fusion_weights', (0.5, 1.0), 'a weight of 0 among them'),
    ],
)
def test_every_entry_of_a_tuple_is_checked(field, value, allowed):
    """Before the stage that reads it, the last ones of a run."""
    with pytest.raises(InputError, match=rf'config\.{re.escape(field)} is .*{allowed}'):
        validate(changed(field, value))


def test_a_misspelt_field_gets_the_nearest_name():
    config = default_config()
    config.finetune.stepz = 3
    with pytest.raises(InputError) as error:
        validate(config)
    assert str(error.value) == (
        'config.finetune.stepz is not a field; did you mean config.finetune.steps?'
    )


def test_more_candidates_than_are_retrieved_are_refused():
    with pytest.raises(InputError, match='more cannot be ranked than are retrieved'):
        validate(changed('ranking.candidates', 51))


def test_candidates_must_leave_room_for_negatives():
    with pytest.raises(
        InputError, match=r'tasks\.candidates is 10 .*: a list of targets alone teaches'
    ):
        validate(changed('tasks.candidates', 10))


def test_a_prompt_without_the_user_is_refused():
    config = default_config()
    config.prompts.history = 0
    config.prompts.profile = 'none'
    with pytest.raises(InputError, match='nothing of the user'):
        validate(config)


def test_candidates_in_training_alone_are_refused():
    config = default_config()
    config.prompts.candidates = False
    with pytest.raises(InputError, match='would list candidates and the ranking would not'):
        validate(config)
    config.tasks.recommend_retrieval = 0.0
    validate(config)


@pytest.mark.parametrize(
    ('fields', 'named'),
    [
        ({'prompts.answer': 'index'}, "'index' for both or for none"),
        ({'ranking.mode': 'index'}, "'index' for both or for none"),
        (
            {'prompts.answer': 'index', 'ranking.mode': 'index'},
            "config.ranking.normalize='sum', 'prior' or 'untuned'",
        ),
        (
            {'prompts.answer': 'index', 'ranking.mode': 'index', 'ranking.normalize': 'sum'},
            'config.tasks.recommend_retrieval=1',
        ),
        ({'finetune.objective': 'listwise'}, 'config.tasks.recommend_retrieval=1'),
        ({'finetune.retriever_weight': 1.0}, 'a weight of 0, or lists of a retriever'),
        ({'finetune.less_untuned': True}, "config.finetune.objective='listwise' or 'both'"),
        ({'ranking.normalize': 'untuned', 'ranking.mode': 'generate'}, "with 'generate'"),
        (
            {
                'ranking.skip_misses': True,
                'ranking.mode': 'generate',
                'prompts.candidates': False,
                'tasks.recommend_retrieval': 0.0,
            },
            'where the model writes without a list',
        ),
        ({'ranking.orders': 2, 'ranking.mode': 'generate'}, 'listed, shuffled and scored'),
        *(
            (
                {'ranking.orders': 2, 'tasks.recommend_retrieval': 0.0} | unlisted,
                'listed, shuffled and scored',
            )
            for unlisted in (
                {'prompts.candidates': False},
                {'prompts.candidate_order': 'retriever'},
            )
        ),
        (
            {
                'finetune.objective': 'listwise',
                'finetune.less_untuned': True,
                'tasks.recommend_retrieval': 1.0,
            },
            "config.ranking.normalize='untuned'",
        ),
        ({'tasks.candidates_from': 'retriever'}, 'config.tasks.recommend_retrieval=1'),
        ({'tasks.candidates_from': 'covisitation'}, 'config.tasks.recommend_retrieval=1'),
        ({'prompts.candidate_order': 'retriever'}, "config.tasks.candidates_from='retriever'"),
        (
            {
                'tasks.candidates_from': 'retriever',
                'tasks.recommend_retrieval': 1.0,
                'tasks.targets_at': 'last',
            },
            "config.tasks.targets_at='shuffled'",
        ),
        (
            {
                'tasks.candidates_from': 'retriever',
                'tasks.recommend_retrieval': 1.0,
                'tasks.candidates': 51,
            },
            'more cannot be listed than are retrieved',
        ),
    ],
)
def test_values_that_make_no_sense_together_are_refused(fields, named):
    config = default_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=re.escape(named)):
        validate(config)


@pytest.mark.parametrize(
    'fields',
    [
        {'prompts.candidate_order': 'retriever'},
        {'prompts.answer': 'index', 'ranking.mode': 'index', 'ranking.normalize': 'prior'},
    ],
)
def test_without_fine_tuning_its_fields_do_not_matter(fields):
    config = default_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=r'config\.tasks\.'):
        validate(config)
    config.stages = ('data', 'retrieval', 'ranking', 'report')
    assert validate(config) is None


def test_the_open_choices_of_the_paper_have_the_documented_defaults():
    """What the paper leaves open, as docs/prompts.md lists it."""
    tasks = default_config().tasks
    assert (tasks.users, tasks.recommend_retrieval, tasks.swap) == (0.2, 0.5, 0.1)
    assert (tasks.candidates, tasks.targets, tasks.min_history) == (20, 10, 3)
    assert (tasks.negatives_by_genre, tasks.enrich, tasks.enrich_min_users) == (0.5, True, 3)
    assert (tasks.targets_at, tasks.profile) == ('shuffled', True)
    prompts = default_config().prompts
    assert (prompts.history, prompts.item, prompts.answer) == (20, 'title', 'title')


@pytest.mark.parametrize(
    ('text', 'value'), [('1e-5', 1e-5), ('1.0e-5', 1e-5), ('3', 3.0), ('1E-5', 1e-5)]
)
def test_g04_a_number_with_an_exponent_is_a_number(text, value, monkeypatch):
    """The form that sweep tools write, and that YAML 1.1 takes for text."""
    arguments = ['main', f'--config.finetune.learning_rate={text}']
    monkeypatch.setattr(sys, 'argv', arguments)  # the fields' flags are made from it
    holder = flags.FlagValues()
    config_flags.DEFINE_config_dict('config', default_config(), flag_values=holder)
    holder(arguments)
    found = holder.config.finetune.learning_rate
    assert isinstance(found, float)
    assert found == value
    validate(holder.config)


def test_g02_a_config_survives_json_with_its_tuples():
    config = default_config()
    FrozenConfigDict(config)  # tuples of any length can be frozen
    config.evaluation.ks = (1, 20)
    again = restore(json.loads(json.dumps(flatten(config))))
    assert again == config
    assert again.evaluation.ks == (1, 20)
    assert isinstance(again.lora.targets, tuple)


@pytest.mark.parametrize('field', FIELDS)
def test_every_field_is_read_somewhere(field):
    code = ''.join(
        path.read_text()
        for path in (ROOT / 'palr_jax').rglob('*.py')
        if path.name != 'config.py' or path.parent.name == 'llama'
    )
    assert re.search(rf'\.{field.split(".")[-1]}\b', code), f'nothing reads config.{field}'
