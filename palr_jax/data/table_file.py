"""One file of a table, CSV, TSV, JSON lines or Parquet, as batches of Arrow columns.

Every row has a number by which errors name its place, whatever the kind of file.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from etils import epath

from palr_jax.data.files import RawFiles, shorten
from palr_jax.errors import InputError

# By the end of a file's name, without .gz.
KINDS = {'.csv': ',', '.tsv': '\t', '.jsonl': None, '.ndjson': None, '.parquet': None}
_BLOCK = 1 << 24  # bytes of a CSV file parsed at once
_BATCH = 1 << 19  # rows of a Parquet file read at once
_HALF_PAIR = re.compile('[\ud800-\udfff]')  # json.loads joins the two halves of a whole one

# Numbers that tell the place of each row, and one Arrow array a column.
Batch = tuple[Sequence[int], list[pa.Array]]


class TableFile:
    """One file, whatever its kind, as batches of columns."""

    def __init__(self, raw: RawFiles, member: str, delimiter: str = ''):
        """`delimiter` is that of CSV and TSV alone; '' leaves it to the file's name."""
        self.raw, self.member = raw, member
        self.kind = kind_of(member)
        self.delimiter = delimiter if delimiter and KINDS[self.kind] else KINDS[self.kind]

    def place(self, number: int) -> str:
        """How errors name the row of a batch that has this number."""
        line = number if self.kind != '.parquet' else None
        if self.delimiter is not None:
            line = self._line(number)
        if line is None:
            return f'{self.raw.where(self.member)}, row {number}'
        return self.raw.where(self.member, line)

    def batches(self, columns: Mapping[str, str]) -> Iterator[Batch]:
        """Yields the columns that `columns` names by config field.

        Raises:
          InputError: a column is missing, or the file or a row is malformed.
        """
        if self.kind == '.parquet':
            yield from self._parquet(columns)
        elif self.delimiter is not None:
            yield from self._csv(columns)
        else:
            yield from self._json(columns)

    def _csv(self, columns: Mapping[str, str]) -> Iterator[Batch]:
        with self.raw.open(self.member) as stream, self._parsed():
            header = self._header(stream.readline())
            self._check(columns, header)
        wrong: list[pa_csv.InvalidRow] = []

        def note(row: pa_csv.InvalidRow) -> str:
            wrong.append(row)
            return 'error'

        names = list(columns.values())
        with self.raw.open(self.member) as stream:
            try:
                reader = pa_csv.open_csv(
                    stream,
                    # One thread, for the numbers of wrong rows.
                    pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK),
                    pa_csv.ParseOptions(
                        delimiter=self.delimiter,
                        newlines_in_values=True,
                        invalid_row_handler=note,
                    ),
                    # Bytes, so that neither '007' nor a byte that is not UTF-8 is lost.
                    pa_csv.ConvertOptions(
                        include_columns=names,
                        column_types=dict.fromkeys(names, pa.binary()),
                        strings_can_be_null=False,
                    ),
                )
                first = 1
                for batch in reader:
                    yield range(first, first + len(batch)), batch.columns
                    first += len(batch)
            except pa.ArrowInvalid as error:
                if not wrong:
                    raise self._malformed(error) from error
                raise InputError(
                    f'{self.place(wrong[0].number - 1)}: found {wrong[0].actual_columns} fields in '
                    f'{shorten(wrong[0].text)}; needed {wrong[0].expected_columns}, separated by '
                    f'{self.delimiter!r}.'
                ) from error

    def _header(self, line: bytes) -> list[str]:
        text = line.decode('utf-8-sig').strip('\r\n')
        return next(csv.reader([text], delimiter=self.delimiter), [])

    def _line(self, row: int) -> int | None:
        """The line of a row of a CSV file, in which lines may be empty or stand in quotes.

        None if Python's reader cannot tell (a field of more than 128 KiB).
        """
        with self.raw.open(self.member) as stream:
            text = io.TextIOWrapper(stream, 'latin-1', newline='')
            rows = csv.reader(text, delimiter=self.delimiter)
            last = (rows.line_num for fields in rows if fields)  # the first is the header's
            try:
                return next(itertools.islice(last, row, None), None)
            except csv.Error:
                return None

    def _parquet(self, columns: Mapping[str, str]) -> Iterator[Batch]:
        with self.raw.open(self.member) as stream, self._parsed():
            file = pq.ParquetFile(stream)
            self._check(columns, file.schema_arrow.names)
            names = list(columns.values())
            first = 1
            for batch in file.iter_batches(_BATCH, columns=names):
                yield range(first, first + len(batch)), [batch.column(name) for name in names]
                first += len(batch)

    def _json(self, columns: Mapping[str, str]) -> Iterator[Batch]:
        kinds: dict[str, str] = {}
        for numbers, lines in self.raw.lines(self.member):
            rows = [self._record(n, line) for n, line in zip(numbers, lines)]
            arrays = []
            for field, name in columns.items():
                values = [record.get(name) for record in rows]
                if all(v is None for v in values) and name not in kinds:
                    self._check({field: name}, list(rows[0]))
                for number, value in zip(numbers, values):
                    kind = _json_kind(value)
                    if kind is not None and kinds.setdefault(name, kind) != kind:
                        raise InputError(
                            f'{self.place(number)}: {name} is {shorten(repr(value))}, {kind}, and '
                            f'{kinds[name]} in the lines before; allowed is one type.'
                        )
                try:
                    arrays.append(pa.array(values))
                except UnicodeEncodeError as error:
                    texts = (json.dumps(value, ensure_ascii=False) for value in values)
                    number = next(n for n, text in zip(numbers, texts) if _HALF_PAIR.search(text))
                    raise InputError(
                        f'{self.place(number)}: {name} has {shorten(error.object)}, which holds '
                        'half a surrogate pair; allowed are whole characters.'
                    ) from error
                except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                    raise self._malformed(error) from error
            yield numbers, arrays

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise self.not_utf8(number, line, error) from error
        except (ValueError, RecursionError):
            record = None
        if type(record) is not dict:
            raise InputError(
                f'{self.place(number)}: found {shorten(line)}; needed is one JSON object.'
            )
        return record

    def _check(self, columns: Mapping[str, str], found: Sequence[str]) -> None:
        for field, name in columns.items():
            if found.count(name) == 1:
                continue
            problem = 'is missing' if name not in found else 'occurs more than once'
            between = '' if self.delimiter is None else f', separated by {self.delimiter!r}'
            other = '' if self.delimiter is None else ' or config.data.delimiter'
            raise InputError(
                f'{self.raw.where(self.member)}: the column {name!r} {problem}; found the columns '
                f'{", ".join(map(repr, found)) or "none"}{between}: set config.data.{field}{other}.'
            )

    def not_utf8(self, number: int, value: bytes, error: UnicodeDecodeError) -> InputError:
        return InputError(
            f'{self.place(number)}: byte {value[error.start]:#04x} in {shorten(value)} is not '
            'UTF-8; allowed is UTF-8.'
        )

    def text(self, number: int, value: bytes | str) -> str:
        """A value of a text column.

        Raises:
          InputError: it is not UTF-8.
        """
        if isinstance(value, str):
            return value
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise self.not_utf8(number, value, error) from error

    @contextmanager
    def _parsed(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
            raise self._malformed(error) from error

    def _malformed(self, error: Exception) -> InputError:
        reason = ' '.join(str(error).split())[:200]
        return InputError(
            f'{self.raw.where(self.member)}: not a readable {self.kind} file ({reason}).'
        )


def kind_of(name: str) -> str:
    """The kind of table that a file's name tells.

    Raises:
      InputError: it tells none.
    """
    kind = epath.Path(name.removesuffix('.gz')).suffix
    if kind not in KINDS or (kind == '.parquet' and name.endswith('.gz')):
        raise InputError(
            f'{name}: the name does not tell the kind of the table; allowed are '
            f'{", ".join(KINDS)}, and .gz behind all but the last.'
        )
    return kind


def _json_kind(value: Any) -> str | None:
    if value is None:
        return None
    known = {bool: 'true or false', int: 'a number', float: 'a number', str: 'text', list: 'a list'}
    return known.get(type(value), 'an object')
