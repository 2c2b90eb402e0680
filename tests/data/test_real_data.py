"""The real files: published counts, the equality of the sources, and the splits by time."""

import hashlib
import zipfile

import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax.data import fetch, leave_one_out, load, make_split
from palr_jax.data.splits import describe

pytestmark = pytest.mark.real_data


def load_path(source, path):
    return load(ConfigDict({'source': source, 'path': str(path), 'k_core': 5}))


def assert_same(one, other):
    assert one.catalogue == other.catalogue
    assert one.interactions.user_ids == other.interactions.user_ids
    for name in ('users', 'items', 'times'):
        np.testing.assert_array_equal(
            getattr(one.interactions, name), getattr(other.interactions, name), strict=True
        )
    ours, theirs = leave_one_out(one.interactions), leave_one_out(other.interactions)
    for part in ('valid', 'test'):
        np.testing.assert_array_equal(ours.targets(part), theirs.targets(part))


@pytest.fixture
def ml100k(real_data):
    path = real_data / 'ml-100k.zip'
    if not path.exists():
        pytest.skip(f'{path} is absent.')
    return path


def test_ml100k_archive_and_folder(ml100k, tmp_path):
    source = load_path('ml100k', ml100k)
    assert (source.record['before_k_core']['users'], source.record['rows_read']) == (943, 100_000)
    assert source.record['before_k_core']['items'] == 1682
    with zipfile.ZipFile(ml100k) as archive:
        archive.extractall(tmp_path)
    assert_same(load_path('ml100k', tmp_path), source)


def test_d03_d05_ml100k_titles(ml100k):
    config = ConfigDict({'source': 'ml100k', 'path': str(ml100k), 'k_core': 0})
    catalogue = load(config).catalogue
    titles = dict(zip(catalogue.raw_ids, catalogue.titles))
    years = dict(zip(catalogue.raw_ids, catalogue.years))
    assert titles['246'] == titles['268'] == 'Chasing Amy (1997)'
    assert catalogue.items - len(set(catalogue.titles[1:])) == 18
    assert (titles['267'], years['267']) == ('unknown', None)
    assert titles['1412'].endswith('(1995) (V)')
    assert years['1412'] == 1995
    assert titles['1635'] == 'Two Friends (1986)'
    assert sum(year is None for year in catalogue.years[1:]) == 1


def test_ml100k_wheel(ml100k):
    known = fetch.WHEELS['ml-100k']
    path = fetch.cache_folder() / known.file
    if not path.exists():
        pytest.skip(f'{path} is absent; `wheel:ml-100k` fetches it.')
    assert hashlib.sha256(path.read_bytes()).hexdigest() == known.sha256
    official = load_path('ml100k', ml100k)
    assert_same(load_path('ml100k', path), official)
    assert_same(load_path('recbole', path), official)


def test_ml1m_counts_of_the_paper(real_data):
    """Section 3 of the paper: 6,040 users, 3,416 items, 999,611 interactions after the 5-core."""
    path = real_data / 'ml-1m.zip'
    if not path.exists():
        pytest.skip(f'{path} is absent.')
    source = load_path('ml1m', path)
    record = source.record
    assert record['rows_read'] == 1_000_209
    assert record['before_k_core']['items'] == 3706
    assert (record['users'], record['items'], record['interactions']) == (6040, 3416, 999_611)
    assert all(source.catalogue.years[1:])
    assert all(source.catalogue.keywords[1:])
    by_id = dict(zip(source.catalogue.raw_ids, source.catalogue.titles))
    assert by_id['73'] == 'Misérables, Les (1995)'


def test_beauty_counts_of_the_paper(real_data):
    """Section 3 of the paper: 22,363 users, 12,101 items, 198,502 interactions."""
    path = real_data / 'amazon-beauty'
    if not path.exists():
        pytest.skip(f'{path} is absent.')
    source = load_path('amazon', path)
    record = source.record
    assert (record['users'], record['items'], record['interactions']) == (22_363, 12_101, 198_502)
    assert record['rows_read'] == 198_502
    assert record['dropped'] == {'repeated': 0, 'k_core': 0}
    assert record['titles']['placeholder'] == 7
    titles = dict(zip(source.catalogue.raw_ids, source.catalogue.titles))
    assert titles['B001DJ2USM'] == 'Hair Sprays'
    assert titles['B002WLWX82'] == "Dr. Scholl's Quick Heat Paraffin Spa Bath"
    assert all(source.catalogue.keywords[1:])


def test_temporal_splits(real_data, ml100k):
    """Few users of MovieLens, but many of Beauty, have events on both sides of a cut."""
    expected = {'ml100k': (79_430, 82, 89), 'amazon': (158_689, 5_881, 5_585)}
    for source, path in (('ml100k', ml100k), ('amazon', real_data / 'amazon-beauty')):
        if not path.exists():
            pytest.skip(f'{path} is absent.')
        events = load_path(source, path).interactions
        split = make_split(events, 'temporal')
        counts = describe(split)
        found = (counts['train_events'], counts['valid_users'], counts['test_users'])
        assert found == expected[source]
        shares = [np.mean(events.times >= cut) for cut in split.cuts]
        np.testing.assert_allclose(shares, [0.2, 0.1], atol=0.002)
        assert events.times[split.train_events()].max() < split.cuts[0]


@pytest.mark.filterwarnings('ignore:label.. is deprecated:DeprecationWarning')
def test_tfds_equals_the_file(ml100k, tmp_path):
    from palr_jax.data.tfds_builders import PalrMovielens

    made = PalrMovielens(config='ml100k', path=ml100k, data_dir=tmp_path)
    made.download_and_prepare()
    prepared, files = load_path('tfds', made.data_path), load_path('ml100k', ml100k)
    assert_same(prepared, files)
    assert prepared.record == files.record
