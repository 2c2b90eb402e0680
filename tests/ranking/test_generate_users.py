"""Many users ranked by what the model writes: scores, counts, interrupted and continued runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from palr_jax.data import Catalogue
from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import hit_rate, rank_targets
from palr_jax.prompts.encode import Encoder
from palr_jax.prompts.template import load_template
from palr_jax.ranking import generate_users as module
from palr_jax.ranking import users as kept
from palr_jax.ranking.constrained import make_writer, place_queries
from palr_jax.ranking.fuse import fuse
from palr_jax.ranking.generate import NOT_FINITE
from palr_jax.ranking.generate_users import answer_users, generate_users, read_answers
from palr_jax.ranking.score import Query
from palr_jax.ranking.users import read_scores
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer

TITLES = tuple(f'{word} {year}' for year in (1979, 1986, 1995) for word in ('Heat', 'M', 'Alien'))
CONFIG = ConfigDict({'batch_size': 2, 'max_shapes': 1})
HIT, WRONG, INVALID = 1, 2, None
BROKEN = None  # the answer of a model whose logits are not finite


@pytest.fixture(scope='module')
def encoder():
    n = len(TITLES) + 1
    catalogue = Catalogue(tuple(map(str, range(n))), ('', *TITLES), (None,) * n, ((),) * n)
    return Encoder(catalogue, tiny_tokenizer(TITLES), load_template('movies'), 'plain', 512)


def draw_users(encoder):
    """Five users with 3 to 6 candidates in slots of their own: (items, queries)."""
    rng = np.random.default_rng(4)
    items = np.full((5, 6), -1)
    queries = []
    for row, number in enumerate((6, 3, 5, 6, 4)):
        slots = np.sort(rng.permutation(6)[:number])
        items[row, slots] = rng.permutation(np.arange(1, 10))[:number]
        own = items[row, slots]
        prompt = encoder.prompt('recommend_retrieval', [int(own[0])], (), own.tolist())
        queries.append(Query(prompt.tokens, tuple(encoder.reply(int(i)) for i in own)))
    return items, queries


class Interrupted(Exception):
    """Stands for the end of a run."""


@pytest.mark.slow
def test_places_of_many_users_and_a_continued_run(encoder, tmp_path, monkeypatch):
    """O01: the second run writes only the users that the first one did not; then none."""
    model = tiny_config(vocab_size=encoder.tokenizer.size)
    params = jax.tree.map(jnp.asarray, random_params(model, seed=3))
    items, queries = draw_users(encoder)
    users = np.array([3, 5, 8, 9, 20])
    path = epath.Path(tmp_path / 'scores.npz')
    written, real = [], place_queries

    def counted(writer, params, queries, *args, **options):
        for batch in real(writer, params, queries, *args, **options):
            if len(written) == 4 and len(queries) == 5:
                raise Interrupted
            written.extend(batch[0])
            yield batch

    monkeypatch.setattr(module, 'place_queries', counted)
    monkeypatch.setattr(kept, 'SAVE_SECONDS', 0.0)

    def run(identity='a', number=4):
        return generate_users(
            'made up',
            users,
            items,
            queries,
            encoder,
            params,
            CONFIG,
            model=model,
            lora=None,
            dtype=jnp.float32,
            path=path,
            identity=identity,
            number=number,
        )

    with pytest.raises(Interrupted):
        run()
    half = read_scores(path)
    (left,) = np.flatnonzero(np.isnan(half.sums).any(axis=1))
    good = queries[left]
    queries[left] = dataclasses.replace(good, candidates=(), name='User 196')
    with pytest.raises(InputError, match='User 196 has no candidates'):
        run()
    queries[left] = good
    found = run()
    assert len(written) == 5
    assert found.computed > half.computed > 0
    assert found.seconds > half.seconds > 0
    stored = read_scores(path)
    np.testing.assert_array_equal(stored.sums, found.sums)
    assert run().sums.tolist() == found.sums.tolist()
    assert len(written) == 5

    line_break = np.array(encoder.tokenizer.encode('\n'))
    options = {'number': 4, 'batch_size': 5, 'max_shapes': 1, 'max_positions': 512}
    writer = make_writer(model, None, jnp.float32, None, number=4)
    ((indices, places, _),) = real(writer, params, queries, line_break, **options)
    for i, of_user in zip(indices, places):
        filled = items[i] >= 0
        expected = [-(place or min(filled.sum(), 4) + 1) for place in of_user[: filled.sum()]]
        assert found.sums[i, filled].tolist() == expected
        assert np.all(found.sums[i, ~filled] == -np.inf)
    for how in ('sum', 'token', 'byte'):
        np.testing.assert_array_equal(found.normalized(how), found.sums)
    fused = fuse(np.where(items >= 0, 0.0, -np.inf), found.normalized('token'), 1.0)
    assert np.array_equal(np.argmax(fused, axis=1), np.argmax(found.sums, axis=1))

    run(identity='b')
    assert len(written) == 10
    assert run(identity='b', number=1).sums[0].tolist().count(-2) == 5


def stand_in(encoder, answers, calls):
    """A generator that answers prompt n, whose first token is n, with the text `answers[n]`."""

    def generator(params, tokens, lengths):
        calls.append(tokens[:, 0].tolist())
        rows = np.full((len(tokens), 40), encoder.eos[0], np.int32)
        for row, n in zip(rows, tokens[:, 0]):
            if answers[n] is BROKEN:
                row[0] = NOT_FINITE
                continue
            ids = encoder.tokenizer.encode(answers[n])[:40]
            row[: len(ids)] = ids
        return rows

    return generator


def answer(encoder, monkeypatch, path, texts, histories, calls, batch_size=2, first=0):
    monkeypatch.setattr(module, 'make_generator', lambda *_, **__: stand_in(encoder, texts, calls))
    return answer_users(
        'made up',
        first + np.arange(len(texts)),
        [Query(np.array([n, 7, 7], np.int32), (), f'User {n}0') for n in range(len(texts))],
        histories,
        encoder,
        None,
        ConfigDict({'batch_size': batch_size, 'max_shapes': 1}),
        model=tiny_config(),
        lora=None,
        dtype=jnp.float32,
        path=epath.Path(path / 'answers.npz'),
        identity='a',
        most=40,
    )


def test_free_answers_by_hand(encoder, tmp_path, monkeypatch):
    """What is stored and counted; a second run answers nobody anew."""
    texts = [
        '"Alien 1979"\n"Alien 1979"\n"M 1931"\n"Heat 1995"',
        '1. "M 1986"',
        'I would recommend',
        '',
    ]
    calls = []
    found = answer(encoder, monkeypatch, tmp_path, texts, [{7}, {3}, {3}, {3}], calls)
    assert found.items.tolist() == [[3, 0, 7], [5, -1, -1], [0, -1, -1], [-1, -1, -1]]
    assert found.normalized('byte')[0].tolist() == [-1, -2, -3]
    assert [found.lines.tolist(), found.invalid.tolist()] == [[4, 1, 1, 0], [1, 0, 1, 0]]
    assert [found.repeated.tolist(), found.seen.tolist()] == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert found.valid.tolist() == [True, True, False, False]
    assert found.shares() == {
        'invalid': pytest.approx(2 / 6),
        'repeated': pytest.approx(1 / 6),
        'seen': pytest.approx(1 / 6),
        'unanswered': 0.5,
    }
    sizes = [len(encoder.tokenizer.encode(text)) + 1 for text in texts]
    assert sizes[0] < 40
    assert (found.tokens >= 0).sum(axis=1).tolist() == sizes
    assert found.computed == 2 * (16 + max(sizes[:2]) - 1) + 2 * (16 + max(sizes[2:]) - 1)
    again = answer(encoder, monkeypatch, tmp_path, texts, [{7}, {3}, {3}, {3}], calls)
    assert calls == [[0, 1], [2, 3]]
    for name in ('items', 'scores', 'tokens', 'seconds', 'computed'):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert read_answers(tmp_path / 'answers.npz').shares() == found.shares()


def test_an_answer_is_read_once_however_often_they_are_saved(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, 'SAVE_SECONDS', -1)
    texts, real = [], module.read_answer
    monkeypatch.setattr(
        module, 'read_answer', lambda text, *of: texts.append(text) or real(text, *of)
    )
    found = answer(encoder, monkeypatch, tmp_path, ['"M 1986"'] * 6, [()] * 6, [])
    assert texts == [''] * 6 + ['"M 1986"'] * 6
    assert found.items.tolist() == [[5]] * 6


def test_what_is_kept_of_other_users_or_candidates_is_replaced(encoder, tmp_path, monkeypatch):
    calls = []
    for first in (0, 5, 5):
        found = answer(encoder, monkeypatch, tmp_path, ['', ''], [()] * 2, calls, first=first)
        assert found.users.tolist() == [first, first + 1]
    assert calls == [[0, 1], [0, 1]]

    asked = []

    def places(writer, params, queries, *_, **__):
        asked.append(len(queries))
        return [(np.arange(len(queries)), [np.array([1, 2])] * len(queries), 1)] if queries else []

    monkeypatch.setattr(module, 'make_writer', lambda *_, **__: None)
    monkeypatch.setattr(module, 'place_queries', places)
    for user, items in ((3, [4, 5]), (3, [4, 5]), (7, [4, 5]), (7, [6, 5])):
        found = generate_users(
            'made up',
            np.array([user]),
            np.array([items]),
            [None],
            encoder,
            None,
            CONFIG,
            model=tiny_config(),
            lora=None,
            dtype=None,
            path=epath.Path(tmp_path / 'places.npz'),
            identity='a',
        )
        assert (found.users.tolist(), found.items.tolist()) == ([user], [items])
    assert asked == [1, 0, 1, 1]


def test_a_continued_run_says_whose_answer_is_wrong(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, 'SAVE_SECONDS', -1)
    calls = []
    for _ in range(2):
        with pytest.raises(InputError, match=r'^User 30: the logits are not finite'):
            answer(encoder, monkeypatch, tmp_path, ['', '', '', BROKEN], [()] * 4, calls)
    assert calls == [[0, 1], [2, 3], [2, 3]]


def test_a_line_that_the_token_limit_cuts_is_invalid(encoder, tmp_path, monkeypatch):
    """The 40th token is not EOS: what has no closing quote names nothing."""
    line = '\n"M 1979"'
    for missing, named in ((0, 2), (1, 0)):  # all tokens of the line, or all but the last quote
        padding = 40 - len(encoder.tokenizer.encode(line)) + missing
        text = '?' * padding + line
        folder = tmp_path / str(missing)
        found = answer(encoder, monkeypatch, folder, [text], [()], [], batch_size=1)
        assert found.tokens[0, -1] != encoder.eos[0]
        assert found.items[0].tolist() == [0, named]
    assert encoder.tokenizer.decode(found.tokens[0]).endswith('\n"M 1979')


def test_e04_hits_of_valid_answers_times_their_share_are_those_of_all(
    encoder, tmp_path, monkeypatch
):
    """E04: the numbers of the report. 95 users, 64 valid answers (0.6737), 25 hits.

    HR 0.3906 on valid answers, 0.2632 on all.
    """
    kinds = np.random.default_rng(0).permutation([HIT] * 25 + [WRONG] * 39 + [INVALID] * 31)
    texts = ['"Heat 1979"' if k == HIT else '"M 1979"' if k == WRONG else 'Heat' for k in kinds]
    found = answer(encoder, monkeypatch, tmp_path, texts, [()] * 95, [], batch_size=5)
    ranks = rank_targets(found.items, found.normalized('sum'), np.ones(95, np.int64))
    of_all = hit_rate(ranks, 1).mean()
    of_valid = hit_rate(ranks.take(found.valid), 1).mean()
    ratio = found.valid.mean()
    assert (round(of_valid, 4), round(ratio, 4), round(of_all, 4)) == (0.3906, 0.6737, 0.2632)
    assert of_all == pytest.approx(of_valid * ratio, abs=1e-12)
    assert found.shares()['unanswered'] == pytest.approx(1 - ratio)
