"""From what the model wrote to a ranking: the text of an answer is matched to items.

One line that is not blank is one answer. It matches an item if it is the item's reply, a text in
double quotes, to the letter, but for

* white space: before, behind and between words any white space is one blank;
* quotes: curly and other double quotes are straight ones, and so are apostrophes; inside the outer
  quotes a double quote is an apostrophe, as in `Encoder`;
* a list mark before the opening quote, as models like to set: `1.`, `1)`, `-`, `*` or `•`.

Anything else beside the quotes, no quotes, or no closing quote (a line that the token limit cut)
makes it invalid. An invalid line takes its place, so it pushes the later ones down. A line that
repeats an earlier one takes none. Items of one title are matched together, as a tie. An item of the
user's history is a valid answer, though it can be no target; such answers are counted as seen.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from palr_jax.prompts.encode import Encoder

LINES = 10  # of an answer; the prompt asks for so many
INVALID = 0  # the item of an invalid line: the padding item, which is nobody's target
_LIST_MARK = re.compile(r'^(?:\d{1,3}[.)]|[-*•])\s*(?=")')
_STRAIGHT = str.maketrans(dict.fromkeys('“”„‟«»″＂', '"') | dict.fromkeys('‘’‚‛′`´＇', "'"))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one user was answered.

    Attributes:
      items: the items of each place, several where they share a title, none where the line is
        invalid.
      repeated: lines that named only items of earlier lines.
      seen: places whose items are all of the user's history.
    """

    items: tuple[tuple[int, ...], ...]
    repeated: int
    seen: int

    @property
    def lines(self) -> int:
        return len(self.items) + self.repeated

    @property
    def invalid(self) -> int:
        return self.items.count(())


def index_replies(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """The items of each reply, as `read_answer` compares them.

    A tokenizer may not give a title back as it was (SentencePiece folds some characters). Then the
    model can write only what the tokens spell, so that names the item too.
    """
    index: dict[str, tuple[int, ...]] = {}
    for item in range(1, encoder.catalogue.items + 1):
        spelt = encoder.tokenizer.decode(encoder.reply(item).tolist())
        for text in {_plain(encoder.reply_text(item)), _plain(spelt)}:
            index[text] = (*index.get(text, ()), item)
    return index


def read_answer(
    text: str, index: Mapping[str, tuple[int, ...]], seen: Collection[int] = (), lines: int = LINES
) -> Answer:
    """The items that an answer names.

    Args:
      text: of the answer, without the end-of-answer token.
      index: from `index_replies`.
      seen: items of the user's history.
      lines: later lines do not count, blank ones aside.
    """
    places: list[tuple[int, ...]] = []
    named: set[int] = set()
    repeated = 0
    for line in [plain for plain in map(_plain, text.splitlines()) if plain][:lines]:
        matched = index.get(line, ())
        new = tuple(item for item in matched if item not in named)
        if matched and not new:
            repeated += 1
            continue
        named.update(new)
        places.append(new)
    return Answer(tuple(places), repeated, sum(bool(p) and set(p) <= set(seen) for p in places))


def rank_answers(answers: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray]:
    """(items [U', N] int32, scores [U', N] float32) of the answers, for `rank_targets`.

    The score is the place, negative; items that share a place tie. An invalid line is INVALID, a
    slot behind the last item -1 with the score -inf; N is at least 1.
    """
    width = max((sum(len(place) or 1 for place in answer.items) for answer in answers), default=0)
    items = np.full((len(answers), max(width, 1)), -1, np.int32)
    scores = np.full(items.shape, -np.inf, np.float32)
    for row, answer in enumerate(answers):
        slot = 0
        for number, place in enumerate(answer.items, start=1):
            for item in place or (INVALID,):
                items[row, slot], scores[row, slot] = item, -number
                slot += 1
    return items, scores


def score_places(places: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Scores of candidates that the model wrote in an order; finite in every filled slot.

    Args:
      places: [U', C] the place at which each was written, from 1; 0 is not written.
      filled: [U', C] bool, the slots that hold a candidate.

    Returns:
      [U', C] float32: the place, negative; candidates not written tie behind the last place; -inf
      in unfilled slots.
    """
    behind = places.max(axis=1, keepdims=True, initial=0) + 1
    scores = -np.where(places > 0, places, behind).astype(np.float32)
    return np.where(filled, scores, np.float32(-np.inf))


def _plain(line: str) -> str:
    """A line as it is compared: `"…"`, or anything else, which matches nothing."""
    line = _LIST_MARK.sub('', ' '.join(line.translate(_STRAIGHT).split()))
    if len(line) < 2 or line[0] != '"' or line[-1] != '"':
        return line
    inside = ' '.join(line[1:-1].replace('"', "'").split())
    return f'"{inside}"'
