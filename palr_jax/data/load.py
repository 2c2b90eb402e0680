"""The data stage: from the config to a data set on disk and back."""

from dataclasses import dataclass
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from palr_jax import storage
from palr_jax.data import interactions
from palr_jax.data.interactions import TIE_RULE, Catalogue, Source
from palr_jax.data.sources import parse
from palr_jax.data.splits import Split, describe
from palr_jax.errors import InputError

_MINIMUM_USERS = 3
# U+FFFD, and what it becomes when its UTF-8 bytes are read as latin-1.
_LOST = ('\ufffd', 'ï¿½')


@dataclass(frozen=True)
class Dataset:
    """What the later stages read."""

    catalogue: Catalogue
    split: Split
    user_ids: tuple[str, ...]  # raw ids [U]
    record: dict[str, Any]


def load(config: ConfigDict) -> Source:
    """Parses, removes repeated pairs and filters the data that `config.data` names.

    Args:
      config: the part `data` of the config; reads source, path, k_core and what the parser of the
        source reads.

    Raises:
      InputError: a field or a file is wrong, or too few users are left.
    """
    if config.k_core < 0:
        raise InputError(
            f'config.data.k_core is {config.k_core}; allowed are 0 (keep all) and more.'
        )
    parsed = parse(config)
    log, prepared = parsed.log, parsed.prepared
    events, item_ids, repeated = interactions.build(log)
    before = prepared.before_k_core or interactions.counts(events)
    if config.k_core < prepared.k_core:
        raise InputError(
            f'config.data.k_core is {config.k_core}, but {parsed.path} was prepared with '
            f'{prepared.k_core}; allowed are {prepared.k_core} and more.'
        )
    kept, kept_items, rounds = interactions.k_core(events, config.k_core)
    raw_ids = [item_ids[item - 1] for item in kept_items]
    catalogue, untitled = interactions.build_catalogue(raw_ids, log.metadata, log.placeholders)
    after = interactions.counts(kept)
    if after['users'] < _MINIMUM_USERS:
        raise InputError(
            f'config.data.k_core={config.k_core} leaves {_counted(after)} of {_counted(before)}; '
            f'needed are {_MINIMUM_USERS} users: lower config.data.k_core or give a larger log.'
        )
    record = {
        'name': parsed.name,
        **after,
        'tie_rule': TIE_RULE,
        'sha256': parsed.sha256,
        'rows_read': prepared.rows or len(log.users),
        'dropped': {
            'repeated': prepared.repeated + repeated,
            'k_core': before['interactions'] - len(kept.items),
        },
        'before_k_core': before,
        'k_core': {'k': config.k_core, 'rounds': [*prepared.rounds, *rounds]},
        'titles': {
            'placeholder': untitled,
            'damaged': sum(any(mark in title for mark in _LOST) for title in catalogue.titles),
            'shared': catalogue.items - len(set(catalogue.titles[1:])),
        },
    }
    _say(parsed.path, record)
    return Source(kept, catalogue, record)


def save(source: Source, split: Split, folder: epath.PathLike) -> None:
    """Writes `dataset.npz`, `catalogue.json` and `dataset.json`, the record."""
    folder = epath.Path(folder)
    storage.write_arrays(
        folder / 'dataset.npz',
        offsets=split.offsets,
        items=split.items,
        train_end=split.train_end,
        valid_at=split.valid_at,
        test_at=split.test_at,
        cuts=split.cuts,
    )
    catalogue = source.catalogue
    storage.write_json(
        folder / 'catalogue.json',
        {
            'raw_ids': catalogue.raw_ids,
            'titles': catalogue.titles,
            'years': catalogue.years,
            'keywords': catalogue.keywords,
            'user_ids': source.interactions.user_ids,
        },
    )
    storage.write_json(folder / 'dataset.json', source.record | {'split': describe(split)})


def read(folder: epath.PathLike) -> Dataset:
    """Reads what `save` wrote.

    Raises:
      InputError: a file is missing or damaged.
    """
    folder = epath.Path(folder)
    arrays = storage.read_arrays(folder / 'dataset.npz')
    table = storage.read_json(folder / 'catalogue.json')
    record = storage.read_json(folder / 'dataset.json')
    try:
        catalogue = Catalogue(
            raw_ids=tuple(table['raw_ids']),
            titles=tuple(table['titles']),
            years=tuple(table['years']),
            keywords=tuple(map(tuple, table['keywords'])),
        )
        return Dataset(catalogue, Split(**arrays), tuple(table['user_ids']), record)
    except (KeyError, TypeError) as error:
        raise InputError(
            f'{folder}: dataset.npz or catalogue.json lacks a part ({error}); prepare it again.'
        ) from error


def _say(path: epath.Path, record: dict[str, Any]) -> None:
    titles = record['titles']
    logging.info(
        '%s: %d rows, %d repeated; %s; %s after the %d-core (%d rounds).',
        path,
        record['rows_read'],
        record['dropped']['repeated'],
        _counted(record['before_k_core']),
        _counted(record),
        record['k_core']['k'],
        len(record['k_core']['rounds']),
    )
    if titles['damaged']:
        logging.warning(
            '%s: %d titles hold U+FFFD: this copy has lost accents that the official file has.',
            path,
            titles['damaged'],
        )
    if titles['placeholder'] or titles['shared']:
        logging.info(
            '%s: %d items without a title got a placeholder, %d share a title with an earlier one.',
            path,
            titles['placeholder'],
            titles['shared'],
        )


def _counted(counts: dict[str, Any]) -> str:
    return (
        f'{counts["users"]} users, {counts["items"]} items, {counts["interactions"]} interactions'
    )
