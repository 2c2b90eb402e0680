"""RecBole atomic files, and their equality with the official layout."""

import pytest
from ml_collections import ConfigDict

from palr_jax.data import load, recbole, streams
from palr_jax.data.files import open_files
from palr_jax.errors import InputError

INTER = 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'
ITEM = 'item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n'


def read(folder, inter=INTER + 'u1\tB7\t5\t100\n', item=ITEM + 'B7\tHeat\t1995\tDrama\n'):
    (folder / 'x.inter').write_bytes(inter if isinstance(inter, bytes) else inter.encode())
    (folder / 'x.item').write_text(item, encoding='utf-8')
    return recbole.read(open_files(folder))


def test_fields_may_stand_in_any_order(tmp_path):
    log = read(
        tmp_path,
        'timestamp:float\titem_id:token\tuser_id:token\n8.75e2\tB7\té1\n9.5\tB2\tu2\n1\tB7\tu2\n',
        'title:token_seq\titem_id:token\nSoap, with Lavender\tB7\n',
    )
    assert log.times.tolist() == [875.0, 9.5, 1.0]
    assert log.user_ids == ('é1', 'u2')
    assert log.item_ids == ('B7', 'B2')
    assert log.users.tolist() == [0, 1, 1]
    assert log.items.tolist() == [0, 1, 0]
    assert log.metadata == {'B7': ('Soap, with Lavender', ())}


@pytest.mark.parametrize(
    ('title', 'year', 'restored'),
    [
        ('Heat', '1995', 'Heat (1995)'),
        ('Two Friends ', '1986', 'Two Friends (1986)'),
        ('Giving (1995)', 'V', 'Giving (1995) (V)'),
        ('unkonwn', 'unkonwn', 'unknown'),
        ('Heat (1995)', '1995', 'Heat (1995)'),
        ('Soap', '', 'Soap'),
        ('', '1995', ''),
    ],
)
def test_d05_titles_are_put_back_together(tmp_path, title, year, restored):
    log = read(tmp_path, item=f"{ITEM}B7\t{title}\t{year}\tAnimation Children's\n")
    assert log.metadata['B7'] == (restored, ('Animation', "Children's"))


def test_the_layout_of_movielens_25m(tmp_path):
    """Made-up rows: genres in `genre`, none listed, half stars, quotes, a run of years."""
    log = read(
        tmp_path,
        INTER + '1\t296\t5.0\t1147880044.0\n1\t306\t3.5\t1147868817.0\n',
        'item_id:token\tmovie_title:token_seq\trelease_year:token\tgenre:token_seq\n'
        '296\tMade Up\t1994\tComedy Crime Sci-Fi\n'
        '306\t"""Great"" Things"\t2006–2007\t(no genres listed)\n'
        '307\t"Great" Things\t\tDrama|IMAX\n',
    )
    assert log.times.tolist() == [1147880044, 1147868817]
    assert log.metadata == {
        '296': ('Made Up (1994)', ('Comedy', 'Crime', 'Sci-Fi')),
        '306': ('"Great" Things (2006–2007)', ()),
        '307': ('"Great" Things', ('Drama', 'IMAX')),
    }


def test_the_layout_of_movielens_10m(tmp_path):
    item = 'item_id:token\tmovie_name:token_seq\ttype:token_seq\n1\tHeat (1995)\tCrime Drama\n'
    assert read(tmp_path, item=item).metadata == {'1': ('Heat (1995)', ('Crime', 'Drama'))}


def test_the_layout_of_amazon_2023(tmp_path):
    """Made-up rows: milliseconds, which become seconds, categories with blanks, a missing title."""
    inter = INTER + ''.join(
        f'{user}\t{item}\t5.0\t{1588687728923 + n}\n'
        for n, (user, item) in enumerate(
            [('AG', 'B01'), ('AF', 'B02'), ('AG', 'B02'), ('AH', 'B01')]
        )
    )
    item = (
        'item_id:token\ttitle:token\tcategories:token_seq\tprice:float\n'
        'B01\t"Howard LC0008 Leather Conditioner, 8"" oz"\tSkin Care, Hands & Feet\t9.9\n'
        "B02\t\t'Hair Care', 'Brushes'\t\n"
    )
    log = read(tmp_path, inter, item)
    assert log.metadata['B01'] == (
        'Howard LC0008 Leather Conditioner, 8" oz',
        ('Skin Care', 'Hands & Feet'),
    )
    assert log.metadata['B02'] == ('', ('Hair Care', 'Brushes'))
    source = load(ConfigDict({'source': 'recbole', 'path': str(tmp_path), 'k_core': 0}))
    assert source.interactions.times.tolist() == [1588687728] * 4
    assert source.catalogue.titles[2] == 'Untitled item B02'


@pytest.mark.parametrize(
    ('inter', 'message'),
    [
        ('', r'x\.inter: the file has no rows'),
        (INTER, r'x\.inter: the file has no rows'),
        ('196\t242\t3\t881250949\n', r"line 1: found '196.*needed is a header .*field:type"),
        ('user_id,item_id\n', r"line 1: found 'user_id,item_id'; needed is a header"),
        (
            'user_id:token\titem_id:token\n1\t2\n',
            r'found the fields user_id, item_id; needed is time',
        ),
        (INTER + '1\t2\t3\n', r'x\.inter, line 2: found 3 fields .* needed 4, separated by tab'),
        (INTER + '1\t2\t3\t4\n1\t2\t3\tnan\n', r"line 3: timestamp is 'nan'; allowed are numbers"),
        (INTER + '1\t2\t3\tnoon\n', r"line 2: timestamp is 'noon'"),
        (
            INTER + '1\t2\t3\t4\n1\t2\t3\t1e30\n',
            r"line 3: timestamp is '1e30'; allowed are numbers",
        ),
        (INTER + '1\t\t3\t4\n', r'line 2: item_id is empty'),
        (
            f'{INTER}é\t2\t3\t4\n\n'.encode() + b'c\xe9\t2\t3\t4\n',
            r"x\.inter, line 4: byte 0xe9 in 'cé' \(user_id\) is not UTF-8; allowed is UTF-8",
        ),
        (
            INTER.encode() + b'1\t\xc3\t3\t4\n',
            r"line 2: byte 0xc3 in 'Ã' \(item_id\) is not UTF-8",
        ),
    ],
)
def test_malformed_interactions(tmp_path, inter, message):
    """Refused as a whole log, and event by event."""
    with pytest.raises(InputError, match=message):
        read(tmp_path, inter)
    if 'no rows' not in message:
        config = ConfigDict({'source': 'recbole', 'path': str(tmp_path), 'k_core': 0})
        with pytest.raises(InputError, match=message):
            list(streams.events(config, 'x.inter'))


@pytest.mark.parametrize(
    ('item', 'message'),
    [
        ('', r'x\.item: the file is empty'),
        ('item_id:token\n1\n', r'found the fields item_id; needed is movie_title or title or'),
        (
            ITEM + 'B7\tHeat\n',
            r'x\.item, line 2: found 2 fields .* needed 4 \(item_id, movie_title',
        ),
        (ITEM + 'B7\tA\t1995\tWar\nB7\tB\t1995\tWar\n', r'line 3: item_id B7 occurs a second time'),
    ],
)
def test_malformed_items(tmp_path, item, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, item=item)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r'NAME\.inter is missing; found no files'):
        recbole.read(open_files(tmp_path))
    (tmp_path / 'x.inter').write_text(INTER)
    with pytest.raises(InputError, match=r'x\.item is missing beside x\.inter'):
        recbole.read(open_files(tmp_path))
    (tmp_path / 'y.inter').write_text(INTER)
    with pytest.raises(InputError, match=r'found 2 \.inter files \(x\.inter, y\.inter\)'):
        recbole.read(open_files(tmp_path))
