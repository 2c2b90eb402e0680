"""Co-visitation: counts by hand, factors against dense algebra, no leak, and what is refused."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import ndcg
from palr_jax.retrieval import covisitation, fit_popularity, target_ranks
from palr_jax.retrieval.covisitation import covisits, fit_covisitation, load, save, truncated_svd


@pytest.fixture(scope='module')
def fitted(chain):
    return fit_covisitation(chain, 41, 12, seed=0)  # item 41 is in nobody's history


def test_counts_by_hand(split_of):
    """Training parts 1-2-3, 2-3 (both only train, or lose their last two) and 4, a lone event.

    1→2 and 2→3 are next to each other, 1→3 two places apart; user 0 counts 1 / sqrt(3), user 1
    1 / sqrt(2).
    """
    found = covisits(split_of([[1, 2, 3, 4, 1], [2, 3], [4]]), 4).toarray()
    expected = np.zeros((4, 4))
    expected[0, 1] = 1 / np.sqrt(3)
    expected[0, 2] = 1 / 2 / np.sqrt(3)
    expected[1, 2] = 1 / np.sqrt(3) + 1 / np.sqrt(2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_pairs_beyond_the_window_do_not_count(split_of, monkeypatch):
    monkeypatch.setattr(covisitation, 'WINDOW', 2)
    found = covisits(split_of([[1, 2, 3, 4, 5, 6]]), 6).toarray()  # 5 and 6 do not train
    assert np.argwhere(found).tolist() == [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]]


def test_scores_equal_dense_algebra(chain):
    """With all factors: U S at unit length times V, from NumPy's SVD of the dense matrix."""
    counts = covisits(chain, 40).toarray()
    cosine = counts / np.sqrt(np.outer(counts.sum(1), counts.sum(0)))
    u, s, vt = np.linalg.svd(np.sqrt(cosine))
    sources = u * s
    sources /= np.linalg.norm(sources, axis=1, keepdims=True)
    history = np.array([3, 17, 8])
    expected = (sources[7] + sources[16] / 2 + sources[2] / 3) @ vt
    retriever = fit_covisitation(chain, 40, 40, seed=0)
    found = retriever.user_vectors([history])[0] @ retriever.item_vectors.T
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_svd_is_the_largest_part():
    """Against a matrix made of known factors: 30 singular values, each 0.8 of the one before."""
    rng = np.random.default_rng(0)
    q, r = (np.linalg.qr(rng.standard_normal((80, 30)))[0] for _ in range(2))
    values = 0.8 ** np.arange(30)
    matrix = sp.csr_array(((q * values) @ r.T).astype(np.float32))
    u, s, v = truncated_svd(matrix, 8, seed=0)
    np.testing.assert_allclose(s, values[:8], rtol=1e-4)
    np.testing.assert_allclose((u * s) @ v.T, (q[:, :8] * values[:8]) @ r[:, :8].T, atol=1e-4)
    np.testing.assert_allclose(v.T @ v, np.eye(8), atol=1e-5)
    assert truncated_svd(matrix, 60, seed=0)[1].shape == (30,)  # the other values are 0


def test_learns_a_chain(chain, fitted):
    users = chain.users('test')
    histories = [chain.history(u, 'test') for u in users]
    targets = chain.targets('test')[users]

    def score(retriever):
        queries = retriever.user_vectors(histories)
        ranks = target_ranks(queries, retriever.item_vectors, targets, histories, True)
        return ndcg(ranks, 10).mean()

    assert score(fitted) > max(0.5, 3 * score(fit_popularity(chain, 41)))


def test_targets_do_not_change_the_fit(chain, fitted):
    """Validation and test items replaced at random: the same bits."""
    items, train = chain.items.copy(), chain.train_events()
    items[~train] = np.random.default_rng(1).integers(1, 41, np.count_nonzero(~train))
    assert (items != chain.items).any()
    other = fit_covisitation(dataclasses.replace(chain, items=items), 41, 12, seed=0)
    np.testing.assert_array_equal(other.sources, fitted.sources)
    np.testing.assert_array_equal(other.item_vectors, fitted.item_vectors)


def test_the_same_seed_gives_the_same_bits(chain, fitted):
    again = fit_covisitation(chain, 41, 12, seed=0)
    np.testing.assert_array_equal(again.sources, fitted.sources)
    np.testing.assert_array_equal(again.item_vectors, fitted.item_vectors)
    other = fit_covisitation(chain, 41, 12, seed=1)
    assert (other.item_vectors != fitted.item_vectors).any()
    np.testing.assert_allclose(  # the same factors, whatever the signs
        other.sources @ other.item_vectors.T, fitted.sources @ fitted.item_vectors.T, atol=0.02
    )


def test_s03_empty_histories_and_cold_items(fitted):
    """Item 41 never trained: it has a zero vector and, as a history, says nothing."""
    assert fitted.item_vectors.shape == fitted.sources.shape == (41, 12)
    assert fitted.item_vectors.dtype == fitted.sources.dtype == np.float32
    assert not fitted.item_vectors[40].any()
    assert fitted.item_vectors[:40].any(1).all()
    vectors = fitted.user_vectors([np.zeros(0, np.int32), np.array([41]), np.array([5])])
    assert vectors.dtype == np.float32
    assert vectors.any(1).tolist() == [False, False, True]
    assert fitted.user_vectors([]).shape == (0, 12)


def test_a_lone_pair_is_enough(split_of):
    """Two items of five, rank 1: the second is what follows the first, and nothing else is said."""
    retriever = fit_covisitation(split_of([[1, 2]]), 5, 12, seed=0)
    scores = retriever.user_vectors([np.array([1]), np.array([2])]) @ retriever.item_vectors.T
    np.testing.assert_allclose(scores, [[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], atol=1e-6)


def test_only_the_latest_items_are_read(fitted):
    history = np.arange(1, 31)
    latest = fitted.user_vectors([history[-covisitation.WINDOW :]])
    np.testing.assert_array_equal(fitted.user_vectors([history]), latest)


def test_e09_vectors_do_not_depend_on_batch_mates(fitted):
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 41, n) for n in (3, 0, 25, 1)]
    together = fitted.user_vectors(histories)
    for row, history in enumerate(histories):
        np.testing.assert_array_equal(fitted.user_vectors([history])[0], together[row])


def test_s01_s04_ids_outside_the_catalogue_are_refused(fitted):
    with pytest.raises(InputError, match=r'row 2 holds the item id 0; item ids are 1 to 41'):
        fitted.user_vectors([np.array([5]), np.zeros(0, int), np.array([5, 7, 0])])
    with pytest.raises(InputError, match=r'row 0 holds the item id 42'):
        fitted.user_vectors([np.array([42])])


def test_bad_settings_are_refused(split_of, chain):
    with pytest.raises(InputError, match='No user has two training items'):
        fit_covisitation(split_of([[1, 2, 3], [4]]), 4, 8, seed=0)
    with pytest.raises(InputError, match='factors is 0; allowed: 1 or more'):
        fit_covisitation(chain, 40, 0, seed=0)


def test_read_as_written(fitted, tmp_path):
    save(fitted, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['covisitation.npz']
    loaded = load(tmp_path)
    np.testing.assert_array_equal(loaded.sources, fitted.sources)
    np.testing.assert_array_equal(loaded.item_vectors, fitted.item_vectors)


def test_a_damaged_file_is_refused(fitted, tmp_path):
    with pytest.raises(InputError, match=r'covisitation\.npz: this file does not exist'):
        load(tmp_path)
    save(fitted, tmp_path)
    arrays = dict(storage.read_arrays(tmp_path / 'covisitation.npz'))

    def store(**changes):
        storage.write_arrays(tmp_path / 'covisitation.npz', **(arrays | changes))

    store(sources=arrays['sources'][:-1])
    with pytest.raises(InputError, match=r'\(41, 12\), .*\(40, 12\).*; allowed: .* of one shape'):
        load(tmp_path)
    store(extra=arrays['sources'])
    with pytest.raises(InputError, match=r"'extra'.*; allowed: sources and item_vectors"):
        load(tmp_path)
    store(about=np.array('{"format": 9}'))
    with pytest.raises(InputError, match='format is 9; this version reads 1'):
        load(tmp_path)
