"""Candidates and ranks by hand, against NumPy, and the field cases of unseen items."""

import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import hit_rate
from palr_jax.retrieval import (
    Candidates,
    build_index,
    fit_popularity,
    read_candidates,
    read_ranks,
    retrieve,
    save_candidates,
    save_ranks,
    target_ranks,
)
from palr_jax.retrieval import candidates as candidates_module

# Three users of width-1 vectors: a score is the product, so items stand 5, 4, 3, 2, 1 for weight 1.
VECTORS = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]])


def test_k_unseen_items_come_back():
    index = build_index(VECTORS, 'exact')
    found = retrieve(
        index, np.array([[1.0], [-1.0], [1.0]]), [[5, 4], [1], [1, 2, 3]], 3, exclude=True
    )
    assert found.users.tolist() == [0, 1, 2]
    assert found.items.tolist() == [[3, 2, 1], [2, 3, 4], [5, 4, -1]]
    assert found.scores.tolist() == [[3, 2, 1], [-2, -3, -4], [5, 4, -np.inf]]
    assert found.items.dtype == np.int32


def test_seen_items_stay_if_asked_for():
    index = build_index(VECTORS, 'exact')
    found = retrieve(index, np.ones((1, 1)), [[5, 4]], 7, exclude=False, users=np.array([12]))
    assert found.users.tolist() == [12]
    assert found.items.tolist() == [[5, 4, 3, 2, 1, -1, -1]]


@pytest.mark.parametrize('backend', ['auto', 'exact'])
def test_users_with_long_histories_get_k_items_too(backend):
    """Their history is what they score highest, so almost all of the catalogue must be fetched."""
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(200, 8)), rng.normal(size=(30, 8))
    order = np.argsort(-(queries @ vectors.T), 1) + 1
    histories = [order[u, : rng.integers(0, 200)] for u in range(30)]
    histories[3] = order[3]
    found = retrieve(build_index(vectors, backend), queries, histories, 10, exclude=True)
    for user, history in enumerate(histories):
        expected = order[user, len(history) : len(history) + 10].tolist()
        assert found.items[user].tolist() == expected + [-1] * (10 - len(expected))


def test_d07_only_items_of_the_catalogue_are_candidates():
    """Raw ids 1, 2, 4 are the items 1, 2, 3: there is no gap to fall into, and no fourth item."""
    found = retrieve(build_index(np.eye(3), 'exact'), np.ones((1, 3)), [[]], 4, exclude=True)
    assert found.items.tolist() == [[1, 2, 3, -1]]


def test_ranks_by_hand():
    """Item scores 2, 1, 2, 2, 5: target 1 has one item above it and two tied with it."""
    vectors = np.array([[2.0], [1.0], [2.0], [2.0], [5.0]])
    ranks = target_ranks(np.ones((1, 1)), vectors, [1], [[]], exclude=True)
    assert (ranks.greater.tolist(), ranks.ties.tolist()) == ([1], [2])
    ranks = target_ranks(np.ones((1, 1)), vectors, [1], [[5, 3, 2]], exclude=True)
    assert (ranks.greater.tolist(), ranks.ties.tolist()) == ([0], [1])
    ranks = target_ranks(np.ones((1, 1)), vectors, [1], [[5, 3, 2]], exclude=False)
    assert (ranks.greater.tolist(), ranks.ties.tolist()) == ([1], [2])
    ranks = target_ranks(np.ones((1, 1)), vectors, [1], [[1, 5]], exclude=True)  # seen, yet ranked
    assert (ranks.greater.tolist(), ranks.ties.tolist()) == ([0], [2])


def test_e01_equal_scores_are_ties_not_hits():
    """A constant scorer over 20 items gets what a random order gets: HR@1 = 1 / 20."""
    ranks = target_ranks(np.zeros((3, 4)), np.ones((20, 4)), [1, 7, 20], [[]] * 3, exclude=True)
    assert hit_rate(ranks, 1).tolist() == [0.05] * 3
    assert hit_rate(ranks, 10).tolist() == [0.5] * 3


def test_ranks_in_batches_equal_sorting(monkeypatch):
    monkeypatch.setattr(candidates_module, 'BATCH', 4)
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(10, 6)).astype(np.float32)
    vectors = rng.normal(size=(50, 6)).astype(np.float32)
    targets = rng.integers(1, 51, 10)
    histories = [rng.choice(50, 12, replace=False) + 1 for _ in range(10)]
    ranks = target_ranks(queries, vectors, targets, histories, exclude=True)
    for user in range(10):
        allowed = [i for i in range(1, 51) if i not in histories[user] or i == targets[user]]
        order = sorted(allowed, key=lambda i: -(queries[user] @ vectors[i - 1]))
        assert ranks.greater[user] == order.index(targets[user])
    assert not ranks.ties.any()
    assert ranks.found.all()
    # E09: other batch-mates, same ranks.
    turned = target_ranks(queries[::-1], vectors, targets[::-1], histories[::-1], exclude=True)
    assert turned.greater[::-1].tolist() == ranks.greater.tolist()


def test_the_ranks_agree_with_the_candidates(chain):
    """Among the first k candidates exactly where the rank is at most k."""
    rng = np.random.default_rng(0)
    users = chain.users('test')
    histories = [chain.history(u, 'test') for u in users]
    queries, vectors = rng.normal(size=(len(users), 8)), rng.normal(size=(40, 8))
    targets = chain.targets('test')[users]
    found = retrieve(build_index(vectors, 'exact'), queries, histories, 10, exclude=True)
    ranks = target_ranks(queries, vectors, targets, histories, exclude=True)
    assert ((found.items == targets[:, None]).any(1) == (hit_rate(ranks, 10) == 1)).all()


def test_a_target_that_is_no_item_is_refused():
    for target in (0, 6, -1):
        with pytest.raises(InputError, match=f'row 1 has the target item {target}; .* 1 to 5'):
            target_ranks(np.ones((2, 1)), VECTORS, [3, target], [[], []], exclude=True)
    with pytest.raises(InputError, match=r'user vectors .* NaN'):
        target_ranks(np.full((1, 1), np.nan), VECTORS, [3], [[]], exclude=True)
    with pytest.raises(InputError, match='overflows'):
        target_ranks(np.full((1, 1), 2e38), VECTORS, [3], [[]], exclude=True)


def test_popularity_counts_training_events_alone(split_of):
    """Users 1-2-3-4-5, 2-4-1 and 2-1: the last two events of the first two are left out."""
    split = split_of([[1, 2, 3, 4, 5], [2, 4, 1], [2, 1]])
    assert fit_popularity(split, 6).counts.tolist() == [2, 3, 1, 0, 0, 0]
    assert fit_popularity(split_of([[1]]), 2).counts.tolist() == [1, 0]


def test_popularity_goes_the_same_way_as_a_retriever(split_of):
    split = split_of([[1, 2, 3, 4, 5], [2, 4, 1], [2, 1]])
    popularity, users = fit_popularity(split, 6), split.users('test')
    histories = [split.history(u, 'test') for u in users]
    queries, counts = popularity.user_vectors(histories), popularity.item_vectors
    found = retrieve(build_index(counts), queries, histories, 4, exclude=True)
    assert found.items.tolist() == [[5, 6, -1, -1], [1, 3, 5, 6]]
    assert found.scores.tolist() == [[0, 0, -np.inf, -np.inf], [2, 1, 0, 0]]
    ranks = target_ranks(queries, counts, split.targets('test')[users], histories, exclude=True)
    assert (ranks.greater.tolist(), ranks.ties.tolist()) == ([0, 0], [1, 0])


def test_candidates_and_ranks_are_read_as_written(tmp_path):
    found = Candidates(
        np.array([3, 5]),
        np.array([[2, 1], [4, -1]], np.int32),
        np.array([[0.5, 0.25], [1.0, -np.inf]], np.float32),
    )
    save_candidates(tmp_path, 'retriever', 'test', found)
    read = read_candidates(tmp_path, 'retriever', 'test')
    for name in ('users', 'items', 'scores'):
        np.testing.assert_array_equal(getattr(read, name), getattr(found, name))
    ranks = target_ranks(np.ones((2, 1)), VECTORS, [3, 1], [[], []], exclude=True)
    save_ranks(tmp_path, 'popularity', 'valid', found.users, ranks)
    users, again = read_ranks(tmp_path, 'popularity', 'valid')
    assert users.tolist() == [3, 5]
    assert again.greater.tolist() == [2, 4]
    assert again.found.all()
    with pytest.raises(InputError, match=r'popularity_test_ranks\.npz: this file does not exist'):
        read_ranks(tmp_path, 'popularity', 'test')
