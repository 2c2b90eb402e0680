"""The profile retriever: texts as vectors, users from items and keywords, and its file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palr_jax import storage
from palr_jax.data import Catalogue
from palr_jax.errors import InputError
from palr_jax.llama import lora
from palr_jax.llama.attention import Causal
from palr_jax.llama.model import Llama
from palr_jax.llama.quantize import quantize
from palr_jax.prompts.profile import count_profile
from palr_jax.retrieval import build_index, profile
from palr_jax.retrieval.profile import (
    ProfileRetriever,
    embed_texts,
    fit_profile,
    item_texts,
    whiten,
)
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer

KINDS = {'Western': 'Dusty Saloon Riders', 'Space': 'Galactic Orbit Station', 'Crime': 'Mob Heist'}


@pytest.fixture(scope='module')
def catalogue() -> Catalogue:
    """30 items, by turns of three kinds, whose titles share words; item 31 has no keywords."""
    kinds = list(KINDS) * 10
    return Catalogue(
        raw_ids=('', *(f'r{i}' for i in range(1, 32))),
        titles=('', *(f'{KINDS[k]} {n} (19{50 + n})' for n, k in enumerate(kinds)), 'Untold'),
        years=(None,) * 32,
        keywords=((), *((k, 'Old') if n % 2 else (k,) for n, k in enumerate(kinds)), ()),
    )


@pytest.fixture(scope='module')
def model(catalogue):
    """(params, config, tokenizer) of six layers, of which two are used."""
    tokenizer = tiny_tokenizer(catalogue.titles)
    config = tiny_config(vocab_size=tokenizer.size, layers=6, max_positions=128)
    return random_params(config, 0), config, tokenizer


@pytest.fixture(scope='module')
def retriever(catalogue, model) -> ProfileRetriever:
    vectors = embed_texts(*model, item_texts(catalogue))
    return fit_profile(catalogue, vectors, counted(catalogue), 'abc', share=0.3)


def counted(catalogue):
    return lambda histories: [count_profile(h, catalogue.keywords) for h in histories]


def by_hand(model, text: str) -> np.ndarray:
    """One text, no padding, all layers declared by hand, the first token left out of the mean."""
    params, config, tokenizer = model
    config = dataclasses.replace(config, layers=2)
    params = params | {'layers': jax.tree.map(lambda leaf: leaf[:2], params['layers'])}
    ids = np.array([[tokenizer.bos_id, *tokenizer.encode(text, allow_special=False)]])
    places, segments = np.arange(ids.shape[1])[None], np.ones_like(ids)
    hidden = jax.jit(Llama(config).apply)({'params': params}, ids, places, Causal(segments))
    return np.asarray(hidden)[0, 1:].mean(0)


def test_a_text_is_the_mean_of_its_hidden_states(model):
    """In batches, with padding, twice in the list; a special token is text."""
    texts = ['Mob', 'Galactic Orbit Station 1 (1951): Space', '<|im_end|>', 'Mob']
    found = embed_texts(*model, texts, batch_size=3, max_shapes=2)
    assert found.dtype == np.float32
    for text, vector in zip(texts, found):
        np.testing.assert_allclose(vector, by_hand(model, text), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[0], found[3])
    turned = embed_texts(*model, texts[::-1], batch_size=5, max_shapes=1)[::-1]
    np.testing.assert_allclose(turned, found, rtol=1e-4, atol=1e-5)


def test_an_empty_text_is_zero_and_a_long_one_is_cut(model):
    tokenizer = model[2]
    long = 'x q z ' * 100  # more tokens than the model has positions
    empty, cut, kept = embed_texts(
        *model, ['', long, tokenizer.decode(tokenizer.encode(long)[:64])]
    )
    assert not empty.any()
    np.testing.assert_allclose(cut, kept, rtol=1e-5, atol=1e-6)
    assert embed_texts(*model, []).shape == (0, 32)
    assert np.isfinite(embed_texts(*model, [long], max_tokens=1000)).all()


def test_few_programs_are_compiled(model):
    params, config, tokenizer = model
    config = dataclasses.replace(config, norm_eps=2e-5)  # a program of its own
    texts = ['x ' * n for n in range(1, 61)]
    embed_texts(params, config, tokenizer, texts, batch_size=8, max_shapes=3)
    program = profile._make_program(dataclasses.replace(config, layers=2), jnp.dtype('float32'))
    assert program._cache_size() <= 3


def test_what_lies_beside_the_base_weights_changes_nothing(model, catalogue):
    """Upper layers and adapters are not read; bfloat16 and int8 kernels come close."""
    params, config, tokenizer = model
    texts = item_texts(catalogue)[:6]

    def embed(params, dtype=jnp.float32):
        return embed_texts(
            params, config, tokenizer, texts, dtype=dtype, batch_size=8, max_shapes=1
        )

    plain = embed(params)
    spoilt = jax.tree.map(np.copy, params)
    for leaf in jax.tree.leaves(spoilt['layers']):
        leaf[2:] = np.nan
    np.testing.assert_array_equal(embed(spoilt), plain)
    adapter = lora.init_adapter(config, lora.LoraSpec(rank=4, alpha=8, targets=('q', 'v')), 0)
    adapted = lora.join(jax.tree.map(lambda leaf: leaf + 1, adapter), params)
    np.testing.assert_array_equal(embed(adapted), plain)

    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    up = {'kernel': quantize(params['layers']['mlp']['up']['kernel'], 'int8')}
    mlp = params['layers']['mlp'] | {'up': up}
    int8 = params | {'layers': params['layers'] | {'mlp': mlp}}
    for tree, dtype in ((narrow, jnp.bfloat16), (int8, jnp.float32)):
        close = embed(tree, dtype)
        cosines = (profile.unit(close) * profile.unit(plain)).sum(1)
        assert cosines.min() > 0.999
        assert not np.array_equal(close, plain)


def test_weights_that_are_not_finite_are_told(model):
    params, config, tokenizer = model
    params = params | {'final_norm': {'scale': np.full(32, np.inf, np.float32)}}
    with pytest.raises(InputError, match="text 'Heat' are not finite; check the weights"):
        embed_texts(params, config, tokenizer, ['Heat'])


def test_the_text_of_an_item(catalogue):
    texts = item_texts(catalogue)
    assert texts[0] == '"Dusty Saloon Riders 0 (1950)": Western'
    assert texts[1] == '"Galactic Orbit Station 1 (1951)": Space, Old'
    assert texts[30] == '"Untold"'
    assert len(texts) == catalogue.items


def test_whitening_by_hand():
    """Around (10, 5): variances 54/8 and 6/8, their mean 30/8, a fifth of it added: 7.5 and 1.5."""
    deviations = np.array([[3, 0], [-3, 0], [0, 1], [0, -1], [3, 1], [-3, -1], [3, -1], [-3, 1]])
    scaled = deviations / np.sqrt([7.5, 1.5])
    expected = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    found = whiten(deviations + np.array([10.0, 5.0]))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert not whiten(np.ones((3, 2))).any()


def simple(profiles=None, **fields) -> ProfileRetriever:
    """Three items along three axes, two keywords."""
    keyword_vectors = np.array([[0.6, 0.8, 0], [0, 0, 1]], np.float32)
    settings = {'share': 0.0, 'decay': 0.5, 'fingerprint': 'abc'} | fields
    return ProfileRetriever(
        np.eye(3, dtype=np.float32),
        ('Crime', 'War'),
        keyword_vectors,
        profiles=profiles,
        **settings,
    )


def test_a_user_by_hand():
    """Items 1, 2, 2 with decay 1/2: 1/4, 1/2 + 1; the profile's two keywords count alike."""
    latest = np.array([0.25, 1.5, 0]) / np.hypot(0.25, 1.5)
    keywords = np.array([0.6, 0.8, 1]) / np.sqrt(2)
    histories = [np.array([1, 2, 2])]
    for share in (0.0, 0.25, 1.0):
        found = simple(lambda _: [('Crime', 'War')], share=share).user_vectors(histories)
        expected = (1 - share) * latest + share * keywords
        np.testing.assert_allclose(found, expected[None], rtol=1e-6, atol=1e-7)
        assert found.dtype == np.float32
    assert simple(None).user_vectors(histories).shape == (1, 3)  # no profile is asked for
    unnamed = simple(lambda _: [()], share=0.25).user_vectors(histories)
    np.testing.assert_allclose(unnamed, 0.75 * latest[None], rtol=1e-6)


def test_s03_a_user_without_history_has_the_zero_vector(retriever):
    vectors = retriever.user_vectors([np.zeros(0, np.int32), np.array([3, 4]), []])
    assert not vectors[[0, 2]].any()
    assert vectors[1].any()
    assert retriever.user_vectors([]).shape == (0, 32)


def test_s04_ids_and_keywords_of_other_catalogues_are_refused(retriever):
    with pytest.raises(InputError, match=r'row 1 holds the item id 0; item ids are 1 to 31'):
        retriever.user_vectors([np.array([5]), np.array([5, 7, 0])])
    with pytest.raises(InputError, match=r'row 0 holds the item id 32'):
        retriever.user_vectors([[32]])
    with pytest.raises(InputError, match="row 0 names 'Opera', no keyword of the catalogue"):
        simple(lambda _: [('War', 'Opera')], share=0.5).user_vectors([[1]])


def test_a_keyword_is_the_mean_of_its_items(retriever, catalogue):
    assert retriever.keywords == ('Crime', 'Old', 'Space', 'Western')
    total = np.zeros(32)
    for item, keywords in enumerate(catalogue.keywords):
        if 'Space' in keywords:
            total += retriever.item_vectors[item - 1] / len(keywords)
    found = retriever.keyword_vectors[2]
    np.testing.assert_allclose(found, total / np.linalg.norm(total), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_items_of_the_same_kind_are_found(retriever, catalogue, share):
    """By the latest items, by both, by the profile alone; even random layers tell words apart."""
    retriever = dataclasses.replace(retriever, share=share)
    index = build_index(retriever.item_vectors, 'exact')
    histories = [[i, i + 3, i + 6] for i in range(1, 20)]
    found, _ = index.search(retriever.user_vectors(histories), 8)
    for history, items in zip(histories, found):
        kind = catalogue.keywords[history[0]][0]
        assert sum(kind in catalogue.keywords[item] for item in items) >= 6


def test_read_as_written(retriever, catalogue, tmp_path):
    profile.save(retriever, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['profile.npz']
    loaded = profile.load(tmp_path, counted(catalogue), 'abc')
    histories = [np.array([1, 2, 3]), np.array([31])]
    np.testing.assert_array_equal(loaded.user_vectors(histories), retriever.user_vectors(histories))
    np.testing.assert_array_equal(loaded.item_vectors, retriever.item_vectors)
    assert (loaded.keywords, loaded.decay) == (retriever.keywords, retriever.decay)


def test_files_of_other_formats_and_models_are_refused(retriever, tmp_path):
    with pytest.raises(InputError, match=r'profile\.npz: this file does not exist'):
        profile.load(tmp_path, None, 'abc')
    profile.save(retriever, tmp_path)
    with pytest.raises(InputError, match=r'are of the model abc…; the model at hand is xyz…'):
        profile.load(tmp_path, None, 'xyz')
    storage.write_arrays(tmp_path / 'profile.npz', about=np.array('{"format": 9}'))
    with pytest.raises(InputError, match='format is 9; this version reads 1'):
        profile.load(tmp_path, None, 'abc')
