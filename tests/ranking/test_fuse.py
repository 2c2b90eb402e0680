"""Standardising, fusing and choosing the weight, by hand numbers."""

import math

import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.ranking.fuse import choose_weight, fuse, shuffle_users, standardize

NONE = -np.inf


def test_standardize_by_hand():
    """1, 2, 3 have mean 2 and standard deviation sqrt(2/3); unfilled slots do not count."""
    z = math.sqrt(1.5)
    scores = np.array([[1.0, 2.0, 3.0, NONE], [-10.0, NONE, -20.0, NONE]], np.float32)
    np.testing.assert_allclose(standardize(scores), [[-z, 0, z, NONE], [1, NONE, -1, NONE]])


def test_standardize_makes_constant_and_lonely_scores_zero():
    """Three times 0.1 has a mean of 0.10000000000000002; that must not become a spread."""
    out = standardize(np.array([[0.1, 0.1, 0.1], [7.0, NONE, NONE], [NONE, NONE, NONE]]))
    np.testing.assert_array_equal(out, [[0, 0, 0], [0, NONE, NONE], [NONE, NONE, NONE]])


def test_fuse_by_hand():
    """Standardised: retriever (1, -1), LLM (-1, 1)."""
    retriever, llm = np.array([[5.0, 3.0]]), np.array([[-9.0, -7.0]])
    np.testing.assert_allclose(fuse(retriever, llm, 0.0), [[1, -1]])
    np.testing.assert_allclose(fuse(retriever, llm, 0.5), [[0.5, -0.5]])
    np.testing.assert_allclose(fuse(retriever, llm, 2.0), [[-1, 1]])


def test_weight_zero_keeps_the_retrievers_order():
    rng = np.random.default_rng(0)
    retriever, llm = rng.standard_normal((5, 9)), rng.standard_normal((5, 9))
    fused = fuse(retriever, llm, 0.0)
    np.testing.assert_array_equal(np.argsort(-fused), np.argsort(-retriever))


def test_constant_llm_scores_change_nothing():
    retriever = np.random.default_rng(1).standard_normal((4, 6))
    constant = np.full((4, 6), -3.3)
    np.testing.assert_array_equal(fuse(retriever, constant, 2.0), standardize(retriever))


def test_unfilled_slots_stay_last():
    retriever, llm = np.array([[-5.0, -6.0, NONE]]), np.array([[-30.0, -20.0, NONE]])
    for weight in (0.0, 0.5, 100.0):
        fused = fuse(retriever, llm, weight)
        assert fused[0, 2] == NONE
        assert np.isfinite(fused[0, :2]).all()


def test_a_score_that_is_no_number_is_refused():
    """E01: taken for an unfilled slot, it would end last, or at the mean, without a word."""
    good = np.array([[1.0, 2.0]])
    for wrong in (np.nan, np.inf):
        with pytest.raises(InputError, match=f'row 0, slot 1 is {wrong}'):
            fuse(good, np.array([[1.0, wrong]]), 1.0)


def test_scores_of_different_candidates_are_refused():
    with pytest.raises(InputError, match='different candidates'):
        fuse(np.array([[1.0, 2.0]]), np.array([[1.0, NONE]]), 1.0)
    with pytest.raises(InputError, match='different candidates'):
        fuse(np.array([[1.0, 2.0]]), np.array([[1.0, 2.0, 3.0]]), 1.0)


def test_choose_weight_by_hand():
    """Two users with two candidates each; NDCG@10 is 1 at rank 1, 0.6309 at rank 2.

    Standardised, user 1 has retriever (1, -1) and LLM (-1, 1), user 2 (1, -1) and (1, -1). Targets:
    the second item of user 1, the first of user 2. Weight 0: ranks 2 and 1; weight 1: user 1's
    items tie, (1 + 0.6309) / 2 on average; weight 2 and 3: ranks 1 and 1.
    """
    items = np.array([[11, 12], [21, 22]])
    retriever = np.array([[2.0, 1.0], [2.0, 1.0]])
    llm = np.array([[-5.0, -4.0], [-4.0, -5.0]])
    second = 1 / math.log2(3)
    weight, means = choose_weight(items, retriever, llm, np.array([12, 21]), (3.0, 2.0, 0.0, 1.0))
    assert means == pytest.approx(
        {0.0: (second + 1) / 2, 1.0: ((1 + second) / 2 + 1) / 2, 2.0: 1.0, 3.0: 1.0}
    )
    assert weight == 2.0  # the smallest of equals


def test_without_a_gain_the_weight_is_zero():
    items, scores = np.array([[1, 2, 3]]), np.array([[3.0, 2.0, 1.0]])
    weight, _ = choose_weight(items, scores, scores[:, ::-1], np.array([1]), (0.0, 0.5, 1.0))
    assert weight == 0.0
    # A target that was not retrieved is a miss at every weight.
    assert choose_weight(items, scores, scores, np.array([9]), (0.0, 1.0)) == (
        0.0,
        {0.0: 0.0, 1.0: 0.0},
    )


def test_a_grid_without_zero_and_no_users_are_refused():
    items, scores = np.array([[1, 2]]), np.array([[2.0, 1.0]])
    with pytest.raises(InputError, match=r'fusion_weights is \(0.5,\); allowed: numbers with 0'):
        choose_weight(items, scores, scores, np.array([1]), (0.5,))
    with pytest.raises(InputError, match='no validation user'):
        choose_weight(items[:0], scores[:0], scores[:0], np.zeros(0, int), (0.0,))


def test_shuffled_scores_are_somebody_elses():
    """Slot by slot; a slot that the other lacks has the mean of his others."""
    scores = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, NONE], [100.0, NONE, NONE]])
    shuffled = shuffle_users(scores, seed=0)
    np.testing.assert_array_equal(np.isfinite(shuffled), np.isfinite(scores))
    full = {1.0: [1, 2, 3], 10.0: [10, 20, 15], 100.0: [100, 100, 100]}
    for own, row in zip(scores, shuffled):
        assert row[0] != own[0]
        np.testing.assert_array_equal(
            row[np.isfinite(own)], np.array(full[row[0]])[np.isfinite(own)]
        )
    many = np.arange(50.0)[:, None] + np.zeros((50, 2))
    assert sorted(shuffle_users(many, 1)[:, 0]) == sorted(many[:, 0])
    assert (shuffle_users(many, 1) != many).all()
    assert not np.array_equal(shuffle_users(many, 1), shuffle_users(many, 2))


def test_users_who_are_not_scored_lower_every_mean_alike():
    items, retriever = np.array([[1, 2], [3, 4]]), np.array([[2.0, 1.0], [2.0, 1.0]])
    llm, targets = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([2, 4])
    some = choose_weight(items, retriever, llm, targets, (0.0, 2.0))
    of_all = choose_weight(items, retriever, llm, targets, (0.0, 2.0), users=8)
    assert some[0] == of_all[0] == 2.0
    assert some[1] == {0.0: pytest.approx(1 / math.log2(3)), 2.0: 1.0}
    assert of_all[1] == {w: pytest.approx(m / 4) for w, m in some[1].items()}
