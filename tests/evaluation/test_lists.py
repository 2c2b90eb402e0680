"""Measures of the lists against arithmetic by hand, SciPy and plain loops."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jaccard

from palr_jax.data.interactions import Catalogue
from palr_jax.data.splits import Split
from palr_jax.errors import InputError
from palr_jax.evaluation.lists import (
    ItemFacts,
    coverage,
    diversity,
    item_facts,
    novelty,
    top_items,
)


def random_slots(users=200, slots=12, levels=4, seed=0):
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(30)[:slots] + 1 for _ in range(users)])
    items[rng.random(items.shape) < 0.3] = -1
    scores = rng.integers(0, levels, items.shape).astype(np.float32)
    scores[items == -1] = np.nan  # what an unfilled slot holds does not matter
    return items, scores, rng.permutation(1000)[:users]


def test_lists_are_the_best_items_in_order():
    items, scores, users = random_slots()
    lists = top_items(items, scores, users, 10, seed=0)
    assert (lists.shape, lists.dtype) == ((200, 10), np.int32)
    for row, of_row, found in zip(items, scores, lists):
        score_of = dict(zip(row.tolist(), of_row.tolist()))
        score_of.pop(-1, None)
        shown = found[found > 0].tolist()
        assert len(shown) == len(set(shown)) == min(10, len(score_of))
        assert (found[len(shown) :] == -1).all()
        best = sorted(score_of.values(), reverse=True)[: len(shown)]
        assert [score_of[item] for item in shown] == best


def test_e02_the_order_of_the_slots_changes_nothing():
    items, scores, users = random_slots()
    order = np.argsort(np.random.default_rng(1).random(items.shape), axis=1)
    moved = np.take_along_axis(items, order, 1), np.take_along_axis(scores, order, 1)
    lists = top_items(items, scores, users, 10, seed=3)
    np.testing.assert_array_equal(top_items(*moved, users, 10, seed=3), lists)
    wider = (np.pad(slots, ((0, 0), (2, 0)), constant_values=-1) for slots in (items, scores))
    np.testing.assert_array_equal(top_items(*wider, users, 10, seed=3), lists)
    assert (top_items(items, scores, users, 10, seed=4) != lists).any()


def test_e09_the_other_users_change_nothing():
    items, scores, users = random_slots()
    some = np.random.default_rng(1).permutation(200)[:50]
    np.testing.assert_array_equal(
        top_items(items[some], scores[some], users[some], 10, seed=3),
        top_items(items, scores, users, 10, seed=3)[some],
    )


@pytest.mark.parametrize('seed', [0, 1])
def test_every_order_of_tied_items_is_as_likely(seed):
    users = np.arange(6000)
    items = np.tile([5, 9, 7], (6000, 1))
    lists = top_items(items, np.zeros(items.shape), users, 3, seed=seed)
    orders, times = np.unique(lists, axis=0, return_counts=True)
    assert len(orders) == 6
    assert stats.chisquare(times).pvalue > 0.01


def test_precision_of_scores_and_what_is_no_number():
    items, users = np.array([[4, 5, 6]]), np.array([77])
    scores = np.array([[-np.inf, -1.0, -1.001]])
    assert top_items(items, scores, users, 4, seed=0).tolist() == [[5, 6, 4, -1]]
    tied = scores.astype(ml_dtypes.bfloat16)
    assert {top_items(items, tied, users + n, 1, seed=0)[0, 0] for n in range(20)} == {5, 6}
    scores[0, 1] = np.nan
    with pytest.raises(InputError, match=r'user 77 has a score that is NaN.*1 of 1 users'):
        top_items(items, scores, users, 3, seed=0)
    with pytest.raises(ValueError, match=r'\(1, 3\), \(1, 2\) and \(1,\)'):
        top_items(items, scores[:, :2], users, 3, seed=0)


def test_coverage_by_hand():
    lists = np.array([[3, 1, -1], [3, -1, -1], [-1, -1, -1]])
    assert coverage(lists, 8) == 2 / 8
    assert coverage(lists[2:], 8) == coverage(lists[:0], 8) == 0


def test_novelty_by_hand():
    """Items that 4, 2, 1 and none of 8 users have: 1, 2, 3 and, as if one had it, 3 bits."""
    facts = ItemFacts(np.array([0, 4, 2, 1, 0]), 8, [()] * 5)
    lists = np.array([[1, 2, 3, 4], [4, 1, -1, -1], [-1, -1, -1, -1]])
    assert novelty(lists, facts).tolist() == [9 / 4, 2, 0]


def test_diversity_by_hand():
    """Drama and Drama-War: 1 - 1/2. Items 4 and 5 have no keywords."""
    keywords = [(), ('Drama',), ('Drama', 'War', 'Drama'), ('Comedy',), (), ()]
    lists = np.array([[1, 2, -1], [1, 2, 3], [4, 5, -1], [4, 1, -1], [1, -1, -1], [-1, -1, -1]])
    np.testing.assert_allclose(diversity(lists, keywords), [0.5, 2.5 / 3, 0, 1, 0, 0])
    assert diversity(lists, [()] * 6).tolist() == [0] * 6


def test_diversity_agrees_with_scipy():
    rng = np.random.default_rng(0)
    has = rng.random((31, 9)) < 0.25
    keywords = [[f'word {word}' for word in np.flatnonzero(row)] for row in has]
    items, scores, users = random_slots(users=40)
    lists = top_items(items, scores, users, 6, seed=0)
    expected = [
        np.mean([jaccard(has[a], has[b]) for a, b in itertools.combinations(row[row > 0], 2)])
        for row in lists
    ]
    assert not has[1:].any(1).all()  # items without keywords are among them
    np.testing.assert_allclose(diversity(lists, keywords), expected)


def test_facts_count_training_users():
    """User 0 trains on 1 and 2, and on 1 again; user 1 on 2; user 2 on nothing."""
    split = Split(
        offsets=np.array([0, 4, 6, 7]),
        items=np.array([1, 2, 1, 3, 2, 4, 1], np.int32),
        train_end=np.array([3, 1, 0]),
        valid_at=np.array([-1, -1, -1]),
        test_at=np.array([3, 1, 0]),
    )
    keywords = ((), ('a',), ('b',), (), (), ())
    facts = item_facts(split, Catalogue(('',) * 6, ('',) * 6, (None,) * 6, keywords))
    assert facts.holders.tolist() == [0, 1, 2, 0, 0, 0]
    assert (facts.users, facts.items, facts.keywords) == (2, 5, keywords)
