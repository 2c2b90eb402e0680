"""Amazon reviews of 2014 (McAuley), any category, in the official layout.

`reviews_X_5.json.gz` (or `reviews_X.json.gz`, the whole category) and `meta_X.json.gz`, packed or
unpacked; one record a line. Only that somebody reviewed a product counts, not the stars. The
metadata files are not JSON but Python dicts, so a line is read as JSON and, where that fails, as a
literal; nothing in it is ever executed.

* Title: of the metadata, HTML entities undone ('&amp;'), white space runs made one blank.
* Placeholder of an item without a title: its brand and most special category, 'OPI Nail Polish'.
* Keywords: the categories of all its paths below the root, each once ('Beauty' > 'Makeup' > 'Nails'
  gives 'Makeup', 'Nails'); a path that is only a root gives none.
"""

import ast
import html
import json
import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from palr_jax.data.files import RawFiles, open_files, shorten
from palr_jax.data.interactions import Item, RawLog, is_missing
from palr_jax.errors import InputError

_NAME = re.compile(r'(reviews|meta)_(.+?)(_5)?\.json(\.gz)?')
_ENTITY = re.compile(r'&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|\w{2,31});')
_LONGEST_LITERAL = 1 << 22  # bytes; ast needs hundreds of times the memory
_CHUNK = 1 << 16  # events that are turned into arrays at once


class Product(NamedTuple):
    """A line of metadata."""

    title: str
    brand: str
    paths: tuple[tuple[str, ...], ...]  # root first

    def item(self) -> Item:
        return Item(self.title, tuple(dict.fromkeys(c for path in self.paths for c in path[1:])))

    def placeholder(self) -> str:
        """What stands for a missing title; '' if there is neither brand nor category."""
        category = self.paths[0][-1] if self.paths else ''
        return f'{self.brand} {category}'.strip()


def open_category(path: epath.PathLike) -> RawFiles:
    """The files of one category.

    Args:
      path: a folder or archive that holds one category, or a reviews file with its metadata beside
        it.

    Raises:
      InputError: it does not exist, or is a file of another kind.
    """
    path = epath.Path(path)
    found = _NAME.fullmatch(path.name)
    if found is None or path.is_dir():
        return open_files(path)
    beside = open_files(path.parent)
    wanted = (path.name, *_meta_names(found[2]))
    return RawFiles(path.parent, False, {n: s for n, s in beside.members.items() if n in wanted})


def read(raw: RawFiles) -> tuple[str, RawLog]:
    """Reads the reviews and the metadata. Returns the category in lower case, and the log.

    Raises:
      InputError: a file is missing, empty or malformed.
    """
    category, reviews, meta = find(raw)
    log_users: dict[str, int] = {}
    log_items: dict[str, int] = {}
    blocks, rows = [], []
    for user, item, second in events(raw, reviews):
        rows.append(
            (
                log_users.setdefault(user, len(log_users)),
                log_items.setdefault(item, len(log_items)),
                second,
            )
        )
        if len(rows) == _CHUNK:
            blocks.append(np.array(rows, np.int64).T)
            rows = []
    blocks.append(np.array(rows, np.int64).reshape(-1, 3).T)
    users, items, times = np.concatenate(blocks, axis=1)
    if not len(users):
        raise InputError(
            f'{raw.where(reviews)}: the file is empty; needed are lines with reviewerID, asin and '
            'unixReviewTime.'
        )
    metadata, placeholders = describe(raw, meta, log_items)
    log = RawLog(
        users=users,
        items=items,
        times=times,
        user_ids=tuple(log_users),
        item_ids=tuple(log_items),
        metadata=metadata,
        files=(reviews, meta),
        placeholders=placeholders,
    )
    return category.lower(), log


def find(raw: RawFiles) -> tuple[str, str, str]:
    """The category, its reviews file and its metadata file.

    Raises:
      InputError: there is none, or more than one.
    """
    found = {m: _NAME.fullmatch(m.rsplit('/', 1)[-1]) for m in raw.members}
    reviews = [m for m, name in found.items() if name and name[1] == 'reviews']
    if len(reviews) != 1:
        raise InputError(
            f'{raw.path}: found {len(reviews)} reviews files ({", ".join(reviews) or raw.listing()}'
            '); needed is one reviews_CATEGORY_5.json.gz or reviews_CATEGORY.json.gz (where there '
            'are several, config.data.path names the file).'
        )
    category = found[reviews[0]][2]
    names = _meta_names(category)
    meta = [m for m in raw.members if m.rsplit('/', 1)[-1] in names]
    if len(meta) != 1:
        raise InputError(
            f'{raw.path}: found {len(meta)} metadata files of the category {category}'
            f' ({", ".join(meta) or raw.listing()}); needed is one {names[0]}.'
        )
    return category, reviews[0], meta[0]


def events(raw: RawFiles, member: str) -> Iterator[tuple[str, str, int]]:
    """Yields (user, item, second) of a reviews file in file order.

    Raises:
      InputError: a line is malformed.
    """
    for where, record in _records(raw, member):
        second = record.get('unixReviewTime')
        if type(second) is not int or not 0 <= second < 10**18:
            raise InputError(
                f'{where}: unixReviewTime is {_shown(record, "unixReviewTime")}; allowed are whole '
                'numbers of seconds.'
            )
        yield _id(where, record, 'reviewerID'), _id(where, record, 'asin'), second


def describe(
    raw: RawFiles, member: str, item_ids: Collection[str]
) -> tuple[dict[str, Item], dict[str, str]]:
    """What the metadata says of these items.

    Returns:
      The items and the placeholders of those without a title, by raw id.

    Raises:
      InputError: a line is malformed.
    """
    metadata: dict[str, Item] = {}
    placeholders: dict[str, str] = {}
    for item, product in products(raw, member, set(item_ids)):
        metadata[item] = product.item()
        if is_missing(product.title) and product.placeholder():
            placeholders[item] = product.placeholder()
    return metadata, placeholders


def products(raw: RawFiles, member: str, wanted: set[str]) -> Iterator[tuple[str, Product]]:
    """Yields (raw item id, what the metadata says) of the items `wanted`, each once.

    Raises:
      InputError: a line is malformed, or two lines of an item differ.
    """
    seen: dict[str, Product] = {}
    for where, record in _records(raw, member):
        item = _id(where, record, 'asin')
        title, brand = (_text(where, record, field) for field in ('title', 'brand'))
        product = Product(title, '' if is_missing(brand) else brand, _paths(where, record))
        if item not in seen and item in wanted:
            seen[item] = product
            yield item, product
        elif seen.get(item, product) != product:
            raise InputError(
                f'{where}: asin {item} occurs a second time with other values; allowed is one line '
                'an item.'
            )


def _records(raw: RawFiles, member: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (how errors name the line, its record)."""
    where = raw.where(member)
    for numbers, lines in raw.lines(member):
        for number, line in zip(numbers, lines):
            place = f'{where}, line {number}'
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise InputError(
                    f'{place}: byte {line[error.start]:#04x} in {shorten(line)} is not UTF-8; '
                    'allowed is UTF-8.'
                ) from error
            except (ValueError, RecursionError):
                record = _literal(line)
            if type(record) is not dict:
                raise InputError(
                    f'{place}: found {shorten(line)}; needed is one JSON object or one Python dict '
                    'of plain values.'
                )
            yield place, record


def _literal(line: bytes) -> object:
    """The value of a line that is a Python dict of plain values; None for anything else."""
    if not line.startswith(b'{') or len(line) > _LONGEST_LITERAL:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of backslashes that escape nothing
        try:
            return ast.literal_eval(line.decode())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None


def _id(where: str, record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if type(value) is not str or is_missing(value):
        raise InputError(f'{where}: {field} is {_shown(record, field)}; needed is a text.')
    return value


def _text(where: str, record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None or value != value:  # NaN, which stands for nothing in exported frames
        return ''
    if type(value) is not str:
        raise InputError(
            f'{where}: {field} is {_shown(record, field)}; allowed are a text and nothing.'
        )
    return _clean(value)


def _paths(where: str, record: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    paths = record.get('categories') or []
    if type(paths) is not list or not all(
        type(path) is list and all(type(name) is str for name in path) for path in paths
    ):
        raise InputError(
            f'{where}: categories is {_shown(record, "categories")}; allowed is a list of lists of '
            'texts.'
        )
    cleaned = [tuple(filter(None, map(_clean, path))) for path in paths]
    return tuple(path for path in cleaned if path)


def _clean(text: str) -> str:
    for _ in range(2):  # '&amp;quot;' occurs
        text = _ENTITY.sub(lambda found: html.unescape(found[0]), text)
    if not text.isascii():  # half a surrogate pair is not text
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return ' '.join(text.split())


def _shown(record: dict[str, Any], field: str) -> str:
    return shorten(repr(record[field])) if field in record else 'missing'


def _meta_names(category: str) -> tuple[str, str]:
    return f'meta_{category}.json.gz', f'meta_{category}.json'
