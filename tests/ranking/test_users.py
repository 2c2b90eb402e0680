"""From sums of log-probabilities to scores, and the prompts that they belong to."""

import dataclasses

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from palr_jax import storage
from palr_jax.config import default_config
from palr_jax.data import Catalogue
from palr_jax.errors import InputError
from palr_jax.prompts.encode import Encoder
from palr_jax.prompts.template import load_template
from palr_jax.ranking.score import Query
from palr_jax.ranking.users import Scores, make_query, ranking_prompt, score_users
from palr_jax.testing.llama import tiny_tokenizer

SHORT = 'M (1931)'
LONG = "Those Who Love Me Can Take the Train (Ceux qui m'aiment prendront le train) (1998)"  # ML-1M
ACCENT = 'Les Misérables (1995)'
TITLES = ('', SHORT, LONG, ACCENT, 'Heat (1995)', 'Heat (1995)')


@pytest.fixture(scope='module')
def encoder():
    catalogue = Catalogue(
        tuple(map(str, range(6))), TITLES, (None,) * 6, ((), ('Crime',), (), (), (), ())
    )
    tokenizer = tiny_tokenizer(TITLES)
    return Encoder(catalogue, tokenizer, load_template('movies'), 'plain', 500)


def scores_of(encoder, sums, items):
    items = np.array([items])
    answers = tuple(encoder.replies(items[items >= 0].tolist()))
    query = Query(np.zeros(3, np.int32), answers)
    return Scores.of_queries(items, [query], encoder, np.array([sums], np.float32))


def test_c02_a_sum_favours_the_short_title_and_a_mean_the_predictable_one(encoder):
    """C02: the same probability a token: the sum prefers the short title, the mean neither."""
    tokens = [len(encoder.reply(item)) for item in (1, 2)]
    assert tokens[1] > 3 * tokens[0]
    scores = scores_of(encoder, [-2.0 * n for n in tokens] + [-np.inf], [1, 2, -1])
    short, long, unfilled = scores.normalized('sum')[0]
    assert short > long
    assert unfilled == -np.inf
    np.testing.assert_allclose(scores.normalized('token')[0], [-2, -2, -np.inf])
    sizes = [len(f'"{title}"'.encode()) for title in (SHORT, LONG)]
    np.testing.assert_allclose(
        scores.normalized('byte')[0, :2], [-2 * n / size for n, size in zip(tokens, sizes)]
    )


def test_c02_bytes_are_not_characters(encoder):
    scores = scores_of(encoder, [-10.0], [3])
    assert scores.bytes[0, 0] == len(f'"{ACCENT}"') + 1
    assert scores.normalized('byte')[0, 0] == pytest.approx(-10 / (len(ACCENT) + 3))


def test_the_prior_is_taken_off_candidate_by_candidate(encoder):
    scores = scores_of(encoder, [-8.0, -30.0, -np.inf], [1, 2, -1])
    prior = scores_of(encoder, [-7.0, -33.0, -np.inf], [1, 2, -1])
    less = scores.less(prior).normalized('prior')[0]
    np.testing.assert_allclose(less, [-1, 3, -np.inf])  # the long title gains by the user
    np.testing.assert_array_equal(scores.less(scores).normalized('prior')[0], [0, 0, -np.inf])


def test_a_user_without_history_has_a_prompt_without_its_paragraph(encoder):
    config = default_config().prompts
    items = np.array([4, 1])
    nobody, listed = ranking_prompt(encoder, config, np.zeros(0, np.int32), (), items, [0])
    somebody, same = ranking_prompt(encoder, config, np.array([2, 3]), ('Crime',), items, [0])
    assert listed == same
    assert set(nobody.spans) == {'candidates'}
    assert set(somebody.spans) == {'history', 'profile', 'candidates'}
    query, cut = make_query(encoder, config, np.zeros(0, np.int32), (), items, [0])
    assert cut == 0
    assert len(query.candidates) == 2


def test_duplicate_titles_tie_by_title_and_not_by_number(encoder):
    config = default_config().prompts
    items = np.array([4, 5, 1])
    query, _ = make_query(encoder, config, np.array([2]), (), items, [0])
    assert query.candidates[0].tolist() == query.candidates[1].tolist()
    numbered = Encoder(
        encoder.catalogue, encoder.tokenizer, load_template('movies'), 'plain', 500, answer='index'
    )
    query, _ = make_query(numbered, config, np.array([2]), (), items, [0])
    spelt = [encoder.tokenizer.decode(answer.tolist()).strip() for answer in query.candidates]
    assert sorted(spelt) == ['1.', '2.', '3.']
    _, listed = ranking_prompt(numbered, config, np.array([2]), (), items, [0])
    assert [listed[int(text[:-1]) - 1] for text in spelt] == items.tolist()


def test_a_continued_run_says_whose_query_is_wrong(encoder, tmp_path):
    """Of four users the first two are scored, so the last one is the second of those pending."""
    prompts = default_config().prompts
    items = np.array([[1, 4]] * 4)
    queries = [
        make_query(encoder, prompts, np.array([2]), (), items[0], [0], name=f'User {name}')[0]
        for name in (17, 196, 23, 305)
    ]
    users = np.array([3, 5, 8, 9])
    half = Scores.of_queries(items, queries, encoder, users=users)
    half.sums[:2] = -1.0
    path = epath.Path(tmp_path / 'scores.npz')
    storage.write_arrays(path, identity=np.array('a'), **dataclasses.asdict(half))

    def run(queries, scorer=None):
        return score_users(
            'made up',
            users,
            items,
            queries,
            encoder,
            scorer,
            None,
            ConfigDict({'batch_size': 1, 'row_length': 32, 'max_shapes': 1}),
            max_positions=512,
            path=path,
            identity='a',
        )

    said = iter([0.0, np.nan])
    with pytest.raises(InputError, match='User 305: the score of candidate 0 is nan'):
        run(queries, lambda _, batch: np.full(batch.answers.shape, next(said)))
    queries[3] = dataclasses.replace(queries[3], prompt=np.zeros(512, np.int32))
    with pytest.raises(InputError, match='User 305: prompt and candidate 0 have '):
        run(queries)
    items[3] = -1
    half.items[3], half.sums[3] = -1, -np.inf
    storage.write_arrays(path, identity=np.array('a'), **dataclasses.asdict(half))
    queries[3] = dataclasses.replace(queries[3], candidates=())
    with pytest.raises(InputError, match='User 305 has no candidates'):
        run(queries)
