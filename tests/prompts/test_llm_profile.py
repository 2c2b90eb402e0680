"""The profile by the LLM: the best keywords of what was shown, asked once, from the past alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palr_jax.config import default_config
from palr_jax.data import Catalogue, Dataset, Split
from palr_jax.errors import InputError
from palr_jax.llama.model import apply_logits
from palr_jax.llm_input import example_profiles, make_queries
from palr_jax.project import Project
from palr_jax.prompts import Encoder, Example, llm_profile, load_template
from palr_jax.prompts.llm_profile import llm_profiles
from palr_jax.ranking.score import make_scorer, score_queries
from palr_jax.retrieval import Candidates, save_candidates
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

KEYWORDS = (
    ('Crime', 'Drama'),
    ('Horror', 'Sci-Fi'),
    ('Action', 'Sci-Fi'),
    ('Western',),
    (),
    ('Drama',),
)
TITLES = tuple(f'Film {i} ({1990 + i})' for i in range(1, len(KEYWORDS) + 1))
CATALOGUE = Catalogue(tuple('0123456'), ('', *TITLES), (None,) * 7, ((), *KEYWORDS))
TOKENIZER = tiny_tokenizer([*TITLES, 'Crime Drama Horror Sci-Fi Action Western'], vocab_size=300)


def config(**changes):
    prompts = default_config().prompts
    for field, value in changes.items():
        prompts[field] = value
    return prompts


def encoder(length=4096, template='movies', catalogue=CATALOGUE):
    return Encoder(catalogue, TOKENIZER, load_template(template), 'chatml', length)


class Model:
    """Stands in for the model: a fixed sum for each line, one query a batch, newest first."""

    def __init__(self, **sums):
        self.sums, self.asked = sums, []

    def __call__(self, queries):
        for i in reversed(range(len(queries))):
            lines = [self.line(answer) for answer in queries[i].candidates]
            self.asked.append((TOKENIZER.decode(queries[i].prompt), lines))
            values = [self.sums.get(line.replace('-', '_'), -50.0) for line in lines]
            yield np.array([i]), np.array([[*values, -np.inf]], np.float32)

    @staticmethod
    def line(answer):
        text = TOKENIZER.decode(answer)
        return text.removesuffix('<|im_end|>').removesuffix('\n')


def profiles(histories, model, *, path=None, identity='tiny', made_by=None, **changes):
    return llm_profiles(
        histories, made_by or encoder(), config(**changes), model, path=path, identity=identity
    )


# --- what is asked --------------------------------------------------------------------------------


def test_the_text_of_both_questions():
    model = Model(Horror=-1.0, Drama=-2.0)
    assert profiles([[5, 6, 2]], model) == [('Horror', 'Drama')]
    question = (
        '<|endoftext|><|im_start|>user\nDescribe the taste of a user in two keywords.\n\n'
        'The user watched these movies, oldest first, each followed by its keywords:\n'
        '"Film 5 (1995)"\n"Film 6 (1996)": Drama\n"Film 2 (1992)": Horror, Sci-Fi\n\n'
        "Answer with the two of these keywords that describe the user's preference best, one on "
        'each line, the most important first.<|im_end|>\n<|im_start|>assistant\n'
    )
    assert model.asked == [
        (question, ['Drama', 'Horror', 'Sci-Fi']),
        (question + 'Horror\n', ['Drama', 'Sci-Fi']),
    ]


def test_p03_keywords_end_their_line_and_the_answer_ends_with_eos():
    """P03, P04: one tokenisation of prompt and answer, no keyword that begins another."""
    first = encoder().keyword('Sci-Fi', last=False)
    last = encoder().keyword('Horror', last=True)
    assert TOKENIZER.decode(np.concatenate([first, last])) == 'Sci-Fi\nHorror<|im_end|>'
    assert TOKENIZER.encode('Sci-Fi\nHorror<|im_end|>') == [*first.tolist(), *last.tolist()]
    prompt = encoder().prompt('profile', [2, 3]).tokens
    together = TOKENIZER.encode(TOKENIZER.decode([*prompt, *first, *last]))
    assert together == [*prompt.tolist(), *first.tolist(), *last.tolist()]
    answers = [encoder().keyword(k, last=False) for k in ('Art', 'Art House', 'Art-')]
    assert len({tuple(a[: len(answers[0])].tolist()) for a in answers}) == 3


@pytest.mark.slow
def test_the_profile_is_the_best_of_naive_scores():
    """Every keyword behind its whole prompt, in a row of its own; the second behind the first."""
    tiny = tiny_config(vocab_size=TOKENIZER.size, max_positions=1024)
    params = random_params(tiny, 3)
    scorer = make_scorer(tiny, None)

    def score(queries):
        return score_queries(
            scorer, params, queries, batch_size=2, row_length=32, max_shapes=1, max_positions=1024
        )

    logits = jax.jit(lambda tokens: apply_logits(params, tiny, tokens))

    def best(prompt, keywords, last):
        sums = {}
        for keyword in keywords:
            answer = encoder().keyword(keyword, last=last)
            tokens = np.concatenate([prompt, answer])
            row = np.pad(tokens, (0, 400 - len(tokens)))[None]
            each = jax.nn.log_softmax(logits(jnp.array(row))[0])
            places = range(len(prompt), len(tokens))
            sums[keyword] = sum(float(each[at - 1, tokens[at]]) for at in places)
        return max(sums, key=sums.get)

    histories = [[1, 2, 3], [4, 3, 6, 5]]
    for history, found in zip(histories, profiles(histories, score)):
        prompt = encoder().prompt('profile', history).tokens
        keywords = {k for item in history for k in CATALOGUE.keywords[item]}
        first = best(prompt, keywords, last=False)
        prompt = np.concatenate([prompt, encoder().keyword(first, last=False)])
        assert found == (first, best(prompt, keywords - {first}, last=True))


@pytest.mark.parametrize(
    ('normalize', 'best'), [('sum', 'Horror'), ('byte', 'Western'), ('token', 'Sci-Fi')]
)
def test_scores_are_normalised_as_the_config_says(normalize, best):
    """-8, -9.5 and -8.5: -1.14, -1.36 and -1.06 a byte, with one for the end of the line; -4, -2.4
    and -2.8 a token of 2, 4 and 3."""
    question = llm_profile.Question(
        np.array([1]),
        ('Horror', 'Sci-Fi', 'Western'),
        (np.array([5, 6]), np.array([5, 6, 7, 8]), np.array([5, 6, 7])),
    )
    sums = np.array([[-8.0, -9.5, -8.5]])
    score = lambda queries: [(np.array([0]), sums)]  # noqa: E731
    assert llm_profile.choose('', [question], score, normalize, None, '') == [best]


def test_equal_scores_go_by_name():
    assert profiles([[3, 2, 1]], Model()) == [('Action', 'Crime')]


# --- which keywords -------------------------------------------------------------------------------


def test_histories_without_keywords_and_with_one_ask_nothing():
    model = Model()
    assert profiles([[], [5, 5], [5, 4, 4]], model) == [(), (), ('Western',)]
    assert model.asked == []


def test_only_the_latest_items_are_read():
    model = Model(Western=-1.0)
    history = [4, 4, 4, 1, 6, 2]
    assert profiles([history], model, profile_history=3) == [('Crime', 'Drama')]
    assert profiles([history], model, profile_history=20)[0][0] == 'Western'


def test_what_was_cut_to_keep_to_the_length_gives_no_keyword():
    model = Model(Western=-1.0)
    whole = encoder().prompt('profile', [4, 1, 2]).tokens
    short = encoder(length=len(whole) - 1)
    assert profiles([[4, 1, 2]], model)[0][0] == 'Western'
    assert profiles([[4, 1, 2]], model, made_by=short) == [('Crime', 'Drama')]
    assert all('Western' not in lines for _, lines in model.asked[-2:])


def test_k01_keywords_come_from_the_history_alone():
    """K01, on random histories and scores: two different keywords of it, or all that it has."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 7, rng.integers(0, 6)).tolist() for _ in range(60)]
    names = sorted({k for keywords in KEYWORDS for k in keywords})
    model = Model(**{k.replace('-', '_'): -float(rng.random()) for k in names})
    for history, found in zip(histories, profiles(histories, model)):
        known = {k for item in history for k in CATALOGUE.keywords[item]}
        assert set(found) <= known
        assert len(found) == len(set(found)) == min(2, len(known))


def test_a_template_that_does_not_ask_is_named(tmp_path):
    for task in ('recommend', 'recommend_retrieval'):
        (tmp_path / f'{task}.txt').write_text('{history}\n\n{profile}\n\n{candidates}')
    made_by = encoder(template=str(tmp_path))
    with pytest.raises(InputError, match=r'has no profile\.txt; write one, or set prompts\.profi'):
        profiles([[1, 2]], Model(), made_by=made_by)


# --- once -----------------------------------------------------------------------------------------


def test_the_same_history_is_asked_about_once(tmp_path):
    model, path = Model(Horror=-1.0), tmp_path / 'profiles.json'
    asked = [[1, 2], [2, 1], [1, 2]]
    found = profiles(asked, model, path=path)
    assert len(model.asked) == 4  # two histories, two keywords each
    assert found[0] == found[2]
    again = Model()
    assert profiles(asked[::-1], again, path=path) == found[::-1]
    assert again.asked == []
    longer = Model()
    profiles([[1, 2, 3]], longer, path=path)  # one more item: a prefix of another length
    assert len(longer.asked) == 2


@pytest.mark.parametrize('done', [1, 3, 5])
def test_an_interrupted_run_asks_only_what_is_missing(tmp_path, monkeypatch, done):
    monkeypatch.setattr(llm_profile, 'SAVE_SECONDS', 0.0)
    histories = [[1, 2], [2, 3], [3, 1]]
    path = tmp_path / 'profiles.json'

    class Killed(Model):
        def __call__(self, queries):
            for result in super().__call__(queries):
                if len(self.asked) > done:
                    raise KeyboardInterrupt
                yield result

    killed = Killed(Horror=-1.0, Action=-2.0)
    with pytest.raises(KeyboardInterrupt):
        profiles(histories, killed, path=path)
    rest = Model(Horror=-1.0, Action=-2.0)
    assert profiles(histories, rest, path=path) == profiles(
        histories, Model(Horror=-1.0, Action=-2.0)
    )
    assert len(rest.asked) == 6 - done


def test_what_a_choice_depends_on_is_part_of_its_key(tmp_path):
    """Another model, wording, title, keyword or normalisation is another question."""
    path = tmp_path / 'profiles.json'
    profiles([[1, 2]], Model(Horror=-1.0), path=path)
    renamed = dataclasses.replace(CATALOGUE, titles=('', 'Heat', *TITLES[1:]))
    for changes in (
        {'identity': 'other'},
        {'made_by': encoder(template='products')},
        {'made_by': encoder(catalogue=renamed)},
        {'profile_normalize': 'byte'},
    ):
        model = Model(Drama=-1.0)
        assert profiles([[1, 2]], model, path=path, **changes)[0][0] == 'Drama'
        assert len(model.asked) == 2
    assert profiles([[1, 2]], Model(), path=path)[0][0] == 'Horror'  # still there


# --- in the pipeline ------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    tiny = tiny_config(vocab_size=TOKENIZER.size, max_positions=1024)
    write_hf_folder(folder, tiny, random_params(tiny, 0), TOKENIZER)
    return folder


@pytest.fixture
def made_up_scores(monkeypatch):
    """Sums that hang on every token of prompt and answer: whatever a prompt sees, shows."""

    def scores(_, queries):
        for i, query in enumerate(queries):
            seeds = [[*query.prompt.tolist(), *answer.tolist()] for answer in query.candidates]
            sums = [-np.random.default_rng(seed).random() for seed in seeds]
            yield np.array([i]), np.array([sums])

    monkeypatch.setattr(Project, 'base_scores', scores)


def project_of(model_folder, workdir, items):
    """User 0 trains on three items, then validates and tests; candidates are all other items."""
    settings = default_config()
    settings.model.path = str(model_folder)
    settings.prompts.profile = 'llm'
    settings.ranking.candidates = 2
    settings.tasks.enrich = False
    project = Project(settings, workdir)
    n = len(items)
    split = Split(
        offsets=np.array([0, n]),
        items=np.array(items, np.int32),
        train_end=np.array([n - 2], np.int32),
        valid_at=np.array([n - 2], np.int32),
        test_at=np.array([n - 1], np.int32),
    )
    project.dataset = Dataset(CATALOGUE, split, ('u',), {})
    for part in ('valid', 'test'):
        items = np.array([[4, 5]], np.int32)
        found = Candidates(np.array([0]), items, np.zeros(items.shape, np.float32))
        save_candidates(workdir / 'retrieval', 'retriever', part, found)
    return project


def prompts_of(project):
    """The text of the validation and the test prompt."""
    decode = project.checkpoint.tokenizer.decode
    return [decode(make_queries(project, part)[2][0].prompt) for part in ('valid', 'test')]


def line_of_profile(text):
    return text.split('The user prefers:\n')[1].split('\n')[0].split(', ')


def test_k01_no_profile_knows_what_comes_after_it(model_folder, tmp_path, made_up_scores):
    """K01: the only Western validates, the only Action tests; both profiles are of the past."""
    project = project_of(model_folder, tmp_path / 'a', [1, 6, 2, 4, 3])
    valid, test = map(line_of_profile, prompts_of(project))
    assert len(valid) == len(test) == 2
    assert set(valid) <= {'Crime', 'Drama', 'Horror', 'Sci-Fi'}
    assert set(test) <= {'Crime', 'Drama', 'Horror', 'Sci-Fi', 'Western'}
    # Whatever comes later, the prompts of what is earlier are the same to the letter.
    other = project_of(model_folder, tmp_path / 'b', [1, 6, 2, 5, 5])
    assert prompts_of(other)[0] == prompts_of(project)[0]
    other = project_of(model_folder, tmp_path / 'c', [1, 6, 2, 4, 5])
    assert prompts_of(other) == prompts_of(project)


def test_k01_the_profile_of_an_example_ends_at_its_cut(model_folder, tmp_path, made_up_scores):
    """K01: the target of the example is the only Western; the profile is of `past`."""
    project = project_of(model_folder, tmp_path, [1, 6, 2, 4, 3])
    example = Example(0, 'recommend', past=(1, 6), history=(6,), candidates=(), targets=(4,))
    (profile,) = example_profiles(project, [example])
    assert sorted(profile) == ['Crime', 'Drama']  # also of what is too old to be shown
    project.config.tasks.profile = False
    assert example_profiles(project, [example]) == [()]


def test_profiles_are_kept_in_the_workdir_and_need_no_model_again(
    model_folder, tmp_path, made_up_scores, monkeypatch
):
    first = prompts_of(project_of(model_folder, tmp_path, [1, 6, 2, 4, 3]))
    assert (tmp_path / 'profiles.json').exists()
    monkeypatch.setattr(Project, 'base_scores', None)  # calling it would fail
    assert prompts_of(project_of(model_folder, tmp_path, [1, 6, 2, 4, 3])) == first
