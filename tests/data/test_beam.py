"""The Beam pipelines against the in-memory path, bit for bit, on made-up logs."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax.config import default_config
from palr_jax.data import load, make_split
from palr_jax.errors import InputError
from palr_jax.testing import write_amazon, write_ml1m, write_ml100k, write_recbole

pytestmark = [
    pytest.mark.slow,
    # What tensorflow-datasets says with protobuf 6, which apache-beam brings.
    pytest.mark.filterwarnings('ignore:label.. is deprecated:DeprecationWarning'),
]
pipeline_options = pytest.importorskip(
    'apache_beam.options.pipeline_options', reason='apache-beam is not installed (extra beam).'
)


def make_config(source, path, k_core):
    config = default_config().data
    config.update({'source': source, 'path': str(path), 'k_core': k_core})
    return config


def prepare(config, to):
    from palr_jax.data.beam_builder import prepare

    path = prepare(config, to, pipeline_options.PipelineOptions(['--runner=FnApiRunner']))
    loaded = config.copy_and_resolve_references()
    loaded.source, loaded.path = 'tfds', str(path)
    return loaded


def assert_same(one, other):
    assert one.catalogue == other.catalogue
    assert one.interactions.user_ids == other.interactions.user_ids
    for name in ('users', 'items', 'times'):
        np.testing.assert_array_equal(
            getattr(one.interactions, name), getattr(other.interactions, name), strict=True
        )
    ours, theirs = (make_split(source.interactions, 'leave_one_out') for source in (one, other))
    np.testing.assert_array_equal(ours.targets('test'), theirs.targets('test'))
    assert one.record == other.record


@pytest.mark.parametrize(
    ('write', 'source', 'k_core'),
    [
        (write_ml1m, 'ml1m', 9),
        (write_amazon, 'amazon', 5),
        (write_recbole, 'recbole', 0),
        (write_recbole, 'ml100k', 0),
    ],
)
def test_beam_equals_the_memory(tmp_path, write, source, k_core):
    config = make_config(source, write(tmp_path / 'raw'), k_core)
    memory = load(config)
    assert_same(load(prepare(config, tmp_path / 'to')), memory)
    if k_core == 9:
        assert len(memory.record['k_core']['rounds']) > 1


def write_table(folder):
    """A log in parts with repeated pairs, ties, fractions of seconds and much that falls."""
    rng = np.random.default_rng(0)
    for part in range(3):
        rows = []
        for _ in range(400):
            user, item = int(30 * rng.random() ** 2), int(40 * rng.random() ** 2)
            rows.append({'user': f'u{user}', 'item': item, 'time': int(rng.integers(50)) / 4})
        (folder / f'part-{part}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    titles = [{'item': n, 'title': f'Title {n}', 'keywords': 'a|b'} for n in range(0, 40, 2)]
    titles[0]['title'] = titles[-1]['title'] = 'Lost \ufffd'  # of a common and of a rare item
    items = folder.parent / 'items.jsonl'
    items.write_text('\n'.join(map(json.dumps, titles)))
    return items


def test_d08_d11_ties_repeats_and_rounds_over_several_files(tmp_path):
    (tmp_path / 'events').mkdir()
    items = write_table(tmp_path / 'events')
    config = make_config('table', tmp_path / 'events', 12)
    config.items_path = str(items)
    memory = load(config)
    assert memory.record['dropped']['repeated'] > 100
    assert len(memory.record['k_core']['rounds']) > 1
    assert memory.record['titles']['damaged'] == 1
    prepared = prepare(config, tmp_path / 'to')
    assert_same(load(prepared), memory)
    assert [path.name for path in (tmp_path / 'to').iterdir()] != []
    left = sorted(p.name for p in (tmp_path / 'to').rglob('*') if 'pipelines' in str(p))
    assert left == []
    prepared.k_core = 5
    with pytest.raises(
        InputError, match=r'k_core is 5, but .* was prepared with 12; allowed are 12'
    ):
        load(prepared)


def test_a_malformed_row_is_named(tmp_path):
    folder = write_ml1m(tmp_path / 'raw')
    with (folder / 'ratings.dat').open('a') as stream:
        stream.write('1::x::5::3\n')
    with pytest.raises(
        InputError, match=r"ratings\.dat, line \d+: item id is 'x'; allowed are whole"
    ):
        prepare(make_config('ml1m', folder, 5), tmp_path / 'to')
    assert [path for path in (tmp_path / 'to').rglob('*') if path.is_file()] == []


def test_what_cannot_be_streamed_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.data\.source is 'tfds'; allowed for a pipeline"):
        prepare(ConfigDict({'source': 'tfds', 'path': str(tmp_path), 'k_core': 5}), tmp_path)
    with pytest.raises(InputError, match=r'ratings\.dat is missing'):
        prepare(make_config('ml1m', write_ml100k(tmp_path), 5), tmp_path)
