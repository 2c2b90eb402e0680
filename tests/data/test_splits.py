"""Leave-one-out and the split by time: by hand, and the properties that rule out leaks."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax.data import Interactions, Split, leave_one_out, load, make_split, temporal
from palr_jax.data.splits import cut_times, describe
from palr_jax.errors import InputError
from palr_jax.testing import write_amazon, write_ml100k


def make_interactions(*histories):
    users = np.repeat(np.arange(len(histories)), [len(h) for h in histories]).astype(np.int32)
    items = np.concatenate([np.array(h, np.int32) for h in histories])
    ids = tuple(str(user) for user in range(len(histories)))
    return Interactions(users, items, np.arange(len(items)), ids)


def test_d10_the_validation_item_is_part_of_the_test_history():
    split = leave_one_out(make_interactions([1, 2, 3, 4, 5]))
    assert split.train(0).tolist() == [1, 2, 3]
    assert split.history(0, 'valid').tolist() == [1, 2, 3]
    assert split.target(0, 'valid') == 4
    assert split.history(0, 'test').tolist() == [1, 2, 3, 4]
    assert split.target(0, 'test') == 5


def test_d10_users_with_fewer_than_three_events_only_train():
    split = leave_one_out(make_interactions([7, 8], [1, 2, 3], [9]))
    assert [split.train(user).tolist() for user in range(3)] == [[7, 8], [1], [9]]
    assert split.users('valid').tolist() == split.users('test').tolist() == [1]
    assert split.targets('valid').tolist() == [0, 2, 0]
    assert split.targets('test').tolist() == [0, 3, 0]
    assert split.target(0, 'test') == 0
    assert split.history(0, 'test').tolist() == [7, 8]
    assert split.history(2, 'valid').tolist() == [9]


def test_d11_cold_targets_are_counted():
    split = leave_one_out(make_interactions([1, 2, 3, 9], [2, 1, 4, 3], [5, 6]))
    # Training: 1, 2 of user 0, 2, 1 of user 1, 5, 6 of user 2.
    assert describe(split) == {
        'valid_users': 2,
        'valid_cold': 2,
        'test_users': 2,
        'test_cold': 2,
    }
    warm = leave_one_out(make_interactions([1, 2, 3], [3, 1, 2], [2, 3, 1]))
    assert describe(warm)['test_cold'] == 0


def test_the_three_positions_are_independent():
    """What a split by time needs: a test target without a validation target, a gap before it."""
    split = Split(
        offsets=np.array([0, 5, 7]),
        items=np.array([1, 2, 3, 4, 5, 6, 7], np.int32),
        train_end=np.array([2, 2], np.int32),
        valid_at=np.array([-1, -1], np.int32),
        test_at=np.array([4, -1], np.int32),
    )
    assert split.train(0).tolist() == [1, 2]
    assert split.history(0, 'valid').tolist() == [1, 2]
    assert split.history(0, 'test').tolist() == [1, 2, 3, 4]
    assert split.targets('test').tolist() == [5, 0]
    assert split.train_events().tolist() == [True, True, False, False, False, True, True]


def test_names_are_checked():
    events = make_interactions([1, 2, 3])
    with pytest.raises(
        InputError, match=r"config\.data\.split is 'random'; allowed are leave_one_out, temporal"
    ):
        make_split(events, 'random')
    with pytest.raises(ValueError, match="part is 'train'"):
        make_split(events, 'leave_one_out').targets('train')


def make_events(*histories):
    """Interactions of users' [(item, time)]."""
    users = np.repeat(np.arange(len(histories)), [len(h) for h in histories]).astype(np.int32)
    items, times = np.array([event for h in histories for event in h]).T
    ids = tuple(str(user) for user in range(len(histories)))
    return Interactions(users, items.astype(np.int32), times, ids)


def test_temporal_by_hand():
    """Cuts at 10 and 20; an event in the second of a cut is behind it."""
    split = temporal(
        make_events(
            [(1, 1), (2, 9), (3, 10), (4, 15), (5, 20), (6, 30)],  # all parts
            [(1, 5), (2, 25)],  # no validation target, since nothing happens between the cuts
            [(3, 12), (4, 19), (1, 21)],  # no training event, so no validation target
            [(4, 1), (5, 2)],  # only trains
            [(6, 20), (7, 22)],  # nothing before any cut
            [(2, 3), (3, 10)],  # no test target
        ),
        10,
        20,
    )
    assert [split.train(user).tolist() for user in range(6)] == [[1, 2], [1], [], [4, 5], [], [2]]
    assert split.targets('valid').tolist() == [3, 0, 0, 0, 0, 3]
    assert split.targets('test').tolist() == [5, 2, 1, 0, 0, 0]
    assert split.history(0, 'valid').tolist() == [1, 2]
    assert split.history(0, 'test').tolist() == [1, 2, 3, 4]
    assert split.history(1, 'test').tolist() == [1]
    assert split.history(2, 'test').tolist() == [3, 4]
    assert describe(split) == {
        'valid_from': 10,
        'test_from': 20,
        'train_events': 6,
        'other_events': 6,
        'users_without_training': 2,
        'valid_users': 2,
        'valid_cold': 2,
        'test_users': 3,
        'test_cold': 0,
    }


def test_cuts_are_shares_of_all_events_and_never_part_a_second():
    events = make_events([(item, time) for item, time in enumerate([1, 2, 3, 4, 5, 6, 7, 7, 7, 8])])
    assert cut_times(events, 0.2, 0.1) == (7, 8)
    assert cut_times(events, 0.1, 0.2) == (7, 7)
    assert cut_times(events, 0.3, 0.4) == (4, 7)


def test_a_part_that_would_be_empty_is_refused():
    events = make_events([(item, 5) for item in range(9)])
    with pytest.raises(
        InputError, match=r'valid_share=0\.1 and .*leave no training events, with cuts .*\[5, 5\]'
    ):
        make_split(events, 'temporal')
    events = make_events([(1, 1), (2, 2), (3, 3)], [(4, 9), (5, 9), (6, 9)])
    with pytest.raises(InputError, match=r'leave no validation users'):
        make_split(events, 'temporal', 0.2, 0.2)


@pytest.fixture(params=['ml100k', 'amazon'])
def source(request, tmp_path):
    """A log after the k-core, with many ties; users' first and last seconds differ widely."""
    write = {'ml100k': write_ml100k, 'amazon': write_amazon}[request.param]
    path = write(tmp_path, users=60)
    source = load(ConfigDict({'source': request.param, 'path': str(path), 'k_core': 5}))
    events = source.interactions
    new_user = np.diff(events.users, prepend=-1) > 0
    later = np.diff(events.times, prepend=0) != 0
    ticks = np.cumsum(later)
    ticks -= ticks[new_user][events.users]
    starts = np.random.default_rng(0).integers(10, size=len(events.user_ids))
    times = starts[events.users] + ticks
    return dataclasses.replace(source, interactions=dataclasses.replace(events, times=times))


def seen(split, part, users):
    """All that a model may learn from, and what it reads before the targets of `users`."""
    train = [split.train(user).tolist() for user in range(len(split.offsets) - 1)]
    return train, [split.history(user, part).tolist() for user in users]


def test_k_temporal_nothing_at_or_after_a_cut_is_in_training_or_histories(source):
    events = source.interactions
    split = make_split(events, 'temporal', 0.15, 0.15)
    valid_from, test_from = split.cuts
    trains = split.train_events()
    assert events.times[trains].max() < valid_from
    assert trains.sum() == (events.times < valid_from).sum()
    for part, cut in (('valid', valid_from), ('test', test_from)):
        assert len(split.users(part)) > 10
        for user in split.users(part):
            times = events.times[split.offsets[user] : split.offsets[user + 1]]
            at = len(split.history(user, part))
            assert at > 0
            assert times[at - 1] < cut <= times[at]
    assert all(events.times[split.offsets[:-1] + split.valid_at][split.valid_at >= 0] < test_from)


@pytest.mark.parametrize('part', ['valid', 'test'])
def test_k_temporal_what_happens_after_a_cut_changes_nothing_before_it(source, part):
    """Events behind the cut get other items and later times, or are deleted."""
    events = source.interactions
    cuts = cut_times(events, 0.15, 0.15)
    split = temporal(events, *cuts)
    rng = np.random.default_rng(0)
    late = events.times >= cuts[part == 'test']
    for keep in (np.ones(len(late), bool), ~late | (rng.random(len(late)) < 0.5), ~late):
        items, times = events.items.copy(), events.times.copy()
        items[late] = rng.integers(1, source.catalogue.items + 1, late.sum())
        times[late] += rng.integers(2)
        changed = Interactions(events.users[keep], items[keep], times[keep], events.user_ids)
        after = temporal(changed, *cuts)
        users = np.intersect1d(split.users(part), after.users(part))
        assert len(users) > 10 or not keep[late].any()
        assert seen(after, part, users) == seen(split, part, users)


def test_k_leave_one_out_a_test_item_is_in_no_training_and_no_history(source):
    """Another test item for every user changes nothing before the test; same for validation."""
    events = source.interactions
    split = leave_one_out(events)
    rng = np.random.default_rng(0)
    for part, at in (('test', split.test_at), ('valid', split.valid_at)):
        items = events.items.copy()
        rows = (split.offsets[:-1] + at)[at >= 0]
        items[rows] = items[rows] % source.catalogue.items + 1
        changed = leave_one_out(dataclasses.replace(events, items=items))
        users = split.users(part)
        assert seen(changed, part, users) == seen(split, part, users)
        assert np.all(changed.targets(part) != split.targets(part))
        shuffled = events.items.copy()
        for user in users:  # the target and all that follows it
            start = split.offsets[user] + at[user]
            shuffled[start : split.offsets[user + 1]] = rng.integers(1, 9)
        changed = leave_one_out(dataclasses.replace(events, items=shuffled))
        assert seen(changed, part, users) == seen(split, part, users)
