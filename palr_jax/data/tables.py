"""The user's own log: CSV, TSV, JSON lines or Parquet, with the column names of the config.

One row an event, in any order; further columns are not read. Text files may be packed (`.gz`), and
the path may be a folder of parts, which follow each other in the order of their names. A second
table may describe the items. Nothing is guessed and no row is dropped here: a row that cannot be
read is an error that names its line.

* Ids are text or whole numbers. An id that is empty, 'nan', 'None' or the like, that begins or ends
  with a blank, or that is spelt both '7' and '7.0' is an error, since each is a sign of an export
  that went wrong.
* Times are numbers, or the date and time types of Parquet. Only their order counts.
* Titles may be missing; such items get a placeholder.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from pyarrow import types

from palr_jax.data.files import RawFiles, open_file, open_files, shorten
from palr_jax.data.interactions import Item, RawLog, is_missing
from palr_jax.data.table_file import KINDS, TableFile, kind_of
from palr_jax.errors import InputError

_WHOLE_FLOAT = re.compile(r'-?\d+\.0+')
_DELIMITER = re.compile('[\t !#-~]')


def read(config: ConfigDict, path: epath.Path) -> tuple[dict[str, str], RawLog]:
    """Reads the log at `path`, and the items at `config.items_path` if it is not ''.

    Args:
      config: the part `data` of the config; reads columns, items_path, item_columns,
        keyword_separator and delimiter.
      path: a file, or a folder of parts.

    Returns:
      The hashes of the files by name, and the log.

    Raises:
      InputError: a file is missing or malformed.
    """
    raw, members = open_log(config, path)
    log = _events(raw, members, config)
    metadata, hashes = describe(config, members, log.item_ids)
    return raw.sha256(members) | hashes, dataclasses.replace(log, metadata=metadata)


def open_log(config: ConfigDict, path: epath.Path) -> tuple[RawFiles, list[str]]:
    """The files of the log at `path`, and their names in order.

    The table of the items is not among them, if it lies in the same folder.

    Raises:
      InputError: there are none, or they are of several kinds, or a field is wrong.
    """
    if config.delimiter and not _DELIMITER.fullmatch(config.delimiter):
        raise InputError(
            f'config.data.delimiter is {config.delimiter!r}; allowed are one printable ASCII '
            'character but the double quote, tab, and nothing, for what the name of the file tells.'
        )
    if config.items_path and not config.item_columns.item:
        raise InputError(
            "config.data.item_columns.item is ''; needed is the column of the ids in "
            f'{config.items_path}.'
        )
    if not path.is_dir():
        raw = open_file(path)
        return raw, _parts(raw)
    raw = open_files(path)
    return raw, _parts(raw, epath.Path(config.items_path))


def describe(
    config: ConfigDict, members: Collection[str], item_ids: Sequence[str]
) -> tuple[dict[str, Item], dict[str, str]]:
    """What the table at `config.items_path` says of these items.

    Args:
      members: names of the files of the log.

    Returns:
      The items by raw id, and the hash of the file by its name, or by its path where a file of the
      log has that name; nothing where `config.items_path` is ''.

    Raises:
      InputError: the file is missing or malformed, or knows none of the items.
    """
    if not config.items_path:
        logging.warning('config.data.items_path is not set: prompts will show item ids.')
        return {}, {}
    raw = open_file(config.items_path, 'config.data.items_path')
    (member,) = _parts(raw)
    metadata = _items(TableFile(raw, member, config.delimiter), config, item_ids)
    name = raw.where(member) if member in members else member
    return metadata, {name: raw.sha256([member])[member]}


def events(raw: RawFiles, member: str, config: ConfigDict) -> Iterator[tuple[str, str, float]]:
    """Yields (user, item, time) of one file in file order.

    Raises:
      InputError: a column is missing, or a row is malformed.
    """
    table, names = TableFile(raw, member, config.delimiter), config.columns
    for numbers, (users, items, times) in table.batches(_columns(config)):
        ids: list[list[str]] = []
        for column, name in ((users, names.user), (items, names.item)):
            known: dict[str, int] = {}
            codes = _codes(table, numbers, column, name, known)
            texts = list(known)
            ids.append([texts[code] for code in codes])
        yield from zip(*ids, _seconds(table, numbers, times, names.time).tolist())


def _columns(config: ConfigDict) -> dict[str, str]:
    return {f'columns.{name}': config.columns[name] for name in ('user', 'item', 'time')}


def _parts(raw: RawFiles, other: epath.Path | None = None) -> list[str]:
    """The files of a table by name; hidden ones and marks such as _SUCCESS are not among them.

    Nor is `other`, the file of another table.
    """
    members = sorted(m for m in raw.members if m[0] not in '._' and '/' not in m)
    if other is not None:
        members = [m for m in members if (raw.path / m).resolve() != other.resolve()]
    if not members:
        raise InputError(
            f'{raw.path}: found no files; needed are tables ({", ".join(KINDS)}) of one kind.'
        )
    kinds = {kind_of(member) for member in members}
    if len(kinds) > 1:
        raise InputError(
            f'{raw.path}: found {raw.listing()}; allowed are tables of one kind in a folder.'
        )
    return members


def _events(raw: RawFiles, members: Sequence[str], config: ConfigDict) -> RawLog:
    user_codes: dict[str, int] = {}
    item_codes: dict[str, int] = {}
    blocks = []
    for member in members:
        table = TableFile(raw, member, config.delimiter)
        for numbers, (users, items, times) in table.batches(_columns(config)):
            blocks.append(
                (
                    _codes(table, numbers, users, config.columns.user, user_codes),
                    _codes(table, numbers, items, config.columns.item, item_codes),
                    _seconds(table, numbers, times, config.columns.time),
                )
            )
    if not sum(len(block[0]) for block in blocks):
        raise InputError(
            f'{raw.path}: {", ".join(members[:4])} has no rows; needed is a row for each event.'
        )
    users, items, times = (np.concatenate(column) for column in zip(*blocks))
    return RawLog(
        users=users,
        items=items,
        times=times,
        user_ids=tuple(user_codes),
        item_ids=tuple(item_codes),
        metadata={},
        files=tuple(members),
    )


def _codes(
    table: TableFile, numbers: Sequence[int], column: pa.Array, name: str, codes: dict[str, int]
) -> np.ndarray:
    """Codes of the ids in order of appearance; extends `codes`. Returns [rows] int32."""
    column = _plain(column)
    kind = column.type
    if not (_is_text(kind) or types.is_integer(kind) or types.is_null(kind)):
        raise InputError(
            f'{table.place(numbers[0])}: {name} is of the type {kind}; allowed are text and whole '
            'numbers.'
        )
    if column.null_count:
        at = column.is_null().index(True).as_py()
        raise InputError(f'{table.place(numbers[at])}: {name} is empty; needed is an id.')
    encoded = column.dictionary_encode()
    lookup = np.empty(len(encoded.dictionary), np.int32)

    def number_of(code: int) -> int:
        return numbers[encoded.indices.index(code).as_py()]

    for n, value in enumerate(encoded.dictionary.to_pylist()):
        try:
            id_ = value.decode() if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError as error:
            raise table.not_utf8(number_of(n), value, error) from error
        if id_ not in codes and (problem := _problem(id_, codes)):
            raise InputError(f'{table.place(number_of(n))}: {name} is {shorten(id_)}; {problem}.')
        lookup[n] = codes.setdefault(id_, len(codes))
    return lookup[encoded.indices.to_numpy()]


def _problem(id_: str, codes: Mapping[str, int]) -> str:
    """What is wrong with a new id; '' if nothing is."""
    if is_missing(id_):
        return 'needed is an id'
    if id_ != id_.strip():
        return 'allowed are ids that neither begin nor end with a blank'
    other = id_.split('.')[0] if _WHOLE_FLOAT.fullmatch(id_) else f'{id_}.0'
    if other in codes:
        return f'{other!r} stands for the same number in other rows; allowed is one spelling'
    return ''


def _seconds(table: TableFile, numbers: Sequence[int], column: pa.Array, name: str) -> np.ndarray:
    """Times [rows], int64 where all are whole numbers, else float64."""
    if column.null_count:
        at = column.is_null().index(True).as_py()
        raise InputError(f'{table.place(numbers[at])}: {name} is empty; needed is a time.')
    if types.is_date(column.type):
        column = column.cast(pa.timestamp('s'))
    kind = column.type
    if types.is_timestamp(kind):
        ticks = column.cast(pa.int64()).to_numpy()
        divisor = {'s': 1, 'ms': 10**3, 'us': 10**6, 'ns': 10**9}[kind.unit]
        return ticks if divisor == 1 else ticks / divisor
    if not (_is_text(kind) or types.is_integer(kind) or types.is_floating(kind)):
        raise InputError(
            f'{table.place(numbers[0])}: {name} is of the type {kind}; allowed are numbers, dates '
            'and times.'
        )
    times = _numbers(column)
    if times is None:
        number, value = next(
            (number, value)
            for number, value in zip(numbers, column.to_pylist())
            if _numbers(pa.array([value], kind)) is None
        )
        shown = shorten(value if _is_text(kind) else str(value))
        raise InputError(f'{table.place(number)}: {name} is {shown}; allowed are numbers.')
    return times


def _numbers(column: pa.Array) -> np.ndarray | None:
    """Numbers that fit into 64 bits; None if one of the values is none."""
    for wanted in (pa.int64(), pa.float64()):
        try:
            text = column.cast(pa.string()) if types.is_binary(column.type) else column
            found = text.cast(wanted).to_numpy()
        except pa.ArrowInvalid:
            continue
        # NaN compares false.
        return found if (np.abs(found) < 2**63).all() else None
    return None


def _is_text(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind)


def _items(table: TableFile, config: ConfigDict, item_ids: Sequence[str]) -> dict[str, Item]:
    """What a table says about the items of the log, by raw id."""
    names = config.item_columns
    fields = [field for field in ('item', 'title', 'keywords') if names[field]]
    wanted = set(item_ids)
    metadata: dict[str, Item] = {}
    untitled: list[int] = []
    others: dict[str, int] = {}
    for numbers, arrays in table.batches({f'item_columns.{f}': names[f] for f in fields}):
        columns = dict(zip(fields, arrays))
        codes = _codes(table, numbers, columns['item'], names.item, others)
        ids = list(others)
        titles = _titles(table, numbers, columns.get('title'), names.title)
        keywords = _keywords(table, numbers, columns.get('keywords'), config)
        for number, code, title, words in zip(numbers, codes.tolist(), titles, keywords):
            raw_id = ids[code]
            if raw_id in metadata:
                raise InputError(
                    f'{table.place(number)}: {names.item} {raw_id} occurs a second time; allowed '
                    'is one row an item.'
                )
            if raw_id in wanted:
                metadata[raw_id] = Item(title, words)
                if is_missing(title):
                    untitled.append(number)
    if not metadata:
        raise InputError(
            f'{table.raw.where(table.member)}: none of its items is in the log; it has '
            f'{", ".join(map(repr, list(others)[:3])) or "no rows"}, the log '
            f'{", ".join(map(repr, item_ids[:3]))}.'
        )
    if untitled:
        logging.warning(
            '%s: no title, as of %d items; they get placeholders.',
            table.place(untitled[0]),
            len(untitled),
        )
    return metadata


def _titles(
    table: TableFile, numbers: Sequence[int], column: pa.Array | None, name: str
) -> list[str]:
    if column is None:
        return [''] * len(numbers)
    column = _plain(column)
    if not (_is_text(column.type) or types.is_null(column.type)):
        raise InputError(
            f'{table.place(numbers[0])}: {name} is of the type {column.type}; allowed is text.'
        )
    values = zip(numbers, column.to_pylist())
    return [' '.join(table.text(number, value or '').split()) for number, value in values]


def _keywords(
    table: TableFile, numbers: Sequence[int], column: pa.Array | None, config: ConfigDict
) -> list[tuple[str, ...]]:
    if column is None:
        return [()] * len(numbers)
    column = _plain(column)
    kind = column.type
    listed = types.is_list(kind) or types.is_large_list(kind)
    of = kind.value_type if listed else kind
    if not (_is_text(of) or types.is_null(of)):
        raise InputError(
            f'{table.place(numbers[0])}: {config.item_columns.keywords} is of the type {kind}; '
            'allowed are text and lists of text.'
        )
    separator, found = config.keyword_separator, []
    for number, value in zip(numbers, column.to_pylist()):
        if not listed:
            text = table.text(number, value or '')
            parts = text.split(separator) if separator else [text]
            value = [] if is_missing(text) else parts
        words = (' '.join((word or '').split()) for word in value or [])
        found.append(tuple(word for word in words if word))
    return found


def _plain(column: pa.Array) -> pa.Array:
    """A column that is not dictionary-encoded."""
    return column.cast(column.type.value_type) if types.is_dictionary(column.type) else column
