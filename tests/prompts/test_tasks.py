"""The instruction examples: made of training data alone, in the shares that the config states."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from palr_jax.config import default_config
from palr_jax.data import Catalogue, Interactions, leave_one_out
from palr_jax.errors import InputError
from palr_jax.prompts.tasks import affinity, make_examples, split_users

ITEMS = 90
GENRES = ('Drama', 'Comedy', 'War', 'Western', 'Horror', 'Musical')
HISTORY = 5  # shown here, so that most histories are longer


def config(**changes):
    tasks = default_config().tasks
    for field, value in changes.items():
        tasks[field] = value
    return tasks


def split_of(*histories):
    """Every user's events, oldest first; the last two validate and test."""
    lengths = [len(h) for h in histories]
    return leave_one_out(
        Interactions(
            users=np.repeat(np.arange(len(histories), dtype=np.int32), lengths),
            items=np.array([i for h in histories for i in h], np.int32),
            times=np.concatenate([np.arange(n) for n in lengths]),
            user_ids=tuple(map(str, range(len(histories)))),
        )
    )


def catalogue_of(keywords):
    n = len(keywords) + 1
    titles = ('', *(f'Film {i}' for i in range(1, n)))
    return Catalogue(tuple(map(str, range(n))), titles, (None,) * n, ((), *keywords))


def train_only(*histories):
    """Users with these training items; items 98 and 99 are what each of them does next."""
    return split_of(*([*h, 98, 99] for h in histories))


@pytest.fixture(scope='module')
def catalogue():
    rng = np.random.default_rng(1)
    return catalogue_of(
        [tuple(rng.permutation(GENRES)[: rng.integers(0, 4)].tolist()) for _ in range(ITEMS)]
    )


@pytest.fixture(scope='module')
def split():
    """400 users of 4 to 30 events; an item is rarer the larger its id."""
    rng = np.random.default_rng(2)
    weight = 1 / np.arange(1, ITEMS + 1) ** 0.6
    histories = [
        rng.choice(ITEMS, rng.integers(4, 31), replace=False, p=weight / weight.sum()) + 1
        for _ in range(400)
    ]
    return split_of(*histories)


@pytest.fixture(scope='module')
def pairs(split, catalogue):
    return affinity(split, catalogue)


@pytest.fixture(scope='module')
def examples(split, catalogue, pairs):
    """The examples of all users, as configured by default but with fewer targets."""
    return make(split, catalogue, pairs, targets=6)


def make(split, catalogue, pairs, users=None, history=HISTORY, seed=0, **changes):
    users = range(len(split.train_end)) if users is None else users
    return make_examples(
        split, catalogue, pairs, users, config(**changes), history=history, seed=seed
    )


def within(count, n, share, sigmas=4):
    """Whether `count` of `n` is within so many standard deviations of the share."""
    return abs(count - n * share) <= sigmas * np.sqrt(n * share * (1 - share))


# --- co-visitation --------------------------------------------------------------------------------


def test_co_visitation_equals_a_brute_force_count(split, pairs):
    expected = np.zeros((ITEMS + 1, ITEMS + 1), int)
    for user in range(len(split.train_end)):
        for a, b in itertools.permutations(split.train(user).tolist(), 2):
            expected[a, b] += 1
    assert np.array_equal(pairs.together.toarray(), expected)
    has = {(int(i), u) for u in range(len(split.train_end)) for i in split.train(u)}
    assert set(zip(*(axis.tolist() for axis in pairs.visitors.nonzero()))) == has
    assert set(pairs.visitors.data.tolist()) == {1}


def test_keyword_lists_hold_every_item_once(catalogue, pairs):
    for genre in GENRES:
        has = [i for i in range(1, ITEMS + 1) if genre in catalogue.keywords[i]]
        assert pairs.by_keyword[genre].tolist() == has


# --- which users ----------------------------------------------------------------------------------


def test_a_seeded_fifth_of_the_users_gives_examples(split):
    ours, others = split_users(split, 0.2, seed=0)
    assert len(ours) == 80  # of 400, all with two training items
    assert np.array_equal(np.union1d(ours, others), np.arange(400))
    assert not set(ours) & set(others)
    again, _ = split_users(split, 0.2, seed=0)
    assert np.array_equal(ours, again)
    other_seed, _ = split_users(split, 0.2, seed=1)
    assert not np.array_equal(ours, other_seed)
    assert within(len(set(ours) & set(other_seed)), 80, 0.2)  # independent of the first choice


@pytest.mark.parametrize(('share', 'number'), [(0.0, 0), (0.001, 1), (0.5, 2), (1.0, 4)])
def test_the_share_is_of_users_who_can_give_one(share, number):
    """Users with 0 and 1 training items are on neither side."""
    split = split_of([1, 2, 3, 4], [1, 2, 3], [5, 6], [4], [1, 2, 3, 4, 5], [3, 2, 1, 6])
    assert split.train_end.tolist() == [2, 1, 2, 1, 3, 2]
    ours, others = split_users(split, share, seed=0)
    assert len(ours) == number
    assert sorted([*ours, *others]) == [0, 2, 4, 5]


# --- histories, cuts, targets ---------------------------------------------------------------------


def test_without_enrichment_an_example_is_a_window_of_the_training_items(split, catalogue, pairs):
    for e in make(split, catalogue, pairs, enrich=False, swap=0.0, targets=6):
        train = split.train(e.user).tolist()
        cut = len(e.past)
        assert list(e.past) == train[:cut]
        assert e.history == e.past[-HISTORY:]
        assert list(e.targets) == train[cut : cut + 6]
        assert len(e.targets) >= 1
        assert cut >= min(3, len(train) - 1)


def test_every_user_gives_as_many_examples_as_there_are_cuts_up_to_the_limit(split, examples):
    given = collections.Counter(e.user for e in examples)
    for user, n in enumerate(split.train_end.tolist()):
        cuts = n - min(3, n - 1)
        assert given[user] == min(4, cuts)
    assert len({(e.user, len(e.past)) for e in examples}) == len(examples)  # no cut twice


def test_cuts_are_uniform(catalogue):
    """One user with 10 training items: the 7 cuts of 700 seeds, 100 each."""
    split = split_of(range(1, 13))
    pairs = affinity(split, catalogue)
    cuts = collections.Counter(
        len(make(split, catalogue, pairs, seed=seed, examples_per_user=1)[0].past)
        for seed in range(700)
    )
    assert sorted(cuts) == [3, 4, 5, 6, 7, 8, 9]
    assert all(within(n, 700, 1 / 7) for n in cuts.values())


@pytest.mark.parametrize('least', [1, 3, 6])
def test_at_least_so_many_items_stand_before_a_cut(split, catalogue, pairs, least):
    made = make(split, catalogue, pairs, min_history=least, examples_per_user=30)
    for user, n in enumerate(split.train_end.tolist()):
        cuts = sorted(len(e.past) for e in made if e.user == user)
        assert cuts == list(range(min(least, n - 1), n))


def test_users_with_two_training_items_give_one_example(catalogue):
    """One item before the cut where three are not to be had, one after it."""
    split = split_of([7, 3, 5, 9], [1, 2, 3, 4, 5])
    (example,) = make(split, catalogue, affinity(split, catalogue), [0], enrich=False, swap=0.0)
    assert (example.past, example.history, example.targets) == ((7,), (7,), (3,))


def test_no_history_is_shown_where_the_prompt_leaves_it_out(split, catalogue, pairs):
    """prompts.history = 0: the profile still has the past, and nothing is swapped into it."""
    for e in make(split, catalogue, pairs, range(50), history=0, swap=1.0):
        assert e.history == ()
        assert list(e.past) == split.train(e.user)[: len(e.past)].tolist()


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('share', [0.0, 0.5, 0.8, 1.0])
def test_the_mix_of_tasks(split, catalogue, pairs, share):
    """Within four standard deviations of about 1,500 draws: .05 for a half."""
    made = make(split, catalogue, pairs, recommend_retrieval=share, enrich=False)
    retrieval = sum(e.task == 'recommend_retrieval' for e in made)
    assert len(made) > 1400
    assert within(retrieval, len(made), share)
    assert all(bool(e.candidates) == (e.task == 'recommend_retrieval') for e in made)


@pytest.mark.parametrize('share', [0.0, 0.1, 1.0])
def test_swaps_exchange_one_shown_item_with_one_of_the_answer(split, catalogue, pairs, share):
    made = make(split, catalogue, pairs, swap=share, targets=6)
    swapped = 0
    for e in made:
        train = split.train(e.user).tolist()
        cut = len(e.past)
        moved = [p for p in range(cut) if e.past[p] != train[p]]
        swapped += len(moved)
        own = [i for i in e.targets if i in train]
        assert sorted([*e.past, *own]) == sorted(train[: cut + 6])  # nothing lost, nothing twice
        if moved:
            (position,) = moved
            assert position >= cut - HISTORY
            assert train[position] in e.targets
            assert e.past[position] in train[cut : cut + 6]
    assert within(swapped, len(made), share)


def test_examples_whose_candidates_are_retrieved_keep_the_users_own_history(
    split, catalogue, pairs
):
    """An item that a swap took out of it could be retrieved, and be listed as a negative."""
    retrieved = {'candidates_from': 'covisitation', 'recommend_retrieval': 1.0, 'swap': 1.0}
    made = make(split, catalogue, pairs, candidates=8, targets=10, **retrieved)
    similar = make(split, catalogue, pairs, swap=0.0)
    assert [e.past for e in made] == [e.past for e in similar]
    assert [e.history for e in made] == [e.history for e in similar]
    assert {(e.task, e.candidates, e.targets) for e in made} == {('recommend_retrieval', (), ())}


# --- enrichment -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('min_users', 'most', 'targets'),
    [
        (1, 5, (4, 5, 6, 7)),
        (2, 5, (4, 5, 6)),
        (3, 5, (4, 5)),
        (4, 5, (4,)),
        (1, 3, (4, 5, 6)),
        (1, 1, (4,)),
    ],
)
def test_enrichment_counts_the_users_who_share_an_item(min_users, most, targets):
    """The only cut of user 0 leaves item 4. Of the users with 4, three have 5, two 6, one 7.

    8 belongs to a user who shares only history with user 0, and everybody's validation and test
    items 98 and 99, which all users with 4 share, are not training data.
    """
    split = train_only([1, 2, 3, 4], [4, 5, 6], [4, 5], [6, 5, 4], [4, 7, 3], [1, 2, 3, 8])
    catalogue = catalogue_of([()] * 99)
    (example,) = make(
        split,
        catalogue,
        affinity(split, catalogue),
        [0],
        enrich_min_users=min_users,
        targets=most,
        swap=0.0,
    )
    assert example.targets == targets


def test_enrichment_counts_users_not_pairs():
    """A user who shares two targets is one user: item 6 has one, item 7 has two."""
    split = train_only([1, 2, 3, 4, 5], [4, 5, 6], [4, 7], [5, 7])
    catalogue = catalogue_of([()] * 99)
    pairs = affinity(split, catalogue)
    made = make(split, catalogue, pairs, [0], enrich_min_users=2, swap=0.0)
    assert next(e.targets for e in made if len(e.past) == 3) == (4, 5, 7)


def test_enriched_answers_never_hold_what_is_shown(examples):
    assert any(len(e.targets) == 6 for e in examples)
    for e in examples:
        assert len(set(e.targets)) == len(e.targets) <= 6
        assert not set(e.targets) & set(e.past)


# --- candidates -----------------------------------------------------------------------------------


def test_k03_lists_hold_all_targets_and_only_items_that_the_user_has_not_had(split, examples):
    """K03: targets in the list exactly once, no negative out of the user's training items."""
    lists = [e for e in examples if e.candidates]
    assert len(lists) > 600
    for e in lists:
        assert len(e.candidates) == 20
        assert len(set(e.candidates)) == 20
        assert set(e.targets) <= set(e.candidates)
        negatives = set(e.candidates) - set(e.targets)
        assert not negatives & set(split.train(e.user).tolist())
        assert not negatives & set(e.past)
        assert all(1 <= i <= ITEMS for i in e.candidates)


def test_targets_stand_anywhere_in_the_list(examples):
    """The places of the first target over the 20 slots: uniform, so about 9.5 on average."""
    places = [e.candidates.index(e.targets[0]) for e in examples if e.candidates]
    deviation = np.sqrt((20**2 - 1) / 12 / len(places))
    assert abs(np.mean(places) - 9.5) < 4 * deviation
    assert set(places) == set(range(20))


@pytest.mark.parametrize('at', ['first', 'last'])
def test_targets_stand_where_the_config_says(split, catalogue, pairs, at):
    made = make(split, catalogue, pairs, targets=6, targets_at=at, recommend_retrieval=1.0)
    orders = set()
    for e in made:
        n = len(e.targets)
        block = e.candidates[:n] if at == 'first' else e.candidates[-n:]
        assert sorted(block) == sorted(e.targets)
        assert len(set(e.candidates)) == 20
        orders.add(tuple(e.targets.index(item) for item in block))
    assert len(orders) > 100  # shuffled among themselves


@pytest.mark.parametrize(('share', 'by_genre'), [(0.0, 0), (0.3, 3), (0.5, 4), (1.0, 9)])
def test_the_shares_of_the_two_kinds_of_negatives(share, by_genre):
    """The target's genre is that of 11 to 30; its company, all of another genre, is 31 to 50."""
    split = train_only([1, 2, 3, 10], *([10, i] for i in range(31, 51)))
    genres = {10: 'War'} | dict.fromkeys(range(11, 31), 'War') | dict.fromkeys(range(31, 51), 'Art')
    catalogue = catalogue_of([(genres[i],) if i in genres else () for i in range(1, 100)])
    pairs = affinity(split, catalogue)
    (example,) = make(
        split,
        catalogue,
        pairs,
        [0],
        negatives_by_genre=share,
        candidates=10,
        targets=1,
        recommend_retrieval=1.0,
        swap=0.0,
    )
    negatives = set(example.candidates) - {10}
    assert len(negatives) == 9
    assert len(negatives & set(range(11, 31))) == by_genre  # round(9 * share)
    assert len(negatives & set(range(31, 51))) == 9 - by_genre


def test_company_is_drawn_by_the_number_of_users_who_share_it():
    """Three users have the target and 5, one has it and 6: 5 comes three times out of four."""
    split = train_only([1, 2, 3, 4], [4, 5], [4, 5], [4, 5], [4, 6])
    catalogue = catalogue_of([()] * 99)
    pairs = affinity(split, catalogue)
    drawn = collections.Counter()
    for seed in range(600):
        (example,) = make(
            split,
            catalogue,
            pairs,
            [0],
            seed=seed,
            candidates=2,
            targets=1,
            negatives_by_genre=0.0,
            recommend_retrieval=1.0,
            swap=0.0,
        )
        drawn.update(set(example.candidates) - {4})
    assert set(drawn) == {5, 6}
    assert within(drawn[5], 600, 0.75)


def test_lists_are_filled_at_random_where_nothing_resembles_the_targets():
    """No keywords and no company: the rest of the catalogue serves, as far as it goes."""
    split = train_only([1, 2, 3, 4])
    catalogue = catalogue_of([()] * 99)
    pairs = affinity(split, catalogue)
    (example,) = make(split, catalogue, pairs, recommend_retrieval=1.0)
    assert len(set(example.candidates)) == 20
    small = catalogue_of([()] * 7)
    split = split_of([1, 2, 3, 4, 5, 6])
    (example,) = make(split, small, affinity(split, small), recommend_retrieval=1.0, swap=0.0)
    assert sorted(example.candidates) == [4, 5, 6, 7]  # all that there is


def test_d03_two_items_with_one_title_are_two_items():
    """D03: the twin of the target is a negative like any other; nothing is keyed by title."""
    split = split_of([1, 2, 3, 4, 6, 7])
    catalogue = catalogue_of([('War',)] * 7)
    catalogue = dataclasses.replace(catalogue, titles=('', *['Chasing Amy (1997)'] * 7))
    pairs = affinity(split, catalogue)
    (example,) = make(split, catalogue, pairs, recommend_retrieval=1.0, swap=0.0)
    assert example.history == (1, 2, 3)
    assert example.targets == (4,)
    assert sorted(example.candidates) == [4, 5, 6, 7]


def test_lists_without_room_for_a_negative_are_refused(split, catalogue, pairs):
    with pytest.raises(InputError, match=r'candidates is 10; .*tasks.targets, which is 10'):
        make(split, catalogue, pairs, candidates=10, targets=10)
    made = make(split, catalogue, pairs, [0], candidates=10, targets=10, recommend_retrieval=0.0)
    assert {e.task for e in made} == {'recommend'}


# --- what examples depend on ----------------------------------------------------------------------


def test_k01_no_example_depends_on_a_validation_or_test_item(split, catalogue, pairs, examples):
    """K01: other validation and test items for every user; all examples are the same."""
    items = split.items.copy()
    held_out = ~split.train_events()
    assert held_out.sum() == 2 * 400
    items[held_out] = np.random.default_rng(9).integers(1, ITEMS + 1, held_out.sum())
    assert np.count_nonzero(items != split.items) > 700
    other = dataclasses.replace(split, items=items)
    assert make(other, catalogue, affinity(other, catalogue), targets=6) == examples
    assert np.array_equal(split_users(other, 0.2, 0)[0], split_users(split, 0.2, 0)[0])


def test_k01_held_out_items_are_not_spared_as_negatives(split, examples):
    """Leaving them out would tell the model about them; they come as often as others do."""
    lists = [e for e in examples if e.candidates]
    seen = sum(
        split.target(e.user, part) in set(e.candidates) - set(e.targets)
        for e in lists
        for part in ('valid', 'test')
    )
    # About 15 negatives of some 75 items that the user has not had.
    assert 0.1 < seen / (2 * len(lists)) < 0.4


def test_examples_depend_on_the_seed_and_not_on_who_else_gives_some(
    split, catalogue, pairs, examples
):
    again = make(split, catalogue, pairs, targets=6)
    assert again == examples
    few = make(split, catalogue, pairs, [11, 3, 200], targets=6)
    assert few == [e for user in (11, 3, 200) for e in examples if e.user == user]
    assert make(split, catalogue, pairs, seed=1, targets=6) != examples
