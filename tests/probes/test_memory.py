"""What a model is said to know by heart: made-up models that know a part."""

import numpy as np
import pytest

from palr_jax.config import default_config
from palr_jax.data import Catalogue, Split
from palr_jax.probes import memory
from palr_jax.prompts import Encoder, load_template
from palr_jax.testing.llama import tiny_tokenizer

TITLES = (
    'Heat (1995)',
    'Star Wars (1977)',
    'Toy Story (1995)',
    '2001: A Space Odyssey (1968)',
    'Shall We "Dance" (1937) (V)',
    'Boys on the Side',
)
YEARS = (1995, 1977, 1995, 1968, 1937, None)
KEYWORDS = (
    ('Crime', 'Drama'),
    ('War',),
    ('Comedy',),
    ('Drama',),
    ('Comedy', 'Drama'),
    (),
)


@pytest.fixture(scope='module')
def encoder():
    catalogue = Catalogue(
        ('', *map(str, range(1, 7))), ('', *TITLES), (None, *YEARS), ((), *KEYWORDS)
    )
    config = default_config()
    run_encoder = Encoder(
        catalogue, tiny_tokenizer(TITLES), load_template('movies'), 'chatml', 1024
    )
    return memory.make_encoder(run_encoder, config)


def knows(encoder, answers):
    """A generator that goes on with `answers[what was begun]`, and says `nothing"` otherwise."""
    tokenizer = encoder.tokenizer

    def generate(prompts, most):
        found = []
        for prompt in prompts:
            begun = tokenizer.decode(prompt).rsplit('\n', 1)[1]
            said = [*tokenizer.piece(answers.get(begun, ' nothing"')), tokenizer.eos_id]
            found.append(np.array(said[:most], np.int32))
        return found

    return generate


def test_prompts_are_in_the_style_of_the_run(encoder):
    prompt = encoder.tokenizer.decode(encoder.prompt('title', []).tokens)
    assert prompt == (
        '<|endoftext|><|im_start|>user\nName one movie.\n\nAnswer with its title in double '
        'quotes.<|im_end|>\n<|im_start|>assistant\n'
    )
    prompt = encoder.tokenizer.decode(encoder.prompt('keyword', [2]).tokens)
    assert 'This is one movie:\n"Star Wars (1977)"\n\nAnswer with the keyword' in prompt


def test_a_model_that_knows_half_of_the_titles(encoder):
    """Two of four: one ends with a quote, one with the bracket of its year."""
    items = np.array([2, 3, 4, 6])
    generate = knows(
        encoder,
        {
            '"Star': ' Wars"',
            '"Toy': ' Soldiers"',
            '"2001: A': ' Space Odyssey (1968)"',
            '"Boys on': ' the Side of Town"',
        },
    )
    found = memory.ask_titles(items, encoder, generate)
    assert found.asked == ('"Star', '"Toy', '"2001: A', '"Boys on')
    assert found.right.tolist() == [True, False, True, False]
    assert found.said[0] == ' Wars"'
    assert found.baseline is None


def test_a_model_that_knows_one_year(encoder):
    """1995 is the year of most titles: always saying it is right for two of five."""
    generate = knows(encoder, {'"Star Wars (': '1977)"', '"Toy Story (': '19955)"'})
    found = memory.ask_years(np.arange(1, 6), encoder, generate)
    assert found.asked[4] == "\"Shall We 'Dance' ("
    assert found.right.tolist() == [False, True, False, False, False]
    assert found.baseline.tolist() == [True, False, True, False, False]


def test_the_best_keyword_is_one_of_the_items(encoder):
    """Keywords in order: Comedy, Crime, Drama, War. A long one is no worse for its sum."""
    lengths = np.array([len(encoder.keyword(k, last=True)) for k in sorted({*sum(KEYWORDS, ())})])
    means = np.array(
        [
            [-4.0, -1.0, -2.0, -3.0],  # Crime: right
            [-4.0, -3.0, -2.0, -1.5],  # War: right
            [-4.0, -3.0, -2.0, -2.5],  # Drama for a comedy: wrong
            [-1.0, -3.0, -2.0, -2.5],  # Comedy for a drama: wrong
        ]
    )
    asked = []

    def score(queries):
        asked.extend(queries)
        return (means * lengths).astype(np.float32)

    found = memory.ask_keywords(np.array([1, 2, 3, 4]), encoder, score)
    assert found.said == ('Crime', 'War', 'Drama', 'Comedy')
    assert found.right.tolist() == [True, True, False, False]
    assert found.baseline.tolist() == [True, False, False, True]  # Drama, of three items
    answers = [encoder.tokenizer.decode(tokens) for tokens in asked[0].candidates]
    assert answers == [f'{k}<|im_end|>' for k in ('Comedy', 'Crime', 'Drama', 'War')]


@pytest.mark.parametrize(
    ('name', 'shown', 'rest'),
    [
        ('Star Wars', 'Star', ' Wars'),
        ('Pride and Prejudice', 'Pride', ' and Prejudice'),
        ('2001: A Space Odyssey', '2001: A', ' Space Odyssey'),
    ],
)
def test_the_first_half_of_the_words_is_shown(name, shown, rest):
    assert memory.cut(name) == (shown, rest)


@pytest.mark.parametrize(
    ('said', 'ended', 'right'),
    [
        (' Wars"', False, True),
        (' Wars', True, True),
        (' Wars', False, False),  # cut off: it may have gone on
        (' Wars (1977)"', False, True),
        (' Wars\n', False, True),
        (' Wars: A New Hope"', False, False),
        (' Warship"', False, False),
        (' wars"', False, False),
        ('Wars"', False, False),
        ('', True, False),
    ],
)
def test_a_title_is_complete_word_for_word(said, ended, right):
    assert memory.completes(said, ' Wars', ended) is right


def test_popularity_is_of_the_training_events():
    """Item 6 is taken by both users last, so only in tests: it is as rare as one of no event."""
    split = Split(
        offsets=np.array([0, 5, 9]),
        items=np.array([4, 2, 3, 1, 6, 4, 2, 4, 6], np.int32),
        train_end=np.array([4, 3]),
        valid_at=np.array([-1, -1]),
        test_at=np.array([4, 3]),
    )
    # Events: item 4 three, item 2 two, items 1 and 3 one, items 5 and 6 none.
    assert memory.popularity_thirds(split, 6).tolist() == [0, 1, 0, 1, 0, 2, 2]


def test_shares_by_hand():
    answers = memory.Answers(
        np.array([2, 3, 4, 6]),
        ('a', 'b', 'c', 'd'),
        ('w', 'x', 'y', 'z'),
        np.array([True, False, True, False]),
        np.array([True, False, False, False]),
    )
    thirds = np.array([0, 1, 0, 1, 0, 2, 2])
    found = memory.summary(answers, thirds, lambda values: [values.min(), values.max()])
    assert found['items'] == 4
    assert found['share'] == 0.5
    assert found['ci95'] == pytest.approx([0.15004, 0.84996], abs=1e-5)  # Wilson's, 2 of 4
    assert found['baseline'] == 0.25
    assert found['above_baseline'] == {'share': 0.25, 'ci95': [0, 1]}
    shares = {name: part['share'] for name, part in found['by_popularity'].items()}
    assert shares == {'popular': 1.0, 'middle': 0.0, 'rare': 0.0}
    assert found['answers'][1] == {'asked': 'b', 'said': 'x', 'right': False}


def test_a_catalogue_without_years_is_not_asked_for_them(encoder):
    nothing = memory.ask_years(np.zeros(0, int), encoder, None)
    assert memory.summary(nothing, np.zeros(7, int), None) is None
    table = memory.table({'model': 'm', 'questions': {'year': None}})
    assert 'the catalogue has none' in table
