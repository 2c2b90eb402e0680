"""The profile as in section 1 of the paper: an LLM reads a history and names two keywords.

The prompt lists the items with their keywords; the answer is two of these keywords, one a line, the
most important first. Nothing is generated: every keyword that the prompt shows is a possible line,
and the model scores them all in one pass (`ranking.score`), so no answer can be anything else. A
line ends with its line break, the last one with EOS, so `Art` has no head start over `Art House`.

The second keyword is scored after the first, in a second pass with the first as a line of the
answer, as generation would go on. Scores of one pass alone would ask twice for the best first
keyword, never for the one that adds to it.

A sum of log-probabilities is, up to a constant, the probability of a line given that it is one of
those allowed. Sums favour short texts where later tokens are uncertain; here every keyword stands
in the prompt, and what follows its first token is close to certain. Means over tokens or bytes
would reward that certainty, hence long keywords (`prompts.profile_normalize` offers all three).

Every choice is kept under a hash of what it depends on: the prompt's tokens, the keywords and the
model. So a history, which a user and a length determine, is asked about once, an interrupted run
continues, and nothing kept can be out of date.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from palr_jax import storage
from palr_jax.parallel import distributed
from palr_jax.progress import Progress
from palr_jax.prompts.encode import Encoder
from palr_jax.prompts.profile import KEYWORDS
from palr_jax.prompts.template import PROFILE
from palr_jax.ranking.score import Query

SAVE_SECONDS = 20.0  # work that an interrupted run may lose

# Queries -> (indices of some of them [n], their sums [n, C]), as `score_queries`.
Score = Callable[[Sequence[Query]], Iterable[tuple[np.ndarray, np.ndarray]]]


class Question(NamedTuple):
    """Which keyword comes next: the prompt with the answer so far, and the keywords allowed."""

    prompt: np.ndarray  # [l] int32
    keywords: tuple[str, ...]
    answers: tuple[np.ndarray, ...]  # the tokens of each keyword, with what ends its line

    def key(self, identity: str) -> str:
        """Of everything that the choice depends on."""
        parts = [identity.encode(), self.prompt.tobytes(), '\n'.join(self.keywords).encode()]
        return hashlib.sha256(b'\0'.join(parts)).hexdigest()[:32]


def llm_profiles(
    histories: Sequence[Sequence[int]],
    encoder: Encoder,
    config,
    score: Score,
    *,
    path: epath.Path | None,
    identity: str,
) -> list[tuple[str, ...]]:
    """The profile of each history, most important keyword first.

    A history whose items have no keywords has no profile, one with a single keyword has that one.

    Args:
      histories: item ids, oldest first; nothing from a target on may be among them.
      encoder: of the catalogue.
      config: `config.prompts`.
      score: the model.
      path: where choices are kept; None keeps none.
      identity: of the model, its weights and its arithmetic.

    Raises:
      InputError: the template does not ask for profiles.
    """
    questions = [ask(history, encoder, config.profile_history) for history in histories]
    profiles: list[tuple[str, ...]] = [()] * len(histories)
    for place in range(KEYWORDS):
        asked = [i for i, question in enumerate(questions) if question.keywords]
        name = f'profiles, keyword {place + 1} of {KEYWORDS}'
        chosen = choose(
            name, [questions[i] for i in asked], score, config.profile_normalize, path, identity
        )
        for i, keyword in zip(asked, chosen):
            profiles[i] += (keyword,)
            questions[i] = after(questions[i], keyword, encoder)
    return profiles


def ask(history: Sequence[int], encoder: Encoder, most: int) -> Question:
    """The question for the first keyword, of the latest `most` items that the prompt has room for.

    Items without keywords are shown as well, as long as one has some.
    """
    shown = list(history)[-most:]
    if not any(encoder.catalogue.keywords[item] for item in shown):
        return Question(np.zeros(0, np.int32), (), ())
    prompt = encoder.prompt(PROFILE, shown)
    known = {k for item in shown[prompt.history_cut :] for k in encoder.catalogue.keywords[item]}
    keywords = tuple(sorted(known))
    answers = tuple(encoder.keyword(keyword, last=False) for keyword in keywords)
    return Question(prompt.tokens, keywords, answers)


def after(question: Question, keyword: str, encoder: Encoder) -> Question:
    """The question for the last keyword, with `keyword` as the line before it."""
    rest = tuple(k for k in question.keywords if k != keyword)
    prompt = np.concatenate([question.prompt, encoder.keyword(keyword, last=False)])
    return Question(prompt, rest, tuple(encoder.keyword(k, last=True) for k in rest))


def choose(
    name: str,
    questions: Sequence[Question],
    score: Score,
    normalize: str,
    path: epath.Path | None,
    identity: str,
) -> list[str]:
    """The best keyword of each question; equal scores go by name.

    Args:
      name: shown with the progress.
      questions: each with at least one keyword.
      score: the model.
      normalize: 'sum' | 'token' | 'byte'.
      path: where choices are kept; None keeps none.
      identity: of the model.
    """
    keys = [question.key(f'{identity} {normalize}') for question in questions]
    known = {k: q.keywords[0] for k, q in zip(keys, questions) if len(q.keywords) == 1}
    distributed.barrier('profiles')  # all read what is there before one writes more
    if path is not None and path.exists():
        known |= storage.read_json(path)
    todo = {key: q for key, q in zip(keys, questions) if key not in known}  # each once
    if not todo:
        return [known[key] for key in keys]
    names, pending = list(todo), list(todo.values())
    queries = [Query(question.prompt, question.answers) for question in pending]
    saved = time.monotonic()
    with Progress(name, len(set(keys)), 'histories', done=len(set(keys)) - len(todo)) as progress:
        for indices, sums in score(queries):
            for i, row in zip(indices, sums):
                sizes = _sizes(pending[i], normalize)
                best = int(np.argmax(row[: len(sizes)] / sizes))
                known[names[i]] = pending[i].keywords[best]
            progress.update(len(indices))
            now = time.monotonic()
            if path is not None and (now - saved > SAVE_SECONDS or progress.done == progress.total):
                saved = now
                storage.write_json(path, known)
    return [known[key] for key in keys]


def _sizes(question: Question, normalize: str) -> np.ndarray:
    """[C] what the sum of each keyword is divided by; the end of the line counts as one."""
    if normalize == 'token':
        return np.array([len(answer) for answer in question.answers])
    if normalize == 'byte':
        return np.array([len(keyword.encode()) + 1 for keyword in question.keywords])
    return np.ones(len(question.keywords), int)
