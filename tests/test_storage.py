"""Files are whole or absent, and foreign data is never unpickled."""

import json
import os

import numpy as np
import pytest

from palr_jax import storage
from palr_jax.errors import InputError


def test_json_and_arrays_come_back(tmp_path):
    storage.write_json(tmp_path / 'a' / 'x.json', {'b': [1, None, 'é']})
    assert storage.read_json(tmp_path / 'a' / 'x.json') == {'b': [1, None, 'é']}
    storage.write_arrays(tmp_path / 'x.npz', ids=np.arange(3), name=np.array('text'))
    read = storage.read_arrays(tmp_path / 'x.npz')
    np.testing.assert_array_equal(read['ids'], [0, 1, 2])
    assert str(read['name']) == 'text'


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'x.json'
    storage.write_json(path, {'old': 1})
    with pytest.raises(ValueError, match='not JSON compliant'):
        storage.write_json(path, {'new': float('nan')})
    with pytest.raises(ValueError, match='allow_pickle'):
        storage.write_arrays(path, objects=np.array([object()]))
    assert json.loads(path.read_text()) == {'old': 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / 'x.json'
    storage.write_json(path, {'old': 1})

    def full(self, data):
        with open(self, 'wb') as file:
            file.write(data[:3])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(type(storage.epath.Path(path)), 'write_bytes', full)
    with pytest.raises(InputError, match=r'x\.json: cannot be written \(No space left'):
        storage.write_json(path, {'new': 1})
    assert json.loads(path.read_text()) == {'old': 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    folder = tmp_path / 'run'
    for _ in range(2):  # it is free again afterwards
        with storage.locked(folder):
            with (
                pytest.raises(
                    InputError, match=rf'run is in use by another run \(process {os.getpid()} on'
                ),
                storage.locked(folder),
            ):
                raise AssertionError
            with storage.locked(tmp_path / 'other'):
                pass


def test_missing_and_damaged_files_are_named(tmp_path):
    for read, name in ((storage.read_json, 'x.json'), (storage.read_arrays, 'x.npz')):
        with pytest.raises(InputError, match=f'{name}: this file does not exist'):
            read(tmp_path / name)
    (tmp_path / 'x.json').write_text('{')
    with pytest.raises(InputError, match=r'x\.json: this file is not valid JSON'):
        storage.read_json(tmp_path / 'x.json')
    storage.write_arrays(tmp_path / 'x.npz', a=np.arange(100))
    whole = (tmp_path / 'x.npz').read_bytes()
    (tmp_path / 'x.npz').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r'x\.npz: this file is damaged'):
        storage.read_arrays(tmp_path / 'x.npz')


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / 'x.npz', a=np.array([{'b': 1}], dtype=object))
    with pytest.raises(InputError, match='damaged'):
        storage.read_arrays(tmp_path / 'x.npz')
