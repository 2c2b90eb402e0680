"""One-pass scores against naive ones: every candidate behind its whole prompt, in a row of its own.

The naive side shares the layers with the one-pass side, but no packing, no shapes and no masks; the
layers themselves are checked against NumPy and torch under tests/llama.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.llama import lora
from palr_jax.llama.model import apply_logits
from palr_jax.ranking.score import (
    PROMPT_STEP,
    Query,
    choose_groups,
    make_batch,
    make_scorer,
    one_pass_scores,
    pack,
    padding_share,
    plan_batches,
    score_batches,
    score_queries,
    shared_beginning,
    useful_tokens,
)
from palr_jax.testing.llama import random_params, tiny_config

VOCABULARY = 53
CONFIG = tiny_config(vocab_size=VOCABULARY)
SPEC = lora.LoraSpec(4, 8.0, ('q', 'v', 'down'))
LENGTH = 64  # of a naive row


@pytest.fixture(scope='module')
def params():
    """A base with an adapter that does something."""
    rng = np.random.default_rng(0)
    adapter = lora.init_adapter(CONFIG, SPEC, seed=0)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), adapter)
    return lora.join(adapter, random_params(CONFIG, seed=2))


@pytest.fixture(scope='module')
def scorer():
    return make_scorer(CONFIG, SPEC)


@jax.jit
def naive_sums(params, tokens, begins, ends):
    """[N] sums of the log-probabilities of tokens[begin:end] given all before them."""
    places = jnp.arange(LENGTH)
    real = (places < ends[:, None]).astype(jnp.int32)
    logits = apply_logits(params, CONFIG, tokens, segments=real, lora=SPEC)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
    answer = (places[1:] >= begins[:, None]) & (places[1:] < ends[:, None])
    return jnp.sum(jnp.where(answer, each, 0.0), axis=1)


def naive_scores(params, queries):
    """[C] of each query."""
    rows = [np.concatenate([q.prompt, answer]) for q in queries for answer in q.candidates]
    counts = [len(query.candidates) for query in queries]
    tokens = np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows])
    begins = np.repeat([len(query.prompt) for query in queries], counts)
    ends = np.array([len(row) for row in rows])
    sums = np.asarray(naive_sums(params, tokens, begins, ends))
    return np.split(sums, np.cumsum(counts)[:-1])


def draw_query(rng, prompt, answers):
    draw = lambda n: rng.integers(0, VOCABULARY, n).astype(np.int32)  # noqa: E731
    return Query(draw(prompt), tuple(draw(n) for n in answers))


def draw_queries():
    """C04: prompts of 5 and 40 tokens together, candidates of 1..15 tokens; further odd sizes."""
    rng = np.random.default_rng(5)
    return [
        draw_query(rng, 5, rng.permutation(np.arange(20) % 15 + 1)),
        draw_query(rng, 40, rng.permutation(np.arange(20) % 15 + 1)),
        draw_query(rng, 17, [1, 1, 1]),  # single tokens only: no row token at all
        draw_query(rng, 1, [7]),  # one candidate
        draw_query(rng, 31, [15] * 9),
    ]


def score(scorer, params, queries, batch_size=3, row_length=32, max_shapes=1, max_positions=512):
    """[C] of each query, in the order of the queries. The defaults make one program of them all."""
    found = [None] * len(queries)
    for indices, sums in score_queries(
        scorer,
        params,
        queries,
        batch_size=batch_size,
        row_length=row_length,
        max_shapes=max_shapes,
        max_positions=max_positions,
    ):
        for i, row in zip(indices, sums):
            assert found[i] is None
            assert np.all(row[len(queries[i].candidates) :] == -np.inf)
            found[i] = row[: len(queries[i].candidates)]
    return found


def assert_close(found, expected, atol):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.fixture(scope='module')
def expected(params):
    return naive_scores(params, draw_queries())


@pytest.mark.parametrize(
    ('batch_size', 'row_length', 'max_shapes'), [(3, 32, 1), (1, 1, 2), (4, 64, 1)]
)
def test_c04_equals_naive_scoring(params, scorer, expected, batch_size, row_length, max_shapes):
    """C01, C04: whatever the batch-mates, batch sizes and row lengths; to 1e-4 in float32.

    The last user fills several rows; a row length of 1 grows to hold the longest candidate.
    """
    queries = draw_queries()
    found = score(scorer, params, queries, batch_size, row_length, max_shapes)
    assert_close(found, expected, atol=1e-4)


def test_users_fill_several_rows():
    """Nine candidates of 15 tokens (14 inputs) in rows of 32: two a row, five rows."""
    [(_, shape)] = plan_batches(draw_queries()[4:], 1, 32, 1, 512)
    assert (shape.rows, shape.row_length) == (5, 32)


def test_c01_a_single_token_is_scored_by_the_last_token_of_the_prompt(params, scorer):
    """C01: tokens 4, 5, 6 behind 0..3 are scored at positions 3, 4, 5."""
    tokens = np.arange(7)
    of_all = jax.jit(functools.partial(apply_logits, config=CONFIG, lora=SPEC))
    logits = of_all(params, tokens=tokens[None])[0]
    each = np.asarray(jax.nn.log_softmax(logits))[np.arange(6), tokens[1:]]
    query = Query(tokens[:4], (tokens[4:], tokens[4:5]))
    found = score(scorer, params, [query, *draw_queries()[1:]])[0]
    np.testing.assert_allclose(found, [each[3:6].sum(), each[3]], atol=1e-5)


def test_a_shared_beginning_by_hand():
    """Every answer keeps a token of its own, one that is the beginning of another, too."""
    assert shared_beginning([(7, 1, 2), (7, 1, 3), (7, 1, 2, 4)]) == 2
    assert shared_beginning([(7, 1, 2), (7, 1), (7,)]) == 0
    assert shared_beginning([(7, 1), (7, 1, 2)]) == 1
    assert shared_beginning([(7, 1, 2), (8, 1, 2)]) == 0
    assert shared_beginning([(7, 1, 2)]) == 2
    query = Query(np.arange(15), (np.array([7, 1, 2]), np.array([7, 3]), np.array([7, 1, 2])))
    [(_, shape)] = plan_batches([query], 1, 16, 1, 512)
    assert (shape.length, shape.rows, shape.beginning) == (16, 1, 1)
    batch = make_batch([query], shape)
    assert batch.prompt.all()
    assert batch.tokens[0].tolist() == [*range(15), 7, 1, *[0] * 15]
    assert batch.positions[0, 15:18].tolist() == [15, 16, 0]
    assert (batch.beginning.tolist(), batch.first.tolist()) == ([[7]], [[1, 3, 0]])
    assert (batch.answers.tolist(), batch.targets[0, 0]) == ([[0, 1, 0]], 2)
    assert useful_tokens(query) == 17


def test_c01_shared_beginnings_equal_naive_scoring(params, scorer):
    """C01: beginnings of 0 to 14 tokens, of prompts shorter than that, side by side in a batch."""
    rng = np.random.default_rng(11)
    queries = []
    for prompt, begin, rests in [(40, 1, 20), (3, 4, 9), (1, 14, 1), (22, 2, 5), (5, 0, 6)]:
        beginning = rng.integers(0, VOCABULARY, begin)
        rest = draw_query(rng, prompt, rng.integers(1, 16 - begin, rests))
        answers = [np.concatenate([beginning, answer]) for answer in rest.candidates]
        queries.append(Query(rest.prompt, tuple(answers)))
    queries[1] = Query(queries[1].prompt, (*queries[1].candidates, queries[1].candidates[0][:4]))
    [(_, shape)] = plan_batches(queries, 5, 32, 1, 512)
    assert shape.beginning == 14
    found = score(scorer, params, queries)
    expected = naive_scores(params, queries)
    assert_close(found, expected, atol=1e-4)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=1e-5)
    order = rng.permutation(20)
    queries[0] = Query(queries[0].prompt, tuple(queries[0].candidates[i] for i in order))
    np.testing.assert_array_equal(score(scorer, params, queries)[0], found[0][order])


def test_a_thousand_candidates_equal_naive_scoring(params, scorer):
    """C01: 40 beginnings, each an answer itself, with 24 answers that go on from it.

    A user with one candidate is in the same batch: the shortest and the longest list.
    """
    rng = np.random.default_rng(12)
    draw = lambda n: rng.integers(0, VOCABULARY, n).tolist()  # noqa: E731
    beginnings = [[7, *draw(n)] for n in rng.integers(2, 8, 40)]
    rests = [[], *(draw(n) for n in rng.integers(1, 8, 24))]
    answers = [np.array(begin + rest) for begin in beginnings for rest in rests]
    assert len({tuple(answer) for answer in answers}) == 1000
    mixed = [answers[i] for i in rng.permutation(1000)]
    queries = [Query(np.array(draw(30)), tuple(mixed)), draw_query(rng, 12, [5])]
    found = score(scorer, params, queries, batch_size=2, row_length=64)
    assert [len(row) for row in found] == [1000, 1]
    assert_close(found, naive_scores(params, queries), atol=1e-4)


def test_the_order_of_the_candidates_changes_no_bit(params, scorer):
    """With the prompt fixed; and equal answers tie exactly, wherever they stand (D03)."""
    first, *others = draw_queries()
    twice = (*first.candidates[:19], first.candidates[3])
    plain = score(scorer, params, [Query(first.prompt, twice), *others])
    order = np.random.default_rng(1).permutation(20)
    mixed = Query(first.prompt, tuple(twice[i] for i in order))
    shuffled = score(scorer, params, [mixed, *others])
    np.testing.assert_array_equal(shuffled[0], plain[0][order])
    for a, b in zip(shuffled[1:], plain[1:]):
        np.testing.assert_array_equal(a, b)
    assert plain[0][3] == plain[0][19]
    assert len(set(plain[0].tolist())) == 19


def test_the_order_of_the_users_changes_nothing(params, scorer, expected):
    """E09, to 1e-5: batch-mates may change the last bits, no more."""
    queries = draw_queries()
    plain = score(scorer, params, queries)
    for order in ([4, 2, 0, 3, 1], [1, 0, 3, 2, 4]):
        found = score(scorer, params, [queries[i] for i in order])
        assert_close([found[order.index(i)] for i in range(5)], plain, atol=1e-5)
        assert_close([found[order.index(i)] for i in range(5)], expected, atol=1e-4)


def test_c04_scoring_twice_is_identical_and_compiles_nothing(params, scorer):
    """C04, C06."""
    first = score(scorer, params, draw_queries())
    programs = scorer._cache_size()
    for a, b in zip(first, score(scorer, params, draw_queries())):
        np.testing.assert_array_equal(a, b)
    assert scorer._cache_size() == programs


def many_users(longest, number=100):
    rng = np.random.default_rng(8)
    return [
        draw_query(rng, rng.integers(1, longest - 14), rng.integers(1, 16, rng.integers(1, 12)))
        for _ in range(number)
    ]


@pytest.mark.parametrize('limit', [128, 317])
def test_c06_compiles_at_most_one_program_a_shape(limit):
    """C06: 100 users of random lengths, a last batch that is not full, an odd length limit.

    A stand-in for the model counts what jax compiles: only shapes matter here.
    """
    programs = []

    @jax.jit
    def program(params, batch):
        programs.append(jax.tree.map(jnp.shape, batch))  # runs once a compilation
        return params + jnp.zeros(batch.first.shape)

    queries = many_users(limit)
    longest = Query(np.zeros(limit - 15, np.int32), (np.zeros(15, np.int32),))
    found = score(program, 0.0, [*queries, longest], 4, 32, 3, max_positions=limit)
    assert len(found) == 101
    assert 1 < len(programs) <= 3
    assert program._cache_size() == len(programs)


def test_padding_is_a_small_share():
    """Prompts and titles of ML-1M's sizes: 15 % of the computed tokens at most."""
    rng = np.random.default_rng(3)
    queries = []
    for _ in range(400):
        history = min(20, 3 + rng.geometric(0.05))
        prompt = 120 + 50 * 9 + sum(rng.integers(6, 15, history))
        queries.append(draw_query(rng, prompt, np.clip(rng.normal(11, 3, 50), 4, 30).astype(int)))
    plan = plan_batches(queries, 4, 64, 4, 2048)
    assert padding_share(queries, plan) < 0.15
    assert sorted(itertools.chain(*(indices for indices, _ in plan))) == list(range(400))


def test_padding_share_by_hand():
    """Two users in a batch of four: 20 + 1 + 3 + 5 and 30 of 4 x (32 + 16) tokens are of use.

    Equal candidates are computed once, and so is what all begin with.
    """
    zeros = functools.partial(np.zeros, dtype=np.int32)
    answers = np.array([0, 1, 0, 0, 0]), np.array([0, 2, 0, 0, 0, 0, 0])
    queries = [Query(zeros(20), (*answers, answers[0])), Query(zeros(30), (zeros(1),))]
    plan = plan_batches(queries, 4, 16, 1, 512)
    assert [(shape.tokens, shape.users) for _, shape in plan] == [(48, 4)]
    assert padding_share(queries, plan) == pytest.approx(1 - 59 / 192)


def test_pack_is_first_fit_decreasing():
    assert pack([3, 8, 0, 5, 2], 8) == [[1], [3, 0], [4]]
    assert pack([0, 0], 8) == []


@pytest.mark.parametrize('batch_size', [1, 3])
def test_choose_groups_is_optimal(batch_size):
    """Against every way to cut the sorted lengths."""
    rng = np.random.default_rng(6)

    def computed(groups, lengths, extra):
        return sum(
            -(-len(group) // batch_size) * batch_size * (lengths[group].max() + extra[group].max())
            for group in groups
        )

    for _ in range(40):
        size = rng.integers(1, 10)
        lengths, extra = rng.integers(1, 7, size) * 16, rng.integers(1, 4, size) * 32
        most = int(rng.integers(1, 5))
        groups = choose_groups(lengths, extra, most, batch_size)
        assert len(groups) <= most
        assert sorted(np.concatenate(groups)) == list(range(size))
        distinct = np.unique(lengths)
        best = min(
            computed([np.flatnonzero(np.isin(lengths, part)) for part in parts], lengths, extra)
            for number in range(min(most, len(distinct)))
            for cuts in itertools.combinations(range(1, len(distinct)), number)
            for parts in [np.split(distinct, cuts)]
        )
        assert computed(groups, lengths, extra) == best


def test_no_queries_make_no_batches(params, scorer):
    assert score(scorer, params, []) == []


@pytest.mark.parametrize(
    ('query', 'message'),
    [
        (Query(np.arange(3), ()), 'Query 1 has no candidates'),
        (Query(np.arange(0), (np.arange(2),)), 'Query 1 has an empty prompt'),
        (Query(np.arange(3), (np.arange(2), np.arange(0))), 'Query 1: candidate 1 has no tokens'),
        (
            Query(np.arange(14), (np.arange(2), np.arange(3))),
            'Query 1: prompt and candidate 1 have 17 tokens; the model reads 16',
        ),
    ],
)
def test_bad_queries_are_refused(params, scorer, query, message):
    good = Query(np.arange(14), (np.arange(2),))  # 16 tokens: just fits, though padded to more
    with pytest.raises(InputError, match=message):
        score(scorer, params, [good, query], max_positions=16)
    named = dataclasses.replace(query, name='User 196')
    with pytest.raises(InputError, match=message.replace('Query 1', 'User 196')):
        score(scorer, params, [good, named], max_positions=16)


def test_a_token_that_the_model_does_not_know_is_refused(params, scorer):
    """A tokenizer of another model; JAX would clamp the index silently."""
    queries = draw_queries()
    queries[3] = Query(queries[3].prompt, (np.arange(2), np.array([1, VOCABULARY])))
    with pytest.raises(InputError, match='Query 3: the score of candidate 1 is nan'):
        score(scorer, params, queries)


def test_a_batch_is_started_before_the_sums_of_the_one_before_are_read():
    started = []

    def scorer(_, batch):
        started.append(batch)
        return np.zeros(batch.answers.shape, np.float32)

    queries = draw_queries()
    plan = plan_batches(queries, 2, 32, 1, 512)
    seen = [
        (indices.tolist(), len(started))
        for indices, _ in score_batches(scorer, None, queries, plan)
    ]
    assert seen == [(members.tolist(), n) for (members, _), n in zip(plan, (2, 3, 3))]


def test_a_bfloat16_base_gives_distinct_float32_scores(params, expected):
    """C03: -20.01 and -20.05 are one number in bfloat16; the scores must not be rounded to it."""
    adapter, base = lora.split(params)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), base)
    scorer = make_scorer(CONFIG, SPEC, jnp.bfloat16)
    found = np.concatenate(score(scorer, lora.join(adapter, half), draw_queries()))
    assert found.dtype == np.float32
    assert len(set(found.tolist())) == len(found)
    rounded = np.asarray(jnp.asarray(found, jnp.bfloat16)).astype(np.float32)
    assert len(set(rounded.tolist())) < len(found)  # what a sum in bfloat16 would tie
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0.03, atol=0.3)


@pytest.mark.slow
def test_the_gradient_equals_the_naive_one(params):
    """Listwise training goes through the same program; no NaN comes out of the masks."""
    queries = draw_queries()[:2]
    opened = tuple(np.append(7, answer)[:15] for answer in queries[1].candidates)
    queries[1] = Query(queries[1].prompt, opened)
    [(indices, shape)] = plan_batches(queries, 2, 16, 1, 512)
    batch = make_batch([queries[i] for i in indices], shape)
    adapter, base = lora.split(params)
    pull = np.random.default_rng(2).standard_normal((2, 20)).astype(np.float32)

    def of_one_pass(adapter):
        scores = one_pass_scores(
            lora.join(adapter, base), batch, config=CONFIG, lora=SPEC, dtype=jnp.float32
        )
        return jnp.sum(pull * scores)

    rows = [np.concatenate([queries[i].prompt, a]) for i in indices for a in queries[i].candidates]
    tokens = np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows])
    begins = np.repeat([len(queries[i].prompt) for i in indices], 20)
    ends = np.array([len(row) for row in rows])

    def naive(adapter):
        return pull.ravel() @ naive_sums(lora.join(adapter, base), tokens, begins, ends)

    quick = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
    found, expected = quick(jax.grad(of_one_pass))(adapter), quick(jax.grad(naive))(adapter)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_prompt_lengths_are_rounded_to_few_values():
    queries = many_users(100)
    for _, shape in plan_batches(queries, 4, 32, 3, 512):
        assert shape.length % PROMPT_STEP == 0


def test_bfloat16_weights_are_widened_one_layer_at_a_time():
    """On CPUs, scratch memory does not grow with the number of layers."""

    def scratch(layers):
        config = tiny_config(vocab_size=97, width=128, hidden=512, layers=layers)
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), random_params(config, 0)
        )
        query = Query(np.arange(16, dtype=np.int32), (np.arange(8, dtype=np.int32),))
        ((_, shape),) = plan_batches([query], 1, 16, 1, 512)
        program = make_scorer(config, None, jnp.bfloat16).lower(params, make_batch([query], shape))
        return program.compile().memory_analysis().temp_size_in_bytes

    assert scratch(12) < 1.1 * scratch(3)
