"""Amazon 2014: lines that are not JSON, titles, categories, and everything that can be wrong."""

import gzip
import json
import shutil

import pytest
from ml_collections import ConfigDict

from palr_jax.data import amazon, load, make_split
from palr_jax.data.files import open_files
from palr_jax.errors import InputError
from palr_jax.testing import write_amazon

REVIEW = b'{"reviewerID": "A1", "asin": "B1", "unixReviewTime": 1318896000}\n'
META = b"{'asin': 'B1', 'title': 'Soap'}\n"


def read(folder, meta=META, reviews=REVIEW):
    (folder / 'reviews_Toys_and_Games_5.json').write_bytes(reviews)
    (folder / 'meta_Toys_and_Games.json').write_bytes(meta)
    return amazon.read(amazon.open_category(folder))[1]


def make_reviews(*items):
    return b''.join(REVIEW.replace(b'B1', item.encode()) for item in items)


def load_path(path, k_core=5):
    return load(ConfigDict({'source': 'amazon', 'path': str(path), 'k_core': k_core}))


def test_a01_python_dicts_beside_json(tmp_path):
    log = read(
        tmp_path,
        b"""{'asin': 'B001', 'title': "Burt's Bees"}\n{"asin":"B002","title":"X"}\n""",
        make_reviews('B001', 'B002'),
    )
    assert {raw_id: item.title for raw_id, item in log.metadata.items()} == {
        'B001': "Burt's Bees",
        'B002': 'X',
    }


@pytest.mark.parametrize(
    'line',
    [
        "__import__('os').system('touch {pwned}')",
        "{{'asin': 'B1', 'title': __import__('os').system('touch {pwned}')}}",
        "{{'asin': 'B1', **{{'title': open('{pwned}', 'w')}}}}",
        "{{'asin': 'B1', 'title': [c for c in open('{pwned}', 'w')]}}",
        "('asin', 'B1')",
        '["asin", "B1"]',
        '17',
        '{{"asin": ' + '-' * 100_000 + '1}}',
        '{{"asin": ' + '[' * 100_000 + '}}',
        "{{'asin': 1" + ' + 1' * 100_000 + '}}',
        "{{[]: 'B1'}}",
        "{{'asin': '\0'}}",
    ],
)
def test_a01_code_is_refused_with_its_line_and_not_executed(tmp_path, line):
    pwned = tmp_path / 'pwned'
    line = line.format(pwned=pwned).encode()
    with pytest.raises(
        InputError, match=r'meta_Toys_and_Games\.json, line 2: found .*; needed is one JSON'
    ):
        read(tmp_path, META + line + b'\n')
    assert not pwned.exists()


def test_a01_a_very_long_literal_is_not_even_parsed(tmp_path):
    line = b"{'asin': 'B1', 'title': '" + b'x' * (1 << 22) + b"'}\n"
    with pytest.raises(InputError, match=r"line 1: found '\{'asin'|line 1: found \"\{'asin'"):
        read(tmp_path, line)


def test_backslashes_that_escape_nothing_are_no_error(tmp_path):
    log = read(tmp_path, b"{'asin': 'B1', 'title': 'A \\d B'}\n")
    assert log.metadata['B1'].title == r'A \d B'


def test_a02_a_broken_record_is_named(tmp_path):
    lines = [b"{'asin': 'B%d', 'title': 'x'}" % n for n in range(5)]
    lines[2] = b"{'asin': 'B0', 'tit 'x'}"
    with pytest.raises(
        InputError, match=r"meta_Toys_and_Games\.json, line 3: found \"\{'asin': 'B0', 'tit 'x'\}\""
    ):
        read(tmp_path, b'\n'.join(lines))


def test_a03_items_without_a_title_get_brand_and_category(tmp_path):
    """The rule of PAPER.md, section 3; they keep their place in the counts."""
    meta = (
        b"{'asin': 'B1', 'brand': 'OPI &amp; Co', 'categories': [['Beauty', 'Makeup', 'Polish']]}\n"
        b"{'asin': 'B2', 'title': '', 'categories': [['Beauty', 'Hair Sprays']]}\n"
        b"{'asin': 'B3', 'title': None, 'brand': 'OPI'}\n"
        b'{"asin": "B4", "title": NaN, "brand": NaN}\n'
        b"{'asin': 'B5', 'title': 'nan', 'brand': 'None', 'categories': [['Beauty']]}\n"
    )
    items = [f'B{n}' for n in range(1, 7)]
    read(tmp_path, meta, b''.join(REVIEW.replace(b'A1', u) for u in (b'A1', b'A2', b'A3')))
    reviews = make_reviews(*items) + REVIEW.replace(b'A1', b'A2') + REVIEW.replace(b'A1', b'A3')
    (tmp_path / 'reviews_Toys_and_Games_5.json').write_bytes(reviews)
    source = load_path(tmp_path, k_core=0)
    assert source.catalogue.titles[1:] == (
        'OPI & Co Polish',
        'Hair Sprays',
        'OPI',
        'Untitled item B4',
        'Beauty',
        'Untitled item B6',
    )
    assert source.record['titles']['placeholder'] == 6
    assert source.record['items'] == 6


def test_titles_are_cleaned(tmp_path):
    title = r' Salt &amp; Pepper\n &amp;quot;No.&#39;5&quot;  R&D &not '
    meta = f"{{'asin': 'B1', 'title': '{title}'}}\n".encode()
    assert read(tmp_path, meta).metadata['B1'].title == 'Salt & Pepper "No.\'5" R&D &not'
    meta = b'{"asin": "B1", "title": "Caf\\u00e9 \\ud83d\\ude00 \\ud83d"}\n'
    log = read(tmp_path, meta)
    assert log.metadata['B1'].title == 'Café 😀 \ufffd'


def test_categories_become_keywords_below_the_root_without_repeats(tmp_path):
    paths = [['Beauty', 'Hair &amp; Body', 'Bath'], ['Gifts'], ['Home', 'Bath', 'Salts'], []]
    meta = json.dumps({'asin': 'B1', 'title': 'Soap', 'categories': paths}).encode()
    assert read(tmp_path, meta).metadata['B1'].keywords == ('Hair & Body', 'Bath', 'Salts')


def test_a06_the_record(tmp_path):
    folder = write_amazon(tmp_path)
    source = load_path(folder)
    record = source.record
    assert record['name'] == 'beauty'
    assert set(record['sha256']) == {'meta_Beauty.json.gz', 'reviews_Beauty_5.json.gz'}
    kept = load_path(folder, k_core=0)
    titles = dict(zip(kept.catalogue.raw_ids, kept.catalogue.titles))
    assert titles['B000000002'].startswith('Kitanova ')
    assert titles['B000000003'] != ''
    assert titles['B000000005'] == 'Nameless "No. 5" Soap'
    assert titles['B000000006'] == titles['B000000007']
    assert kept.record['titles']['placeholder'] == 3
    assert kept.record['titles']['shared'] >= 1
    assert not any('&amp;' in word for words in kept.catalogue.keywords for word in words)
    assert make_split(source.interactions, 'leave_one_out').users('test').size == record['users']


@pytest.mark.parametrize('form', ['unpacked', 'file', 'subfolder', 'zip'])
def test_every_form_gives_the_same_data(tmp_path, form):
    expected = load_path(write_amazon(tmp_path / 'a'))
    if form == 'unpacked':
        path = write_amazon(tmp_path / 'b', packed=False)
    elif form == 'file':  # beside another category
        write_amazon(tmp_path / 'a', category='Office_Products', seed=1)
        path = tmp_path / 'a' / 'reviews_Beauty_5.json.gz'
    elif form == 'subfolder':
        path = tmp_path
    else:
        path = shutil.make_archive(tmp_path / 'beauty', 'zip', tmp_path / 'a')
    source = load_path(path)
    assert source.catalogue == expected.catalogue
    for name in ('users', 'items', 'times'):
        ours, theirs = (getattr(s.interactions, name) for s in (source, expected))
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ('reviews', 'message'),
    [
        (b'', r'reviews_Toys_and_Games_5\.json: the file is empty'),
        (REVIEW + b'A1,B1,5,100\n', r"line 2: found 'A1,B1,5,100'; needed is one JSON object"),
        (
            REVIEW.replace(b'1318896000', b'"noon"'),
            r"line 1: unixReviewTime is \"'noon'\"; all",
        ),
        (
            REVIEW.replace(b'1318896000', b'-5'),
            r"line 1: unixReviewTime is '-5'; allowed are",
        ),
        (REVIEW.replace(b'1318896000', b'1.5'), r"line 1: unixReviewTime is '1\.5'; allowed are"),
        (REVIEW.replace(b'"A1"', b'7'), r"line 1: reviewerID is '7'; needed is a text"),
        (REVIEW.replace(b'"B1"', b'null'), r"line 1: asin is 'None'; needed is a text"),
        (REVIEW.replace(b'"asin"', b'"item"'), r'line 1: asin is missing; needed is a text'),
        (b'\n' + REVIEW.replace(b'A1', b'\xe9'), r'line 2: byte 0xe9 in .* is not UTF-8; allowed'),
    ],
)
def test_malformed_reviews(tmp_path, reviews, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, reviews=reviews)


@pytest.mark.parametrize(
    ('meta', 'message'),
    [
        (b"{'asin': 'B1', 'title': 5}\n", r"line 1: title is '5'; allowed are a text and nothing"),
        (b"{'title': 'A'}\n", r'line 1: asin is missing'),
        (b"{'asin': 'B1', 'categories': ['A']}", r'line 1: categories is .*; allowed is a list of'),
        (META + b"{'asin': 'B1', 'title': 'Other'}", r'line 2: asin B1 occurs a second time with'),
    ],
)
def test_malformed_metadata(tmp_path, meta, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, meta)


def test_a_line_of_metadata_may_be_repeated(tmp_path):
    assert read(tmp_path, META + META).metadata['B1'].title == 'Soap'


def test_a_truncated_gz_file(tmp_path):
    write_amazon(tmp_path)
    path = tmp_path / 'reviews_Beauty_5.json.gz'
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r'reviews_Beauty_5\.json\.gz: the archive is damaged'):
        load_path(tmp_path)
    path.write_bytes(b'<html>Log in</html>')
    with pytest.raises(InputError, match=r'reviews_Beauty_5\.json\.gz: the archive is damaged'):
        load_path(tmp_path)


def test_files_are_found_or_named(tmp_path):
    with pytest.raises(InputError, match=r'found 0 reviews files \(no files\); needed is one'):
        amazon.find(open_files(tmp_path))
    write_amazon(tmp_path)
    write_amazon(tmp_path, category='Books')
    with pytest.raises(InputError, match=r'found 2 reviews files .*config\.data\.path names the'):
        amazon.find(open_files(tmp_path))
    (tmp_path / 'meta_Books.json.gz').unlink()
    with pytest.raises(
        InputError, match=r'found 0 metadata files of the category Books .*one meta_Books\.json\.gz'
    ):
        amazon.find(amazon.open_category(tmp_path / 'reviews_Books_5.json.gz'))


def test_packed_files_show_progress(tmp_path, monkeypatch):
    monkeypatch.setattr('palr_jax.data.files._BLOCK', 100)
    made = []

    class Recorder(amazon.open_files.__globals__['Progress']):
        def __init__(self, name, total, unit):
            super().__init__(name, total, unit)
            made.append(self)

    monkeypatch.setattr('palr_jax.data.files.Progress', Recorder)
    folder = write_amazon(tmp_path)
    load_path(folder)
    size = (folder / 'reviews_Beauty_5.json.gz').stat().st_size
    assert gzip.decompress((folder / 'reviews_Beauty_5.json.gz').read_bytes()).count(b'\n') > 300
    shown = made[0]
    assert (shown.name, shown.total) == ('reviews_Beauty_5.json.gz', -(-size // 100))
    assert shown.done == shown.total
