"""Logs read event by event, for pipelines that never hold one whole; the parsers are the same."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from palr_jax.data import amazon, fetch, files, movielens, recbole, tables
from palr_jax.data.files import RawFiles, open_files
from palr_jax.data.interactions import Item
from palr_jax.errors import InputError

SOURCES = ('ml100k', 'ml1m', 'recbole', 'amazon', 'table')


class Stream(NamedTuple):
    """A log in one or more files, which follow each other."""

    name: str  # of the data set
    raw: RawFiles
    members: tuple[str, ...]  # files of events
    described: tuple[str, ...]  # files about the items, among those of `raw`


class Described(NamedTuple):
    """What is known of some items."""

    metadata: dict[str, Item]
    placeholders: dict[str, str]
    damaged_titles: int
    sha256: dict[str, str]  # of all raw files by name


def open_stream(config: ConfigDict) -> Stream:
    """Finds the files that `config.data` names; reads none of them.

    Raises:
      InputError: a field is wrong, or a file is missing.
    """
    if config.source not in SOURCES:
        raise InputError(
            f'config.data.source is {config.source!r}; allowed for a pipeline are '
            f'{", ".join(SOURCES)}.'
        )
    path = fetch.resolve(config.path)
    if config.source == 'table':
        raw, members = tables.open_log(config, path)
        return Stream(path.name.split('.')[0], raw, tuple(members), ())
    if config.source == 'amazon':
        raw = amazon.open_category(path)
        category, reviews, meta = amazon.find(raw)
        return Stream(category.lower(), raw, (reviews,), (meta,))
    raw = open_files(path)
    if config.source == 'recbole':
        inter, item = recbole.need(raw)
        name = inter.rsplit('/', 1)[-1].removesuffix('.inter')
        return Stream(name, raw, (inter,), (item,))
    names = {'ml100k': ['u.data', 'u.item', 'u.genre'], 'ml1m': ['ratings.dat', 'movies.dat']}
    data, *others = raw.need(names[config.source])
    return Stream(config.source, raw, (data,), tuple(others))


def events(config: ConfigDict, member: str) -> Iterator[tuple[str, str, float]]:
    """Yields (user, item, time) of one of the files of the stream, in file order.

    Raises:
      InputError: the file cannot be read, or a row is malformed.
    """
    raw = open_stream(config).raw
    if config.source == 'table':
        yield from tables.events(raw, member, config)
    elif config.source == 'amazon':
        yield from amazon.events(raw, member)
    elif config.source == 'recbole':
        for users, items, times in recbole.columns(raw, member):
            yield from zip(map(files.decode, users), map(files.decode, items), times.tolist())
    else:
        for users, items, times in movielens.ratings(raw, member):
            yield from zip(map(str, users.tolist()), map(str, items.tolist()), times.tolist())


def describe(config: ConfigDict, item_ids: Sequence[str]) -> Described:
    """What the source says of these items.

    Raises:
      InputError: a file cannot be read, or a row is malformed.
    """
    stream = open_stream(config)
    raw = stream.raw
    hashes = raw.sha256((*stream.members, *stream.described))
    if config.source == 'table':
        metadata, lost, more = tables.describe(config, item_ids)
        return Described(metadata, {}, lost, hashes | more)
    if config.source == 'amazon':
        return Described(*amazon.describe(raw, stream.described[0], item_ids), hashes)
    read_items = {
        'ml100k': movielens.ml100k_items,
        'ml1m': movielens.ml1m_items,
        'recbole': recbole.read_items,
    }[config.source]
    metadata, lost = read_items(raw, *stream.described)
    return Described(metadata, {}, lost, hashes)
