"""The parsers by the name of the source: each gives the raw log, and where it comes from."""

from collections.abc import Callable
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from palr_jax.data import amazon, fetch, movielens, recbole, tables
from palr_jax.data.files import RawFiles, open_files
from palr_jax.data.interactions import RawLog
from palr_jax.errors import InputError


class Prepared(NamedTuple):
    """What was dropped before the log came here, by a builder or a pipeline."""

    rows: int = 0  # read from the raw files; 0 = all are in the log
    repeated: int = 0  # pairs dropped
    k_core: int = 0  # the k of a k-core done before; 0 = none
    before_k_core: dict[str, int] | None = None  # counts
    rounds: tuple[dict[str, int], ...] = ()  # counts after each round


class Parsed(NamedTuple):
    """What a parser gives."""

    path: epath.Path  # of the files, for messages
    name: str  # of the data set
    log: RawLog
    sha256: dict[str, str]  # of the raw files by name
    prepared: Prepared = Prepared()


def parse(config: ConfigDict) -> Parsed:
    """Reads the raw files that `config.data` names.

    Raises:
      InputError: a field or a file is wrong.
    """
    if config.source not in _PARSERS:
        raise InputError(
            f'config.data.source is {config.source!r}; allowed are {", ".join(_PARSERS)}.'
        )
    return _PARSERS[config.source](config)


def _movielens(name: str, parse: Callable[[RawFiles], RawLog]) -> Callable[..., Parsed]:
    """A parser of the official layout that takes RecBole's form of the same data as well."""

    def parser(config: ConfigDict) -> Parsed:
        raw = open_files(fetch.resolve(config.path))
        recboles = recbole.stands_for(raw, movielens.FILES[name][0])
        return _parsed(raw, name, recbole.read(raw) if recboles else parse(raw))

    return parser


def _recbole(config: ConfigDict) -> Parsed:
    raw = open_files(fetch.resolve(config.path))
    log = recbole.read(raw)
    return _parsed(raw, log.files[0].rsplit('/', 1)[-1].removesuffix('.inter'), log)


def _amazon(config: ConfigDict) -> Parsed:
    raw = amazon.open_category(fetch.resolve(config.path))
    return _parsed(raw, *amazon.read(raw))


def _parsed(raw: RawFiles, name: str, log: RawLog) -> Parsed:
    return Parsed(raw.path, name, log, raw.sha256(log.files))


def _table(config: ConfigDict) -> Parsed:
    path = fetch.resolve(config.path)
    hashes, log = tables.read(config, path)
    return Parsed(path, path.name.split('.')[0], log, hashes)


def _tfds(config: ConfigDict) -> Parsed:
    try:
        from palr_jax.data import tfds_builders
    except ImportError as error:
        raise InputError(
            f"config.data.source='tfds' needs tensorflow-datasets ({error}); install it with "
            'pip install tensorflow-datasets importlib_resources.'
        ) from error
    return tfds_builders.read(config.path)


_PARSERS: dict[str, Callable[[ConfigDict], Parsed]] = {
    'ml100k': _movielens('ml100k', movielens.read_ml100k),
    'ml1m': _movielens('ml1m', movielens.read_ml1m),
    'recbole': _recbole,
    'amazon': _amazon,
    'table': _table,
    'tfds': _tfds,
}
