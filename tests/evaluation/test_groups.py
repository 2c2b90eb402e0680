"""Groups of users by hand."""

import numpy as np
import pytest

from palr_jax.data.splits import Split
from palr_jax.evaluation.groups import popularity_classes, quartiles, user_groups


def split_of(histories):
    """Leave-one-out: a user's last item tests, the one before validates."""
    lengths = np.array([len(items) for items in histories])
    return Split(
        offsets=np.concatenate([[0], lengths.cumsum()]),
        items=np.concatenate(histories).astype(np.int32),
        train_end=lengths - 2,
        valid_at=lengths - 2,
        test_at=lengths - 1,
    )


# Training events: item 1 has 5, the items 2, 3, 4 have 2 each and 5, 6, 7 one each; 14 in all.
SPLIT = split_of(
    [
        [1, 2, 8, 1],  # tests item 1
        [1, 2, 1, 3],
        [1, 3, 4, 1, 2],
        [1, 3, 5, 1, 7],
        [6, 7, 1, 4, 1, 8],
    ]
)


def test_thirds_of_training_events():
    """Before item 1: none of 14; before 2, 3, 4: 5, from a third on; before 5, 6, 7: 11."""
    classes = popularity_classes(SPLIT)
    counts = np.bincount(SPLIT.items[SPLIT.train_events()], minlength=9)
    assert counts.tolist() == [0, 5, 2, 2, 2, 1, 1, 1, 0]
    assert classes[1:].tolist() == ['head', *['middle'] * 3, *['tail'] * 3, 'cold']


def test_thirds_end_before_an_item_not_in_it():
    """Of 12 events 4, 3, 2, 1, 1, 1: item 2 has a third before it, item 4 nine."""
    split = split_of([[1] * 4 + [2] * 3 + [3] * 2 + [4, 5, 6] + [7, 7]])
    names = ['head', 'middle', 'middle', 'tail', 'tail', 'tail', 'cold']
    assert popularity_classes(split)[1:].tolist() == names


def test_groups_by_hand():
    groups = user_groups(SPLIT, 'test', np.arange(5), np.array([0, 3]))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in groups.items()} == {
        'fine-tuning: seen users': [0, 3],
        'fine-tuning: unseen users': [1, 2, 4],
        'history length: 3': [0, 1],
        'history length: 4': [2, 3],
        'history length: 5': [4],
        'target popularity: head': [0],
        'target popularity: middle': [1, 2],
        'target popularity: tail': [3],
        'target popularity: cold': [4],
    }


def test_a_sample_has_the_same_groups_in_its_own_order():
    users = np.array([4, 1, 0])
    everyone = user_groups(SPLIT, 'test', np.arange(5), np.array([0, 3]))
    sample = user_groups(SPLIT, 'test', users, np.array([0, 3]))
    assert set(sample) < set(everyone)  # nobody with 4 items, nor with a tail target
    for name, mask in sample.items():
        np.testing.assert_array_equal(mask, everyone[name][users])


def test_the_groups_of_a_grouping_part_the_users():
    rng = np.random.default_rng(0)
    split = split_of([rng.integers(1, 50, rng.integers(3, 40)) for _ in range(300)])
    for part in ('valid', 'test'):
        users = rng.permutation(300)[:200]
        groups = user_groups(split, part, users, np.arange(60))
        for grouping in ('fine-tuning', 'history length', 'target popularity'):
            masks = [mask for name, mask in groups.items() if name.startswith(f'{grouping}: ')]
            assert (np.sum(masks, 0) == 1).all()
        few = user_groups(split, part, users[:20], np.arange(60))
        assert set(few) <= set(groups)
        for name, mask in groups.items():
            if name.startswith('history length'):
                low, high = map(int, name.split(': ')[1].split('-'))
                lengths = [len(split.history(user, part)) for user in users[mask]]
                assert low <= min(lengths) <= max(lengths) <= high
                assert 0.15 < mask.mean() < 0.35


def test_without_fine_tuning_and_without_users():
    groups = user_groups(SPLIT, 'test', np.arange(5), None)
    assert not any(name.startswith('fine-tuning') for name in groups)
    assert user_groups(SPLIT, 'test', np.zeros(0, int), None) == {}
    groups = user_groups(SPLIT, 'test', np.arange(5), np.arange(5))
    assert 'fine-tuning: unseen users' not in groups
    nobody = Split(SPLIT.offsets, SPLIT.items, SPLIT.train_end, -np.ones(5), -np.ones(5))
    with pytest.raises(ValueError, match='without a valid target'):
        user_groups(nobody, 'valid', np.arange(5), None)


def test_quartiles_keep_equal_values_together():
    assert quartiles(np.arange(3, 103)) == [(3, 27), (28, 52), (53, 77), (78, 102)]
    assert quartiles(np.array([4, 4, 4, 4, 5, 9])) == [(4, 4), (5, 5), (9, 9)]
    assert quartiles(np.array([7])) == [(7, 7)]
    assert quartiles(np.zeros(0, int)) == []
