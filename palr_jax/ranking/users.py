"""Ranking the candidates of many users with the LLM: prompts in, scores out, resumable.

Scores are kept as what the model said, the sum of the log-probabilities of each title, beside the
title's numbers of tokens and bytes; how they are normalised is decided when they are read.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from absl import logging
from etils import epath

from palr_jax import storage
from palr_jax.progress import Progress
from palr_jax.prompts.encode import Encoder, Prompt
from palr_jax.ranking.score import Batch, Query, padding_share, plan_batches, score_batches

SAVE_SECONDS = 20.0  # work that an interrupted run may lose
TASK = 'recommend_retrieval'
Result = TypeVar('Result')  # Scores, or the Answers of `generate_users`


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the LLM said of every user's candidates.

    Attributes:
      users: [U'] dense users.
      items: [U', C] candidates as the retriever gave them, -1 where it had none.
      sums: [U', C] float32 log-likelihood of each title, -inf in unfilled slots; NaN is not yet
        scored.
      tokens: [U', C] answer tokens of each title.
      bytes: [U', C] UTF-8 bytes of each title.
      seconds: spent scoring, compilation included.
      computed: tokens computed, padding included.
    """

    users: np.ndarray
    items: np.ndarray
    sums: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    seconds: float
    computed: int

    @classmethod
    def of_queries(
        cls,
        items: np.ndarray,
        queries: Sequence[Query],
        encoder: Encoder,
        sums: np.ndarray | None = None,
        users: np.ndarray | None = None,
    ) -> 'Scores':
        """Scores with the sizes of the queries' answers; `sums` not yet known are NaN."""
        filled = items >= 0
        tokens, sizes = np.zeros(items.shape, np.int32), np.zeros(items.shape, np.int32)
        tokens[filled] = [len(answer) for query in queries for answer in query.candidates]
        sizes[filled] = [len(encoder.reply_text(int(item)).encode()) for item in items[filled]]
        if sums is None:
            sums = np.where(filled, np.nan, -np.inf).astype(np.float32)
        users = np.arange(len(items)) if users is None else users
        return cls(users, items, sums, tokens, sizes, seconds=0.0, computed=0)

    def normalized(self, how: str) -> np.ndarray:
        """[U', C] scores: the sums, or the sums over each title's tokens or bytes.

        A sum favours short titles; a mean over tokens favours titles that are long and predictable.

        Args:
          how: 'token' | 'byte' | 'sum', or 'prior' or 'untuned', sums from which `less` has taken
            others.
        """
        sizes = {'token': self.tokens, 'byte': self.bytes}.get(how, np.ones_like(self.tokens))
        return np.where(self.items >= 0, self.sums / np.maximum(sizes, 1), -np.inf)

    def less(self, others: 'Scores') -> 'Scores':
        """The same with the sums of `others`, of the same candidates, taken off.

        What a prompt without the user says of a title is no preference of the user's (the
        contextual calibration of Zhao et al., 2021, with a difference of log-likelihoods). What
        the untuned model says was not learned here (the implicit reward of DPO, Rafailov et al.,
        2023).
        """
        taken = np.where(self.items >= 0, others.sums, 0.0)
        seconds, computed = self.seconds + others.seconds, self.computed + others.computed
        return dataclasses.replace(self, sums=self.sums - taken, seconds=seconds, computed=computed)


def make_query(
    encoder: Encoder,
    config,
    history: np.ndarray,
    profile: Sequence[str],
    items: np.ndarray,
    seed: Sequence[int],
    name: str = '',
) -> tuple[Query, int]:
    """One user's prompt and candidate answers: (query, items cut from the history).

    Args:
      encoder: of the catalogue.
      config: `config.prompts`.
      history: the user's items, oldest first; nothing from the target on.
      profile: the keywords of that history.
      items: [C] candidates, in the order that the scores shall have.
      seed: of the order in which the prompt shows the candidates.
      name: of the query.
    """
    prompt, listed = ranking_prompt(encoder, config, history, profile, items, seed)
    answers = tuple(encoder.replies(items.tolist(), listed))
    return Query(prompt.tokens, answers, name), prompt.history_cut


def ranking_prompt(
    encoder: Encoder,
    config,
    history: np.ndarray,
    profile: Sequence[str],
    items: np.ndarray,
    seed: Sequence[int],
) -> tuple[Prompt, list[int]]:
    """(the prompt, the candidates in the order that it lists them); see `make_query`."""
    shown = history[len(history) - min(len(history), config.history) :]
    listed: list[int] = []
    if config.candidates:
        listed = items.tolist()
        if config.candidate_order == 'shuffled':
            listed = np.random.default_rng(seed).permutation(items).tolist()
    task = TASK if config.candidates else 'recommend'
    return encoder.prompt(task, shown.tolist(), profile, listed), listed


def score_users(
    name: str,
    users: np.ndarray,
    items: np.ndarray,
    queries: Sequence[Query],
    encoder: Encoder,
    scorer: Callable[[Any, Batch], Any],
    params: Any,
    config,
    *,
    max_positions: int,
    path: epath.Path,
    identity: str,
    unit: str = 'users',
) -> Scores:
    """Scores every query, continuing what `path` holds of the same work.

    Args:
      name: shown with the progress.
      users: [U'] dense users.
      items: [U', C] their candidates, -1 in unfilled slots.
      queries: [U'] their queries; slots that are filled, in the same order.
      encoder: whose replies the candidates are.
      scorer: from `make_scorer`.
      params: the model's.
      config: `config.ranking`.
      max_positions: tokens that the model reads.
      path: where the scores are kept, written as they come.
      identity: of everything that the scores depend on; a file with another one, or of other
        users or candidates, is replaced.
      unit: what the progress counts.
    """
    stored = read_stored(Scores, path, identity, users, items)
    scores = stored or Scores.of_queries(items, queries, encoder, users=users)
    # Who has no candidate is refused below, and not left out.
    todo = np.flatnonzero(np.isnan(scores.sums).any(axis=1) | ~(items >= 0).any(axis=1))
    if stored and not len(todo):
        return stored
    pending = [queries[i] for i in todo]
    plan = plan_batches(
        pending, config.batch_size, config.row_length, config.max_shapes, max_positions
    )
    logging.info(
        '%s: %d %s in %d shapes, %.0f %% of the computed tokens are padding',
        name,
        len(todo),
        unit,
        len({shape for _, shape in plan}),
        100 * padding_share(pending, plan),
    )
    sums = scores.sums.copy()
    batches = (
        (indices, values, shape.users * shape.tokens)
        for (indices, values), (_, shape) in zip(score_batches(scorer, params, pending, plan), plan)
    )

    def take(rows: np.ndarray, values: np.ndarray) -> None:
        filled = items[rows] >= 0
        block = np.full(filled.shape, -np.inf, np.float32)
        block[filled] = values[np.isfinite(values)]
        sums[rows] = block

    def result(seconds: float, computed: int) -> Scores:
        return dataclasses.replace(scores, sums=sums, seconds=seconds, computed=computed)

    return run_batches(name, scores, todo, batches, take, result, path, identity, unit)


def read_scores(path: epath.PathLike) -> Scores:
    """Reads the scores that `score_users` kept."""
    return read_result(Scores, path)


def mean_scores(several: Sequence[Scores]) -> Scores:
    """The mean of what was said of the same candidates under several prompts, and all its time."""
    first, count = several[0], len(several)
    sums = np.where(first.items >= 0, sum(scores.sums for scores in several) / count, -np.inf)
    return dataclasses.replace(
        first,
        sums=sums.astype(np.float32),
        seconds=sum(scores.seconds for scores in several),
        computed=sum(scores.computed for scores in several),
    )


def read_result(kind: type[Result], path: epath.PathLike) -> Result:
    """Reads what `run_batches` kept."""
    arrays = dict(storage.read_arrays(path))
    arrays.pop('identity')
    seconds, computed = float(arrays.pop('seconds')), int(arrays.pop('computed'))
    return kind(**arrays, seconds=seconds, computed=computed)


def read_stored(
    kind: type[Result],
    path: epath.Path,
    identity: str,
    users: np.ndarray,
    items: np.ndarray | None = None,
) -> Result | None:
    """What `path` holds, if that is of this work, these users [U'] and these candidates [U', C]."""
    if not path.exists() or str(storage.read_arrays(path)['identity']) != identity:
        return None
    stored = read_result(kind, path)
    same = np.array_equal(stored.users, users)
    return stored if same and (items is None or np.array_equal(stored.items, items)) else None


def run_batches(
    name: str,
    stored: Result,
    todo: np.ndarray,
    batches: Iterable[tuple[np.ndarray, Any, int]],
    take: Callable[[np.ndarray, Any], None],
    result: Callable[[float, int], Result],
    path: epath.Path,
    identity: str,
    unit: str = 'users',
) -> Result:
    """Takes the batches as they come; saves the result now and then and at the end, and returns it.

    Args:
      name: shown with the progress.
      stored: what was known before, of U' users.
      todo: the rows that the batches count from 0.
      batches: (indices of users, what they got, tokens computed).
      take: called with (rows, what they got).
      result: makes it of what was taken, with (seconds, tokens computed) in all.
      path: where it is kept.
      identity: of everything that it depends on.
      unit: what the progress counts.
    """
    seconds, computed, total = stored.seconds, stored.computed, len(stored.users)

    def save() -> Result:
        found = result(seconds, computed)
        storage.write_arrays(path, identity=np.array(identity), **dataclasses.asdict(found))
        return found

    last = saved = time.monotonic()
    with Progress(name, total, unit, done=total - len(todo)) as progress:
        for indices, got, tokens in batches:
            take(todo[indices], got)
            computed += tokens
            progress.update(len(indices))
            now = time.monotonic()
            seconds, last = seconds + now - last, now
            if now - saved > SAVE_SECONDS and progress.done < total:
                saved = now
                save()
    return save()
