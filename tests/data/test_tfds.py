"""The TFDS builders, on made-up files: the same bits as from the files, without TensorFlow."""

import builtins
import dataclasses
import hashlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from palr_jax.data import fetch, load, make_split
from palr_jax.data.tfds_builders import PalrAmazon, PalrMovielens
from palr_jax.errors import InputError
from palr_jax.testing import write_amazon, write_ml1m, write_ml100k

# What tensorflow-datasets says with protobuf 6, which apache-beam brings.
pytestmark = pytest.mark.filterwarnings('ignore:label.. is deprecated:DeprecationWarning')


def make_config(source, path, k_core=5):
    return ConfigDict({'source': source, 'path': str(path), 'k_core': k_core})


def assert_same(one, other):
    assert one.catalogue == other.catalogue
    assert one.interactions.user_ids == other.interactions.user_ids
    for name in ('users', 'items', 'times'):
        np.testing.assert_array_equal(
            getattr(one.interactions, name), getattr(other.interactions, name), strict=True
        )
    for kind in ('leave_one_out', 'temporal'):
        ours, theirs = (make_split(source.interactions, kind, 0.3, 0.3) for source in (one, other))
        for field in dataclasses.fields(ours):
            np.testing.assert_array_equal(
                getattr(ours, field.name), getattr(theirs, field.name), strict=True
            )


def prepare(folder, builder, config, **arguments):
    made = builder(config=config, data_dir=folder / 'tfds', **arguments)
    made.download_and_prepare()
    return made


@pytest.mark.parametrize(
    ('write', 'source', 'builder', 'config'),
    [
        (write_ml100k, 'ml100k', PalrMovielens, 'ml100k'),
        (write_ml1m, 'ml1m', PalrMovielens, 'ml1m'),
        (write_amazon, 'amazon', PalrAmazon, 'Beauty'),
    ],
)
def test_tfds_equals_the_files(tmp_path, write, source, builder, config):
    path = write(tmp_path / 'raw')
    made = prepare(tmp_path, builder, config, path=path)
    for k_core in (5, 0):
        files = load(make_config(source, path, k_core))
        prepared = load(make_config('tfds', made.data_path, k_core))
        assert_same(prepared, files)
        assert prepared.record == files.record


def test_repeated_pairs_and_titles_without_a_year_survive(tmp_path):
    folder = write_ml100k(tmp_path / 'raw')
    first = (folder / 'u.data').read_text().splitlines()[0].split('\t')
    with (folder / 'u.data').open('a') as stream:
        stream.write(f'{first[0]}\t{first[1]}\t3\t999999999\n{first[0]}\t999\t3\t5\n')
    made = prepare(tmp_path, PalrMovielens, 'ml100k', path=folder)
    files = load(make_config('ml100k', folder, 0))
    prepared = load(make_config('tfds', made.data_path, 0))
    assert_same(prepared, files)
    assert prepared.record == files.record
    assert prepared.record['dropped']['repeated'] == 1
    assert prepared.catalogue.titles[-1] == 'Untitled item 999'


def test_one_example_a_user(tmp_path):
    folder = write_ml1m(tmp_path / 'raw')
    made = prepare(tmp_path, PalrMovielens, 'ml1m', path=folder)
    source = load(make_config('ml1m', folder, 0))
    examples = made.as_data_source(split='users')
    assert len(examples) == len(source.interactions.user_ids)
    events = source.interactions
    of_user = events.users == 3
    example = examples[3]
    assert example['user'].decode() == events.user_ids[3]
    raw_ids = [source.catalogue.raw_ids[item] for item in events.items[of_user]]
    assert [item.decode() for item in example['items']] == raw_ids
    assert list(example['times']) == events.times[of_user].tolist()
    assert 'harper2015movielens' in made.info.citation
    assert made.info.metadata['sha256'] == source.record['sha256']
    assert (made.data_path / 'palr_movielens-users.array_record-00000-of-00001').exists()
    read_only = tfds.builder('palr_movielens/ml1m', data_dir=tmp_path / 'tfds')
    assert read_only.info.splits['users'].num_examples == len(examples)


def test_where_data_sets_are_found(tmp_path, monkeypatch):
    folder = write_ml1m(tmp_path / 'raw')
    made = prepare(tmp_path, PalrMovielens, 'ml1m', path=folder)
    expected = load(make_config('ml1m', folder))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
    for path in (made.data_path.parent, 'palr_movielens/ml1m', 'palr_movielens/ml1m/1.0.0'):
        assert_same(load(make_config('tfds', path)), expected)
    with pytest.raises(InputError, match=r'palr_movielens/ml100k exists neither as it stands nor'):
        load(make_config('tfds', 'palr_movielens/ml100k'))
    with pytest.raises(InputError, match=r'palr_movielens holds 0 versions of a prepared data set'):
        load(make_config('tfds', 'palr_movielens'))
    shutil.copytree(made.data_path, made.data_path.parent / '2.0.0')
    with pytest.raises(InputError, match=r'ml1m holds 2 versions of a prepared data set; needed'):
        load(make_config('tfds', 'palr_movielens/ml1m'))
    (made.data_path / 'metadata.json').unlink()
    with pytest.raises(InputError, match=r'1\.0\.0: format is None; this version reads 1: prepare'):
        load(make_config('tfds', made.data_path))


def test_downloads_are_checked(tmp_path, monkeypatch):
    """Where no path is given, the builder takes what `fetch` has checked against its hash."""
    archive = shutil.make_archive(tmp_path / 'ml-1m', 'zip', write_ml1m(tmp_path / 'raw'))
    data = (tmp_path / 'ml-1m.zip').read_bytes()
    monkeypatch.setenv('PALR_JAX_CACHE', str(tmp_path / 'cache'))
    known = fetch.Download((tmp_path / 'ml-1m.zip').as_uri(), hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(fetch.DOWNLOADS, 'ml-1m', known)
    made = prepare(tmp_path, PalrMovielens, 'ml1m')
    assert_same(load(make_config('tfds', made.data_path)), load(make_config('ml1m', archive)))
    monkeypatch.setitem(fetch.DOWNLOADS, 'ml-1m', dataclasses.replace(known, sha256='0' * 64))
    with pytest.raises(InputError, match=r'ml-1m\.zip is not the expected file: its SHA-256 is'):
        prepare(tmp_path / 'other', PalrMovielens, 'ml1m')


def test_d13_a_missing_install_names_the_packages(monkeypatch):
    real = builtins.__import__

    def without_tfds(name, *arguments, **more):
        if name.startswith('tensorflow_datasets'):
            raise ModuleNotFoundError("No module named 'tensorflow_datasets'")
        return real(name, *arguments, **more)

    monkeypatch.delitem(sys.modules, 'palr_jax.data.tfds_builders')
    monkeypatch.setattr(sys.modules['palr_jax.data'], 'tfds_builders', None, raising=False)
    monkeypatch.delattr(sys.modules['palr_jax.data'], 'tfds_builders')
    monkeypatch.setattr(builtins, '__import__', without_tfds)
    with pytest.raises(
        InputError, match=r'needs tensorflow-datasets .*pip install tensorflow-datasets'
    ):
        load(make_config('tfds', 'x'))


def run(*arguments):
    command = [sys.executable, '-m', 'palr_jax.data.tfds_builders', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_d13_the_command_prepares_without_tensorflow(tmp_path):
    folder = write_amazon(tmp_path / 'raw')
    done = run('--dataset=palr_amazon/Beauty', f'--path={folder}', f'--to={tmp_path}')
    assert done.returncode == 0, done.stderr
    path = tmp_path / 'palr_amazon' / 'Beauty' / '1.0.0'
    assert done.stdout.splitlines()[-1] == str(path)
    code = (
        'import sys; from ml_collections import ConfigDict; from palr_jax.data import load; '
        f'load(ConfigDict({{"source": "tfds", "path": {str(path)!r}, "k_core": 5}})); '
        'print("tensorflow" in sys.modules)'
    )
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith('False')
    done = run('--dataset=movielens', f'--to={tmp_path}')
    assert done.returncode == 2
    assert "--dataset is 'movielens'; allowed are palr_movielens/ml100k" in done.stderr
