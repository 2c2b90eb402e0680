"""Training: what is packed, that the loss is the softmax's, that it learns, repeats and resumes."""

import itertools

import jax
import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import ndcg
from palr_jax.retrieval import (
    fit_popularity,
    target_ranks,
    train,
    train_sasrec,
)
from palr_jax.retrieval.train import batches, cut_sequences, pack


def leaves(retriever):
    return jax.tree.leaves(retriever.params)


def test_sequences_are_cut_from_the_end(split_of):
    split = split_of([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3], [4, 5]])
    # Training parts 1-7, 1 and 4-5, read 3 at a time.
    pieces = [piece.tolist() for piece in cut_sequences(split, 3)]
    assert pieces == [[4, 5, 6, 7], [1, 2, 3, 4], [4, 5]]


def test_packing_by_hand():
    """Steps 4, 2, 2, 1 in rows of 4: the row of four is full, the two of two share the next."""
    rows = pack([np.array(s) for s in ([7, 8], [1, 2, 3], [1, 2, 3, 4, 5], [4, 5, 6])], 4)
    assert rows.ids.tolist() == [[1, 2, 3, 4], [1, 2, 4, 5], [7, 0, 0, 0]]
    assert rows.targets.tolist() == [[2, 3, 4, 5], [2, 3, 5, 6], [8, 0, 0, 0]]
    assert rows.positions.tolist() == [[3, 2, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert rows.segments.tolist() == [[1, 1, 1, 1], [1, 1, 2, 2], [1, 0, 0, 0]]


def test_every_training_step_is_packed_once(chain):
    rows = pack(cut_sequences(chain, 8), 8)
    packed = sorted(zip(rows.ids[rows.ids > 0].tolist(), rows.targets[rows.ids > 0].tolist()))
    trains = [chain.train(user).tolist() for user in range(150)]
    assert packed == sorted(pair for items in trains for pair in itertools.pairwise(items))
    assert len(rows.ids) < 1.2 * len(packed) / 8


def test_each_epoch_has_all_rows_in_its_own_order():
    rows = pack([np.array([i, i]) for i in range(1, 6)], 1)
    orders = []
    for epoch in (0, 1):
        found = list(batches(rows, 2, seed=3, epoch=epoch))
        assert [batch.ids.shape for batch in found] == [(2, 1)] * 3
        orders.append(np.concatenate([batch.ids for batch in found]).ravel().tolist())
        assert sorted(orders[-1]) == [0, 1, 2, 3, 4, 5]
    assert orders[0] != orders[1]


@pytest.fixture(scope='module')
def trained(chain, chain_settings):
    return train_sasrec(chain, 40, chain_settings, seed=0)


def test_learns_a_chain(chain, trained):
    users = chain.users('test')
    histories = [chain.history(u, 'test') for u in users]
    targets = chain.targets('test')[users]

    def score(retriever):
        queries = retriever.user_vectors(histories)
        ranks = target_ranks(queries, retriever.item_vectors, targets, histories, True)
        return ndcg(ranks, 10).mean()

    assert score(trained) > max(0.6, 3 * score(fit_popularity(chain, 40)))
    assert trained.log[-1]['loss'] < trained.log[0]['loss']


def test_the_best_validation_is_what_is_kept(chain, trained):
    scores = [row['NDCG@10'] for row in trained.log]
    assert train.validation_ndcg(trained, chain, True) == pytest.approx(max(scores), abs=1e-6)


def test_the_same_seed_gives_the_same_bits(chain, settings, trained):
    settings.epochs = 2
    first, second = (train_sasrec(chain, 40, settings, seed=0) for _ in range(2))
    for a, b in zip(leaves(first), leaves(second)):
        np.testing.assert_array_equal(a, b)
    assert first.log == second.log
    assert first.log[0]['NDCG@10'] == trained.log[0]['NDCG@10']
    other = train_sasrec(chain, 40, settings, seed=1)
    assert other.log[0]['loss'] != first.log[0]['loss']


def test_training_stops_when_validation_no_longer_rises(chain, settings, monkeypatch):
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.1, 0.9])
    monkeypatch.setattr(train, 'validation_ndcg', lambda *args: next(scores))
    settings.update(epochs=10, evaluate_every=1, patience=3)
    log = train_sasrec(chain, 40, settings, seed=0).log
    assert [row['NDCG@10'] for row in log] == [0.1, 0.3, 0.2, 0.3, 0.1]


def test_a_killed_training_continues_to_the_same_bits(chain, settings, tmp_path, monkeypatch):
    settings.epochs = 6
    whole = train_sasrec(chain, 40, settings, seed=0)

    validate, calls = train.validation_ndcg, []

    def die_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(*args)

    monkeypatch.setattr(train, 'validation_ndcg', die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_sasrec(chain, 40, settings, seed=0, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['training.npz']
    resumed = train_sasrec(chain, 40, settings, seed=0, folder=tmp_path)
    assert len(calls) == 4  # epoch 6 alone was trained again
    assert resumed.log == whole.log
    for a, b in zip(leaves(resumed), leaves(whole)):
        np.testing.assert_array_equal(a, b)
    again = train_sasrec(chain, 40, settings, seed=0, folder=tmp_path)
    assert len(calls) == 4
    assert again.log == whole.log


def test_a_checkpoint_of_another_training_is_not_used(chain, settings, tmp_path):
    settings.epochs = 2
    train_sasrec(chain, 40, settings, seed=0, folder=tmp_path)
    other = train_sasrec(chain, 40, settings, seed=5, folder=tmp_path)
    assert other.log == train_sasrec(chain, 40, settings, seed=5).log


def test_d10_users_without_targets_only_train(split_of, settings):
    """Nobody has three events: nothing to validate on, so the last parameters are kept."""
    settings.update(epochs=3, evaluate_every=3)
    retriever = train_sasrec(split_of([[1, 2], [2, 3], [4]]), 4, settings, seed=0)
    assert retriever.log[0]['NDCG@10'] is None
    assert retriever.item_vectors.shape == (4, 16)


def test_a_training_that_diverges_says_so(chain, settings):
    settings.learning_rate = 1e30
    with pytest.raises(InputError, match=r'SASRec is nan in epoch 1; .* below 1e\+30'):
        train_sasrec(chain, 40, settings, seed=0)


def test_bad_settings_are_refused(split_of, settings):
    with pytest.raises(InputError, match='No user has two training items'):
        train_sasrec(split_of([[1, 2, 3], [4]]), 4, settings, seed=0)
    settings.heads = 3
    with pytest.raises(InputError, match=r'heads is 3; allowed: a divisor of .* 16'):
        train_sasrec(split_of([[1, 2]]), 4, settings, seed=0)
