"""Tables of one's own, in every kind of file: the same log, and everything that can be wrong."""

import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from absl import logging

from palr_jax.config import default_config
from palr_jax.data import load, table_file
from palr_jax.errors import InputError
from palr_jax.testing import write_ml100k

HEAD = 'user,item,time\n'


def make_config(path, k_core=0, **fields):
    config = default_config().data
    config.update({'source': 'table', 'path': str(path), 'k_core': k_core})
    for name, value in fields.items():
        config[name] = str(value)
    return config


def load_text(folder, text, name='log.csv', **fields):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(make_config(path, **fields))


def histories(source):
    """[(raw user id, raw item id, second)] in the order of the interactions."""
    events = source.interactions
    return [
        (events.user_ids[user], source.catalogue.raw_ids[item], second)
        for user, item, second in zip(events.users, events.items, events.times.tolist())
    ]


ROWS = [('b', 'x1', 30), ('a', '007', 20), ('b', '7', 10), ('c', 'x1', 5), ('a', 'é', 20)]
EXPECTED = [('a', '007', 20), ('a', 'é', 20), ('b', '7', 10), ('b', 'x1', 30), ('c', 'x1', 5)]


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl', 'ndjson', 'parquet', 'csv.gz', 'jsonl.gz'])
def test_every_kind_of_file_gives_the_same_log(tmp_path, kind):
    path = tmp_path / f'log.{kind}'
    table = pa.table({name: list(column) for name, column in zip(HEAD[:-1].split(','), zip(*ROWS))})
    table = table.append_column('comment', pa.array(['two\nlines, "quoted"', '', 'x', 'é', ' ']))
    with gzip.open(path, 'wb') if kind.endswith('.gz') else path.open('wb') as stream:
        if kind.startswith('csv') or kind == 'tsv':
            options = pa_csv.WriteOptions(delimiter='\t' if kind == 'tsv' else ',')
            pa_csv.write_csv(table, stream, options)
        elif kind == 'parquet':
            pq.write_table(table, stream)
        else:
            stream.write('\n'.join(map(json.dumps, table.to_pylist())).encode())
    source = load(make_config(path))
    assert histories(source) == EXPECTED
    assert source.record['name'] == 'log'
    assert source.record['rows_read'] == 5
    assert list(source.record['sha256']) == [path.name]


def test_movielens_as_a_table_is_the_same_data_set(tmp_path):
    """Also in small blocks, and from a folder of parts."""
    folder = write_ml100k(tmp_path / 'ml')
    config = default_config().data
    config.update({'source': 'ml100k', 'path': str(folder)})
    official = load(config)
    lines = (folder / 'u.data').read_text().splitlines()
    titles = official.catalogue
    parts = tmp_path / 'parts'
    parts.mkdir()
    for part in range(3):
        rows = lines[part * len(lines) // 3 : (part + 1) * len(lines) // 3]
        (parts / f'part-{part}.tsv').write_text('\n'.join(['u\ti\tstars\tt', *rows]))
    (parts / '_SUCCESS').write_text('')
    items = [
        json.dumps({'item': int(raw_id), 'title': title, 'keywords': list(words)})
        for raw_id, title, words in zip(titles.raw_ids[1:], titles.titles[1:], titles.keywords[1:])
    ]
    (tmp_path / 'items.jsonl').write_text('\n'.join(items))
    config = make_config(parts, k_core=5, items_path=tmp_path / 'items.jsonl')
    config.columns.update({'user': 'u', 'item': 'i', 'time': 't'})
    ours = load(config)
    assert ours.catalogue == official.catalogue
    for name in ('users', 'items', 'times'):
        np.testing.assert_array_equal(
            getattr(ours.interactions, name), getattr(official.interactions, name), strict=True
        )
    assert set(ours.record['sha256']) == {
        'items.jsonl',
        'part-0.tsv',
        'part-1.tsv',
        'part-2.tsv',
    }


def test_d08_the_size_of_a_block_does_not_matter(tmp_path, monkeypatch):
    rows = [f'u{n % 7},i{n * n % 11},{n // 3}' for n in range(200)]
    expected = histories(load_text(tmp_path, HEAD + '\n'.join(rows)))
    monkeypatch.setattr(table_file, '_BLOCK', 100)
    assert histories(load_text(tmp_path, HEAD + '\n'.join(rows))) == expected


@pytest.mark.parametrize(
    ('column', 'seconds'),
    [
        (pa.array([1.5e9, 1.0, 2.0]), [1_500_000_000, 1, 2]),
        (pa.array([3, 1, 2], pa.uint16()), [3, 1, 2]),
        (pa.array([86_400_500, 1_000, 0], pa.timestamp('ms')), [86_400, 1, 0]),
        (pa.array([2, 1, 0], pa.date32()), [172_800, 86_400, 0]),
        (pa.array(['3e0', '-1.5', '2']), [3, -2, 2]),
    ],
)
def test_times(tmp_path, column, seconds):
    pq.write_table(
        pa.table({'user': [1, 2, 3], 'item': [1, 1, 1], 'time': column}), tmp_path / 'log.parquet'
    )
    assert load(make_config(tmp_path / 'log.parquet')).interactions.times.tolist() == seconds


def test_ids_in_parquet_may_be_a_dictionary_or_numbers(tmp_path):
    table = pa.table(
        {
            'user': pa.array(['b', 'a', 'c']).dictionary_encode(),
            'item': pa.array([10, 9, 10], pa.int32()),
            'time': [1, 2, 3],
        }
    )
    pq.write_table(table, tmp_path / 'log.parquet')
    source = load(make_config(tmp_path / 'log.parquet'))
    assert source.interactions.user_ids == ('a', 'b', 'c')
    assert source.catalogue.raw_ids == ('', '9', '10')


ROW = '1,2,3\n'


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('a.csv', b'', r'a\.csv: the file is empty'),
        ('a.csv', HEAD, r'a\.csv has no rows; needed is a row for each event'),
        ('a.jsonl', '\n', r'a\.jsonl has no rows'),
        ('a.txt', HEAD, r'a\.txt: the name does not tell the kind of the table; allowed are \.csv'),
        (
            'a.csv',
            'user;item;time\n1;2;3\n',
            r"a\.csv: the column 'user' is missing; found the columns 'user;item;time', separated "
            r"by ',': set config\.data\.columns\.user or config\.data\.delimiter",
        ),
        ('a.csv', 'uid,item,time\n1,2,3\n', r"'user' is missing; found the columns 'uid', 'item'"),
        ('a.csv', 'user,item,time,time\n1,2,3,3\n', r"the column 'time' occurs more than once"),
        ('a.csv', HEAD + '\n1,2,3\n\n1,2\n', r"a\.csv, line 5: found 2 fields in '1,2'; needed 3"),
        ('a.csv', HEAD + '1,2,3\n1,"2,3\n', r'a\.csv, line 3: found 2 fields in .*needed 3'),
        ('a.csv', HEAD + '1,2,3\n\n1,2,noon\n', r"a\.csv, line 4: time is 'noon'; allowed are num"),
        ('a.csv', HEAD + '1,"2\n2",3\n1,2,\n', r"a\.csv, line 4: time is ''; allowed are numbers"),
        ('a.csv', HEAD + ROW * 9 + '1,2,nan\n', r"line 11: time is 'nan'"),
        ('a.csv', HEAD + '1,2,2011-01-01\n', r"line 2: time is '2011-01-01'; allowed are numbers"),
        ('a.csv', HEAD + '1,2,1e300\n', r"line 2: time is '1e300'"),
        ('a.csv', HEAD + '1,2,3\n,2,3\n', r"line 3: user is ''; needed is an id"),
        ('a.csv', HEAD + '1,nan,3\n', r"line 2: item is 'nan'; needed is an id"),
        ('a.csv', HEAD + '1, 2,3\n', r"line 2: item is ' 2'; allowed are ids that neither begin"),
        ('a.csv', HEAD + '1,2,3\n1.0,2,3\n', r"line 3: user is '1\.0'; '1' stands for the same"),
        ('a.csv', HEAD + '1,2.0,3\n1,2,3\n', r"line 3: item is '2'; '2\.0' stands for the same"),
        (
            'a.csv',
            HEAD.encode() + b'1,2,3\n\n1,caf\xe9,3\n',
            r"line 4: byte 0xe9 in 'café' is not UTF-8; allowed is UTF-8",
        ),
        ('a.csv', HEAD.encode() + b'1,2,3\xe9\n', r"line 2: time is '3é'; allowed are numbers"),
        ('a.csv', b'us\xe9r,item,time\n1,2,3\n', r'a\.csv: not a readable \.csv file .*utf-8'),
        ('a.jsonl', '{"user": 1, "item": 2}\n', r"a\.jsonl: the column 'time' is missing; found"),
        (
            'a.jsonl',
            '{"user": 1,\n',
            r"a\.jsonl, line 1: found '\{\"user\": 1,'; needed is one",
        ),
        ('a.jsonl', '[1, 2, 3]\n', r'line 1: found .* needed is one JSON object'),
        (
            'a.jsonl',
            '{"user": 1, "item": 2, "time": 3}\n\n{"user": "1", "item": 2, "time": 3}\n',
            r"a\.jsonl, line 3: user is \"'1'\", text, and a number in the lines before; allowed i",
        ),
        ('a.jsonl', '{"user": 1.5, "item": 2, "time": 3}', r'user is of the type double; allowed'),
        ('a.jsonl', '{"user": true, "item": 2, "time": 3}', r'user is of the type bool; allowed'),
        (
            'a.jsonl',
            '{"user": 1, "item": 2, "time": 3}\n{"user": null, "item": 2, "time": 3}',
            r'line 2: user is empty; needed is an id',
        ),
        ('a.jsonl', '{"user": 1, "item": 2, "time": "x"}', r"line 1: time is 'x'; allowed are num"),
        ('a.jsonl', '{"user": 1, "item": 2, "time": [1]}', r'time is of the type list<.*allowed'),
        (
            'a.jsonl',
            b'{"user": "\xe9", "item": 2, "time": 1}',
            r'line 1: byte 0xe9 in .* UTF-8',
        ),
        ('a.jsonl', '{"user": 36893488147419103232, "item": 2, "time": 1}', r'not a readable'),
        (
            'a.jsonl',
            r'{"user": "\ud83d\ude00", "item": 2, "time": 1}'
            '\n\n'
            r'{"user": "a \ud83d", "item": 2, "time": 1}',
            r"a\.jsonl, line 3: user has 'a \\ud83d', which holds half a surrogate pair",
        ),
        ('a.parquet', b'PAR1 and no more', r'a\.parquet: not a readable \.parquet file'),
        ('a.csv.gz', b'no gzip', r'a\.csv\.gz: the archive is damaged'),
    ],
)
def test_bad_logs(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        load_text(tmp_path, text, name)


def test_bad_types_in_parquet(tmp_path):
    good = {'user': pa.array([1, 2]), 'item': pa.array(['a', 'b']), 'time': pa.array([1, 2])}
    for name, column, message in [
        ('user', pa.array([1.0, 2.0]), r'log\.parquet, row 1: user is of the type double; allowed'),
        ('item', pa.array(['a', None]), r'log\.parquet, row 2: item is empty; needed is an id'),
        ('time', pa.array([1, None]), r'log\.parquet, row 2: time is empty; needed is a time'),
        ('time', pa.array([1.0, np.inf]), r"log\.parquet, row 2: time is 'inf'; allowed are numb"),
    ]:
        pq.write_table(pa.table(good | {name: column}), tmp_path / 'log.parquet')
        with pytest.raises(InputError, match=message):
            load(make_config(tmp_path / 'log.parquet'))


def test_paths_and_delimiters_are_checked(tmp_path):
    with pytest.raises(InputError, match=r'config\.data\.path: .*none\.csv does not exist'):
        load(make_config(tmp_path / 'none.csv'))
    with pytest.raises(InputError, match=r'found no files; needed are tables \(\.csv, \.tsv'):
        load(make_config(tmp_path))
    for delimiter in ('::', 'é', '\0', '\n', '"'):
        with pytest.raises(
            InputError, match=r'config\.data\.delimiter is .*; allowed are one printable ASCII'
        ):
            load_text(tmp_path, HEAD, delimiter=delimiter)
    (tmp_path / 'log.tsv').write_text('')
    with pytest.raises(InputError, match=r'found log\.csv, log\.tsv; allowed are tables of one'):
        load(make_config(tmp_path))
    assert len(histories(load_text(tmp_path, 'user;item;time\n1;2;3\n2;2;3\n3;2;3', delimiter=';')))


def test_the_delimiter_is_not_that_of_json_lines(tmp_path):
    (tmp_path / 'items.jsonl').write_text('{"item": 1, "title": "A; B", "keywords": null}')
    source = load_text(
        tmp_path, LOG.replace(',', ';'), items_path=tmp_path / 'items.jsonl', delimiter=';'
    )
    assert source.catalogue.titles[1] == 'A; B'


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path):
    assert len(histories(load_text(tmp_path, b'\xef\xbb\xbf' + LOG.encode()))) == 3


def test_a_field_too_long_for_a_line_number(tmp_path):
    text = 'user,item,time,text\nu,1,3,' + 'x' * 200_000 + '\nu,1,x,y\n'
    with pytest.raises(InputError, match=r"log\.csv, row 2: time is 'x'; allowed are numbers"):
        load_text(tmp_path, text)


LOG = HEAD + 'u,1,3\nv,2,3\nw,3,3\n'


def load_items(folder, text, name='items.csv', **fields):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_text(folder, LOG, items_path=path, **fields)


def test_a03_titles_that_are_missing(tmp_path, monkeypatch):
    """A placeholder, the number in the record, and the first place in the log."""
    said = []
    monkeypatch.setattr(logging, 'warning', lambda text, *args: said.append(text % args))
    text = 'item,title,keywords\n1,Heat  (1995),Crime| Drama |\n2,,\n9,,\n3,nan,nan\n'
    source = load_items(tmp_path, text)
    titles = source.catalogue.titles[1:]
    assert titles == ('Heat (1995)', 'Untitled item 2', 'Untitled item 3')
    assert source.catalogue.keywords[1:] == (('Crime', 'Drama'), (), ())
    assert source.catalogue.years[1:] == (1995, None, None)
    assert source.record['titles']['placeholder'] == 2
    assert set(source.record['sha256']) == {'log.csv', 'items.csv'}
    (line,) = said
    assert 'items.csv, line 3: no title, as of 2 items' in line


def test_items_without_keywords_or_table(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, 'warning', lambda text, *args: said.append(text % args))
    (tmp_path / 'items.parquet').unlink(missing_ok=True)
    pq.write_table(
        pa.table({'item': [1, 2, 3], 'name': ['A', None, 'C']}), tmp_path / 'items.parquet'
    )
    (tmp_path / 'log.csv').write_text(LOG)
    config = make_config(tmp_path / 'log.csv', items_path=tmp_path / 'items.parquet')
    config.item_columns.update({'title': 'name', 'keywords': ''})
    assert load(config).catalogue.titles[1:] == ('A', 'Untitled item 2', 'C')
    config.items_path = ''
    assert load(config).catalogue.titles[1] == 'Untitled item 1'
    assert 'config.data.items_path is not set' in said[-1]


def test_a_table_of_items_needs_the_column_of_their_ids(tmp_path):
    (tmp_path / 'log.csv').write_text(LOG)
    (tmp_path / 'items.csv').write_text('item,title,keywords\n1,A,x\n')
    config = make_config(tmp_path / 'log.csv', items_path=tmp_path / 'items.csv')
    config.item_columns.item = ''
    with pytest.raises(
        InputError, match=r"item_columns\.item is ''; needed is the column of the id"
    ):
        load(config)


def test_a_text_without_separator_is_one_keyword(tmp_path):
    text = 'item,title,keywords\n1,A,Sci-Fi  & Fantasy\n2,B,\n'
    source = load_items(tmp_path, text, keyword_separator='')
    assert source.catalogue.keywords[1:] == (('Sci-Fi & Fantasy',), (), ())


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_lists_of_keywords_may_all_be_empty(tmp_path, kind):
    table = pa.table({'item': [1, 2], 'title': ['A', 'B'], 'keywords': [[], []]})
    path = tmp_path / f'items.{kind}'
    if kind == 'jsonl':
        path.write_text('\n'.join(map(json.dumps, table.to_pylist())))
    else:
        pq.write_table(table, path)
    source = load_text(tmp_path, LOG, items_path=path)
    assert source.catalogue.titles[1] == 'A'
    assert source.catalogue.keywords[1:] == ((), (), ())


def test_the_table_of_items_may_lie_among_the_parts(tmp_path):
    """Of another kind than they, and named by another way to it."""
    folder = tmp_path / 'events'
    folder.mkdir()
    (folder / 'part-0.csv').write_text(LOG)
    table = pa.table({'item': [1], 'title': ['A'], 'keywords': ['x']})
    pq.write_table(table, folder / 'items.parquet')
    for path in (folder / 'items.parquet', folder / '..' / 'events' / 'items.parquet'):
        source = load(make_config(folder, items_path=path))
        assert source.catalogue.titles[1] == 'A'
        assert set(source.record['sha256']) == {'part-0.csv', 'items.parquet'}


def test_the_table_of_items_may_have_the_name_of_a_part(tmp_path):
    for folder, text in (('events', LOG), ('items', 'item,title,keywords\n1,A,x\n')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'part-0.csv').write_text(text)
    items = tmp_path / 'items' / 'part-0.csv'
    source = load(make_config(tmp_path / 'events', items_path=items))
    hashes = source.record['sha256']
    assert set(hashes) == {'part-0.csv', str(items)}
    assert hashes[str(items)] == hashlib.sha256(items.read_bytes()).hexdigest()


def test_lists_of_keywords(tmp_path):
    pq.write_table(
        pa.table(
            {'item': [1, 2, 3], 'title': ['A', 'B', 'C'], 'keywords': [['x ', 'y'], [], None]}
        ),
        tmp_path / 'items.parquet',
    )
    source = load_text(tmp_path, LOG, items_path=tmp_path / 'items.parquet')
    assert source.catalogue.keywords[1:] == (('x', 'y'), (), ())


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        (
            'items.csv',
            'item,name,keywords\n1,A,x\n',
            r"items\.csv: the column 'title' is missing; found the columns 'item', 'name', "
            r"'keywords', .*: set config\.data\.item_columns\.title or config\.data\.delimiter",
        ),
        (
            'items.csv',
            'item,title,keywords\n1,"two\nlines",x\n1,A,x\n',
            r'items\.csv, line 4: item 1 occurs a second time; allowed is one row an item',
        ),
        (
            'items.csv',
            b'item,title,keywords\n1,Caf\xe9,x\n',
            r"items\.csv, line 2: byte 0xe9 in 'Café' is not UTF-8",
        ),
        (
            'items.csv',
            'item,title,keywords\nB1,A,x\n',
            r"none of its items is in the log; it has 'B1', the log '1', '2', '3'",
        ),
        (
            'items.jsonl',
            '{"item": 1, "title": 1984, "keywords": []}',
            r'items\.jsonl, line 1: title is of the type int64; allowed is text',
        ),
        (
            'items.jsonl',
            '{"item": 1, "title": "A", "keywords": 7}',
            r'line 1: keywords is of the type int64; allowed are text and lists of text',
        ),
        (
            'items.jsonl',
            '{"item": 1, "title": "A", "keywords": [1]}\n',
            r'line 1: keywords is of the type list<.*int64>; allowed are text and lists',
        ),
        (
            'items.jsonl',
            r'{"item": 1, "title": "A", "keywords": ["x", "\ude00"]}',
            r'items\.jsonl, line 1: keywords has .*, which holds half a surrogate pair',
        ),
        ('items.csv', b'', r'items\.csv: the file is empty'),
    ],
)
def test_bad_items(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        load_items(tmp_path, text, name)


def test_a_missing_table_of_items_is_named(tmp_path):
    with pytest.raises(InputError, match=r'config\.data\.items_path: .*no\.csv does not exist'):
        load_text(tmp_path, LOG, items_path=tmp_path / 'no.csv')
