"""Prompts as tokens: nothing that matters is cut, and a title has the same tokens everywhere."""

import numpy as np
import pytest

from palr_jax.data import Catalogue
from palr_jax.errors import InputError
from palr_jax.llama.tokenizer import from_gguf
from palr_jax.prompts.encode import Encoder, without_year
from palr_jax.prompts.template import STYLES, load_template
from palr_jax.testing.llama import tiny_tokenizer

TITLES = (
    'Heat (1995)',
    'Alien (1979)',
    'Aliens (1986)',
    'Misérables, Les (1995)',
    'M (1931)',
    'Chasing Amy (1997)',
    'Chasing Amy (1997)',  # one title, two ids
    'Those Who Love Me Can Take the Train (Ceux qui m’aiment) (1998)',
    '2001: A Space Odyssey (1968)',
    'unknown',
)
HOSTILE = (
    'End <|im_end|> of Days (1999)',
    '<|endoftext|>',
    '<|im_start|>assistant',
    '<s></s>',
    'The "Burbs" (1989)',
    '"',
    '',
    ' \n ',
    ' Two\n lines\t(1986) ',
    '¿🎬',
)


def catalogue(titles=TITLES):
    n = len(titles) + 1
    return Catalogue(tuple(map(str, range(n))), ('', *titles), (None,) * n, ((),) * n)


def byte_level(bos_id=0):
    """As SmolLM2 and Llama 3: BOS is id 0, EOS is id 2 and pads too."""
    tokenizer = tiny_tokenizer([*TITLES, *STYLES['alpaca'], 'Recommend movies'], vocab_size=320)
    tokenizer.bos_id = bos_id
    return tokenizer


def sentencepiece():
    """As Llama 2: a blank in front of every string, bytes for what the vocabulary lacks."""
    words = ['▁H', 'Heat', 'He', 'at', '▁(', '▁(1', '95', '▁A', 'Al', 'ien', 'Alien', '▁R', '"H']
    characters = sorted(set('▁' + ''.join(chr(c) for c in range(33, 127))))
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *characters, *words]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(characters) + len(words))
    metadata = {
        'model': 'llama',
        'tokens': tokens,
        'token_type': types,
        'scores': [-float(i) for i in range(len(tokens))],
        'bos_token_id': 1,
        'eos_token_id': 2,
    }
    return from_gguf({f'tokenizer.ggml.{k}': v for k, v in metadata.items()}, 'made up')


TOKENIZERS = {'byte_level': byte_level(), 'sentencepiece': sentencepiece()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def make(tokenizer, *, style='plain', titles=TITLES, length=4096, template='movies', **forms):
    return Encoder(catalogue(titles), tokenizer, load_template(template), style, length, **forms)


def count(tokens, wanted):
    return int(np.count_nonzero(tokens == wanted))


def find(tokens, piece):
    """Where `piece` stands in `tokens`."""
    n = len(piece)
    return [i for i in range(len(tokens) - n + 1) if np.array_equal(tokens[i : i + n], piece)]


def test_the_text_of_a_whole_prompt():
    encoder = make(byte_level(), style='chatml')
    prompt = encoder.prompt('recommend_retrieval', [2, 3], ('Sci-Fi', 'Horror'), [1, 5])
    assert encoder.tokenizer.decode(prompt.tokens) == (
        '<|endoftext|><|im_start|>user\n'
        "Recommend 10 other movies based on the user's watching history, from the candidate list."
        '\n\nThe user watched these movies, oldest first:\n"Alien (1979)"\n"Aliens (1986)"'
        '\n\nThe user prefers:\nSci-Fi, Horror'
        '\n\nThe candidates are:\n"Heat (1995)"\n"M (1931)"'
        '\n\nAnswer with one candidate in double quotes on each line, the best first.<|im_end|>\n'
        '<|im_start|>assistant\n'
    )
    assert encoder.tokenizer.decode(encoder.answer([1, 5])) == '"Heat (1995)"\n"M (1931)"<|im_end|>'


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('task', ['recommend', 'recommend_retrieval'])
def test_p03_pieces_are_what_the_whole_text_would_give(style, task):
    """P03: prompt and answer tokenised apart and together are the same tokens."""
    tokenizer = byte_level()
    encoder = make(tokenizer, style=style)
    listed = [4, 9, 1] if task == 'recommend_retrieval' else []
    prompt = encoder.prompt(task, [2, 3, 8], ('Drama', 'Film-Noir'), listed)
    ours = np.concatenate([prompt.tokens, encoder.answer([4, 1])])
    together = tokenizer.encode(tokenizer.decode(ours))
    assert ours.tolist() == together


def test_p03_no_blank_piece_in_front_of_a_title():
    """P03: the blank that Llama 2 puts before each string (id 29871 there) is in no item."""
    tokenizer = sentencepiece()
    blank = tokenizer.id_of('▁')
    assert tokenizer.encode('"Heat (1995)"')[0] == blank  # the fault that is looked for
    encoder = make(tokenizer)
    for item in range(1, len(TITLES) + 1):
        assert tokenizer.decode(encoder.item(item)) == encoder.item_text(item)
        assert encoder.item(item)[0] != blank
    prompt = encoder.prompt('recommend', [1, 2], ('Drama',))
    line_breaks = np.flatnonzero(prompt.tokens == tokenizer.id_of('<0x0A>'))
    assert blank not in prompt.tokens[line_breaks[line_breaks + 1 < len(prompt.tokens)] + 1]
    assert ' \n' not in tokenizer.decode(prompt.tokens)  # nor in front of the wording behind a slot


def test_p03_a_title_has_the_same_tokens_everywhere(tokenizer):
    """P03: history, candidate list, training answer and scoring."""
    encoder = make(tokenizer)
    scored = [encoder.item(i) for i in (1, 4, 8)]
    prompt = encoder.prompt('recommend_retrieval', [1, 4, 8], (), [4, 8, 1])
    start, end = prompt.spans['candidates']
    candidates, history = prompt.tokens[start:end], prompt.tokens[slice(*prompt.spans['history'])]
    answer = encoder.answer([1, 4, 8])
    for piece in scored:
        assert [len(find(place, piece)) for place in (history, candidates, answer)] == [1, 1, 1]
    line_break = tokenizer.piece('\n')
    assert answer.tolist() == [
        *scored[0], *line_break, *scored[1], *line_break, *scored[2], tokenizer.eos_id
    ]  # fmt: skip


@pytest.mark.parametrize('style', STYLES)
def test_p03_the_context_ends_in_a_line_break(style):
    tokenizer = byte_level()
    prompt = make(tokenizer, style=style).prompt('recommend', [1])
    assert prompt.tokens[-len(tokenizer.piece('\n')) :].tolist() == tokenizer.piece('\n')


def test_p04_every_candidate_has_a_token(tokenizer):
    """P04: also titles that are empty, blank or of unknown characters."""
    encoder = make(tokenizer, titles=HOSTILE)
    for item in range(1, len(HOSTILE) + 1):
        assert len(encoder.item(item)) >= 1
        assert tokenizer.decode(encoder.item(item)) == encoder.item_text(item)


def test_p04_no_title_begins_another(tokenizer):
    """Alien and Aliens: no item's tokens are the beginning of another's."""
    titles = tuple(dict.fromkeys((*TITLES, 'Alien', 'Aliens', 'Alien "', *HOSTILE[:6])))
    encoder = make(tokenizer, titles=titles)
    items = [tuple(encoder.item(i).tolist()) for i in range(1, len(titles) + 1)]
    assert len(set(items)) == len(items)
    for a in items:
        assert sum(b[: len(a)] == a for b in items) == 1


def test_d03_one_title_under_two_ids_has_one_spelling():
    """D03: identical tokens, so a guaranteed tie; both stay in the list."""
    encoder = make(byte_level())
    assert encoder.item(6).tolist() == encoder.item(7).tolist()
    prompt = encoder.prompt('recommend_retrieval', [1], (), [6, 2, 7])
    candidates = prompt.tokens[slice(*prompt.spans['candidates'])]
    assert len(find(candidates, encoder.item(6))) == 2


def test_the_text_of_a_prompt_for_products():
    """As the paper shows Beauty: ASIN (title). Answers are titles unless ids are asked for."""
    encoder = make(byte_level(), template='products', item='id_title')
    prompt = encoder.prompt('recommend_retrieval', [2], ('Skin Care', 'Face'), [6, 7])
    assert encoder.tokenizer.decode(prompt.tokens) == (
        "<|endoftext|>Recommend 10 other items based on the user's history, from the candidate "
        'list.\n\nThe user bought these items, oldest first:\n"2 (Alien (1979))"'
        '\n\nThe user prefers:\nSkin Care, Face'
        '\n\nThe candidates are:\n"6 (Chasing Amy (1997))"\n"7 (Chasing Amy (1997))"'
        '\n\nAnswer with one candidate in double quotes on each line, the best first.'
        '\n\nAnswer:\n'
    )
    assert encoder.tokenizer.decode(encoder.answer([7])) == '"Chasing Amy (1997)"<|im_end|>'
    encoder = make(byte_level(), item='id_title', answer='id_title')
    assert encoder.tokenizer.decode(encoder.answer([7])) == '"7 (Chasing Amy (1997))"<|im_end|>'
    assert encoder.reply_text(7) == encoder.item_text(7) == '"7 (Chasing Amy (1997))"'


@pytest.mark.parametrize(
    'forms', [{'item': 'id_title'}, {'item': 'id_title', 'answer': 'id_title'}]
)
def test_p03_p04_the_join_holds_for_ids_too(tokenizer, forms):
    """P03, P04: one tokenisation of the whole, an answer is its lines, none begins another.

    Of ids that begin each other (1 and 10) and titles that spell a parenthesis of their own.
    """
    encoder = make(tokenizer, **forms)
    listed = [10, 1, 6, 7]
    prompt = encoder.prompt('recommend_retrieval', [2, 3], ('Drama',), listed)
    answer = encoder.answer([7, 1])
    text = tokenizer.decode([*prompt.tokens, *answer])
    assert text.count('"1 (Heat (1995))"') == (2 if 'answer' in forms else 1)
    line_break = tokenizer.piece('\n')
    assert answer.tolist() == [
        *encoder.reply(7), *line_break, *encoder.reply(1), tokenizer.eos_id
    ]  # fmt: skip
    assert prompt.tokens[-len(line_break) :].tolist() == line_break
    replies = {tuple(encoder.reply(i).tolist()) for i in range(1, 11)}
    assert len(replies) == (10 if 'answer' in forms else 9)
    for a in replies:
        assert sum(b[: len(a)] == a for b in replies) == 1
    if tokenizer is TOKENIZERS['byte_level']:  # the other one puts a blank before a whole text
        assert tokenizer.encode(text) == [*prompt.tokens.tolist(), *answer.tolist()]


def test_d03_ids_tell_items_of_one_title_apart():
    """D03: two lines in the prompt; their answers tie unless they have ids as well."""
    encoder = make(byte_level(), item='id_title')
    assert encoder.item(6).tolist() != encoder.item(7).tolist()
    assert encoder.reply(6).tolist() == encoder.reply(7).tolist()
    encoder = make(byte_level(), item='id_title', answer='id_title')
    assert encoder.reply(6).tolist() != encoder.reply(7).tolist()


def test_numbered_candidates_are_answered_by_number(tokenizer):
    """More than 26 and more than 10: no number is the beginning of another; titles may repeat."""
    encoder = make(tokenizer, answer='index')
    listed = [6, 7, 1, *[2] * 28]
    prompt = encoder.prompt('recommend_retrieval', [3], (), listed)
    text = tokenizer.decode(prompt.tokens.tolist())
    assert '\n1. "Chasing Amy (1997)"\n2. "Chasing Amy (1997)"\n3. "Heat (1995)"\n4. ' in text
    assert '\n31. ' in text
    assert 'Answer with the number of one candidate on each line' in text
    replies = encoder.replies([1, 7, 6], listed)
    assert [tokenizer.decode(reply.tolist()).strip() for reply in replies] == ['3.', '2.', '1.']
    every = [tuple(r.tolist()) for r in make(tokenizer, answer='index').replies(
        range(1, 11), range(1, 11)
    )]  # fmt: skip
    hundred = [tuple(encoder.tokenizer.piece(f'{n}.')) for n in range(1, 101)]
    assert every == hundred[:10]
    for a in hundred:
        assert sum(b[: len(a)] == a for b in hundred) == 1
    answer = tokenizer.decode(encoder.answer([7, 1], listed).tolist())
    assert answer.split()[0] == '2.'
    assert encoder.prompt('recommend_retrieval', [3], (), [6]).spans['candidates'][1] > 0
    with pytest.raises(KeyError):
        encoder.replies([9], listed)


@pytest.mark.parametrize('style', ['plain', 'alpaca'])
@pytest.mark.parametrize('spelt', ['', '{bos}', '{bos}{bos}', 'x {bos}'])
def test_p05_exactly_one_bos(tokenizer, style, spelt, tmp_path):
    """P05: with or without BOS in the text; none in front of a candidate or an answer."""
    bos = tokenizer.decode([tokenizer.bos_id])
    for task in ('recommend', 'recommend_retrieval'):
        text = f'{spelt.replace("{bos}", bos)}Recommend.\n\n{{history}}\n\n{{candidates}}'
        (tmp_path / f'{task}.txt').write_text(text)
    encoder = make(tokenizer, style=style, template=str(tmp_path))
    for history in ([], [1, 2]):
        prompt = encoder.prompt('recommend_retrieval', history, (), [3, 4])
        assert prompt.tokens[0] == tokenizer.bos_id
        assert count(prompt.tokens, tokenizer.bos_id) == 1
    assert tokenizer.bos_id not in encoder.answer([1, 2])
    assert tokenizer.bos_id not in encoder.item(1)


def test_p05_a_prompt_that_begins_with_a_slot_has_a_bos(tmp_path):
    for task in ('recommend', 'recommend_retrieval'):
        (tmp_path / f'{task}.txt').write_text('{history}\n\nRecommend.')
    tokenizer = byte_level()
    prompt = make(tokenizer, template=str(tmp_path)).prompt('recommend', [1])
    assert tokenizer.decode(prompt.tokens) == (
        '<|endoftext|>"Heat (1995)"\n\nRecommend.\n\nAnswer:\n'
    )


def test_p05_a_model_without_bos_gets_none():
    prompt = make(byte_level(bos_id=None)).prompt('recommend', [1])
    assert count(prompt.tokens, 0) == 0


def test_p05_a_chat_marker_that_is_bos_too_stays_a_marker():
    """SmolLM2 names <|im_start|> as its BOS: it starts the prompt once and marks both turns."""
    prompt = make(byte_level(bos_id=1), style='chatml').prompt('recommend', [1])
    assert prompt.tokens[0] == 1
    assert prompt.tokens[1] != 1
    assert count(prompt.tokens, 1) == 2


def test_titles_and_keywords_that_spell_control_tokens_stay_text():
    tokenizer = byte_level()
    encoder = make(tokenizer, titles=HOSTILE, style='chatml')
    clean = make(tokenizer, style='chatml').prompt('recommend_retrieval', [1], ('Drama',), [2])
    prompt = encoder.prompt('recommend_retrieval', [1, 2, 3], ('<|im_end|>', 'Drama'), [3, 1, 2])
    for control in (0, 1, 2):
        assert count(prompt.tokens, control) == count(clean.tokens, control)
    text = tokenizer.decode(prompt.tokens)
    assert text.count('"End <|im_end|> of Days (1999)"') == 2
    assert '\n<|im_end|>, Drama\n' in text
    answer = encoder.answer([1, 2, 3])
    assert [count(answer, control) for control in (0, 1, 2)] == [0, 0, 1]
    assert answer[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ('title', 'text'),
    [
        ('The "Burbs" (1989)', '''"The 'Burbs' (1989)"'''),
        (' Two\n lines\t(1986) ', '"Two lines (1986)"'),
        ('', '""'),
    ],
)
def test_an_item_is_one_quoted_line(title, text):
    assert make(byte_level(), titles=(title,)).item_text(1) == text


@pytest.mark.parametrize('item', [-1, 0, len(TITLES) + 1])
def test_an_id_outside_the_catalogue_is_a_bug(item):
    """-1 is an unfilled candidate slot, 0 is padding: neither may come out as some title."""
    encoder = make(byte_level())
    with pytest.raises(ValueError, match=rf'item {item}: allowed are 1 to {len(TITLES)}'):
        encoder.prompt('recommend_retrieval', [1], (), [1, item])


def test_spans_are_where_the_parts_stand(tokenizer):
    encoder = make(tokenizer)
    prompt = encoder.prompt('recommend_retrieval', [1, 2], ('Drama', 'War'), [3, 5])
    texts = {
        'history': '"Heat (1995)"\n"Alien (1979)"',
        'profile': 'Drama, War',
        'candidates': '"Aliens (1986)"\n"M (1931)"',
    }
    assert list(prompt.spans) == list(texts)
    for slot, (start, end) in prompt.spans.items():
        assert tokenizer.decode(prompt.tokens[start:end]) == texts[slot]
    assert make(tokenizer).prompt('recommend', [1]).spans.keys() == {'history'}


@pytest.mark.parametrize('style', ['plain', 'chatml'])
@pytest.mark.parametrize('profile', [(), ('Drama', 'Comedy')])
def test_p02_whatever_the_length_only_the_oldest_history_goes(style, profile):
    """P01, P02: one BOS, all wording and all candidates at every length, and no title too few.

    Each length is checked against prompts with a shorter history and no limit.
    """
    tokenizer = byte_level()
    encoder = make(tokenizer, style=style)
    history, candidates = [4, 8, 9, 1, 2], [8, 3, 6, 7, 10]

    def whole(n):
        return encoder.prompt('recommend_retrieval', history[5 - n :], profile, candidates).tokens

    by_size = [whole(n) for n in range(6)]
    sizes = [len(tokens) for tokens in by_size]
    cuts = set()
    for limit in range(sizes[0], sizes[-1] + 3):
        prompt = encoder.prompt('recommend_retrieval', history, profile, candidates, limit)
        kept = max(n for n in range(6) if sizes[n] <= limit)
        assert prompt.history_cut == 5 - kept
        assert prompt.tokens.tolist() == by_size[kept].tolist()
        assert len(prompt.tokens) <= limit
        assert count(prompt.tokens, tokenizer.bos_id) == 1
        shown = prompt.tokens[slice(*prompt.spans['candidates'])]
        assert tokenizer.decode(shown) == '\n'.join(map(encoder.item_text, candidates))
        cuts.add(prompt.history_cut)
    assert cuts == {0, 1, 2, 3, 4, 5}


def test_p02_the_encoders_own_length_is_kept():
    encoder = make(byte_level(), length=220)
    prompt = encoder.prompt('recommend', [1, 2, 3] * 30)
    assert len(prompt.tokens) <= 220
    assert 0 < prompt.history_cut < 90
    history = encoder.tokenizer.decode(prompt.tokens[slice(*prompt.spans['history'])])
    assert history.endswith('"Heat (1995)"\n"Alien (1979)"\n"Aliens (1986)"')


def test_p02_random_lengths_histories_and_candidates(tokenizer):
    """P02: the property over random prompts, with both kinds of tokenizer."""
    rng = np.random.default_rng(0)
    encoder = make(tokenizer)
    for _ in range(60):
        history = rng.integers(1, 11, rng.integers(0, 25)).tolist()
        candidates = rng.integers(1, 11, rng.integers(1, 20)).tolist()
        least = len(encoder.prompt('recommend_retrieval', (), (), candidates).tokens)
        limit = least + int(rng.integers(0, 400))
        prompt = encoder.prompt('recommend_retrieval', history, (), candidates, limit)
        text = tokenizer.decode(prompt.tokens)
        kept = history[prompt.history_cut :]
        assert len(prompt.tokens) <= limit
        assert count(prompt.tokens, tokenizer.bos_id) == 1
        assert 'Recommend 10 other movies based on' in text
        assert ('\n' + '\n'.join(map(encoder.item_text, candidates)) + '\n\nAnswer with') in text
        assert ('The user watched' in text) == bool(kept)
        assert '\n'.join(map(encoder.item_text, kept)) in text


def test_p01_what_does_not_fit_without_history_is_refused():
    encoder = make(byte_level())
    least = len(encoder.prompt('recommend_retrieval', (), (), [1, 2, 3]).tokens)
    for history in ([], [1, 2]):
        message = rf'may have {least - 1} tokens .* it has {least}, with 3 candidates'
        with pytest.raises(InputError, match=message):
            encoder.prompt('recommend_retrieval', history, (), [1, 2, 3], least - 1)


def test_a_part_that_the_template_does_not_show_is_refused():
    with pytest.raises(InputError, match=r'recommend\.txt has no slot \{candidates\}'):
        make(byte_level()).prompt('recommend', [1], (), [2])


def test_a_style_needs_its_control_tokens():
    with pytest.raises(InputError, match=r"style is 'vicuna'; allowed: plain, alpaca, chatml"):
        make(byte_level(), style='vicuna')
    with pytest.raises(InputError, match=r'no token <\|im_start\|>; allowed for it: plain, alp'):
        make(sentencepiece(), style='chatml')


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer):
        self._tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        if name in ('encode', 'piece', 'decode'):
            self.calls += 1
        return getattr(self._tokenizer, name)


def test_every_text_is_tokenised_once():
    tokenizer = Counting(byte_level())
    encoder = make(tokenizer)
    for history in ([1, 2, 3], [3, 2], []):
        encoder.prompt('recommend_retrieval', history, ('Drama',), [4, 5])
    encoder.answer([6])
    before = tokenizer.calls
    for history in ([3, 3, 1], [2], []):
        encoder.prompt('recommend_retrieval', history, ('Drama',), [6, 1, 2])
    encoder.answer([5, 4])
    assert before > 0
    assert tokenizer.calls == before


def test_shared_tokens_cannot_be_written_to():
    encoder = make(byte_level())
    with pytest.raises(ValueError, match='read-only'):
        encoder.item(1)[0] = 5
    encoder.prompt('recommend', [1]).tokens[:] = 0  # a prompt is the caller's own
    assert encoder.prompt('recommend', [1]).tokens.any()


def shown(encoder, prompt, slot='history'):
    start, end = prompt.spans[slot]
    return encoder.tokenizer.decode(prompt.tokens[start:end].tolist()).split('\n')


def test_the_newest_item_stands_first_and_the_wording_says_so():
    encoder = make(TOKENIZERS['byte_level'], history_order='newest_first')
    prompt = encoder.prompt('recommend', [1, 2, 3])
    assert shown(encoder, prompt) == ['"Aliens (1986)"', '"Alien (1979)"', '"Heat (1995)"']
    text = encoder.tokenizer.decode(prompt.tokens.tolist())
    assert 'watched these movies, newest first:' in text
    assert 'oldest' not in text


@pytest.mark.parametrize('order', ['oldest_first', 'newest_first', 'shuffled'])
def test_the_oldest_items_are_cut_in_any_order(order):
    tokenizer = TOKENIZERS['byte_level']
    whole = make(tokenizer, history_order=order)
    room = len(whole.prompt('recommend', [2, 3]).tokens)
    prompt = make(tokenizer, history_order=order, length=room).prompt('recommend', [1, 2, 3])
    assert prompt.history_cut == 1
    assert sorted(shown(whole, prompt)) == ['"Alien (1979)"', '"Aliens (1986)"']


def test_a_shuffled_history_is_the_same_for_the_same_items_and_seed():
    history = [1, 2, 3, 4, 5, 6, 8, 9]
    encoders = [
        make(TOKENIZERS['byte_level'], history_order='shuffled', seed=seed) for seed in (0, 0, 1)
    ]
    first, again, other = (shown(e, e.prompt('recommend', history)) for e in encoders)
    in_order = make(TOKENIZERS['byte_level'])
    assert first == again
    assert len({tuple(first), tuple(other), tuple(history)}) == 3
    told = shown(in_order, in_order.prompt('recommend', history))
    assert sorted(first) == sorted(other) == sorted(told)
    assert first != told
    text = encoders[0].tokenizer.decode(encoders[0].prompt('recommend', history).tokens.tolist())
    assert 'movies, in no particular order:' in text


def test_a_profile_is_asked_for_with_the_oldest_first():
    orders = ('oldest_first', 'newest_first', 'shuffled')
    encoders = [make(TOKENIZERS['byte_level'], history_order=order) for order in orders]
    texts = {tuple(e.prompt('profile', [1, 2, 3, 4]).tokens.tolist()) for e in encoders}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ('title', 'year', 'left'),
    [
        ('Heat (1995)', 1995, 'Heat'),
        ('Ghost Town (1995) (V)', 1995, 'Ghost Town (V)'),
        ('2001: A Space Odyssey (1968)', 1968, '2001: A Space Odyssey'),
        ('(1995) (1995)', 1995, '(1995)'),
        ('(1995)', 1995, '(1995)'),
        ('unknown', None, 'unknown'),
    ],
)
def test_a_title_without_its_year(title, year, left):
    assert without_year(title, year) == left


def test_items_read_and_are_answered_without_their_years():
    years = (None, 1995, 1979)
    items = Catalogue(('', 'a', 'b'), ('', *TITLES[:2]), years, ((),) * 3)
    form = 'title_no_year'
    encoder = Encoder(
        items, TOKENIZERS['byte_level'], load_template('movies'), 'plain', 999, form, form
    )
    assert shown(encoder, encoder.prompt('recommend', [1, 2])) == ['"Heat"', '"Alien"']
    assert encoder.reply_text(2) == '"Alien"'


def test_long_titles_are_cut_to_their_first_words():
    titles = ('', 'Heat (1995)', 'A  very long\ntitle of six words')
    items = Catalogue(('', 'a', 'b'), titles, (None, 1995, None), ((),) * 3)
    forms = {'item': 'id_title', 'answer': 'title', 'title_words': 4}
    encoder = Encoder(
        items, TOKENIZERS['byte_level'], load_template('movies'), 'plain', 999, **forms
    )
    assert encoder.item_text(1) == '"a (Heat (1995))"'
    assert encoder.item_text(2) == '"b (A very long title)"'
    assert encoder.reply_text(2) == '"A very long title"'
    assert TOKENIZERS['byte_level'].decode(encoder.reply(2)) == encoder.reply_text(2)
