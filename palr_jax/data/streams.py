"""Logs read event by event, for pipelines that never hold one whole; the parsers are the same."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from palr_jax.data import amazon, fetch, movielens, recbole, tables
from palr_jax.data.files import RawFiles, open_files
from palr_jax.data.interactions import Item
from palr_jax.errors import InputError

SOURCES = ('ml100k', 'ml1m', 'recbole', 'amazon', 'table')


class Stream(NamedTuple):
    """A log in one or more files, which follow each other."""

    name: str  # of the data set
    form: str  # the source whose parser reads the files
    raw: RawFiles
    members: tuple[str, ...]  # files of events
    described: tuple[str, ...]  # files about the items, among those of `raw`


class Described(NamedTuple):
    """What is known of some items."""

    metadata: dict[str, Item]
    placeholders: dict[str, str]
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
        return Stream(path.name.split('.')[0], 'table', raw, tuple(members), ())
    if config.source == 'amazon':
        raw = amazon.open_category(path)
        category, reviews, meta = amazon.find(raw)
        return Stream(category.lower(), 'amazon', raw, (reviews,), (meta,))
    raw, official = open_files(path), movielens.FILES.get(config.source)
    if official and not recbole.stands_for(raw, official[0]):
        data, *others = raw.need(official)
        return Stream(config.source, config.source, raw, (data,), tuple(others))
    inter, item = recbole.need(raw)
    name = config.source if official else inter.rsplit('/', 1)[-1].removesuffix('.inter')
    return Stream(name, 'recbole', raw, (inter,), (item,))


def events(config: ConfigDict, member: str) -> Iterator[tuple[str, str, float]]:
    """Yields (user, item, time) of one of the files of the stream, in file order.

    Raises:
      InputError: the file cannot be read, or a row is malformed.
    """
    stream = open_stream(config)
    raw = stream.raw
    if stream.form == 'table':
        yield from tables.events(raw, member, config)
    elif stream.form == 'amazon':
        yield from amazon.events(raw, member)
    elif stream.form == 'recbole':
        for users, items, times in recbole.columns(raw, member):
            yield from zip(users, items, times.tolist())
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
    if stream.form == 'table':
        metadata, more = tables.describe(config, stream.members, item_ids)
        return Described(metadata, {}, hashes | more)
    if stream.form == 'amazon':
        return Described(*amazon.describe(raw, stream.described[0], item_ids), hashes)
    read_items = {
        'ml100k': movielens.ml100k_items,
        'ml1m': movielens.ml1m_items,
        'recbole': recbole.read_items,
    }[stream.form]
    return Described(read_items(raw, *stream.described), {}, hashes)
