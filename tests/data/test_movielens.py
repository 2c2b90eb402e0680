"""The two official MovieLens layouts: encodings, titles and everything that can be wrong."""

import shutil
import zipfile

import pytest

from palr_jax.data import files, movielens
from palr_jax.data.files import open_files
from palr_jax.errors import InputError
from palr_jax.testing import write_ml1m, write_ml100k

RATINGS = b'1::73::5::978300760\n1::582::4::978300761\n2::73::3::978300762\n'
GENRES = b'unknown|0\nComedy|1\nDrama|2\n\n'


def read_ml1m(folder, movies, ratings=RATINGS):
    (folder / 'movies.dat').write_bytes(movies)
    (folder / 'ratings.dat').write_bytes(ratings)
    return movielens.read_ml1m(open_files(folder))


def read_ml100k(folder, item, data=b'1\t1\t5\t100\n', genre=GENRES):
    (folder / 'u.item').write_bytes(item)
    (folder / 'u.data').write_bytes(data)
    (folder / 'u.genre').write_bytes(genre)
    return movielens.read_ml100k(open_files(folder))


def test_d01_latin1_bytes(tmp_path):
    log = read_ml1m(tmp_path, b'73::Mis\xe9rables, Les (1995)::Drama|Musical\n')
    assert log.metadata['73'] == ('Misérables, Les (1995)', ('Drama', 'Musical'))


def test_d02_utf8_copy_with_crlf_and_no_last_line_end(tmp_path):
    log = read_ml1m(
        tmp_path,
        b'\xef\xbb\xbf73::Mis\xc3\xa9rables, Les (1995)::Drama\r\n'
        b'582::Metisse (Caf\xef\xbf\xbd au Lait) (1993)::Comedy\r\n'
        b'583::Caf\xc3\xaf\xc2\xbf\xc2\xbd Noir (1993)::Comedy',
        RATINGS.replace(b'\n', b'\r\n').removesuffix(b'\r\n'),
    )
    assert log.metadata['73'].title == 'Misérables, Les (1995)'
    assert log.metadata['582'] == ('Metisse (Caf\ufffd au Lait) (1993)', ('Comedy',))
    assert log.metadata['583'].keywords == ('Comedy',)
    assert log.times.tolist() == [978300760, 978300761, 978300762]


def test_control_characters_of_latin1_do_not_end_lines(tmp_path):
    log = read_ml1m(tmp_path, b'73::Caf\xe9 \x85 Noir (1995)::Drama\n')
    assert log.metadata['73'].title == 'Café \x85 Noir (1995)'


def test_d05_titles_without_a_normal_year(tmp_path):
    log = read_ml100k(
        tmp_path,
        b'1|unknown||||1|0|0\n2|Giving (1995) (V)|01-Jan-1995|||0|1|0\n'
        b'3|Two Friends (1986) |26-Apr-1986|||0|1|1\n',
    )
    assert [log.metadata[raw_id].title for raw_id in '12'] == ['unknown', 'Giving (1995) (V)']
    assert log.metadata['3'].keywords == ('Comedy', 'Drama')


def test_d06_titles_stay_as_they_are(tmp_path):
    titles = [
        'American President, The (1995)',
        'Postino, Il (The Postman) (1994)',
        "Enfer, L' (1994)",
    ]
    lines = ''.join(f'{number}::{title}::Drama\n' for number, title in enumerate(titles, start=1))
    log = read_ml1m(tmp_path, lines.encode())
    assert [item.title for item in log.metadata.values()] == titles


@pytest.mark.parametrize('write', [write_ml100k, write_ml1m])
def test_folder_subfolder_and_archive_are_the_same(tmp_path, write):
    read = movielens.read_ml100k if write is write_ml100k else movielens.read_ml1m
    folder = write(tmp_path / 'outer' / 'inner')
    archive = shutil.make_archive(tmp_path / 'data', 'zip', tmp_path / 'outer')
    logs = [read(open_files(path)) for path in (folder, folder.parent, archive)]
    assert len(logs[0].users) > 300
    for log in logs[1:]:
        assert log.metadata == logs[0].metadata
        assert log.user_ids == logs[0].user_ids
        for name in ('users', 'items', 'times'):
            assert getattr(log, name).tolist() == getattr(logs[0], name).tolist()


def test_d08_the_size_of_a_block_does_not_matter(tmp_path, monkeypatch):
    raw = open_files(write_ml1m(tmp_path))
    whole = movielens.read_ml1m(raw)
    for size in (7, 64, 1000):
        monkeypatch.setattr(files, '_BLOCK', size)
        parts = movielens.read_ml1m(raw)
        assert parts.items.tolist() == whole.items.tolist()
        assert parts.times.tolist() == whole.times.tolist()


def test_long_files_show_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(files, '_BLOCK', 100)
    made = []

    class Recorder(files.Progress):
        def __init__(self, name, total, unit):
            super().__init__(name, total, unit)
            made.append(self)

    monkeypatch.setattr(files, 'Progress', Recorder)
    movielens.read_ml1m(open_files(write_ml1m(tmp_path)))
    assert [(p.name, p.done) for p in made] == [('ratings.dat', made[0].total)]


@pytest.mark.parametrize(
    ('ratings', 'message'),
    [
        (b'', r'ratings\.dat: the file is empty'),
        (b'1,73,5,978300760\n', r"ratings\.dat, line 1: found 1 fields in '1,73,5,978300760'.*::"),
        (RATINGS + b'1::2::3\n', r"line 4: found 3 fields in '1::2::3'; needed 4"),
        (RATINGS + b'\n\n1::2::3::x\n', r"line 6: timestamp is 'x'; allowed are whole numbers"),
        (b'1::73::5::-5\n', r"line 1: timestamp is '-5'"),
        (b'1::73::9::5\n', r"line 1: rating is '9'; allowed are 1, 2, 3, 4, 5"),
        (b'1::::5::5\n', r"line 1: item id is ''"),
        (b'9' * 19 + b'::1::5::5\n', r"line 1: user id is '9999999999999999999'; .* 18 digits"),
        (b'1::73::5::978300760\xe9\n', r"line 1: timestamp is '978300760é'"),
    ],
)
def test_malformed_ratings(tmp_path, ratings, message):
    with pytest.raises(InputError, match=message):
        read_ml1m(tmp_path, b'73::A (1995)::Drama\n', ratings)


@pytest.mark.parametrize(
    ('movies', 'message'),
    [
        (b'', r'movies\.dat: the file is empty'),
        (b'1::A (1995)\n', r"movies\.dat, line 1: found 2 fields in '1::A \(1995\)'; needed 3"),
        (b'x::A (1995)::Drama\n', r"line 1: id is 'x'; allowed are whole numbers"),
        (b'1::A::Drama\n1::B::War\n', r'line 2: id 1 occurs a second time'),
    ],
)
def test_malformed_movies(tmp_path, movies, message):
    with pytest.raises(InputError, match=message):
        read_ml1m(tmp_path, movies)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'item': b'1|A (1995)||||1|0\n'}, r'u\.item, line 1: found 7 fields .* needed 8'),
        ({'item': b'1|A (1995)||||1|0|2\n'}, r"line 1: genre Drama is '2'; allowed are 0 and 1"),
        ({'item': b''}, r'u\.item: the file is empty'),
        ({'genre': b''}, r'u\.genre: the file is empty'),
        ({'genre': b'unknown|0\nDrama|2\n'}, r"u\.genre, line 2: found 'Drama\|2'; needed is .*1"),
        ({'data': b'1 1 5 100\n'}, r'u\.data, line 1: found 1 fields .* separated by tab'),
    ],
)
def test_malformed_ml100k(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read_ml100k(tmp_path, **({'item': b'1|A (1995)||||0|1|0\n'} | change))


def test_a_page_instead_of_an_archive(tmp_path):
    path = tmp_path / 'ml-1m.zip'
    path.write_bytes(b'\n<!DOCTYPE html><html><body>Log in</body></html>')
    with pytest.raises(InputError, match=r'ml-1m\.zip: this is an HTML page, not an archive'):
        open_files(path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'the file is empty'),
        (b'1\t2\t3\t4\n', r'not a zip archive \(it starts with'),
        (b'PK\x03\x04 and no more', 'the zip archive is truncated or damaged'),
    ],
)
def test_not_an_archive(tmp_path, content, message):
    path = tmp_path / 'ml-1m.zip'
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_files(path)


def test_a_truncated_archive(tmp_path):
    archive = shutil.make_archive(tmp_path / 'ml', 'zip', write_ml1m(tmp_path / 'ml'))
    content = (tmp_path / 'ml.zip').read_bytes()
    (tmp_path / 'ml.zip').write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match='truncated or damaged'):
        open_files(archive)


@pytest.mark.parametrize(
    ('at', 'byte'),
    [(6, 0xFF), (8, 0x08)],
    ids=['a version that zipfile lacks', 'a name that is not UTF-8'],
)
def test_an_archive_with_a_damaged_directory(tmp_path, at, byte):
    path = tmp_path / 'ml.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('movies.dat', '1::A::B')
    content = bytearray(path.read_bytes().replace(b'movies', b'movie\xff'))
    content[content.index(b'PK\x01\x02') + at + (at == 8)] = byte
    path.write_bytes(content)
    with pytest.raises(InputError, match=r'ml\.zip: the zip archive is truncated or damaged'):
        open_files(path)


def test_a_damaged_member(tmp_path):
    write_ml1m(tmp_path)
    path = tmp_path / 'ml.zip'
    with zipfile.ZipFile(path, 'w') as archive:  # stored, so that bytes can be changed in place
        for name in ('ratings.dat', 'movies.dat'):
            archive.write(tmp_path / name, name)
    path.write_bytes(path.read_bytes().replace(b'Harbor', b'Harbix'))
    with pytest.raises(InputError, match=r'movies\.dat: the archive is damaged'):
        movielens.read_ml1m(open_files(path))


def test_a_missing_file_is_named(tmp_path):
    folder = write_ml1m(tmp_path)
    (folder / 'movies.dat').unlink()
    with pytest.raises(InputError, match=r'movies\.dat is missing; found ratings\.dat'):
        movielens.read_ml1m(open_files(folder))
    with pytest.raises(InputError, match=r'u\.data is missing'):
        movielens.read_ml100k(open_files(folder))


def test_two_copies_are_refused(tmp_path):
    write_ml1m(tmp_path / 'a')
    write_ml1m(tmp_path / 'b')
    with pytest.raises(
        InputError, match=r'found more than once \(a/ratings\.dat, b/ratings\.dat\)'
    ):
        movielens.read_ml1m(open_files(tmp_path))


def test_a_missing_path(tmp_path):
    with pytest.raises(InputError, match=r'config\.data\.path: .*nowhere does not exist'):
        open_files(tmp_path / 'nowhere')


def test_d01_the_made_up_files_have_what_the_real_ones_have(tmp_path):
    raw = (write_ml100k(tmp_path) / 'u.item').read_bytes()
    with pytest.raises(UnicodeDecodeError):
        raw.decode('utf-8')
    assert b'unknown|' in raw
    assert b'(V)|' in raw
    assert b' |' in raw
    assert raw == (write_ml100k(tmp_path / 'again') / 'u.item').read_bytes()
