"""MovieLens 100K and 1M in the official layouts of GroupLens.

Only that somebody rated a film counts, not the rating. Titles are those of the file without the
blanks around them; articles stay where they are ('Usual Suspects, The (1995)').
"""

from collections.abc import Iterator, Sequence

import numpy as np

from palr_jax.data import files
from palr_jax.data.files import RawFiles, shorten
from palr_jax.data.interactions import Item, RawLog
from palr_jax.errors import InputError

# The events first.
FILES = {'ml100k': ('u.data', 'u.item', 'u.genre'), 'ml1m': ('ratings.dat', 'movies.dat')}
_RATINGS = {b'1', b'2', b'3', b'4', b'5'}


def read_ml100k(raw: RawFiles) -> RawLog:
    """Reads `u.data`, `u.item` and `u.genre`.

    Raises:
      InputError: a file is missing, empty or malformed.
    """
    data, item, genre = raw.need(FILES['ml100k'])
    return _log(raw, data, ml100k_items(raw, item, genre), (data, item, genre))


def read_ml1m(raw: RawFiles) -> RawLog:
    """Reads `ratings.dat` and `movies.dat`.

    Raises:
      InputError: a file is missing, empty or malformed.
    """
    ratings, movies = raw.need(FILES['ml1m'])
    return _log(raw, ratings, ml1m_items(raw, movies), (ratings, movies))


def _log(raw: RawFiles, member: str, metadata: dict[str, Item], used: tuple[str, ...]) -> RawLog:
    blocks = list(ratings(raw, member))
    if not blocks:
        raise InputError(
            f'{raw.where(member)}: the file is empty; needed are lines of user, item, rating and '
            'timestamp.'
        )
    users, items, times = (np.concatenate(column) for column in zip(*blocks))
    user_ids, users = np.unique(users, return_inverse=True)
    item_ids, items = np.unique(items, return_inverse=True)
    return RawLog(
        users=users,
        items=items,
        times=times,
        user_ids=tuple(map(str, user_ids.tolist())),
        item_ids=tuple(map(str, item_ids.tolist())),
        metadata=metadata,
        files=used,
    )


def ratings(raw: RawFiles, member: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields users, items and seconds of `u.data` or `ratings.dat`, each [rows] int64, in order.

    Raises:
      InputError: a line is malformed.
    """
    where = raw.where(member)
    separator = b'::' if member.endswith('.dat') else b'\t'
    for numbers, lines in raw.lines(member):
        users, items, stars, times = files.split_columns(where, numbers, lines, separator, 4)
        if not _RATINGS.issuperset(stars):
            number, value = next((n, v) for n, v in zip(numbers, stars) if v not in _RATINGS)
            raise InputError(
                f'{where}, line {number}: rating is {shorten(value)}; allowed are 1, 2, 3, 4, 5.'
            )
        yield (
            files.whole_numbers(where, numbers, users, 'user id'),
            files.whole_numbers(where, numbers, items, 'item id'),
            files.whole_numbers(where, numbers, times, 'timestamp'),
        )


def _genres(raw: RawFiles, member: str) -> list[str]:
    lines = raw.text_lines(member)
    genres = []
    for number, line in lines:
        name, _, index = line.partition('|')
        if index != str(len(genres)):
            raise InputError(
                f'{raw.where(member, number)}: found {shorten(line)}; '
                f"needed is 'NAME|{len(genres)}'."
            )
        genres.append(name)
    if not genres:
        raise InputError(f"{raw.where(member)}: the file is empty; needed are lines 'NAME|INDEX'.")
    return genres


def ml1m_items(raw: RawFiles, member: str) -> dict[str, Item]:
    """What `movies.dat` says by raw id.

    Raises:
      InputError: a line is malformed.
    """
    metadata: dict[str, Item] = {}
    for number, fields in _item_rows(raw, member, '::', ['id', 'title', 'genres']):
        raw_id, title, genres = fields
        _add(metadata, raw.where(member, number), raw_id, Item(title, tuple(genres.split('|'))))
    return metadata


def ml100k_items(raw: RawFiles, member: str, genre: str) -> dict[str, Item]:
    """What `u.item` says by raw id.

    Raises:
      InputError: a line of it or of `u.genre` is malformed.
    """
    genres = _genres(raw, genre)
    metadata: dict[str, Item] = {}
    names = ['id', 'title', 'release date', 'video release date', 'URL', *genres]
    for number, fields in _item_rows(raw, member, '|', names):
        raw_id, title, flags = fields[0], fields[1], fields[5:]
        wrong = next((n for n, flag in enumerate(flags) if flag not in ('0', '1')), None)
        if wrong is not None:
            raise InputError(
                f'{raw.where(member, number)}: genre {genres[wrong]} is {shorten(flags[wrong])}; '
                'allowed are 0 and 1.'
            )
        keywords = tuple(genre for genre, flag in zip(genres, flags) if flag == '1')
        _add(metadata, raw.where(member, number), raw_id, Item(title, keywords))
    return metadata


def _item_rows(
    raw: RawFiles, member: str, separator: str, names: Sequence[str]
) -> list[tuple[int, list[str]]]:
    """(line number, fields) of a file of items."""
    lines = raw.text_lines(member)
    if not lines:
        raise InputError(f'{raw.where(member)}: the file is empty; needed is a line for each item.')
    rows = [(number, line.split(separator)) for number, line in lines]
    for number, fields in rows:
        if len(fields) != len(names):
            raise InputError(
                f'{raw.where(member, number)}: found {len(fields)} fields in '
                f'{shorten(separator.join(fields))}; needed {len(names)} ({", ".join(names[:5])}'
                f'{", …" if len(names) > 5 else ""}), separated by {separator!r}.'
            )
    return rows


def _add(metadata: dict[str, Item], where: str, raw_id: str, item: Item) -> None:
    if not (raw_id.isascii() and raw_id.isdigit()):
        raise InputError(f'{where}: id is {shorten(raw_id)}; allowed are whole numbers.')
    raw_id = str(int(raw_id))
    if raw_id in metadata:
        raise InputError(f'{where}: id {raw_id} occurs a second time; allowed is one line an item.')
    metadata[raw_id] = item
