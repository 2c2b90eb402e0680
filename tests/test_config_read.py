"""Every field of the config is read by the program, as noted while it runs."""

import csv
import sys

import pytest
from ml_collections import ConfigDict

from palr_jax import compile_check, config, llm_input, pipeline
from palr_jax.data import tables
from palr_jax.errors import InputError
from palr_jax.project import Project
from palr_jax.stages import flatten
from palr_jax.testing import write_ml100k
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

SMALL = {
    **{'retrieval.width': 8, 'retrieval.blocks': 1, 'retrieval.epochs': 2, 'retrieval.length': 16},
    **{'retrieval.candidates': 8, 'prompts.history': 3, 'prompts.length': 500},
    **{'tasks.users': 0.5, 'tasks.candidates': 6, 'tasks.targets': 2},
    **{'finetune.steps': 1, 'finetune.batch_size': 2, 'finetune.length': 500},
    **{'finetune.held_out': 2, 'ranking.candidates': 6, 'ranking.users': 4},
    **{'ranking.max_shapes': 1, 'finetune.max_shapes': 1},
    **{'ranking.valid_users': 4, 'evaluation.resamples': 50, 'data.source': 'table'},
}
# Two runs that between them go through every part that has fields of its own.
TUNED = {
    **{'tasks.candidates_from': 'retriever', 'tasks.recommend_retrieval': 1.0},
    'finetune.pack': False,  # then max_shapes counts
}
UNTUNED = {
    'stages': ('data', 'retrieval', 'ranking'),
    'retrieval.systems': ('covisitation', 'profile'),
    **{'prompts.profile': 'llm', 'prompts.candidates': False, 'tasks.recommend_retrieval': 0.0},
    **{'ranking.mode': 'generate', 'ranking.answer_tokens': 8},
}


@pytest.fixture
def read(monkeypatch):
    """(watch, fields): what the code reads of a config after `watch(config)`.

    A read is an attribute, as in `config.finetune.steps`. What goes over all fields (the check, the
    record of a run, the identity of a checkpoint) uses `items` or subscripts, which do not count,
    but in the parser of tables, where they name the columns.
    """
    watched, fields = {}, set()  # by id, with the part itself, so that no id is used again
    attribute, subscript = ConfigDict.__getattr__, ConfigDict.__getitem__

    def note(part, name, reads):
        if id(part) in watched and reads(sys._getframe(2).f_code.co_filename):
            fields.add(watched[id(part)][1] + name)

    def of_attribute(part, name):
        note(part, name, lambda reader: reader != config.__file__)
        return attribute(part, name)

    def of_subscript(part, name):
        note(part, name, lambda reader: reader == tables.__file__)
        return subscript(part, name)

    def watch(part, prefix=''):
        watched[id(part)] = part, prefix
        for name, value in part.items():
            if isinstance(value, ConfigDict):
                watch(value, f'{prefix}{name}.')

    monkeypatch.setattr(ConfigDict, '__getattr__', of_attribute)
    monkeypatch.setattr(ConfigDict, '__getitem__', of_subscript)
    return watch, fields


@pytest.fixture
def inputs(tmp_path):
    """The fields that name a table of made-up ratings, a table of its items and a tiny model."""
    write_ml100k(tmp_path, users=24, items=40, seed=0)
    text = (tmp_path / 'u.item').read_text('latin-1')
    events = [line.split('\t') for line in (tmp_path / 'u.data').read_text().splitlines()]
    rows = {
        'events': [('user', 'item', 'time'), *((u, i, t) for u, i, _, t in events)],
        'items': [
            ('item', 'title', 'keywords'),
            *((*line.split('|')[:2], 'Drama|Comedy') for line in text.splitlines()),
        ],
    }
    for name, table in rows.items():
        with (tmp_path / f'{name}.csv').open('w', newline='') as file:
            csv.writer(file).writerows(table)
    tokenizer = tiny_tokenizer([text])
    model = tiny_config(vocab_size=tokenizer.size, max_positions=1024)
    write_hf_folder(tmp_path / 'model', model, random_params(model, 0), tokenizer)
    return {
        'data.path': str(tmp_path / 'events.csv'),
        'data.items_path': str(tmp_path / 'items.csv'),
        'model.path': str(tmp_path / 'model'),
    }


@pytest.mark.long
def test_every_field_is_read_and_one_that_nothing_reads_is_found(
    read, inputs, tmp_path, monkeypatch
):
    defaults = config.default_config

    def with_a_spare_field():
        made = defaults()
        made.finetune.spare = 1
        return made

    monkeypatch.setattr(config, 'default_config', with_a_spare_field)
    watch, fields = read
    for name, changes in (('tuned', TUNED), ('untuned', UNTUNED)):
        made = with_a_spare_field()
        made.update_from_flattened_dict(SMALL | inputs | changes)
        watch(made)
        pipeline.run(made, tmp_path / name)
    with pytest.raises(InputError, match=r"config\.mesh\.hardware is ''"):
        compile_check.check(made, '', [], 8)  # the one reader of mesh.hardware
    made.tasks.recommend_retrieval = 1.0  # of similar candidates, which neither run has
    llm_input.drawn_examples(Project(made, tmp_path / 'untuned'), [0])
    assert set(flatten(made)) - fields == {'finetune.spare'}
