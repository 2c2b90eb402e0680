"""Constrained generation against a naive one: the whole row for every token, a trie in Python.

The naive side shares the layers with the fast one, but no cache, no arrays of titles and no queue
of certain tokens: it writes one token at a time, line breaks too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax.errors import InputError
from palr_jax.llama import lora
from palr_jax.llama.model import apply_logits
from palr_jax.parallel import rules
from palr_jax.parallel.mesh import make_mesh
from palr_jax.ranking import constrained
from palr_jax.ranking.constrained import make_writer, place_queries
from palr_jax.ranking.score import Query
from palr_jax.testing.llama import random_params, tiny_config

V = 53
CONFIG = tiny_config(vocab_size=V)
SPEC = lora.LoraSpec(4, 8.0, ('q', 'v', 'down'))
QUOTE, BREAK = 51, 52  # not among the tokens of a title's words
LENGTH = 160  # of a naive row


@pytest.fixture(scope='module')
def params():
    """A base with an adapter that does something."""
    rng = np.random.default_rng(0)
    adapter = lora.init_adapter(CONFIG, SPEC, seed=0)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), adapter)
    return lora.join(adapter, jax.tree.map(jnp.asarray, random_params(CONFIG, seed=2)))


@jax.jit
def logits_at(params, row, place):
    return apply_logits(params, CONFIG, row[None], lora=SPEC)[0, place]


def naive(params, query, line_break, number):
    """[C] the places of a query's candidates."""
    candidates = [tuple(map(int, answer)) for answer in query.candidates]
    row, places = list(map(int, query.prompt)), {}
    while len(places) < min(number, len(set(candidates))):
        trie = {}
        for candidate in set(candidates) - places.keys():
            at = trie
            for token in (*candidate, *line_break):
                at = at.setdefault(token, {})
        line = []
        while trie:
            padded = np.zeros(LENGTH, np.int32)
            padded[: len(row)] = row
            logits = np.asarray(logits_at(params, padded, len(row) - 1))
            token = max(sorted(trie), key=lambda token: logits[token])
            row.append(token)
            line.append(token)
            trie = trie[token]
        places[tuple(line[: len(line) - len(line_break)])] = len(places) + 1
    return [places.get(candidate, 0) for candidate in candidates]


def place(params, queries, line_break=(BREAK,), number=10, batch_size=3, max_shapes=1, **changes):
    """[C] of each query, in the order of the queries."""
    options = {'mesh': None, 'max_positions': 512} | changes
    writer = make_writer(CONFIG, SPEC, mesh=options.pop('mesh'), number=number)
    found = [None] * len(queries)
    for indices, places, _ in place_queries(
        writer,
        params,
        queries,
        np.array(line_break),
        number=number,
        batch_size=batch_size,
        max_shapes=max_shapes,
        **options,
    ):
        for i, row in zip(indices, places):
            assert found[i] is None
            assert not row[len(queries[i].candidates) :].any()
            found[i] = row[: len(queries[i].candidates)].tolist()
    return found


def draw_query(rng, prompt, sizes, words=4):
    """Titles of few different words, so that many begin alike; a quote before and behind each."""
    draw = lambda n: [QUOTE, *rng.integers(0, words, n), QUOTE]  # noqa: E731
    tokens = rng.integers(0, V - 2, prompt).astype(np.int32)
    return Query(tokens, tuple(np.array(draw(n), np.int32) for n in sizes))


def draw_queries():
    """Prompts of 1 to 40 tokens, 1 to 20 candidates of 3 to 10 tokens, some of them twice."""
    rng = np.random.default_rng(5)
    queries = [
        draw_query(rng, 40, rng.integers(1, 6, 20)),
        draw_query(rng, 5, [2]),
        draw_query(rng, 17, rng.integers(1, 9, 13)),
        draw_query(rng, 1, [3, 3]),
        draw_query(rng, 29, [1] * 9, words=3),  # each title about three times
    ]
    twice = queries[2].candidates
    queries[2] = Query(queries[2].prompt, (*twice[:3], twice[0], *twice[3:], twice[5]))
    return queries


@pytest.fixture(scope='module')
def expected(params):
    return [naive(params, query, (BREAK,), 10) for query in draw_queries()]


def test_places_equal_those_of_the_naive_trie(params, expected):
    """Several users in one batch. Candidates of the same tokens share a place."""
    assert place(params, draw_queries()) == expected
    assert set(expected[0]) == set(range(11))  # ten of twenty
    assert expected[1] == [1]
    assert expected[2][0] == expected[2][3]
    assert expected[2][6] == expected[2][-1]
    assert set(expected[4]) == {1, 2, 3}
    assert expected[4] != sorted(expected[4])


def test_ten_of_a_thousand_titles(params):
    """The longest list of candidates, beside a user who has one."""
    rng = np.random.default_rng(3)
    query = draw_query(rng, 40, rng.integers(4, 9, 1000), words=6)
    assert len({answer[:3].tobytes() for answer in query.candidates}) == 36  # many begin alike
    found, one = place(params, [query, draw_query(rng, 9, [4])], batch_size=2)
    assert found == naive(params, query, (BREAK,), 10)
    assert set(found) == set(range(11))
    assert one == [1]


def test_the_model_decides(params, expected):
    """Another prompt before the same candidates gives another order; no place is by position."""
    rng = np.random.default_rng(8)
    query = draw_queries()[0]
    others = [Query(rng.integers(0, V - 2, 40), query.candidates) for _ in range(3)]
    found = place(params, [query, *others])
    assert len({tuple(places) for places in found}) > 2
    backwards = place(params, [Query(query.prompt, query.candidates[::-1])])[0]
    assert backwards[::-1] == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize(('batch_size', 'max_shapes'), [(1, 1), (2, 2)])
def test_batch_mates_and_shapes_change_no_place(params, expected, batch_size, max_shapes):
    """E09: a user's result is that of the user alone."""
    queries = draw_queries()
    options = {'batch_size': batch_size, 'max_shapes': max_shapes}
    assert place(params, queries, **options) == expected
    assert place(params, queries[::-1], **options)[::-1] == expected


@pytest.mark.slow
@pytest.mark.parametrize('read', [1, 2])
def test_tokens_read_at_once_change_no_place(params, expected, read, monkeypatch):
    """With 1 the queue of certain tokens is read one by one, as the naive side writes them."""
    monkeypatch.setattr(constrained, 'READ', read)
    make_writer.cache_clear()
    assert place(params, draw_queries()) == expected
    make_writer.cache_clear()


def test_a_line_break_of_two_tokens_and_a_candidate_of_one(params):
    """Titles without quotes: of [7], [7, 8] and [7, 8, 9] only the line break tells the end."""
    rng = np.random.default_rng(1)
    titles = tuple(np.array(t, np.int32) for t in ([7], [7, 8], [7, 8, 9], [4], [BREAK, 4]))
    queries = [Query(rng.integers(0, V - 2, 8), titles) for _ in range(6)]
    found = place(params, queries, (BREAK, 50), number=3)
    assert found == [naive(params, query, (BREAK, 50), 3) for query in queries]
    assert {1, 2, 3} == {places[i] for places in found for i in (0, 1)} - {0}


def test_passes_are_for_choices_alone(params):
    """By hand: of titles QaQ and Qb…Q (8 tokens) one pass reads the quote, then all is certain.

    The first title is chosen behind the quote; the other is the only one left.
    """
    titles = tuple(np.array([QUOTE, *t, QUOTE], np.int32) for t in ([1], [2] * 6))
    query = Query(np.arange(16, dtype=np.int32), titles)
    queries = [query, Query(query.prompt, titles[:1])]
    options = {'number': 10, 'batch_size': 1, 'max_shapes': 1, 'max_positions': 64}
    writer = make_writer(CONFIG, SPEC, number=10)
    two, one = place_queries(writer, params, queries, np.array([BREAK]), **options)
    assert sorted(two[1][0]) == [1, 2]
    assert two[2] == 16 + constrained.READ * 1
    assert one[2] == 16  # no choice at all


def test_compiles_one_program_a_prompt_length(params, monkeypatch):
    """Sixty users with 1 to 12 candidates of many lengths, in at most two shapes."""
    programs = []

    def counted(params, tokens, lengths, titles, **fixed):
        programs.append(tokens.shape)  # runs once a compilation
        return titles.sizes * 0 + lengths[:, None], jnp.int32(0)

    monkeypatch.setattr(constrained, 'write_titles', counted)
    make_writer.cache_clear()
    rng = np.random.default_rng(2)
    queries = [
        draw_query(rng, rng.integers(1, 200), rng.integers(1, 20, rng.integers(1, 13)), words=40)
        for _ in range(60)
    ]
    found = place(params, queries, batch_size=4, max_shapes=2)
    make_writer.cache_clear()
    assert len(programs) == 2
    assert [set(places) for places in found] == [{len(query.prompt)} for query in queries]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(2, 4, 1), (1, 4, 2)], ids=['rows', 'rows-heads'])
def test_devices_share_the_users(params, expected, sizes):
    """Eight simulated devices give the places of one."""
    axes = dict(zip(('data', 'fsdp', 'tensor'), sizes)) | {'slices': 1}
    mesh = make_mesh(ConfigDict(axes))
    divided = rules.shard(params, mesh, CONFIG)
    assert place(divided, draw_queries(), batch_size=8, mesh=mesh) == expected
    with pytest.raises(InputError, match=r'config.ranking.batch_size is 3, divided over'):
        place(divided, draw_queries(), batch_size=3, mesh=mesh)


def test_bad_requests(params):
    tokens = lambda *ids: np.array(ids, np.int32)  # noqa: E731
    good = Query(tokens(1, 2), (tokens(1), tokens(2)))
    for query, message in (
        (Query(tokens(), (tokens(1),)), 'Query 1 has an empty prompt'),
        (Query(tokens(1), ()), 'Query 1 has no candidates'),
        (Query(tokens(1), (tokens(1), tokens())), 'Query 1 has a candidate of no tokens'),
        (
            Query(tokens(1), (tokens(1), tokens(1, BREAK, 3))),
            'Query 1: a candidate of 1 tokens, with the line break, is the beginning of another',
        ),
        (
            Query(np.zeros(9, np.int32), (tokens(1), tokens(2, 3, 4), tokens(3))),
            'Query 1: the prompt has 9 tokens and an answer of 2 titles up to 6; the model reads',
        ),
    ):
        with pytest.raises(InputError, match=message):
            place(params, [good, query], number=2, max_positions=14)
        named = dataclasses.replace(query, name='User 196')
        with pytest.raises(InputError, match=message.replace('Query 1', 'User 196')):
            place(params, [good, named], number=2, max_positions=14)
    with pytest.raises(InputError, match='Answers of 0 titles are asked for'):
        place(params, [good], number=0)
    unknown = Query(tokens(1, 2), (tokens(1), tokens(V), tokens(2)))
    with pytest.raises(InputError, match='Query 0: the logits are not finite; check the weights'):
        place(params, [unknown])
    broken = params | {'final_norm': {'scale': jnp.full(32, jnp.nan)}}
    three = Query(good.prompt, (*good.candidates, tokens(3)), 'User 196')
    with pytest.raises(InputError, match='User 196: the logits are not finite; check the weights'):
        place(broken, [Query(good.prompt, good.candidates[:1]), three])
    assert place(params, []) == []
