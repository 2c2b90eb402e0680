"""The counted profile against sums done by hand."""

import functools
import operator
from fractions import Fraction

import numpy as np

from palr_jax.data import Split
from palr_jax.prompts.profile import count_profile

# Items 1 to 5.
KEYWORDS = (
    (),
    ('Drama',),
    ('Comedy', 'Drama'),
    ('Western',),
    ('Action', 'Adventure', 'Animation', 'Comedy', 'Fantasy', 'Sci-Fi'),
    (),
)


def test_items_share_one_vote_between_their_keywords():
    # Drama 1 + 1/2, Comedy 1/2 + 1/6, the other five of item 4 1/6 each.
    assert count_profile([1, 2, 4], KEYWORDS) == ('Drama', 'Comedy')


def test_many_keywords_of_one_item_do_not_outvote_single_ones():
    # Action 3/6 against Western 1: three films with six genres weigh less than one with one.
    assert count_profile([3, 4, 4, 4], KEYWORDS, n=1) == ('Western',)


def test_equal_weights_go_to_the_keyword_seen_last():
    assert count_profile([1, 3], KEYWORDS) == ('Western', 'Drama')
    assert count_profile([3, 1], KEYWORDS) == ('Drama', 'Western')


def test_equal_weights_of_one_item_go_by_name():
    assert count_profile([2], KEYWORDS) == ('Comedy', 'Drama')


def test_thirds_add_up_to_one():
    """Six sixths and one whole are the same weight, whatever the rounding of the sums."""
    added = functools.reduce(operator.add, [1 / 6] * 6)  # `sum` corrects itself from Python 3.12 on
    assert added != 1.0  # the reason for the test
    ranked = count_profile([4] * 6 + [3], KEYWORDS)
    assert ranked == ('Western', 'Action')  # all equal; Western was seen last


def test_short_histories_have_short_profiles():
    assert count_profile([], KEYWORDS) == ()
    assert count_profile([5], KEYWORDS) == ()
    assert count_profile([3, 5], KEYWORDS) == ('Western',)


def test_equals_exact_fractions_on_random_histories():
    rng = np.random.default_rng(0)
    names = [f'k{i}' for i in range(7)]
    keywords = ((), *(tuple(rng.permutation(names)[: rng.integers(0, 5)]) for _ in range(30)))
    for _ in range(200):
        history = rng.integers(1, 31, rng.integers(0, 40)).tolist()
        weight = {
            k: sum(Fraction(1, len(keywords[i])) for i in history if k in keywords[i])
            for k in names
        }
        last = {
            k: max((p for p, i in enumerate(history) if k in keywords[i]), default=-1)
            for k in names
        }
        ranked = sorted((k for k in names if weight[k]), key=lambda k: (-weight[k], -last[k], k))
        assert count_profile(history, keywords) == tuple(ranked[:2])


def test_k01_the_target_is_not_in_its_own_profile():
    """K01: Drama, Drama, then the only Western as validation item and the only Action as test."""
    split = Split(
        offsets=np.array([0, 4]),
        items=np.array([1, 2, 3, 4], np.int32),
        train_end=np.array([2], np.int32),
        valid_at=np.array([2], np.int32),
        test_at=np.array([3], np.int32),
    )
    valid = count_profile(split.history(0, 'valid').tolist(), KEYWORDS)
    test = count_profile(split.history(0, 'test').tolist(), KEYWORDS, n=9)
    assert valid == ('Drama', 'Comedy')
    assert set(test) == {'Drama', 'Comedy', 'Western'}  # the validation item is history by then
