"""details.json: every number from the ranks one by one, and example users that nobody chose."""

from types import SimpleNamespace

import numpy as np
import pytest

from palr_jax import details, storage
from palr_jax.evaluation import Run, TargetRanks
from palr_jax.metric_writer import MetricWriter


def random_run(system, users=30, seed=0):
    rng = np.random.default_rng(seed)
    greater, ties = rng.integers(0, 60, users), rng.integers(0, 4, users)
    ranks = TargetRanks(greater.astype(np.int32), ties.astype(np.int32), rng.random(users) < 0.7)
    return Run(system, np.arange(users), ranks)


def by_hand(run, k, gain):
    """The mean over users of the mean over all ranks that a tied target may have."""
    total = 0.0
    for greater, ties, found in zip(run.ranks.greater, run.ranks.ties, run.ranks.found):
        places = range(greater + 1, greater + ties + 2)
        total += found * np.mean([gain(place) if place <= k else 0.0 for place in places])
    return total / len(run.users)


def test_metrics_at_every_k_are_those_of_the_ranks():
    runs = [random_run('retriever', seed=1), random_run('llm', seed=2)]
    found = details.metrics_at_k(runs)
    assert found['ks'] == list(range(1, 51))
    assert found['users'] == 30
    for run in runs:
        values = found['systems'][run.system]
        for k, hit, gain in zip(found['ks'], values['HR'], values['NDCG'], strict=True):
            assert hit == pytest.approx(by_hand(run, k, lambda place: 1.0))
            assert gain == pytest.approx(by_hand(run, k, lambda place: 1 / np.log2(place + 1)))


@pytest.mark.parametrize(
    ('items', 'last'), [(1, [1]), (12, [7, 10, 12]), (500, [300, 500]), (9000, [300, 500])]
)
def test_recall_is_that_of_the_ranks_and_ends_with_the_catalogue(items, last):
    run = random_run('retriever')
    found = details.recall_at_k([run], items)
    assert found['ks'][-len(last) :] == last
    for k, value in zip(found['ks'], found['systems']['retriever'], strict=True):
        assert value == pytest.approx(by_hand(run, k, lambda place: 1.0))


def test_without_users_nothing_is_known():
    found = details.metrics_at_k([random_run('retriever', users=0)])
    assert set(found['systems']['retriever']['HR']) == {None}


def test_tied_items_share_their_places():
    items = np.array([7, 8, 9, 0, -1])
    scores = np.array([0.5, 2.0, 0.5, -1.0, -np.inf])
    assert details.item_places(items, scores)[:4] == [[2, 3], [1, 1], [2, 3], [4, 4]]


def test_example_users_depend_on_the_seed_and_the_users_alone():
    users = np.arange(100, 200)
    drawn = details.draw_examples(users, 0)
    assert len(set(drawn.tolist())) == 10
    assert (np.diff(drawn) > 0).all()
    assert set(drawn) <= set(users)
    np.testing.assert_array_equal(details.draw_examples(users, 0), drawn)
    assert not np.array_equal(details.draw_examples(users, 1), drawn)
    np.testing.assert_array_equal(details.draw_examples(users[:4], 0), users[:4])


def test_a_long_curve_is_averaged_and_a_short_one_is_not(tmp_path):
    project = SimpleNamespace(folder=lambda stage: tmp_path / stage, curves_folder=tmp_path)
    assert details.finetune_curve(project) is None
    storage.write_json(tmp_path / 'finetune' / 'stage.json', {})
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 4):
            writer.write(step, 'finetune', loss=1.0 / step)
            writer.write(step, 'other', loss=9.0)
    expected = {'steps': 1, 'step': [1, 2, 3], 'loss': [1.0, 0.5, 1 / 3]}
    assert details.finetune_curve(project) == expected

    with MetricWriter(tmp_path, {'finetune': 1}) as writer:
        for step in range(1, 1002):
            writer.write(step, 'finetune', loss=float(step))
    curve = details.finetune_curve(project)
    assert curve['steps'] == 3
    assert curve['step'][:2] == [3, 6]
    assert curve['loss'][:2] == [2.0, 5.0]
    assert curve['step'][-1] == 1001
    assert curve['loss'][-1] == 1000.5  # of the two steps that are left
