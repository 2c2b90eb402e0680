"""The text of an answer, matched to the catalogue; what is counted and what is ranked."""

import numpy as np
import pytest

from palr_jax.data import Catalogue
from palr_jax.evaluation.metrics import hit_rate, per_user, rank_targets
from palr_jax.prompts.encode import Encoder
from palr_jax.prompts.template import load_template
from palr_jax.ranking.answers import (
    Answer,
    index_replies,
    rank_answers,
    read_answer,
    score_places,
)
from palr_jax.testing.llama import tiny_tokenizer

TITLES = (
    'Heat (1995)',
    'Alien (1979)',
    'Aliens (1986)',
    'Chasing Amy (1997)',
    'Chasing Amy (1997)',  # one title, two ids
    "Schindler's List (1993)",
    'The "Burbs" (1989)',
    ' Two\n lines\t(1986) ',
    '12. Angry Men',
    'Misérables, Les (1995)',
)
HEAT, ALIEN, ALIENS, AMY, AMY_TOO, LIST, BURBS, LINES, MEN, LES = range(1, 11)


def encoder(answer='title', tokenizer=None):
    n = len(TITLES) + 1
    catalogue = Catalogue(tuple(f'B0{i}' for i in range(n)), ('', *TITLES), (None,) * n, ((),) * n)
    tokenizer = tokenizer or tiny_tokenizer(TITLES)
    return Encoder(catalogue, tokenizer, load_template('movies'), 'plain', 512, answer=answer)


@pytest.fixture(scope='module')
def index():
    return index_replies(encoder())


def test_every_reply_names_its_item(index):
    """D03: a title that two items have names both, neither the first nor the last alone."""
    for form in ('title', 'id_title'):
        of_form = encoder(form)
        replies = index_replies(of_form)
        for item in range(1, len(TITLES) + 1):
            (found,) = read_answer(of_form.reply_text(item), replies).items
            both = form == 'title' and item in (AMY, AMY_TOO)
            assert found == ((AMY, AMY_TOO) if both else (item,))
    assert read_answer('"B02 (Alien (1979))"', index).items == ((),)
    assert read_answer('"B02 (Alien (1979))"', index_replies(encoder('id_title'))).items == (
        (ALIEN,),
    )


@pytest.mark.parametrize(
    ('line', 'item'),
    [
        ('"Heat (1995)"', HEAT),
        ('  "Heat  (1995)"\t', HEAT),
        ('" Heat\u00a0(1995) "', HEAT),
        ('“Heat (1995)”', HEAT),
        ('1. "Heat (1995)"', HEAT),
        ('10) "Heat (1995)"', HEAT),
        ('- "Heat (1995)"', HEAT),
        ('• “Heat (1995)”', HEAT),
        ('"Schindler’s List (1993)"', LIST),
        ('"Schindler`s List (1993)"', LIST),
        ('"The "Burbs" (1989)"', BURBS),
        ('"The \'Burbs\' (1989)"', BURBS),
        ('"Two lines (1986)"', LINES),
        ('"12. Angry Men"', MEN),
        ('3. "12. Angry Men"', MEN),
        ('"Misérables, Les (1995)"', LES),
        # Another title, no title, or more than a title.
        ('"heat (1995)"', None),
        ('"Heat"', None),
        ('"Heat (1995)', None),  # cut short
        ('Heat (1995)', None),
        ("'Heat (1995)'", None),
        ('"Heat (1995)",', None),
        ('"Heat (1995)" and "Alien (1979)"', None),
        ('Try "Heat (1995)"', None),
        ('1 "Heat (1995)"', None),
        ('"Angry Men"', None),
        ('"', None),
        ('""', None),
        ('1.', None),
    ],
)
def test_what_a_line_may_look_like(index, line, item):
    assert read_answer(line, index).items == (((item,) if item else ()),)


def test_e04_an_answer_by_hand(index):
    """E04: an invalid line takes its place, a repeated one none; a cut line is invalid."""
    text = (
        '"Alien (1979)"\r\n\n'
        '"Alien 5 (2030)"\n'
        '"Chasing Amy (1997)"\n'
        '"Alien (1979)"\n'
        '"Chasing Amy (1997)"\n'
        '"Heat (1995)"\n'
        '"Aliens (19'
    )
    answer = read_answer(text, index, seen={AMY, HEAT})
    assert answer == Answer(((ALIEN,), (), (AMY, AMY_TOO), (HEAT,), ()), repeated=2, seen=1)
    assert (answer.lines, answer.invalid) == (7, 2)
    items, scores = rank_answers([answer, read_answer(' \n', index)])
    assert items.tolist() == [[ALIEN, 0, AMY, AMY_TOO, HEAT, 0], [-1] * 6]
    assert scores[0].tolist() == [-1, -2, -3, -3, -4, -5]
    assert np.all(scores[1] == -np.inf)


def test_ten_lines_count(index):
    """The eleventh line that is not blank is not read, whatever the others were."""
    text = '\n\n'.join(['"Heat (1995)"', *['"?"'] * 8, '"Alien (1979)"', '"Aliens (1986)"'])
    assert read_answer(text, index).items == ((HEAT,), *[()] * 8, (ALIEN,))
    assert read_answer(text, index, lines=2).items == ((HEAT,), ())


def test_ranks_of_answers_by_hand(index):
    """E01, E03: a tie of two items is worth half a hit; an item not named is a miss."""
    answers = [
        read_answer(text, index)
        for text in ('"?"\n"Heat (1995)"', '"Chasing Amy (1997)"', '"Heat (1995)"', '', '"?"')
    ]
    items, scores = rank_answers(answers)
    ranks = rank_targets(items, scores, np.array([HEAT, AMY_TOO, ALIEN, ALIEN, ALIEN]))
    assert ranks.greater.tolist() == [1, 0, 0, 0, 0]
    assert ranks.found.tolist() == [True, True, False, False, False]
    assert hit_rate(ranks, 1).tolist() == [0, 0.5, 0, 0, 0]
    assert hit_rate(ranks, 2).tolist() == [1, 1, 0, 0, 0]
    assert per_user(ranks, (10,), 10)['MRR'].tolist() == [0.5, 0.75, 0, 0, 0]
    assert rank_answers([])[0].shape == (0, 1)


def test_titles_that_a_tokenizer_changes_still_match():
    """The model can write only what the tokens spell: that names the item as well."""

    class Folding:
        """Encodes é as e, as a tokenizer that normalises does."""

        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def piece(self, text, allow_special=True):
            return self.tokenizer.piece(text.replace('é', 'e'), allow_special)

    folding = encoder(tokenizer=Folding(tiny_tokenizer(TITLES)))
    index = index_replies(folding)
    text = folding.tokenizer.decode(folding.answer([LES, HEAT])[:-1])
    assert text == '"Miserables, Les (1995)"\n"Heat (1995)"'
    assert read_answer(text, index).items == ((LES,), (HEAT,))
    assert read_answer('"Misérables, Les (1995)"', index).items == ((LES,),)
    assert read_answer(text, index_replies(encoder())).items == ((), (HEAT,))


def test_scores_of_places():
    """Not written: one behind the last place, together. Not there: -inf."""
    places = np.array([[2, 0, 1, 0, 0], [1, 1, 2, 3, 0], [0, 0, 0, 0, 0]])
    filled = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    inf = np.inf
    expected = [[-2, -3, -1, -3, -inf], [-1, -1, -2, -3, -inf], [-inf] * 5]
    found = score_places(places, filled)
    assert found.dtype == np.float32
    assert found.tolist() == expected
