"""The index against NumPy's sort, its backends against each other, and the field cases of ScaNN."""

import importlib.util
import signal
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl import logging

from palr_jax.errors import InputError
from palr_jax.retrieval import index as index_module
from palr_jax.retrieval import retrieve
from palr_jax.retrieval.index import (
    ItemIndex,
    build_index,
    hash_items,
    load_index,
    recall_against_exact,
    save_index,
)

needs_scann = pytest.mark.skipif(
    importlib.util.find_spec('scann') is None, reason='ScaNN has no wheel for this machine.'
)
BACKENDS = [pytest.param('scann', marks=needs_scann), 'exact', 'approx']
EXACT_BACKENDS = BACKENDS[:2]


def by_sorting(vectors, queries, k):
    """Ids by score, the best first, equal scores by id."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return np.argsort(-scores, axis=1, kind='stable')[:, :k] + 1


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('backend', BACKENDS)
def test_finds_what_sorting_finds(backend):
    vectors, queries = random(0, 300, 16), random(1, 7, 16)
    index = build_index(vectors, backend)
    assert index.backend.startswith(backend)
    ids, scores = index.search(queries, 20)
    assert ids.dtype == np.int32
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(ids, by_sorting(vectors, queries, 20))
    expected = np.take_along_axis(queries @ vectors.T, ids - 1, 1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert recall_against_exact(index, queries, 20) == 1.0


@pytest.mark.parametrize('backend', BACKENDS)
def test_n07_each_search_has_its_own_k(backend):
    vectors, queries = random(0, 80, 8), random(1, 3, 8)
    index = build_index(vectors, backend)
    for k in (20, 50, 1):
        assert index.search(queries, k)[0].tolist() == by_sorting(vectors, queries, k).tolist()


@pytest.mark.parametrize('backend', BACKENDS)
def test_s04_slots_beyond_the_catalogue_are_minus_one(backend):
    """No slot is filled with item 0, which a metric might take for a hit."""
    vectors, queries = random(0, 4, 8), random(1, 2, 8)
    ids, scores = build_index(vectors, backend).search(queries, 10)
    assert ids.shape == (2, 10)
    assert np.sort(ids[:, :4], 1).tolist() == [[1, 2, 3, 4]] * 2
    assert (ids[:, 4:] == -1).all()
    assert np.isfinite(scores[:, :4]).all()
    assert np.isneginf(scores[:, 4:]).all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_n03_equal_scores_come_by_item_id(backend):
    """Three twins at the cut, and a user without history for whom all 40 items are equal."""
    vectors = random(0, 40, 8)
    vectors[[31, 12, 5]] = 3 * vectors[5]
    queries = np.stack([vectors[5], np.zeros(8, np.float32)])
    ids, _ = build_index(vectors, backend).search(queries, 2)
    assert ids.tolist() == [[6, 13], [1, 2]]
    ids, _ = build_index(vectors, backend).search(queries, 3)
    assert ids.tolist() == [[6, 13, 32], [1, 2, 3]]


@needs_scann
def test_n03_a_user_with_equal_scores_costs_the_others_nothing():
    """Only his row is fetched further; the answers are those of sorting for all."""
    scann, _ = index_module._import_scann()
    fetched = []

    class Counted:
        def __init__(self, builder):
            self.builder = builder

        def score_brute_force(self):
            return Counted(self.builder.score_brute_force())

        def build(self):
            return Counted(self.builder.build())

        def search_batched_parallel(self, queries, k):
            fetched.append((len(queries), k))
            return self.builder.search_batched_parallel(queries, k)

    class Module:
        def builder(self, *args):
            return Counted(scann.builder(*args))

    vectors, queries = random(0, 100, 8), random(1, 30, 8)
    queries[7] = 0
    rows, scores = index_module._brute_force(Module(), vectors)(queries, 10)
    np.testing.assert_array_equal(rows + 1, by_sorting(vectors, queries, 10))
    assert scores.dtype == np.float32
    assert fetched == [(30, 11), (1, 22), (1, 44), (1, 88), (1, 100)]


@needs_scann
def test_n01_small_catalogue_with_a_thousand_leaves():
    vectors, queries = random(0, 12, 8), random(1, 3, 8)
    index = build_index(vectors, 'scann', leaves=1000)
    assert index.backend == 'scann (brute force)'
    ids, _ = index.search(queries, 50)
    np.testing.assert_array_equal(ids[:, :12], by_sorting(vectors, queries, 12))
    assert (ids[:, 12:] == -1).all()


@needs_scann
def test_n01_tree_with_a_large_k():
    """15,000 vectors and k=2000 once aborted the process; leaves cannot outnumber the items."""
    vectors, queries = random(0, 15_000, 16), random(1, 4, 16)
    index = build_index(vectors, 'scann', leaves=300)
    assert index.backend == 'scann (tree, 300 leaves)'
    ids, scores = index.search(queries, 2000)
    assert ids.min() >= 1
    assert all(len(set(row)) == 2000 for row in ids.tolist())
    assert (np.diff(scores, axis=1) <= 0).all()
    assert recall_against_exact(index, queries, 2000) > 0.9
    assert build_index(vectors[:1000], 'scann', leaves=5000).backend.endswith('1000 leaves)')


@needs_scann
@pytest.mark.parametrize('leaves', [30, 1200])
def test_n01_tree_with_a_k_beyond_the_catalogue(leaves):
    vectors, queries = random(0, 1200, 8), random(1, 3, 8)
    index = build_index(vectors, 'scann', leaves)
    assert index.backend == f'scann (tree, {leaves} leaves)'
    ids, scores = index.search(queries, 1300)
    np.testing.assert_array_equal(np.sort(ids[:, :1200], 1), [np.arange(1, 1201)] * 3)
    assert (ids[:, 1200:] == -1).all()
    assert np.isneginf(scores[:, 1200:]).all()


@needs_scann
def test_n01_tree_whose_leaves_hold_too_few_items(monkeypatch):
    """Most items are twins in one leaf, the rest have a leaf each: ScaNN comes back short."""
    vectors = np.concatenate([np.tile(random(0, 1, 8), (14_700, 1)), 3 * random(1, 300, 8)])
    index = build_index(vectors, 'scann', leaves=300, effort=(0.05, 4))
    completed, jax_search = [], index_module._jax_search
    monkeypatch.setattr(
        index_module, '_jax_search', lambda *args: completed.append(1) or jax_search(*args)
    )
    ids, scores = index.search(vectors[-3:], 300)
    assert completed
    assert ids.min() >= 1
    assert all(len(set(row)) == 300 for row in ids.tolist())
    best = -np.sort(-(vectors[-3:] @ vectors.T), axis=1)[:, :300]
    assert any(np.allclose(s, b, rtol=1e-4, atol=1e-5) for s, b in zip(scores, best))


@needs_scann
@pytest.mark.parametrize('zeros', [400, 1500])
def test_n01_tree_of_zero_vectors(zeros):
    """Items that no training ever moved, among others and alone; some users are zero as well."""
    vectors, queries = random(0, 1500, 8), random(1, 3, 8)
    vectors[:zeros] = queries[0] = 0
    ids, scores = build_index(vectors, 'scann', leaves=40).search(queries, 20)
    assert all(len(set(row)) == 20 for row in ids.tolist())
    assert ids.min() >= 1
    expected = np.take_along_axis(queries @ vectors.T, ids - 1, 1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
    least = -np.sort(-(queries @ vectors.T), 1)[:, 19:20]
    assert np.mean(scores >= least - 1e-4) > 0.8


@pytest.mark.parametrize('kind', [*BACKENDS, pytest.param('tree', marks=needs_scann)])
def test_s04_a_user_without_history_gets_items(kind):
    """The zero vector, as SASRec gives: every item is as good, but item 0 is none."""
    vectors = random(0, 1200, 8)
    index = build_index(vectors, 'scann', 40) if kind == 'tree' else build_index(vectors, kind)
    found = retrieve(index, np.zeros((1, 8)), [np.zeros(0, np.int32)], 50, exclude=True)
    assert len(set(found.items[0].tolist())) == 50
    assert found.items.min() >= 1
    assert not found.scores.any()


def test_n03_recall_counts_what_exact_search_finds():
    """Scores 5, 4, 3, 2, 1: of the two best of each user, it finds one and both."""
    found = np.array([[0, 4], [1, 0]]), np.array([[5, 1], [4, 5]], np.float32)
    vectors = np.array([[5], [4], [3], [2], [1]], np.float32)
    index = ItemIndex(vectors, 'by hand', {}, lambda queries, k: found)
    assert recall_against_exact(index, np.ones((2, 1)), 2) == 0.75


@needs_scann
def test_tree_above_20_000_items():
    centres = random(0, 150, 32)
    vectors = np.repeat(centres, 150, 0) + 0.5 * random(1, 22_500, 32)
    queries = centres[:100] + 0.5 * random(2, 100, 32)
    index = build_index(vectors)
    assert index.backend == 'scann (tree, 150 leaves)'
    assert recall_against_exact(index, queries, 50) > 0.97
    ids, scores = index.search(queries, 50)
    expected = np.take_along_axis(queries @ vectors.T, ids - 1, 1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


@needs_scann
@pytest.mark.parametrize(('spread', 'share'), [(0.3, 0.01), (10.0, 0.1)])
def test_n03_a_tree_searches_as_much_as_its_vectors_need(spread, share, tmp_path, monkeypatch):
    """Tight clusters need few leaves; vectors without any need many, or recall suffers."""
    centres = random(0, 100, 16)
    vectors = np.repeat(centres, 40, 0) + spread * random(1, 4000, 16)
    queries = centres + spread * random(2, 100, 16)
    index = build_index(vectors, 'tree', queries=queries)
    assert index.backend == 'scann (tree, 63 leaves)'
    assert recall_against_exact(index, queries, 50) >= 0.975
    searched = index.settings['effort'][0]
    assert searched <= share if spread < 1 else searched >= share
    save_index(index, tmp_path, 'hash')
    monkeypatch.setattr(index_module, '_choose_effort', None)  # nothing is measured again
    loaded = load_index(tmp_path, 'hash')
    assert loaded.settings == index.settings
    assert recall_against_exact(loaded, queries, 50) >= 0.96  # ScaNN plants another tree


@pytest.fixture
def broken_scann(tmp_path, monkeypatch):
    """A ScaNN whose import raises something other than ImportError."""
    (tmp_path / 'scann.py').write_text("raise OSError('undefined symbol: _ZN10tensorflow')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split('.')[0] == 'scann']:
        monkeypatch.delitem(sys.modules, name)
    index_module._import_scann.cache_clear()
    yield
    index_module._import_scann.cache_clear()


def test_n02_scann_that_cannot_be_imported(broken_scann, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, 'warning', lambda text, *args: warnings.append(text % args))
    vectors, queries = random(0, 30, 8), random(1, 2, 8)
    for _ in range(2):
        index = build_index(vectors)
    assert index.backend == 'exact'
    np.testing.assert_array_equal(index.search(queries, 5)[0], by_sorting(vectors, queries, 5))
    assert len(warnings) == 1
    assert 'OSError: undefined symbol: _ZN10tensorflow' in warnings[0]
    with pytest.raises(InputError, match=r"index is 'scann'.*undefined symbol"):
        build_index(vectors, 'scann')


@pytest.mark.parametrize('backend', EXACT_BACKENDS)
def test_n05_kind_of_the_arrays(backend, tmp_path):
    """Float64, float16, bfloat16, integers, JAX arrays, memory maps, transposed views."""
    vectors = np.random.default_rng(0).integers(-8, 9, size=(60, 8))  # exact in every type
    queries = np.random.default_rng(1).integers(-8, 9, size=(3, 8))
    on_disk = np.lib.format.open_memmap(tmp_path / 'v.npy', 'w+', np.float64, vectors.shape)
    on_disk[:] = vectors
    expected = by_sorting(vectors, queries, 9).tolist()
    kinds = [vectors.astype(t) for t in (np.float64, np.float16, np.int64, ml_dtypes.bfloat16)]
    kinds += [on_disk, jnp.asarray(vectors, jnp.bfloat16), np.asfortranarray(vectors, np.float32)]
    for kind in kinds:
        index = build_index(kind, backend)
        assert index.vectors.dtype == np.float32
        assert index.search(queries.astype(np.float16), 9)[0].tolist() == expected


@pytest.mark.parametrize('backend', EXACT_BACKENDS)
def test_n06_saved_index_knows_its_item_table(backend, tmp_path):
    vectors, queries = random(0, 50, 8), random(1, 4, 8)
    raw_ids = ['', *(f'B{i}' for i in range(50))]
    index = build_index(vectors, backend)
    save_index(index, tmp_path, hash_items(raw_ids))
    loaded = load_index(tmp_path, hash_items(raw_ids))
    assert loaded.backend == index.backend
    np.testing.assert_array_equal(loaded.search(queries, 7)[0], index.search(queries, 7)[0])
    with pytest.raises(InputError, match=r'index\.npz: this index belongs to another item table'):
        load_index(tmp_path, hash_items(raw_ids[::-1]))
    with pytest.raises(InputError, match='does not exist'):
        load_index(tmp_path / 'nowhere', hash_items(raw_ids))


def test_a_save_that_is_killed_leaves_the_old_index(tmp_path):
    """SIGKILL where the new file is written and not yet renamed; the next save works as ever."""
    vectors, queries = random(0, 50, 8), random(1, 4, 8)
    index, of_items = build_index(vectors, 'exact'), hash_items(['', 'a'])
    save_index(index, tmp_path, of_items)
    killed = """
import os, signal, sys
import numpy as np
from palr_jax.retrieval.index import build_index, save_index
os.rename = os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
save_index(build_index(np.ones((9, 3)), 'exact'), sys.argv[1], sys.argv[2])
"""
    command = [sys.executable, '-c', killed, str(tmp_path), of_items]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2  # the index and what the killed process had written
    loaded = load_index(tmp_path, of_items)
    np.testing.assert_array_equal(loaded.search(queries, 7)[0], index.search(queries, 7)[0])
    save_index(build_index(vectors[:9], 'exact'), tmp_path, of_items)
    assert len(load_index(tmp_path, of_items).vectors) == 9


@pytest.mark.parametrize('size', [0, 100, 1500])
def test_half_an_index_file_is_refused(size, tmp_path):
    save_index(build_index(random(0, 50, 8), 'exact'), tmp_path, 'items')
    path = tmp_path / 'index.npz'
    assert size < path.stat().st_size
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r'index\.npz: this file is damaged'):
        load_index(tmp_path, 'items')


def test_hash_of_an_item_table_sees_where_an_id_ends():
    assert hash_items(['ab', 'c']) != hash_items(['a', 'bc'])


def test_bad_vectors_are_refused():
    vectors = random(0, 20, 4)
    vectors[3, 2], vectors[9, 0] = np.nan, np.inf
    with pytest.raises(InputError, match=r'item vectors .* row 3 \(2 of 20 rows do\)'):
        build_index(vectors, 'exact')
    index = build_index(random(0, 20, 4), 'exact')
    with pytest.raises(InputError, match=r'queries .* row 0'):
        index.search(np.array([[np.nan, 0, 0, 0]]), 3)
    with pytest.raises(InputError, match='width 5; the item vectors have 4'):
        index.search(random(0, 2, 5), 3)
    with pytest.raises(InputError, match=r'is 0; allowed: 1 or more'):
        index.search(random(0, 2, 4), 0)
    with pytest.raises(InputError, match=r'shape \(4,\)'):
        index.search(random(0, 4), 1)
    with pytest.raises(InputError, match='no item vectors'):
        build_index(np.zeros((0, 4)), 'exact')
    with pytest.raises(InputError, match=r"is 'faiss'; allowed are auto, scann, tree, exact"):
        build_index(random(0, 20, 4), 'faiss')
    with pytest.raises(InputError, match=r'leaves is 0; allowed: 1 or more'):
        build_index(random(0, 20, 4), 'exact', leaves=0)


def test_exact_search_in_blocks(monkeypatch):
    """No more scores than fit are held at once; no query is lost between blocks."""
    monkeypatch.setattr(index_module, 'BLOCK_SCORES', 200)
    vectors, queries = random(0, 50, 8), random(1, 11, 8)
    ids, _ = build_index(vectors, 'exact').search(queries, 6)
    np.testing.assert_array_equal(ids, by_sorting(vectors, queries, 6))
    assert build_index(vectors, 'exact').search(queries[:0], 6)[0].shape == (0, 6)
