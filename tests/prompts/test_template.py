"""The wording files: paragraphs that come and go with their slots, and every bad file."""

import pytest

from palr_jax.config import CHOICES
from palr_jax.errors import InputError
from palr_jax.prompts.template import FOLDER, SLOTS, STYLES, TASKS, load_template

WORDING = """Recommend.

Watched:
{history}

Prefers:
{profile}

Candidates:
{candidates}

Answer.
"""


def write(folder, text=WORDING, **files):
    for task in TASKS:
        (folder / f'{task}.txt').write_text(files.get(task, text), encoding='utf-8')
    return str(folder)


def shown(template, *filled, task='recommend_retrieval'):
    return ''.join(
        f'<{part.text}>' if part.is_slot else part.text
        for part in template.parts(task, frozenset(filled))
    )


def test_a_full_prompt_keeps_every_paragraph(tmp_path):
    assert shown(load_template(write(tmp_path)), *SLOTS) == (
        'Recommend.\n\nWatched:\n<history>\n\nPrefers:\n<profile>\n\n'
        'Candidates:\n<candidates>\n\nAnswer.'
    )


@pytest.mark.parametrize(
    ('filled', 'text'),
    [
        ((), 'Recommend.\n\nAnswer.'),
        (('history',), 'Recommend.\n\nWatched:\n<history>\n\nAnswer.'),
        (('profile',), 'Recommend.\n\nPrefers:\n<profile>\n\nAnswer.'),
        (
            ('history', 'candidates'),
            'Recommend.\n\nWatched:\n<history>\n\nCandidates:\n<candidates>\n\nAnswer.',
        ),
    ],
)
def test_a_paragraph_goes_when_its_slot_is_empty(tmp_path, filled, text):
    assert shown(load_template(write(tmp_path)), *filled) == text


def test_a_paragraph_with_two_slots_needs_both(tmp_path):
    text = 'A\n\nBoth:\n{history}\n{candidates}\n'
    template = load_template(write(tmp_path, text))
    assert shown(template, 'history') == 'A'
    assert shown(template, 'history', 'candidates') == 'A\n\nBoth:\n<history>\n<candidates>'


def test_the_first_paragraph_may_go(tmp_path):
    template = load_template(write(tmp_path, '{history}\n\nRecommend.'))
    assert shown(template) == 'Recommend.'
    assert shown(template, 'history') == '<history>\n\nRecommend.'


def test_a_filled_slot_without_a_place_is_refused(tmp_path):
    """What the config switches on is never left out in silence."""
    template = load_template(write(tmp_path, recommend='Recommend.\n\n{history}'))
    with pytest.raises(InputError, match=r'recommend\.txt has no slot \{profile\} \{candidates\}'):
        template.parts('recommend', frozenset(SLOTS))
    assert shown(template, *SLOTS).count('<') == 3  # the other task has them all


def test_windows_files_mean_the_same(tmp_path):
    """Byte order mark, CRLF and blanks at line ends, as some editors leave them."""
    plain, windows = tmp_path / 'plain', tmp_path / 'windows'
    plain.mkdir()
    windows.mkdir()
    write(plain)
    for task in TASKS:
        text = WORDING.replace('\n', ' \r\n').encode('utf-8-sig')
        (windows / f'{task}.txt').write_bytes(text)
    assert load_template(str(windows)).paragraphs == load_template(str(plain)).paragraphs


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('A\n\n{histroy}', r'recommend\.txt: line 3: \{histroy\} is an unknown slot'),
        ('A\n{ history }', r'line 2: \{ history \} is an unknown slot'),
        ('{}', r'line 1: \{\} is an unknown slot'),
        ('{history}\n\n{history}', r'line 3: \{history\} is there twice'),
        ('Seen: {history}', r'line 1: \{history\} is not alone on its line'),
        ('A\n  {history}', r'line 2: \{history\} is not alone on its line'),
        ('{history} {profile}', r'line 1: \{history\} is not alone on its line'),
        (' \n\n', r'recommend\.txt: this file is empty'),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        load_template(write(tmp_path, text))
    assert '\n' not in str(error.value)
    if 'slot' in message or 'line' in message:
        assert '{history} {profile} {candidates}' in str(error.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / 'recommend.txt').write_bytes('Café\n\n{history}'.encode('latin-1'))
    with pytest.raises(InputError, match=r'recommend\.txt: this file is not UTF-8'):
        load_template(str(tmp_path))


def test_the_question_for_the_profile_may_be_missing(tmp_path):
    template = load_template(write(tmp_path))
    with pytest.raises(InputError, match=r'has no profile\.txt; write one, or set prompts\.prof'):
        template.parts('profile', frozenset({'history'}))
    (tmp_path / 'profile.txt').write_text('Two keywords?\n\n{history}')
    template = load_template(str(tmp_path))
    assert shown(template, 'history', task='profile') == 'Two keywords?\n\n<history>'
    (tmp_path / 'profile.txt').write_text('{history}\n\n{candidates}')
    with pytest.raises(
        InputError, match=r'profile\.txt: line 3: \{candidates\} is an unknown slot'
    ):
        load_template(str(tmp_path))


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / 'recommend_retrieval.txt').unlink()
    with pytest.raises(InputError, match=r'recommend_retrieval\.txt does not exist; allowed: movi'):
        load_template(str(tmp_path))
    with pytest.raises(InputError, match=r"is 'musicals', but .*; allowed: movies, products, or a"):
        load_template('musicals')


@pytest.mark.parametrize('name', sorted(folder.name for folder in FOLDER.iterdir()))
def test_shipped_templates_have_a_place_for_every_component(name):
    template = load_template(name)
    assert all(f'<{slot}>' in shown(template, *SLOTS) for slot in SLOTS)
    assert shown(template, 'history', 'profile', task='recommend').count('<') == 2
    assert shown(template, 'history', task='profile').count('<') == 1


def test_styles_are_those_that_the_config_allows_and_end_a_line():
    """P03: the context ends in a line break, never in a blank."""
    assert tuple(STYLES) == CHOICES['prompts.style']
    assert all(style.after.endswith('\n') for style in STYLES.values())


def test_a_template_without_numbers_is_refused_only_where_they_are_needed(tmp_path):
    template = load_template(write(tmp_path))
    with pytest.raises(InputError, match=r"no recommend_index\.txt; .*prompts\.answer to 'title'"):
        template.parts('recommend_index', frozenset())
