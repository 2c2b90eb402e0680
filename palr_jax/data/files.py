"""Raw files of a data set, in a folder or a zip archive (a wheel is one), read line by line.

A file whose name ends in `.gz` is inflated on the way.
"""

import gzip
import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import IO

import numpy as np
from etils import epath

from palr_jax.errors import InputError
from palr_jax.progress import Progress

_BLOCK = 1 << 22  # bytes read at once
_MANY_BLOCKS = 16  # a file of more shows its progress
_HTML = re.compile(rb'\s*<(!doctype html|html|head)', re.IGNORECASE)


@dataclass(frozen=True)
class RawFiles:
    """The files below a folder (two levels deep) or in an archive."""

    path: epath.Path
    archive: bool
    members: Mapping[str, int]  # bytes of each file by its path below, with '/'

    def where(self, member: str, line: int | None = None) -> str:
        """How errors name a place in a file."""
        return f'{self.path / member}' + ('' if line is None else f', line {line}')

    def find(self, name: str) -> str | None:
        """The member called `name` at the top or in a subfolder; None if there is none.

        Raises:
          InputError: more than one subfolder has it.
        """
        found = [m for m in self.members if m.split('/')[-1] == name and m.count('/') <= 1]
        if name in found:
            return name
        if len(found) > 1:
            raise InputError(
                f'{self.path}: {name} was found more than once ({", ".join(sorted(found))}); '
                'exactly one is needed.'
            )
        return found[0] if found else None

    def need(self, names: Sequence[str]) -> list[str]:
        """The members called `names`.

        Raises:
          InputError: one is missing.
        """
        found = [self.find(name) for name in names]
        if None in found:
            raise InputError(
                f'{self.path}: {names[found.index(None)]} is missing; found {self.listing()}; '
                f'needed are {", ".join(names)} at the top or in one subfolder.'
            )
        return found

    def listing(self) -> str:
        """A few of the members, for error messages."""
        shown = ', '.join(list(self.members)[:6]) or 'no files'
        return shown + (', …' if len(self.members) > 6 else '')

    def lines(self, member: str) -> Iterator[tuple[Sequence[int], list[bytes]]]:
        """Yields (line numbers, lines) in blocks; without line ends and empty lines."""
        number, rest = 1, b''
        blocks = -(-self.members[member] // _BLOCK)
        long = Progress(member, blocks, 'x 4 MiB') if blocks > _MANY_BLOCKS else nullcontext()
        with self.open(member) as stream, long as progress:
            # Of a .gz file only the deflated size is known beforehand.
            position = (stream.fileobj if isinstance(stream, gzip.GzipFile) else stream).tell
            while True:
                block = stream.read(_BLOCK)
                if block and progress:
                    progress.update(-(-position() // _BLOCK) - progress.done)
                lines = (rest + block).split(b'\n')
                rest = lines.pop() if block else b''
                if number == 1 and lines:
                    lines[0] = lines[0].removeprefix(b'\xef\xbb\xbf')
                numbers: Sequence[int] = range(number, number + len(lines))
                number += len(lines)
                if any(line.endswith(b'\r') for line in lines):
                    lines = [line.removesuffix(b'\r') for line in lines]
                if b'' in lines:
                    numbers = [n for n, line in zip(numbers, lines) if line]
                    lines = [line for line in lines if line]
                if lines:
                    yield numbers, lines
                if not block:
                    return

    def text_lines(self, member: str) -> list[tuple[int, str]]:
        """(line number, line) of a small text file that may be UTF-8 or latin-1.

        Line ends and empty lines are left out.
        """
        with self.open(member) as stream:
            text = decode(stream.read())
        # Not splitlines, which also splits at control characters of latin-1.
        lines = [(n, line.removesuffix('\r')) for n, line in enumerate(text.split('\n'), start=1)]
        return [(n, line) for n, line in lines if line]

    def sha256(self, members: Sequence[str]) -> dict[str, str]:
        """The hash of the archive, or of each of the files that were used of a folder."""
        if self.archive:
            with self.path.open('rb') as stream:
                return {self.path.name: sha256(stream)}
        hashes = {}
        for member in sorted(members):
            with self.open(member, inflate=False) as stream:
                hashes[member.split('/')[-1]] = sha256(stream)
        return hashes

    @contextmanager
    def open(self, member: str, inflate: bool = True) -> Iterator[IO[bytes]]:
        """The bytes of a file; `inflate` undoes .gz.

        Raises:
          InputError: the file cannot be read, here or while it is being read.
        """
        try:
            with ExitStack() as stack:
                path = self.path if self.archive else self.path / member
                stream = stack.enter_context(path.open('rb'))
                if self.archive:
                    archive = stack.enter_context(zipfile.ZipFile(stream))
                    stream = stack.enter_context(archive.open(member))
                if inflate and member.endswith('.gz'):
                    stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
                yield stream
        except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise InputError(
                f'{self.where(member)}: the archive is damaged ({error}); get it again.'
            ) from error
        except RuntimeError as error:  # a password, or a compression that zipfile lacks
            raise InputError(
                f'{self.where(member)}: cannot be read ({error}); allowed are zip archives '
                'without a password.'
            ) from error
        except OSError as error:
            raise InputError(
                f'{self.where(member)}: cannot be read ({error.strerror or error}).'
            ) from error


def open_files(path: epath.PathLike) -> RawFiles:
    """Lists what `path` holds.

    Args:
      path: a folder, or a zip archive of any name.

    Raises:
      InputError: it does not exist, or is a file of another kind.
    """
    path = epath.Path(path)
    if path.is_dir():
        found = {}
        for child in sorted(path.iterdir()):
            for file in sorted(child.iterdir()) if child.is_dir() else [child]:
                if file.is_file():
                    found[str(file.relative_to(path))] = file.stat().length
        return RawFiles(path, False, found)
    if not path.exists():
        raise InputError(
            f'config.data.path: {path} does not exist; needed is the archive or folder of the data.'
        )
    try:
        with path.open('rb') as stream:
            start = stream.read(512)
            stream.seek(0)
            with zipfile.ZipFile(stream) as archive:
                found = {info.filename: info.file_size for info in archive.infolist()}
    # Damage may also read as a version that zipfile does not know, or as a name that is not UTF-8.
    except (zipfile.BadZipFile, RuntimeError, UnicodeDecodeError) as error:
        raise InputError(f'{path}: {_not_a_zip(start)}.') from error
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror or error}).') from error
    return RawFiles(path, True, {name: size for name, size in found.items() if name[-1:] != '/'})


def open_file(path: epath.PathLike, field: str = 'config.data.path') -> RawFiles:
    """One file by itself, whatever stands beside it.

    Raises:
      InputError: it does not exist, is empty or is a folder; `field` is named as the cause.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f'{field}: {path} does not exist; needed is a file.')
    if path.is_dir():
        raise InputError(f'{field}: {path} is a folder; needed is a file.')
    size = path.stat().length
    if not size:
        raise InputError(f'{path}: the file is empty.')
    return RawFiles(path.parent, False, {path.name: size})


def _not_a_zip(start: bytes) -> str:
    if not start:
        return 'the file is empty; needed is a zip archive or a folder'
    if is_html(start):
        return (
            'this is an HTML page, not an archive (the server probably sent an error or log-in '
            'page); get the archive again'
        )
    if start.startswith(b'PK'):
        return 'the zip archive is truncated or damaged; get it again'
    return (
        f'not a zip archive (it starts with {start[:16]!r}); allowed are zip archives and folders'
    )


def is_html(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a web page."""
    return _HTML.match(start) is not None


def decode(data: bytes) -> str:
    """Decodes strict UTF-8, else latin-1.

    The official MovieLens files are latin-1, many copies were converted. Latin-1 text with
    accents is practically never valid UTF-8, so the first success is right.
    """
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError:
        return data.decode('latin-1')


def sha256(stream: IO[bytes]) -> str:
    """Hash of the rest of a stream, as 64 hexadecimal digits."""
    return hashlib.file_digest(stream, 'sha256').hexdigest()


def split_columns(
    where: str, numbers: Sequence[int], lines: list[bytes], separator: bytes, fields: int
) -> list[tuple[bytes, ...]]:
    """Splits lines into columns.

    Raises:
      InputError: a line has another number of fields.
    """
    for number, line in zip(numbers, lines):
        if line.count(separator) != fields - 1:
            name = {b'\t': 'tab'}.get(separator, repr(separator.decode()))
            raise InputError(
                f'{where}, line {number}: found {line.count(separator) + 1} fields in '
                f'{shorten(line)}; needed {fields}, separated by {name}.'
            )
    return list(zip(*(line.split(separator) for line in lines)))


def whole_numbers(
    where: str, numbers: Sequence[int], column: Sequence[bytes], field: str
) -> np.ndarray:
    """Parses a column of unsigned integers. Returns [rows] int64.

    Raises:
      InputError: a value is something else.
    """
    # 18 digits always fit into 64 bits.
    if not all(map(bytes.isdigit, column)) or max(map(len, column)) > 18:
        number, value = next(
            (n, v) for n, v in zip(numbers, column) if not v.isdigit() or len(v) > 18
        )
        raise InputError(
            f'{where}, line {number}: {field} is {shorten(value)}; allowed are whole numbers of at '
            'most 18 digits.'
        )
    return np.fromiter(map(int, column), np.int64, len(column))


def shorten(value: bytes | str, length: int = 60) -> str:
    """A value as error messages show it: quoted, decoded, cut."""
    text = decode(value) if isinstance(value, bytes) else value
    return repr(text if len(text) <= length else text[: length - 1] + '…')
