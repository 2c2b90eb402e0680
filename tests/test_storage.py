"""Files are whole or absent, and foreign data is never unpickled."""

import errno
import fcntl
import json
import os

import numpy as np
import pytest
from absl import logging

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


@pytest.mark.parametrize('error', ['ENOLCK', 'ENOSYS', 'ENOTSUP', 'EOPNOTSUPP'])
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, error):
    def flock(*args):
        raise OSError(getattr(errno, error), 'No locks available')

    warnings = []
    monkeypatch.setattr(logging, 'warning', lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(storage.fcntl, 'flock', flock)
    with storage.locked(tmp_path), storage.locked(tmp_path):
        assert len(warnings) == 2
    assert f'{tmp_path}: its file system has no locks (No locks available)' in warnings[0]


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(storage.fcntl, 'flock', flock)
    with (
        pytest.raises(InputError, match=r'cannot be locked \(Input/output error\)'),
        storage.locked(tmp_path),
    ):
        raise AssertionError


def test_a_run_may_wait_for_another(tmp_path, monkeypatch):
    """The first try finds the folder taken, the second waits until it is free."""
    tries, said = [], []

    def flock(file, how):
        tries.append(how)
        if how & fcntl.LOCK_NB:
            raise BlockingIOError

    monkeypatch.setattr(logging, 'info', lambda text, *args: said.append(text % args))
    monkeypatch.setattr(storage.fcntl, 'flock', flock)
    (tmp_path / storage.LOCK).write_text('process 7 on host')
    with storage.locked(tmp_path, wait=True):
        assert tries == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX]
    assert said == [f'{tmp_path}: waiting for another run (process 7 on host)']


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


@pytest.mark.parametrize(
    ('at', 'bits'),
    [(8, 1), (10, 99)],
    ids=['a password', 'a packing that zipfile lacks'],
)
def test_damage_that_reads_as_something_else(tmp_path, at, bits):
    path = tmp_path / 'x.npz'
    storage.write_arrays(path, a=np.arange(100))
    content = bytearray(path.read_bytes())
    content[content.index(b'PK\x01\x02') + at] ^= bits  # of the central directory
    path.write_bytes(content)
    with pytest.raises(InputError, match=r'x\.npz: this file is damaged'):
        storage.read_arrays(path)


def test_one_array_without_a_name_is_no_archive(tmp_path):
    with (tmp_path / 'x.npz').open('wb') as stream:
        np.save(stream, np.arange(3))
    with pytest.raises(InputError, match=r'x\.npz: this file is damaged'):
        storage.read_arrays(tmp_path / 'x.npz')


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / 'x.npz', a=np.array([{'b': 1}], dtype=object))
    with pytest.raises(InputError, match='damaged'):
        storage.read_arrays(tmp_path / 'x.npz')
