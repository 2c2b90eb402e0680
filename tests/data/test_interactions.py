"""Sorting, repeated pairs, k-core and the catalogue, on logs small enough to check by hand."""

import collections

import numpy as np
import pytest

from palr_jax.data import interactions
from palr_jax.data.interactions import Item, RawLog


def make_log(rows, metadata=None):
    """A log of (user, item, time) rows; codes in order of appearance, as the parsers give them."""
    users = list(dict.fromkeys(user for user, _, _ in rows))
    items = list(dict.fromkeys(item for _, item, _ in rows))
    return RawLog(
        users=np.array([users.index(user) for user, _, _ in rows], np.int64),
        items=np.array([items.index(item) for _, item, _ in rows], np.int64),
        times=np.array([time for _, _, time in rows]),
        user_ids=tuple(users),
        item_ids=tuple(items),
        metadata=metadata or {},
        files=(),
    )


def histories(rows):
    """Raw item ids by raw user id."""
    built, item_ids, _ = interactions.build(make_log(rows))
    out = collections.defaultdict(list)
    for user, item in zip(built.users, built.items):
        out[built.user_ids[user]].append(item_ids[item - 1])
    return dict(out)


def test_d09_rows_out_of_order_are_sorted_by_time():
    rows = [('u', 'C', 3), ('u', 'A', 1), ('u', 'B', 2)]
    assert histories(rows) == {'u': ['A', 'B', 'C']}


def test_d08_ties_keep_file_order_and_never_follow_the_item_id():
    rows = [('1', '30', 100), ('1', '10', 100), ('1', '20', 100)]
    assert histories(rows) == {'1': ['30', '10', '20']}


def test_d08_blocks_of_other_users_do_not_matter():
    rng = np.random.default_rng(0)
    blocks = [[(str(user), str(item), 5) for item in rng.permutation(9)[:6]] for user in range(8)]
    expected = histories([row for block in blocks for row in block])
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(8)
        assert histories([row for n in order for row in blocks[n]]) == expected


def test_a_repeated_pair_keeps_its_earliest_event():
    rows = [('u', 'a', 9), ('u', 'b', 5), ('u', 'a', 2), ('u', 'b', 5), ('v', 'a', 1)]
    built, item_ids, repeated = interactions.build(make_log(rows))
    assert item_ids == ('a', 'b')
    assert repeated == 2
    np.testing.assert_array_equal(built.users, [0, 0, 1])
    np.testing.assert_array_equal(built.items, [1, 2, 1])
    np.testing.assert_array_equal(built.times, [2, 5, 1])


def test_fractions_of_a_second_order_events_but_are_not_kept():
    rows = [('u', 'late', 7.75), ('u', 'early', 7.25), ('u', 'first', -0.5)]
    built, item_ids, _ = interactions.build(make_log(rows))
    assert [item_ids[item - 1] for item in built.items] == ['first', 'early', 'late']
    np.testing.assert_array_equal(built.times, [-1, 7, 7])
    assert built.times.dtype == np.int64


@pytest.mark.parametrize(
    ('ids', 'ordered'),
    [
        (['10', '9', '-1', '0'], ['-1', '0', '9', '10']),
        (['7', '007', '6'], ['6', '007', '7']),
        (['10', '9', 'B2'], ['10', '9', 'B2']),
        ([], []),
    ],
)
def test_natural_order(ids, ordered):
    assert [ids[n] for n in interactions.natural_order(ids)] == ordered


def test_d11_k_core_goes_on_until_nothing_falls():
    """u1:{a,b}, u2:{b,c}, u3:{b,c}, k=2: a goes, so u1 must go."""
    rows = [(u, i, 0) for u, i in ['1a', '1b', '2b', '2c', '3b', '3c']]
    built, item_ids, _ = interactions.build(make_log(rows))
    kept, kept_items, rounds = interactions.k_core(built, 2)
    assert kept.user_ids == ('2', '3')
    assert [item_ids[item - 1] for item in kept_items] == ['b', 'c']
    np.testing.assert_array_equal(kept.items, [1, 2, 1, 2])
    assert rounds == [
        {'users': 3, 'items': 2, 'interactions': 5},
        {'users': 2, 'items': 2, 'interactions': 4},
    ]


@pytest.mark.parametrize('seed', range(5))
def test_k_core_equals_removing_one_at_a_time(seed):
    rng = np.random.default_rng(seed)
    pairs = {(int(u), int(i)) for u, i in rng.integers(0, 14, size=(70, 2))}
    built, item_ids, _ = interactions.build(make_log([(str(u), str(i), 0) for u, i in pairs]))
    kept, kept_items, _ = interactions.k_core(built, 4)

    expected = set(pairs)
    while True:
        counts = collections.Counter(side for u, i in expected for side in (('u', u), ('i', i)))
        bad = next((p for p in expected if min(counts['u', p[0]], counts['i', p[1]]) < 4), None)
        if bad is None:
            break
        expected.remove(bad)

    raw_items = [item_ids[item - 1] for item in kept_items]
    found = {(int(kept.user_ids[u]), int(raw_items[i - 1])) for u, i in zip(kept.users, kept.items)}
    assert found == expected


def test_k_core_may_leave_nothing():
    built, _, _ = interactions.build(make_log([('u', 'a', 0)]))
    kept, kept_items, rounds = interactions.k_core(built, 2)
    assert kept.user_ids == ()
    assert len(kept.users) == len(kept_items) == 0
    assert rounds == [{'users': 0, 'items': 0, 'interactions': 0}]


def test_d07_gaps_in_the_ids_close_and_zero_is_padding():
    """Also S04: the raw id 0 is an item like any other."""
    rows = [('u', raw_id, 0) for raw_id in ('4', '0', '2')]
    built, item_ids, _ = interactions.build(make_log(rows))
    catalogue, _ = interactions.build_catalogue(item_ids, {}, {})
    assert catalogue.items == 3
    assert catalogue.raw_ids == ('', '0', '2', '4')
    assert sorted(built.items) == [1, 2, 3]


@pytest.mark.parametrize('title', ['', '  ', 'nan', 'None', None])
def test_a03_items_without_a_title_get_a_placeholder(title):
    metadata = {} if title is None else {'B3': Item(title, ('Hair',))}
    catalogue, untitled = interactions.build_catalogue(['B3'], metadata, {})
    assert catalogue.titles == ('', 'Untitled item B3')
    assert untitled == 1


def test_d03_two_ids_with_one_title_stay_two_items():
    metadata = {'246': Item('Twins (1997)', ()), '268': Item('Twins (1997)', ())}
    catalogue, _ = interactions.build_catalogue(['246', '268'], metadata, {})
    assert catalogue.raw_ids[1:] == ('246', '268')
    assert catalogue.titles[1:] == ('Twins (1997)', 'Twins (1997)')


def test_marks_for_no_genre_are_not_keywords():
    metadata = {'1': Item('A', ('unknown',)), '2': Item('B', ('Drama', '', 'Drama', 'War'))}
    catalogue, _ = interactions.build_catalogue(['1', '2'], metadata, {})
    assert catalogue.keywords == ((), (), ('Drama', 'War'))


@pytest.mark.parametrize(
    ('title', 'year'),
    [
        ('Heat (1995)', 1995),
        ('unknown', None),
        ('Land Before Time III: The Time of the Great Giving (1995) (V)', 1995),
        ('Two Friends (1986) ', 1986),
        ('2001: A Space Odyssey (1968)', 1968),
        ('Blues Brothers 2000 (1998)', 1998),
        ('1984 (Nineteen Eighty-Four)', None),
        ('Postino, Il (The Postman) (1994)', 1994),
        ('(1995) in the middle', None),
        ('Four Digits (4711)', None),
    ],
)
def test_d05_d06_year(title, year):
    assert interactions.year_of(title) == year
