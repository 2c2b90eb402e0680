"""Metrics against arithmetic by hand and against all orders of the tied items."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import (
    TargetRanks,
    hit_rate,
    ndcg,
    per_user,
    rank_targets,
    recall,
    reciprocal_rank,
)

# FIELD_CASES, reference values: NDCG = 1 / log2(rank + 1).
NDCG_AT_RANK = {1: 1.0, 2: 0.6309, 3: 0.5, 10: 0.2891}


def ranked(rank, items=20):
    """One user whose target stands at `rank` of `items` items."""
    return rank_targets(np.arange(1, items + 1)[None], -np.arange(items)[None], np.array([rank]))


@pytest.mark.parametrize(('rank', 'expected'), NDCG_AT_RANK.items())
def test_reference_values(rank, expected):
    assert ndcg(ranked(rank), 10)[0] == pytest.approx(expected, abs=5e-5)
    assert hit_rate(ranked(rank), 10)[0] == 1
    assert reciprocal_rank(ranked(rank), 20)[0] == pytest.approx(1 / rank)


def test_nothing_beyond_the_cutoff():
    assert hit_rate(ranked(11), 10)[0] == ndcg(ranked(11), 10)[0] == 0
    assert reciprocal_rank(ranked(11), 10)[0] == 0
    assert hit_rate(ranked(3, items=3), 10)[0] == 1  # a list shorter than the cutoff


def over_all_orders(items, scores, target, metric):
    """Mean of `metric(rank or None)` over every order of the tied items, by enumeration."""
    slots = [slot for slot in range(len(items)) if items[slot] != -1]
    values = []
    for tie_break in itertools.permutations(range(len(slots))):
        order = sorted(zip(slots, tie_break), key=lambda entry: (-scores[entry[0]], entry[1]))
        ids = [items[slot] for slot, _ in order]
        values.append(metric(ids.index(target) + 1 if target in ids else None))
    return np.mean(values)


@pytest.mark.parametrize('k', [1, 2, 3, 5, 10])
def test_equals_the_mean_over_all_orders_of_ties(k):
    rng = np.random.default_rng(k)
    users, slots = 40, 5
    items = np.stack([rng.permutation(7)[:slots] + 1 for _ in range(users)])
    items[rng.random(items.shape) < 0.2] = -1
    scores = rng.integers(0, 3, items.shape).astype(np.float32)
    scores[items == -1] = np.nan  # what an unfilled slot holds does not matter
    targets = rng.integers(1, 8, users)
    ranks = rank_targets(items, scores, targets)
    assert 0 < ranks.found.sum() < users
    assert (ranks.ties > 0).any()

    def expected(gain):
        def metric(rank):
            return gain(rank) if rank is not None and rank <= k else 0.0

        return [over_all_orders(*row, metric) for row in zip(items, scores, targets)]

    np.testing.assert_allclose(hit_rate(ranks, k), expected(lambda rank: 1.0))
    np.testing.assert_allclose(ndcg(ranks, k), expected(lambda rank: 1 / np.log2(rank + 1)))
    np.testing.assert_allclose(reciprocal_rank(ranks, k), expected(lambda rank: 1 / rank))


@pytest.mark.parametrize('slot', [0, 7, 19])
def test_e01_a_constant_scorer_gets_what_chance_gets(slot):
    ranks = rank_targets(np.arange(1, 21)[None], np.ones((1, 20)), np.array([slot + 1]))
    assert hit_rate(ranks, 10)[0] == 0.5
    assert hit_rate(ranks, 1)[0] == 0.05
    harmonic = sum(1 / rank for rank in range(1, 21))
    assert reciprocal_rank(ranks, 20)[0] == pytest.approx(harmonic / 20)


def test_e01_nan_scores_are_refused_by_user():
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = np.nan
    items = np.tile(np.arange(1, 5), (3, 1))
    with pytest.raises(InputError, match=r'user in row 1 has a score that is NaN.*1 of 3 users'):
        rank_targets(items, scores, np.ones(3, int))
    with pytest.raises(InputError, match='user 77 has a score that is NaN'):
        rank_targets(items, scores, np.ones(3, int), users=np.array([5, 77, 8]))
    with pytest.raises(InputError, match='3 of 3 users'):
        rank_targets(items, np.full((3, 4), np.nan), np.ones(3, int))


def test_e01_minus_infinity_is_a_score_and_the_worst():
    scores = np.array([[0.0, -np.inf, 1.0, -np.inf]])
    ranks = rank_targets(np.array([[1, 2, 3, 4]]), scores, np.array([2]))
    assert (ranks.greater[0], ranks.ties[0], ranks.found[0]) == (2, 1, True)


def test_e02_the_order_of_the_candidates_changes_nothing():
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(30)[:12] + 1 for _ in range(50)])
    scores = rng.integers(0, 6, items.shape).astype(np.float32)
    targets = rng.integers(1, 31, 50)
    order = np.argsort(rng.random(items.shape), axis=1)
    shuffled = np.take_along_axis(items, order, 1), np.take_along_axis(scores, order, 1)
    before = per_user(rank_targets(items, scores, targets), (1, 5, 10), 12)
    after = per_user(rank_targets(*shuffled, targets), (1, 5, 10), 12)
    assert list(before) == ['HR@1', 'HR@5', 'HR@10', 'NDCG@5', 'NDCG@10', 'MRR']
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_e03_a_target_that_was_not_retrieved_is_a_miss():
    items = np.tile(np.array([4, 5, 6]), (4, 1))
    ranks = rank_targets(items, np.tile([3.0, 2.0, 1.0], (4, 1)), np.array([4, 4, 9, 9]))
    assert hit_rate(ranks, 1).mean() == 0.5
    assert hit_rate(ranks, 1)[ranks.found].mean() == 1.0  # conditional on retrieved
    assert recall(ranks, 3).mean() == 0.5
    assert ndcg(ranks, 3).tolist() == reciprocal_rank(ranks, 3).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize('batch', [1, 2, 3, 8])
def test_e06_batches_do_not_weigh(batch):
    items, scores = np.tile(np.array([1, 2]), (3, 1)), np.tile([2.0, 1.0], (3, 1))
    targets = np.array([1, 2, 1])
    hits = np.concatenate(
        [
            hit_rate(rank_targets(items[at], scores[at], targets[at]), 1)
            for at in (slice(start, start + batch) for start in range(0, 3, batch))
        ]
    )
    assert len(hits) == 3
    assert hits.mean() == pytest.approx(2 / 3)


def test_e09_the_order_of_the_users_changes_nothing():
    rng = np.random.default_rng(1)
    items = np.stack([rng.permutation(9) + 1 for _ in range(20)])
    scores, targets = rng.integers(0, 3, items.shape), rng.integers(1, 10, 20)
    order = rng.permutation(20)
    shuffled = rank_targets(items[order], scores[order], targets[order])
    np.testing.assert_array_equal(
        ndcg(rank_targets(items, scores, targets), 5)[order], ndcg(shuffled, 5)
    )


def test_d03_two_items_with_one_title_are_two_items():
    """Both get the same likelihood, the target's twin is right by name only: an even chance."""
    items, scores = np.array([[246, 268, 7]]), np.array([[-1.5, -1.5, -9.0]])
    assert hit_rate(rank_targets(items, scores, np.array([268])), 1)[0] == 0.5


def test_s04_an_unfilled_slot_is_no_hit():
    items, scores = np.array([[3, -1, -1]]), np.array([[0.0, -np.inf, -np.inf]])
    assert hit_rate(rank_targets(items, scores, np.array([5])), 10)[0] == 0
    assert hit_rate(rank_targets(items, scores, np.array([3])), 1)[0] == 1
    for target in (0, -1):
        with pytest.raises(InputError, match='no target item'):
            rank_targets(items, scores, np.array([target]))


def test_c03_scores_are_compared_in_their_own_precision():
    items, scores = np.array([[1, 2]]), np.array([[-12.31, -12.33]])
    assert rank_targets(items, scores, np.array([2])).greater[0] == 1
    rounded = rank_targets(items, scores.astype(ml_dtypes.bfloat16), np.array([2]))
    assert (rounded.greater[0], rounded.ties[0]) == (0, 1)


def test_an_item_listed_twice_is_refused():
    with pytest.raises(InputError, match='the target twice'):
        rank_targets(np.array([[4, 4, 5]]), np.zeros((1, 3)), np.array([4]))


def test_no_candidates_and_no_users():
    ranks = rank_targets(np.zeros((2, 0), int), np.zeros((2, 0)), np.array([1, 2]))
    assert hit_rate(ranks, 5).tolist() == [0, 0]
    assert len(rank_targets(np.zeros((0, 3), int), np.zeros((0, 3)), np.zeros(0, int))) == 0


def test_shapes_and_cutoffs_are_checked():
    with pytest.raises(ValueError, match=r'\(1, 2\), \(1, 3\) and \(1,\)'):
        rank_targets(np.ones((1, 2), int), np.ones((1, 3)), np.ones(1, int))
    with pytest.raises(ValueError, match='cut at rank 1 or later'):
        ndcg(ranked(1), 0)


def test_e03_users_who_were_not_ranked_are_misses():
    """E03: a target that was not retrieved; two of four users were ranked, both first."""
    ranks = TargetRanks(np.array([0, 0]), np.array([0, 0]), np.array([True, True]))
    spread = ranks.spread(np.array([1, 3]), 4)
    assert hit_rate(spread, 1).tolist() == [0, 1, 0, 1]
    assert spread.take(np.array([3, 1])).found.all()
