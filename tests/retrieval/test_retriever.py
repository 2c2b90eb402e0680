"""A trained retriever: users' vectors, compilations, and what is written and read."""

import jax
import numpy as np
import pytest

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.retrieval import (
    TrainedRetriever,
    build_index,
    retrieve,
)
from palr_jax.retrieval import retriever as retriever_module
from palr_jax.retrieval.retriever import load, save
from palr_jax.retrieval.sasrec import SASRec, SasrecConfig, init_params

CONFIG = SasrecConfig('sasrec', items=30, width=8, blocks=1, heads=2, length=11)


@pytest.fixture(scope='module')
def retriever():
    params = jax.tree.map(np.array, init_params(CONFIG, 0))
    return TrainedRetriever(CONFIG, params, ({'epoch': 1, 'loss': 3.5, 'NDCG@10': None},))


def test_e09_vectors_do_not_depend_on_batch_mates(retriever):
    """In batches of all lengths, alone, and in another order."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 31, n) for n in rng.integers(1, 25, 40)]
    together = retriever.user_vectors(histories)
    alone = np.concatenate([retriever.user_vectors([h]) for h in histories[:6]])
    np.testing.assert_allclose(together[:6], alone, rtol=1e-5, atol=1e-6)
    turned = retriever.user_vectors(histories[::-1])
    np.testing.assert_allclose(turned[::-1], together, rtol=1e-5, atol=1e-6)
    ids = np.array([histories[0][-11:]])
    direct = SASRec(CONFIG).apply({'params': retriever.params}, ids)[0, -1]
    np.testing.assert_allclose(together[0], direct, rtol=1e-5, atol=1e-6)


def test_only_the_latest_items_are_read(retriever):
    history = np.arange(1, 21)
    np.testing.assert_array_equal(
        retriever.user_vectors([history]), retriever.user_vectors([history[-11:]])
    )


def test_s03_a_user_without_history_has_the_zero_vector(retriever):
    vectors = retriever.user_vectors([np.zeros(0, np.int32), np.array([3, 4])])
    assert not vectors[0].any()
    assert vectors[1].any()
    assert retriever.user_vectors([]).shape == (0, 8)


def test_s01_right_padding_is_refused(retriever):
    with pytest.raises(InputError, match=r'row 1 holds the item id 0; item ids are 1 to 30'):
        retriever.user_vectors([np.array([5]), np.array([5, 7, 0])])
    with pytest.raises(InputError, match=r'row 0 holds the item id 31'):
        retriever.user_vectors([np.array([31])])


def test_few_programs_are_compiled(retriever, monkeypatch):
    """Lengths 1 to 60 with a longest of 50: rows of 8, 16, 32 and 50 tokens."""
    monkeypatch.setattr(retriever_module, 'BATCH', 8)
    config = SasrecConfig('sasrec', items=30, width=8, blocks=1, heads=2, length=50)
    fresh = TrainedRetriever(config, init_params(config, 0))
    before = retriever_module._last_state._cache_size()
    rng = np.random.default_rng(0)
    fresh.user_vectors([rng.integers(1, 31, n) for n in rng.integers(1, 61, 100)])
    assert retriever_module._last_state._cache_size() - before <= 4


def test_candidates_of_one_user(retriever):
    history = np.array([4, 9, 2])
    index = build_index(retriever.item_vectors, 'exact')

    def candidates(k, exclude=True):
        found = retrieve(index, retriever.user_vectors([history]), [history], k, exclude)
        filled = found.items[0] > 0
        return found.items[0][filled], found.scores[0][filled]

    items, scores = candidates(5)
    every = retriever.item_vectors @ retriever.user_vectors([[4, 9, 2]])[0]
    every[[3, 8, 1]] = -np.inf
    assert items.tolist() == (np.argsort(-every)[:5] + 1).tolist()
    np.testing.assert_allclose(scores, np.sort(every)[::-1][:5], rtol=1e-5)
    assert len(candidates(50)[0]) == 27
    assert len(candidates(50, exclude=False)[0]) == 30


def test_read_as_written(retriever, tmp_path):
    save(retriever, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['sasrec.npz']
    loaded = load(tmp_path)
    assert loaded.config == CONFIG
    assert loaded.log == retriever.log
    jax.tree.map(np.testing.assert_array_equal, loaded.params, retriever.params)
    histories = [np.array([1, 2, 3])]
    np.testing.assert_array_equal(loaded.user_vectors(histories), retriever.user_vectors(histories))


def test_a_damaged_file_is_refused(retriever, tmp_path):
    with pytest.raises(InputError, match=r'sasrec\.npz: this file does not exist'):
        load(tmp_path)
    save(retriever, tmp_path)
    arrays = dict(storage.read_arrays(tmp_path / 'sasrec.npz'))

    def store(**changes):
        storage.write_arrays(tmp_path / 'sasrec.npz', **(arrays | changes))

    store(**{'items/embedding': arrays['items/embedding'][:-1]})
    with pytest.raises(InputError, match=r'items/embedding has shape \(29, 8\).* \(30, 8\)'):
        load(tmp_path)
    store(extra=np.zeros(3))
    with pytest.raises(InputError, match=r'extra has shape \(3,\).* asks for None'):
        load(tmp_path)
    store(about=np.array('{"format": 9}'))
    with pytest.raises(InputError, match='format is 9; this version reads 1'):
        load(tmp_path)
