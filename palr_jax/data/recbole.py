"""RecBole atomic files: `NAME.inter` and `NAME.item`, tab separated, header `field:type`.

They may lie in a folder, an archive or a Python wheel; RecBole's own wheel holds MovieLens 100K.
Also read are the layouts of the larger MovieLens sets (`genre`, `movie_name`, `type`) and of Amazon
2023 (`title`, `categories`, times in milliseconds). Keywords are separated by ', ' or '|' where one
of these occurs, else by blanks; values that pandas put in quotes lose them.

The conversion of the films differs from GroupLens' file in three ways, which are undone here, so
that both sources give the same catalogue:

* What stands in the last parenthesis of a title has moved to `release_year`: 'Heat' and '1995', but
  also 'Ghost Town (1995)' and 'V'. It goes back behind the title.
* A title without a parenthesis, of which there is one ('unknown'), became 'unkonwn' in both fields.
* The text is UTF-8 (GroupLens': latin-1).
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from palr_jax.data import files
from palr_jax.data.files import RawFiles, shorten
from palr_jax.data.interactions import Item, RawLog
from palr_jax.errors import InputError

_TYPES = ('token', 'token_seq', 'float', 'float_seq')
_TITLES = ('movie_title', 'title', 'movie_name', 'name', 'item_name')
_KEYWORDS = ('class', 'genre', 'genres', 'type', 'category', 'categories')
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def find(raw: RawFiles) -> str | None:
    """The `.inter` file among the raw files; None if there is none.

    Raises:
      InputError: there are several.
    """
    found = [member for member in raw.members if member.endswith('.inter')]
    if len(found) > 1:
        raise InputError(
            f'{raw.path}: found {len(found)} .inter files ({", ".join(found[:4])}); exactly one is '
            'needed.'
        )
    return found[0] if found else None


def stands_for(raw: RawFiles, mark: str) -> bool:
    """Whether the raw files are RecBole's form of a data set that officially has the file `mark`.

    Raises:
      InputError: there are several `.inter` files, or several files of that name.
    """
    return raw.find(mark) is None and find(raw) is not None


def need(raw: RawFiles) -> tuple[str, str]:
    """The `.inter` and the `.item` file.

    Raises:
      InputError: one is missing, or there are several.
    """
    inter = find(raw)
    if inter is None:
        raise InputError(
            f'{raw.path}: NAME.inter is missing; found {raw.listing()}; needed are NAME.inter and '
            'NAME.item.'
        )
    item = inter.removesuffix('.inter') + '.item'
    if item not in raw.members:
        raise InputError(
            f'{raw.path}: {item} is missing beside {inter}; it holds the titles that prompts show.'
        )
    return inter, item


def read(raw: RawFiles) -> RawLog:
    """Reads `NAME.inter` (user_id, item_id, timestamp) and `NAME.item` (item_id, title, …).

    Raises:
      InputError: a file or field is missing, or a row is malformed.
    """
    inter, item = need(raw)
    metadata = read_items(raw, item)
    users, items, times, user_ids, item_ids = _events(raw, inter)
    return RawLog(users, items, times, user_ids, item_ids, metadata, (inter, item))


def _events(
    raw: RawFiles, member: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...], tuple[str, ...]]:
    where = raw.where(member)
    codes_of: tuple[dict[str, int], dict[str, int]] = ({}, {})
    blocks = []
    for users, items, times in columns(raw, member):
        codes = (_codes(column, table) for column, table in zip((users, items), codes_of))
        blocks.append((*codes, times))
    if not blocks:
        raise InputError(
            f'{where}: the file has no rows; needed are a header with user_id:token, item_id:token '
            'and timestamp:float, and a line for each event.'
        )
    users, items, times = (np.concatenate(column) for column in zip(*blocks))
    return users, items, times, *map(tuple, codes_of)


def columns(
    raw: RawFiles, member: str
) -> Iterator[tuple[Sequence[str], Sequence[str], np.ndarray]]:
    """Yields users, items and times [rows] of a `.inter` file in file order.

    Raises:
      InputError: a field is missing, or a row is malformed.
    """
    where = raw.where(member)
    wanted: list[int] = []
    for numbers, lines in raw.lines(member):
        if not wanted:
            header = _header(where, files.decode(lines[0]))
            wanted = [_field(where, header, [n]) for n in ('user_id', 'item_id', 'timestamp')]
            numbers, lines = numbers[1:], lines[1:]
            if not lines:
                continue
        fields = files.split_columns(where, numbers, lines, b'\t', len(header))
        users, items, times = (fields[index] for index in wanted)
        yield (
            _ids(where, numbers, users, 'user_id'),
            _ids(where, numbers, items, 'item_id'),
            _seconds(where, numbers, times),
        )


def _ids(where: str, numbers: Sequence[int], column: Sequence[bytes], name: str) -> list[str]:
    """Raw ids [rows], of which none is empty."""
    if b'' in column:
        raise InputError(
            f'{where}, line {numbers[column.index(b"")]}: {name} is empty; needed is an id.'
        )
    try:
        return b'\n'.join(column).decode().split('\n')
    except UnicodeDecodeError as error:
        at = error.object.count(b'\n', 0, error.start)
        raise InputError(
            f'{where}, line {numbers[at]}: byte {error.object[error.start]:#04x} in '
            f'{shorten(column[at])} ({name}) is not UTF-8; allowed is UTF-8.'
        ) from error


def _codes(column: Sequence[str], table: dict[str, int]) -> np.ndarray:
    """Codes of raw ids in order of appearance; extends `table`. Returns [rows] int32."""
    codes = (table.setdefault(raw_id, len(table)) for raw_id in column)
    return np.fromiter(codes, np.int32, len(column))


def _seconds(where: str, numbers: Sequence[int], column: Sequence[bytes]) -> np.ndarray:
    """Timestamps [rows] float64, which is exact for whole seconds; they fit into 64 bits."""
    try:
        seconds = np.fromiter(map(float, column), np.float64, len(column))
        if (np.abs(seconds) < 2**63).all():  # NaN compares false
            return seconds
    except ValueError:
        pass
    number, value = next((n, v) for n, v in zip(numbers, column) if not _is_number(v))
    raise InputError(
        f'{where}, line {number}: timestamp is {shorten(value)}; allowed are numbers of seconds.'
    )


def _is_number(value: bytes) -> bool:
    try:
        return abs(float(value)) < 2**63
    except ValueError:
        return False


def read_items(raw: RawFiles, member: str) -> dict[str, Item]:
    """What a `.item` file says by raw id.

    Raises:
      InputError: a field is missing, or a row is malformed.
    """
    lines = raw.text_lines(member)
    where = raw.where(member)
    if not lines:
        raise InputError(
            f'{where}: the file is empty; needed is a header and a line for each item.'
        )
    header = _header(where, lines[0][1])
    id_at = _field(where, header, ['item_id'])
    title_at = _field(where, header, _TITLES)
    year_at = header.index('release_year') if 'release_year' in header else None
    keywords_at = next((n for n, name in enumerate(header) if name in _KEYWORDS), None)
    metadata: dict[str, Item] = {}
    for number, line in lines[1:]:
        fields = [_unquoted(field) for field in line.split('\t')]
        if len(fields) != len(header):
            raise InputError(
                f'{where}, line {number}: found {len(fields)} fields in {shorten(line)}; needed '
                f'{len(header)} ({", ".join(header)}), separated by tab.'
            )
        if fields[id_at] in metadata:
            raise InputError(
                f'{where}, line {number}: item_id {fields[id_at]} occurs a second time; allowed is '
                'one line an item.'
            )
        title = fields[title_at]
        if year_at is not None:
            title = _with_year(title, fields[year_at])
        keywords = () if keywords_at is None else _split_keywords(fields[keywords_at])
        metadata[fields[id_at]] = Item(title, keywords)
    return metadata


def _unquoted(field: str) -> str:
    found = _QUOTED.fullmatch(field)
    return found[1].replace('""', '"') if found else field


def _split_keywords(text: str) -> tuple[str, ...]:
    if text.strip() == '(no genres listed)':
        return ()
    separator = next((s for s in (', ', '|') if s in text), ' ')
    words = (word.strip() for word in text.split(separator))
    return tuple(word[1:-1] if re.fullmatch("'.+'", word) else word for word in words)


def _with_year(title: str, year: str) -> str:
    """Undoes what the conversion did to a title; see the top of the file."""
    title, year = title.strip(), year.strip()
    if title == year == 'unkonwn':
        return 'unknown'
    if not title or not year or title.endswith(f'({year})'):
        return title
    return f'{title} ({year})'


def _header(where: str, line: str) -> list[str]:
    fields = [field.rpartition(':') for field in line.split('\t')]
    if any(not name or kind not in _TYPES for name, _, kind in fields):
        raise InputError(
            f'{where}, line 1: found {shorten(line)}; needed is a header of tab-separated '
            f"'field:type' with the types {', '.join(_TYPES)}."
        )
    return [name for name, _, _ in fields]


def _field(where: str, header: Sequence[str], names: Sequence[str]) -> int:
    """Position of the first of `names` that the header has."""
    for name in names:
        if name in header:
            return header.index(name)
    raise InputError(
        f'{where}, line 1: found the fields {", ".join(header)}; needed is {" or ".join(names)}.'
    )
