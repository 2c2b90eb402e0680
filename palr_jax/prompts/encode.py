"""Prompts and answers as tokens.

A prompt is put together from pieces that are tokenised once each and apart: the wording around the
slots, every item, the keywords. An item stands on a line of its own everywhere (in the history,
among the candidates, in the answer), so its tokens are the same in training and in scoring and no
token spans the join of prompt and answer. The closing quote ends an item, and there is none inside:
no item's text is the beginning of another's, so `Alien` has no head start over `Aliens`.

An item is shown by its title with or without the year, or by its raw id and title, which tells
items of one title apart; answers have a form of their own, as the tokens of an id would outweigh
those of a title in a score. Long titles may be cut to their first words.
Or candidates are numbered, and an answer is a number and the full stop after it, which tells 1 from
the beginning of 12.

When a prompt is longer than allowed, the oldest history goes first, in whatever order the rest is
shown. The wording, the profile, the candidates and the answer are never cut.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from palr_jax.data import Catalogue
from palr_jax.errors import InputError
from palr_jax.llama.tokenizer import Tokenizer
from palr_jax.prompts.template import INDEX, PROFILE, STYLES, Template


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An encoded prompt.

    Attributes:
      tokens: [L] int32, from the BOS token to the line break before the answer.
      spans: for each filled slot, where its tokens stand: tokens[start:end].
      history_cut: items that were left out to keep to the length.
    """

    tokens: np.ndarray
    spans: dict[str, tuple[int, int]]
    history_cut: int


OLDEST_FIRST = 'oldest first'  # as templates say it
# What they say where the history is shown in another order.
ORDERS = {
    'oldest_first': OLDEST_FIRST,
    'newest_first': 'newest first',
    'shuffled': 'in no particular order',
}


class _Frame(NamedTuple):
    """Everything but the slots: `wording[0]`, slot 0, `wording[1]`, slot 1, …, `wording[-1]`."""

    slots: tuple[str, ...]
    wording: tuple[np.ndarray, ...]


class Encoder:
    """Encodes the prompts of one catalogue with one tokenizer, template and style.

    What prompts show of an item is its `item`, what answers and scores have of it its `reply`.
    Every text is tokenised once: later prompts only put arrays together.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tokenizer: Tokenizer,
        template: Template,
        style: str,
        max_length: int,
        item: str = 'title',
        answer: str = 'title',
        history_order: str = 'oldest_first',
        seed: int = 0,
        title_words: int = 0,
    ):
        """The encoder of one kind of prompt.

        Args:
          catalogue: titles, raw ids and keywords.
          tokenizer: of the model.
          template: the wording.
          style: one of STYLES.
          max_length: the most tokens of a prompt.
          item: how prompts show an item: 'title', 'title_no_year' or 'id_title'.
          answer: how answers do, or 'index': by its number in the candidate list.
          history_order: one of ORDERS; prompts for a profile show the oldest first.
          seed: of the shuffled order, which depends on the items shown besides.
          title_words: of a title, at most; 0 is all.

        Raises:
          InputError: there is no such style, or the tokenizer lacks the control tokens of it.
        """
        if style not in STYLES:
            raise InputError(f'prompts.style is {style!r}; allowed: {", ".join(STYLES)}.')
        for marker in re.findall(r'<\|\w+\|>', ''.join(STYLES[style])):
            if tokenizer.id_of(marker) is None:
                raise InputError(
                    f'prompts.style is {style!r}, but the tokenizer of the model has no token '
                    f'{marker}; allowed for it: plain, alpaca.'
                )
        self.catalogue = catalogue
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.eos = _frozen([tokenizer.eos_id])
        self._template = template
        self._style = STYLES[style]
        self.numbered = answer == 'index'
        self._order, self._seed = history_order, seed
        self._title_words = title_words
        self._forms = {'item': item, 'reply': item if self.numbered else answer}
        # Caches of this encoder alone: a cache on the class would keep every encoder alive.
        self._literal = functools.cache(self._encode_literal)
        self._frame = functools.cache(self._encode_frame)
        self._tokens = functools.cache(lambda i, form: self._literal(self._text(i, form)))
        self.line_break = self._literal('\n')

    def prompt(
        self,
        task: str,
        history: Sequence[int],
        profile: Sequence[str] = (),
        candidates: Sequence[int] = (),
        max_length: int | None = None,
    ) -> Prompt:
        """Encodes one prompt; empty parts leave their paragraphs out.

        Args:
          task: 'recommend', 'recommend_retrieval', or 'profile', which shows keywords as well.
          history: item ids, oldest first.
          profile: keywords, most important first.
          candidates: item ids in the order shown.
          max_length: tokens allowed, where it is not the encoder's.

        Raises:
          InputError: the prompt is too long even without any history, or the template has no slot
            for a part.
        """
        limit = self.max_length if max_length is None else max_length
        fill = {
            'history': [self.described(i) if task == PROFILE else self.item(i) for i in history],
            'profile': [self._literal(_one_line(', '.join(profile)))] if profile else [],
            'candidates': [self.item(i) for i in candidates],
        }
        if candidates and self.numbered:
            task = INDEX
            numbered = enumerate(candidates, start=1)
            fill['candidates'] = [self._literal(f'{n}. {self.item_text(i)}') for n, i in numbered]
        frame = self._frame(task, frozenset(slot for slot, pieces in fill.items() if pieces))
        fixed = sum(map(len, frame.wording))
        fixed += self._size(fill['profile']) + self._size(fill['candidates'])
        cut = 0
        if fill['history']:
            line_break = len(self.line_break)
            newest_first = np.cumsum([len(p) + line_break for p in fill['history'][::-1]])
            room = limit - fixed + line_break  # the last item needs no break after it
            cut = len(newest_first) - int(np.searchsorted(newest_first, room, side='right'))
            if cut == len(newest_first):  # then its paragraph goes as well
                shorter = self.prompt(task, (), profile, candidates, max_length)
                return dataclasses.replace(shorter, history_cut=cut)
            fill['history'] = self._ordered(task, list(history)[cut:], fill['history'][cut:])
        elif fixed > limit:
            raise InputError(
                f'A prompt may have {limit} tokens here (prompts.length, or finetune.length less '
                f'the answer), but without any history it has {fixed}, with {len(candidates)} '
                'candidates; show fewer candidates or allow more tokens.'
            )
        tokens = [frame.wording[0]]
        spans = {}
        at = len(frame.wording[0])
        for slot, wording in zip(frame.slots, frame.wording[1:]):
            end = at + self._size(fill[slot])
            spans[slot] = (at, end)
            tokens += [*self._lines(fill[slot]), wording]
            at = end + len(wording)
        return Prompt(np.concatenate(tokens), spans, cut)

    def answer(self, items: Sequence[int], listed: Sequence[int] = ()) -> np.ndarray:
        """[A] int32: the items, one a line, and the end-of-answer token; see `replies`."""
        return np.concatenate([*self._lines(self.replies(items, listed)), self.eos])

    def replies(self, items: Sequence[int], listed: Sequence[int] = ()) -> list[np.ndarray]:
        """[n] int32 tokens of each item in an answer, read-only.

        Args:
          items: item ids.
          listed: the candidates of the prompt in the order shown; where they are numbered, the
            items are among them.
        """
        if not self.numbered:
            return [self.reply(int(item)) for item in items]
        numbers = {item: number for number, item in enumerate(listed, start=1)}
        return [self._literal(f'{numbers[item]}.') for item in items]

    def item(self, item: int) -> np.ndarray:
        """[n] int32 tokens of an item in a prompt, read-only; n is at least 1."""
        return self._tokens(item, self._forms['item'])

    def item_text(self, item: int) -> str:
        """An item as prompts show it: in double quotes, on one line."""
        return self._text(item, self._forms['item'])

    def reply(self, item: int) -> np.ndarray:
        """[n] int32 tokens of an item that an answer names, read-only; n is at least 1."""
        return self._tokens(item, self._forms['reply'])

    def reply_text(self, item: int) -> str:
        """An item as answers have it: in double quotes, on one line."""
        return self._text(item, self._forms['reply'])

    def described(self, item: int) -> np.ndarray:
        """[n] int32 tokens of an item with its keywords, read-only."""
        keywords = _one_line(', '.join(self.catalogue.keywords[item]))
        return self._literal(self.item_text(item) + (f': {keywords}' if keywords else ''))

    def keyword(self, keyword: str, *, last: bool) -> np.ndarray:
        """[n] int32: a keyword as a line of an answer, with the break that ends it, or with EOS."""
        end = self.eos if last else self.line_break
        return np.concatenate([self._literal(_one_line(keyword)), end])

    def _ordered(
        self, task: str, items: Sequence[int], pieces: list[np.ndarray]
    ) -> list[np.ndarray]:
        """The pieces of a history's items, oldest first, in the order in which they are shown."""
        if task == PROFILE or self._order == 'oldest_first':
            return pieces
        if self._order == 'newest_first':
            return pieces[::-1]
        order = np.random.default_rng([self._seed, 8, *map(int, items)]).permutation(len(pieces))
        return [pieces[place] for place in order]

    def _text(self, item: int, form: str) -> str:
        if not 1 <= item <= self.catalogue.items:
            raise ValueError(f'item {item}: allowed are 1 to {self.catalogue.items}.')
        text = self.catalogue.titles[item]
        if form == 'title_no_year':
            text = without_year(text, self.catalogue.years[item])
        text = ' '.join(text.split()[: self._title_words or None])
        if form == 'id_title':
            text = f'{self.catalogue.raw_ids[item]} ({text})'
        # A quote inside a title would look like the quote that ends it.
        return '"' + _one_line(text).replace('"', "'") + '"'

    def _lines(self, pieces: Sequence[np.ndarray]) -> list[np.ndarray]:
        lines = [self.line_break] * (2 * len(pieces) - 1)
        lines[::2] = pieces
        return lines

    def _size(self, pieces: Sequence[np.ndarray]) -> int:
        breaks = max(0, len(pieces) - 1)
        return sum(map(len, pieces)) + breaks * len(self.line_break)

    def _encode_literal(self, text: str) -> np.ndarray:
        # Titles and keywords are data: a title that spells a control token stays text.
        return _frozen(self.tokenizer.piece(text, allow_special=False))

    def _encode_frame(self, task: str, filled: frozenset[str]) -> _Frame:
        """The style around the wording of a task, for the slots that are filled.

        It begins with one BOS; where a template spells BOS too, that is dropped.
        """
        bos = self.tokenizer.bos_id
        spelt = None if bos is None else self.tokenizer.decode([bos])
        texts, slots = [self._style.before], []
        for part in self._template.parts(task, filled):
            if part.is_slot:
                slots.append(part.text)
                texts.append('')
            else:
                text = part.text.replace(spelt, '') if spelt else part.text
                order = 'oldest_first' if task == PROFILE else self._order
                texts[-1] += text.replace(OLDEST_FIRST, ORDERS[order])
        texts[-1] += self._style.after

        first = self.tokenizer.encode(texts[0])
        if bos is not None and first[:1] != [bos]:
            first = [bos, *first]
        rest = [self.tokenizer.piece(text) for text in texts[1:]]
        return _Frame(tuple(slots), tuple(map(_frozen, [first, *rest])))


def without_year(title: str, year: int | None) -> str:
    """'Ghost Town (1995) (V)' -> 'Ghost Town (V)'; a title that is nothing but its year stays."""
    before, _, after = title.rpartition(f'({year})')
    return _one_line(before + after) or title


def _one_line(text: str) -> str:
    return ' '.join(text.split())


def _frozen(ids: Sequence[int]) -> np.ndarray:
    """Tokens that many prompts share: writing to them must fail."""
    tokens = np.array(ids, np.int32)
    tokens.flags.writeable = False
    return tokens
