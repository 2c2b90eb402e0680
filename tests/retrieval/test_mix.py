"""Mixes against z-scores of the scores themselves, and weights on cases by hand."""

import dataclasses
import math

import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import hit_rate, ndcg
from palr_jax.retrieval import Popularity, target_ranks
from palr_jax.retrieval.mix import (
    Mix,
    choose_weights,
    load_weights,
    save_weights,
    standardize,
)

HISTORIES = [np.array([1, 5]), np.array([7]), np.zeros(0, int), np.array([2, 3, 4])]


@dataclasses.dataclass(frozen=True)
class Summed:
    """A user is the sum of the rows of the history's items."""

    table: np.ndarray
    item_vectors: np.ndarray

    def user_vectors(self, histories):
        return np.array([self.table[np.asarray(h, int) - 1].sum(0) for h in histories])


def made(width, seed, items=50, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    table = scale * rng.normal(size=(items, width))
    return Summed(table.astype(np.float32), rng.normal(shift, 1, (items, width)).astype(np.float32))


def z_scores(retriever, histories):
    """From the scores over the catalogue themselves; 0 where they are all equal."""
    queries = retriever.user_vectors(histories).astype(np.float64)
    scores = queries @ retriever.item_vectors.astype(np.float64).T
    centred = scores - scores.mean(1, keepdims=True)
    spread = scores.std(1, keepdims=True)
    return np.divide(centred, spread, out=np.zeros_like(scores), where=spread > 1e-9)


def test_a_mix_is_the_weighted_sum_of_z_scores():
    """Of scores of very different size and mean; the third user has no history."""
    members = made(8, 0), made(3, 1, scale=300, shift=5), Popularity(np.arange(50.0) ** 2)
    weights = 0.5, 0.3, 0.2
    mix = Mix(members, weights)
    vectors = mix.user_vectors(HISTORIES)
    assert mix.item_vectors.shape == (50, 12)
    assert vectors.dtype == mix.item_vectors.dtype == np.float32
    expected = sum(w * z_scores(m, HISTORIES) for m, w in zip(members, weights))
    np.testing.assert_allclose(vectors @ mix.item_vectors.T, expected, atol=1e-5)
    assert not vectors[2, :11].any()  # popularity alone speaks


def test_standardize_by_hand():
    """Items 1, 2, 3 have variance 2/3: whatever the user's one number, its size becomes 1.2247."""
    covariance = np.array([[2 / 3]])
    found = standardize(np.array([[5.0], [-0.01], [0.0]]), covariance)
    np.testing.assert_allclose(found, [[math.sqrt(1.5)], [-math.sqrt(1.5)], [0]], rtol=1e-6)


@pytest.mark.parametrize('value', [0.1, 7.0, 0.0])
def test_equal_scores_add_nothing(value):
    """The rounded mean of fifty 0.1 is not 0.1; that must not become a spread."""
    one, flat = made(8, 0), Popularity(np.full(50, value, np.float32))
    found = Mix((one, flat), (0.5, 0.5))
    scores = found.user_vectors(HISTORIES) @ found.item_vectors.T
    np.testing.assert_allclose(scores, 0.5 * z_scores(one, HISTORIES), atol=1e-5)


def test_scores_that_are_equal_along_the_user_add_nothing():
    """The items differ, but not in the direction of the user: only rounding is left."""
    rng = np.random.default_rng(0)
    direction = np.array([0.6, 0.8, 0.0])
    items = rng.normal(size=(50, 3))
    items += (3 - items @ direction)[:, None] * direction
    turned = Summed(np.tile(direction, (50, 1)), items.astype(np.float32))
    mix = Mix((made(4, 0), turned), (0.5, 0.5))
    assert not mix.user_vectors(HISTORIES)[:, 4:].any()


@pytest.mark.parametrize('place', [0, 1])
def test_one_weight_alone_is_that_retriever(place):
    members = made(8, 0), made(3, 1)
    mix = Mix(members, tuple(3.0 * (i == place) for i in range(2)))
    np.testing.assert_array_equal(mix.item_vectors, members[place].item_vectors)
    found, expected = (m.user_vectors(HISTORIES) for m in (mix, members[place]))
    np.testing.assert_array_equal(found, expected)


def test_a_mix_of_mixes_is_a_retriever():
    inner = Mix((made(8, 0), made(3, 1)), (0.5, 0.5))
    outer = Mix((inner, made(5, 2)), (0.75, 0.25))
    expected = 0.75 * z_scores(inner, HISTORIES) + 0.25 * z_scores(made(5, 2), HISTORIES)
    scores = outer.user_vectors(HISTORIES) @ outer.item_vectors.T
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_wrong_weights_are_refused():
    members = made(8, 0), made(3, 1)
    for weights in ((0.5,), (0.0, 0.0), (1.5, -0.5), (0.5, math.nan)):
        with pytest.raises(InputError, match=r'weights of 2 retrievers are .* not all 0'):
            Mix(members, weights)


class Oracle:
    """Scores at random, but finds the targets of some users."""

    def __init__(self, split, users, seed):
        self.item_vectors = np.eye(41, dtype=np.float32)[:40]
        self.answers = {}
        rng = np.random.default_rng(seed)
        for user in split.users('valid'):
            vector = rng.normal(size=41).astype(np.float32)
            if user in users:
                vector[split.target(user, 'valid') - 1] = 6
            self.answers[tuple(split.history(user, 'valid'))] = vector

    def user_vectors(self, histories):
        return np.array([self.answers[tuple(h)] for h in histories])


def value(retriever, split, users):
    histories = [split.history(u, 'valid') for u in users]
    targets, queries = split.targets('valid')[users], retriever.user_vectors(histories)
    return ndcg(target_ranks(queries, retriever.item_vectors, targets, histories, True), 10).mean()


def test_weights_join_what_each_retriever_knows(chain):
    """One finds the targets of the even users, one of every third; noise finds nothing."""
    users = chain.users('valid')
    even, third, noise = (
        Oracle(chain, set(known.tolist()), seed)
        for seed, known in enumerate((users[::2], users[::3], users[:0]))
    )
    for members in ((even, third), (third, even)):
        weights, means = choose_weights(members, chain, users, True)
        assert len(means) == 11  # the whole grid
        assert means[weights] == max(means.values())
        assert means[weights] > max(means[1.0, 0.0], means[0.0, 1.0]) + 0.1
        assert means[weights] == pytest.approx(value(Mix(members, weights), chain, users), abs=1e-6)
    weights, means = choose_weights((noise, even, third), chain, users, True)
    assert sum(weights) == pytest.approx(1)
    assert means[weights] == max(means.values())
    assert weights[0] < 0.2 < min(weights[1:])


def test_of_equals_fewer_retrievers_win(chain):
    """Equal scores change nothing at any weight, so who gives them is left out."""
    users = chain.users('valid')
    one = Oracle(chain, set(users[::2].tolist()), 0)
    flat = Popularity(np.ones(40, np.float32))
    assert choose_weights((one, flat), chain, users, True)[0] == (1, 0)
    assert choose_weights((flat, one), chain, users, True)[0] == (0, 1)
    assert choose_weights((one,), chain, users, True)[0] == (1,)


def test_weights_follow_the_metric_and_the_users(chain):
    """Each retriever knows half of the users: asked about one half, it is the one that counts."""
    users = chain.users('valid')
    first, second = users[::2], users[1::2]
    members = Oracle(chain, set(first.tolist()), 0), Oracle(chain, set(second.tolist()), 1)
    for some, place in ((first, 0), (second, 1)):
        weights, means = choose_weights(
            members, chain, some, True, metric=lambda ranks: hit_rate(ranks, 1)
        )
        assert weights[place] >= 0.5
        assert means[weights] == max(means.values()) > 0.9  # a few histories have two targets
    with pytest.raises(InputError, match='for 2 retrievers on 0 validation users'):
        choose_weights(members, chain, users[:0], True)
    with pytest.raises(InputError, match='for 0 retrievers'):
        choose_weights((), chain, users, True)


def test_weights_are_read_as_written(tmp_path):
    save_weights({'sasrec': 0.7, 'covisitation': 0.3}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mix.json']
    assert load_weights(tmp_path) == {'sasrec': 0.7, 'covisitation': 0.3}
    (tmp_path / 'mix.json').write_text('{"format": 9}')
    with pytest.raises(InputError, match=r'mix\.json: format is 9; this version reads 1'):
        load_weights(tmp_path)
    with pytest.raises(InputError, match='does not exist'):
        load_weights(tmp_path / 'nowhere')
