"""What the order of the listed candidates changes: scorers whose bias is known."""

import numpy as np
import pytest
from scipy import stats

from palr_jax.probes.order import Orders, kendall_tau, measure, table, winning_slots

SETTINGS = {'resamples': 500, 'seed': 0}


def random_orders(users, orders, candidates, scores_of_slots):
    """Orders whose score of a candidate is `scores_of_slots(its slot, candidate)`."""
    rng = np.random.default_rng(0)
    items = np.tile(np.arange(1, candidates + 1), (users, 1))
    slots = rng.permuted(np.tile(np.arange(candidates), (users, orders, 1)), axis=2)
    scores = scores_of_slots(slots, np.broadcast_to(np.arange(candidates), slots.shape))
    return Orders(items, slots, scores.astype(np.float64), np.full(users, 3))


def test_a_scorer_that_prefers_what_is_listed_first():
    """All winners stand in slot 1, and another order has another winner in 1 - 1/C of the cases."""
    users, orders, candidates = 400, 6, 10
    found = measure(random_orders(users, orders, candidates, lambda slot, _: -slot), **SETTINGS)
    assert found['slots']['counts'] == [users * orders] + [0] * 9
    np.testing.assert_allclose(found['slots']['uniform'], [240] * 10)
    # Pearson by hand: ((2400 - 240)^2 + 9 * 240^2) / 240.
    assert found['slots']['chi2'] == pytest.approx(21600)
    assert found['slots']['p_value'] < 1e-9
    assert found['top1_differs']['by_chance'] == pytest.approx(0.9)
    assert found['top1_differs']['mean'] == pytest.approx(0.9, abs=0.03)
    assert abs(found['kendall_tau']['mean']) < 0.03  # the rankings have nothing in common
    thirds = found['thirds']
    assert [thirds[t]['mean'] for t in ('first', 'middle', 'last')] == [1, 0, 0]
    assert thirds['first']['ci95'] == [1, 1]
    assert [thirds[t]['uniform'] for t in thirds] == pytest.approx([0.4, 0.3, 0.3])  # of 10 slots
    # The target is at each rank with the same probability.
    expected = np.mean(1 / np.log2(np.arange(2, 12)))
    assert found['ndcg@10']['mean'] == pytest.approx(expected, abs=0.02)
    assert found['ndcg@10']['deviation'] > 0


def test_a_scorer_that_ignores_the_order():
    found = measure(random_orders(400, 6, 10, lambda _, item: -item), **SETTINGS)
    assert found['top1_differs']['mean'] == 0
    assert found['kendall_tau'] == {'mean': 1.0, 'ci95': [1.0, 1.0]}
    assert found['slots']['p_value'] > 0.01
    assert found['thirds']['first']['mean'] == pytest.approx(0.4, abs=0.04)
    # The target is item 3, always third: 1 / log2(4).
    assert found['ndcg@10']['of_orders'] == pytest.approx([0.5] * 6)
    assert found['ndcg@10']['deviation'] == pytest.approx(0)
    assert found['ndcg@10']['gain']['ci95'] == pytest.approx([0, 0])
    assert found['targets_listed'] == 1


def test_equal_scores_are_won_by_the_retriever_wherever_it_was_listed():
    """E01: ties are no luck of the list; NDCG is the expected one over the order of tied items."""
    found = measure(random_orders(50, 4, 10, lambda slot, _: 0 * slot), **SETTINGS)
    assert found['top1_differs']['mean'] == 0
    assert found['kendall_tau'] is None
    assert found['ndcg@10']['mean'] == pytest.approx(np.mean(1 / np.log2(np.arange(2, 12))))
    assert 'all scores tie' in table({'system': 'llm'} | found)


def test_users_with_fewer_candidates_by_hand():
    """Two users, two orders, three and two candidates."""
    items = np.array([[7, 8, 9], [5, 6, -1]])
    slots = np.array([[[0, 1, 2], [2, 0, 1]], [[0, 1, -1], [1, 0, -1]]])
    inf = -np.inf
    scores = np.array([[[3, 2, 1], [1, 3, 2]], [[2, 1, inf], [2, 1, inf]]], np.float64)
    found = measure(Orders(items, slots, scores, np.array([8, 1])), **SETTINGS)
    # Winners: items 7 (slot 1) and 8 (slot 1); item 5 in slots 1 and 2.
    assert found['slots']['counts'] == [3, 1, 0]
    np.testing.assert_allclose(found['slots']['uniform'], [2 / 3 + 1, 2 / 3 + 1, 2 / 3])
    assert found['top1_differs']['mean'] == 0.5
    assert found['top1_differs']['by_chance'] == pytest.approx((2 / 3 + 1 / 2) / 2)
    # User 1: of three pairs, (8, 9) alone keeps its order, so (1 - 2) / 3; user 2 agrees.
    assert found['kendall_tau']['mean'] == pytest.approx((-1 / 3 + 1) / 2)
    assert found['targets_listed'] == 0.5
    # The first user's target is second, then first; the other's was not retrieved.
    first, second = 1 / np.log2(3) / 2, 1 / 2
    assert found['ndcg@10']['of_orders'] == pytest.approx([first, second])
    assert found['ndcg@10']['deviation'] == pytest.approx((second - first) / np.sqrt(2))
    # Their mean scores are 2, 2.5 and 1.5: the target is first.
    assert found['ndcg@10']['of_mean_scores'] == pytest.approx(1 / 2)
    assert found['ndcg@10']['gain']['mean'] == pytest.approx(1 / 2 - (first + second) / 2)
    # Slots 1 and 2 of two are the first and the middle third.
    assert [found['thirds'][t]['mean'] for t in found['thirds']] == [0.75, 0.25, 0]


def test_tau_is_that_of_scipy():
    scores = np.random.default_rng(0).integers(0, 8, (4, 12)).astype(np.float64)  # with ties
    pairs = [stats.kendalltau(scores[a], scores[b]).statistic for a in range(4) for b in range(a)]
    assert kendall_tau(scores) == pytest.approx(np.mean(pairs))


def test_the_chi_square_of_slots_by_hand():
    """Counts 6, 2, 1, 3 of 12 against 3 each: (9 + 1 + 4 + 0) / 3."""
    won = np.repeat([0, 1, 2, 3], [6, 2, 1, 3]).reshape(6, 2)
    found = winning_slots(won, np.full(6, 4))
    assert found['counts'] == [6, 2, 1, 3]
    assert found['chi2'] == pytest.approx(14 / 3)
    assert found['p_value'] == pytest.approx(stats.chi2.sf(14 / 3, 3))


def test_the_table_fits_a_terminal():
    found = measure(random_orders(20, 3, 50, lambda slot, _: -slot), **SETTINGS)
    lines = table({'system': 'llm_zero_shot'} | found).splitlines()
    assert len(lines) == 10
    assert max(map(len, lines)) <= 80
    assert 'winners that stood in slot 1' in table({'system': 'llm'} | found)
