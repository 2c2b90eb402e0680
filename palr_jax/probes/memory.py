"""What the base model knows of the catalogue by heart, before any tuning.

A model that has read the public files of a data set may rank its items from memory. As in Di Palma
et al. 2025, 'Do LLMs Memorize Recommendation Datasets?', which asks models for the lines of
MovieLens-1M, this asks for what the catalogue says of its items:

* title: of the first half of its words, greedy generation makes the rest, word for word;
* year: the right one follows the title;
* keyword: the best-scored of all the catalogue's keywords is one of the item's.

Items that are in everybody's texts are known without any data set, so each share is divided by the
items' popularity in training, and stands beside what needs no knowledge at all: always saying the
most common year or keyword.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palr_jax.data import Catalogue, Split
from palr_jax.evaluation.statistics import share_interval
from palr_jax.llama.tokenizer import Tokenizer
from palr_jax.probes.finished import Finished, check_number
from palr_jax.prompts.encode import Encoder
from palr_jax.prompts.template import Part, Template
from palr_jax.ranking.generate import generate
from palr_jax.ranking.score import Query

ITEMS = 200
BATCH = 16  # prompts of a generation; they are short
YEAR_TOKENS = 5  # four digits at most, and what comes after them
AFTER_TITLE = 4  # tokens that show whether a title ends where it should
THIRDS = ('popular', 'middle', 'rare')
NOUNS = {'movies': 'movie', 'products': 'product'}  # what a template of ours recommends

# Prompts [n] and the most tokens of an answer -> the answers [n]; EOS ends one that is whole.
Generate = Callable[[Sequence[np.ndarray], int], Sequence[np.ndarray]]
# Queries [n] -> their sums [n, C].
Score = Callable[[Sequence[Query]], np.ndarray]


@dataclass(frozen=True)
class Answers:
    """What the model said of n items.

    Attributes:
      items: [n].
      asked: what it was shown of each.
      said: its answers.
      right: [n] bool.
      baseline: [n] bool, where always giving the most common answer is right; None where no answer
        serves two items.
    """

    items: np.ndarray
    asked: tuple[str, ...]
    said: tuple[str, ...]
    right: np.ndarray
    baseline: np.ndarray | None


def probe(run: Finished, number: int | None) -> dict[str, Any]:
    """Asks the base model for a sample of the catalogue's items; see the top of the file.

    Args:
      run: the finished run, its system the untuned one.
      number: of items for each question; None is ITEMS. Where fewer have a title of two words, a
        year or keywords, all of these are asked for.

    Raises:
      InputError: the catalogue has fewer items.
    """
    project = run.project
    config, catalogue = project.config, project.dataset.catalogue
    check_number('--items', number, catalogue.items, 'items of the catalogue')
    encoder = make_encoder(project.encoder, config)
    model = project.checkpoint.config

    def generated(prompts: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
        with jax.default_matmul_precision(config.model.matmul_precision):
            return generate(
                run.model[0],
                prompts,
                config=model,
                dtype=jnp.dtype(config.model.dtype),
                eos_id=encoder.tokenizer.eos_id,
                most=most,
                batch_size=BATCH,
            )

    def scored(queries: Sequence[Query]) -> np.ndarray:
        return run.score('keywords', queries)

    def some(known: Sequence[bool]) -> np.ndarray:
        """A seeded sample of the items 1 … I of which something is known [I]."""
        items = 1 + np.flatnonzero(known)
        rng = np.random.default_rng([config.seed, 8])
        return np.sort(rng.permutation(items)[: number or ITEMS])

    every = range(1, catalogue.items + 1)
    groups = popularity_thirds(project.dataset.split, catalogue.items)
    found = {
        'title': ask_titles(
            some([len(name_of(catalogue, item).split()) > 1 for item in every]), encoder, generated
        ),
        'year': ask_years(
            some([catalogue.years[item] is not None for item in every]), encoder, generated
        ),
        'keyword': ask_keywords(
            some([bool(catalogue.keywords[item]) for item in every]), encoder, scored
        ),
    }
    return run.record | {
        'items': number or min(ITEMS, catalogue.items),
        'questions': {
            name: summary(answers, groups, run.interval) for name, answers in found.items()
        },
    }


def make_encoder(encoder: Encoder, config) -> Encoder:
    """An encoder like the run's, with the two questions of this probe for its template."""
    noun = NOUNS.get(config.prompts.template, 'item')

    def wording(text: str) -> tuple[Part, ...]:
        return (Part(text, is_slot=False),)

    template = Template(
        'memory',
        {
            'title': (
                wording(f'Name one {noun}.'),
                wording('Answer with its title in double quotes.'),
            ),
            'keyword': (
                (*wording(f'This is one {noun}:\n'), Part('history', is_slot=True)),
                wording(f'Answer with the keyword that describes this {noun} best.'),
            ),
        },
    )
    prompts = config.prompts
    return Encoder(
        encoder.catalogue,
        encoder.tokenizer,
        template,
        prompts.style,
        prompts.length,
        prompts.item,
        prompts.answer,
        title_words=prompts.title_words,
    )


def ask_titles(items: np.ndarray, encoder: Encoder, generate: Generate) -> Answers:
    """Shows the first half of each title's words, behind the quote that opens an answer."""
    cuts = [cut(name_of(encoder.catalogue, int(item))) for item in items]
    most = max((len(encoder.tokenizer.piece(rest, False)) for _, rest in cuts), default=0)
    begun = [f'"{shown}' for shown, _ in cuts]
    said, ended = go_on(begun, encoder, generate, most + AFTER_TITLE)
    right = [completes(text, rest, end) for text, (_, rest), end in zip(said, cuts, ended)]
    return Answers(items, tuple(begun), said, np.array(right, bool), None)


def ask_years(items: np.ndarray, encoder: Encoder, generate: Generate) -> Answers:
    """Shows each title without its year, and the bracket that opens it."""
    catalogue = encoder.catalogue
    begun = [f'"{name_of(catalogue, int(item))} (' for item in items]
    said, _ = go_on(begun, encoder, generate, YEAR_TOKENS)
    years = [str(catalogue.years[item]) for item in items]
    right = [is_year(text, year) for text, year in zip(said, years)]
    common = most_common(map(str, filter(None, catalogue.years)))
    baseline = np.array([year == common for year in years], bool)
    return Answers(items, tuple(begun), said, np.array(right, bool), baseline)


def ask_keywords(items: np.ndarray, encoder: Encoder, score: Score) -> Answers:
    """Shows each item as the run's prompts do, and scores all keywords of the catalogue.

    A keyword's score is the mean log-probability of its tokens and of the end of the answer.
    """
    catalogue = encoder.catalogue
    keywords = sorted({keyword for of_item in catalogue.keywords for keyword in of_item})
    answers = tuple(encoder.keyword(keyword, last=True) for keyword in keywords)
    asked = [encoder.prompt('keyword', [int(item)]).tokens for item in items]
    said: list[str] = []
    if asked:
        sums = score([Query(prompt, answers) for prompt in asked])
        sizes = np.array([len(answer) for answer in answers])
        said = [keywords[best] for best in np.argmax(sums / sizes, axis=1)]
    common = most_common(keyword for of_item in catalogue.keywords for keyword in of_item)
    return Answers(
        items,
        tuple(encoder.item_text(int(item)) for item in items),
        tuple(said),
        np.array([k in catalogue.keywords[i] for k, i in zip(said, items)], bool),
        np.array([common in catalogue.keywords[i] for i in items], bool),
    )


def go_on(
    begun: Sequence[str], encoder: Encoder, generate: Generate, most: int
) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """(what the model adds to each begun answer, whether it ended there) of [n] answers."""
    tokenizer = encoder.tokenizer
    prompt = encoder.prompt('title', []).tokens
    starts = [tokenizer.piece(text, allow_special=False) for text in begun]
    prompts = [np.concatenate([prompt, np.array(start, np.int32)]) for start in starts]
    found = generate(prompts, most) if prompts else []
    ended = tuple(bool(answer[-1] == tokenizer.eos_id) for answer in found)
    said = tuple(
        added_text(start, answer[: len(answer) - end].tolist(), tokenizer)
        for start, answer, end in zip(starts, found, ended)
    )
    return said, ended


def added_text(start: list[int], added: list[int], tokenizer: Tokenizer) -> str:
    """What `added` tokens add to the text; decoded alone they could lose a blank at the front."""
    return tokenizer.decode(start + added)[len(tokenizer.decode(start)) :]


def name_of(catalogue: Catalogue, item: int) -> str:
    """A title without its year, as prompts write it: one line, no double quotes."""
    title, year = catalogue.titles[item], catalogue.years[item]
    if year is not None:
        title = title[: title.rindex(f'({year})')]
    return ' '.join(title.split()).replace('"', "'")


def cut(name: str) -> tuple[str, str]:
    """The first half of a name's words, rounded down, and the rest with the blank before it.

    >>> cut('Star Trek: First Contact')
    ('Star Trek:', ' First Contact')
    """
    words = name.split()
    half = len(words) // 2
    return ' '.join(words[:half]), ' ' + ' '.join(words[half:])


def completes(said: str, rest: str, ended: bool) -> bool:
    """Whether a text begins with `rest` and the title ends there.

    A closing quote, a line break, a bracket (of a year) or the end of the answer ends a title.
    """
    if not said.startswith(rest):
        return False
    after = said[len(rest) :]
    return after.startswith(('"', '\n', ' (')) if after else ended


def is_year(said: str, year: str) -> bool:
    """Whether a text begins with this year."""
    return said.startswith(year) and not said[len(year) : len(year) + 1].isdigit()


def most_common(answers) -> str | None:
    """The answer that is right most often, the first by name of equals; None if there is none."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer), default=None)


def popularity_thirds(split: Split, items: int) -> np.ndarray:
    """[I + 1] the third that each item is in by its training events, 0 the most popular.

    The thirds are of one size, give or take an item; of equal counts the smaller id is first. Row 0
    is padding.
    """
    events = np.bincount(split.items[split.train_events()], minlength=items + 1)
    thirds = np.zeros(items + 1, np.int64)
    thirds[1 + np.argsort(-events[1:], kind='stable')] = np.arange(items) * 3 // items
    return thirds


def summary(
    answers: Answers, thirds: np.ndarray, interval: Callable[[np.ndarray], list[float]]
) -> dict[str, Any] | None:
    """The shares of right answers; None where no item could be asked for.

    Args:
      answers: of n items.
      thirds: [I + 1] as `popularity_thirds`.
      interval: of the mean of [n] differences from the baseline.
    """
    if not len(answers.items):
        return None

    def share(right: np.ndarray) -> dict[str, Any]:
        if not len(right):
            return {'items': 0, 'share': None, 'ci95': None}
        ends = share_interval(int(right.sum()), len(right))
        return {'items': len(right), 'share': float(right.mean()), 'ci95': [*ends]}

    of_items = thirds[answers.items]
    found = share(answers.right)
    if answers.baseline is not None:
        gap = answers.right.astype(float) - answers.baseline
        found['baseline'] = float(answers.baseline.mean())
        found['above_baseline'] = {'share': float(gap.mean()), 'ci95': interval(gap)}
    return found | {
        'by_popularity': {
            name: share(answers.right[of_items == i]) for i, name in enumerate(THIRDS)
        },
        'answers': [
            {'asked': asked, 'said': said, 'right': bool(right)}
            for asked, said, right in zip(answers.asked, answers.said, answers.right)
        ],
    }


def table(found: dict[str, Any]) -> str:
    """The result as text, at most 80 columns wide."""

    def cell(share: float | None) -> str:
        return f'{"-" if share is None else f"{share:.3f}":>9}'

    lines = [
        f'{found["model"]}, untuned: share of right answers',
        f'{"":<8}{"items":>6}{"share":>9}  {"95 %":<14}{"baseline":>9}'
        + ''.join(f'{third:>9}' for third in THIRDS),
    ]
    for name, answers in found['questions'].items():
        if answers is None:
            lines.append(f'{name:<8}{0:>6}  the catalogue has none')
            continue
        low, high = answers['ci95']
        lines.append(
            f'{name:<8}{answers["items"]:>6}{cell(answers["share"])}  [{low:.3f}, {high:.3f}]'
            + cell(answers.get('baseline'))
            + ''.join(cell(answers['by_popularity'][third]['share']) for third in THIRDS)
        )
    return '\n'.join(lines)
