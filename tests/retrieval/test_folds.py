"""Retrieved candidates for fine-tuning come from retrievers that have not seen their users."""

import numpy as np
import pytest

from palr_jax.data import Catalogue, validation_halves
from palr_jax.errors import InputError
from palr_jax.prompts.tasks import Example, relist
from palr_jax.retrieval import Material, retrieve_out_of_fold
from palr_jax.retrieval.systems import fit_systems, mix_systems


def material(split, settings, folder, items=40):
    titles = ('', *(f'Item {i}' for i in range(1, items + 1)))
    catalogue = Catalogue(titles, titles, (None,) * (items + 1), ((),) * (items + 1))
    return Material(split, catalogue, settings, 0, folder)


@pytest.fixture
def covisits(settings):
    """Remembers exactly: the factors are as many as the items."""
    settings.systems = ('covisitation',)
    settings.covisitation_width = 40
    return settings


@pytest.fixture
def secrets(split_of):
    """Each of 10 users went from an item of his own to another of his own; all share item 1."""
    return split_of([[2 * u + 2, 2 * u + 3, 1, 1 + (2 * u + 2) % 20, 1] for u in range(10)])


def test_a_retriever_that_saw_the_user_puts_the_target_first_and_that_of_the_fold_does_not(
    secrets, covisits, tmp_path
):
    users = np.arange(10)
    pasts = [np.array([2 * u + 2]) for u in users]
    targets = [2 * u + 3 for u in users]
    seen = material(secrets, covisits, tmp_path / 'seen')
    mixed = mix_systems(fit_systems(seen), secrets, True, seen.folder)
    scores = mixed.user_vectors(pasts) @ mixed.item_vectors.T
    leaked = [np.argsort(-row)[:3] + 1 for row in scores]
    assert all(target in best for target, best in zip(targets, leaked))

    found = retrieve_out_of_fold(material(secrets, covisits, tmp_path), users, pasts, 5, 3)
    assert found.items.shape == (10, 3)
    assert not any(target in best for target, best in zip(targets, found.items))
    assert not any(past[0] in best for past, best in zip(pasts, found.items))
    again = retrieve_out_of_fold(material(secrets, covisits, tmp_path / 'b'), users, pasts, 5, 3)
    np.testing.assert_array_equal(found.items, again.items)


def test_all_pasts_of_a_user_are_in_one_fold(chain, covisits, tmp_path):
    """What one list holds does not depend on what else is asked for the same users."""
    users = np.array([0, 0, 1, 2])
    pasts = [chain.train(u)[:n] for u, n in ((0, 1), (0, 2), (1, 2), (2, 3))]
    all_of = retrieve_out_of_fold(material(chain, covisits, tmp_path / 'a'), users, pasts, 3, 5)
    some = retrieve_out_of_fold(
        material(chain, covisits, tmp_path / 'b'), users[1:], pasts[1:], 3, 5
    )
    np.testing.assert_array_equal(all_of.items[1:], some.items)


def test_a_fold_of_everybody_is_refused(chain, covisits, tmp_path):
    users = np.arange(len(chain.train_end))
    pasts = [chain.train(u)[:1] for u in users]
    with pytest.raises(InputError, match=r'tasks\.folds is 1: a fold holds all 150 users'):
        retrieve_out_of_fold(material(chain, covisits, tmp_path), users, pasts, 1, 5)


def test_the_split_without_users_and_with_fewer_that_validate(chain):
    less = chain.without(np.array([3, 5]))
    assert less.train(3).tolist() == []
    assert less.target(5, 'test') == less.target(3, 'valid') == 0
    assert less.train(4).tolist() == chain.train(4).tolist()
    assert not np.isin([3, 5], less.users('test')).any()
    first, second = validation_halves(chain, 0)
    assert len(first) == len(second) == 75
    assert sorted([*first, *second]) == chain.users('valid').tolist()
    seen = chain.validating(first)
    assert seen.users('valid').tolist() == sorted(first)
    assert seen.users('test').tolist() == chain.users('test').tolist()
    np.testing.assert_array_equal(seen.train_end, chain.train_end)
    assert not np.array_equal(first, validation_halves(chain, 1)[0])


class Tasks:
    targets = 2


def test_relisted_examples_have_the_next_items_that_were_retrieved(split_of):
    """Of [10, 11 | 12, 13, 14] the next two are targets; a list without any is left out."""
    split = split_of([[10, 11, 12, 13, 14, 15, 16]])
    example = Example(0, 'recommend_retrieval', (10, 11), (11,), (1, 2), (12, 13, 30))
    lists = np.array([[14, 13, 20, -1], [21, 12, 13, 22], [14, 15, 20, 21]])
    scores = np.array([[9.0, 8.0, 7.0, -np.inf], [6.0, 5.0, 4.0, 3.0], [2.0] * 4])
    found = relist([example] * 3, lists, scores, split, Tasks, order='retriever', seed=0)
    assert [(e.candidates, e.targets) for e in found] == [
        ((14, 13, 20), (13,)),
        ((21, 12, 13, 22), (12, 13)),
    ]
    assert [e.scores for e in found] == [(9.0, 8.0, 7.0), (6.0, 5.0, 4.0, 3.0)]
    assert all(e.past == (10, 11) and e.history == (11,) for e in found)
    shuffled = relist([example] * 3, lists, scores, split, Tasks, order='shuffled', seed=0)
    for one, other in zip(found, shuffled, strict=True):
        assert dict(zip(one.candidates, one.scores)) == dict(zip(other.candidates, other.scores))
    assert [sorted(e.candidates) for e in shuffled] == [sorted(e.candidates) for e in found]
    orders = {
        relist([example], lists[1:2], scores[1:2], split, Tasks, order='shuffled', seed=s)[
            0
        ].candidates
        for s in range(20)
    }
    assert len(orders) > 5
