"""Ranking many users by what the LLM writes: prompts in, places or answers out, resumable.

Where the prompt lists candidates, the model is bound to them and gives an order (`generate_users`).
Without a list it writes what it likes, and its text is matched to the catalogue (`answer_users`).
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import LoraSpec
from palr_jax.prompts.encode import Encoder
from palr_jax.ranking.answers import LINES, index_replies, rank_answers, read_answer, score_places
from palr_jax.ranking.constrained import make_writer, place_queries
from palr_jax.ranking.generate import generate_batches, make_generator
from palr_jax.ranking.score import Query
from palr_jax.ranking.users import Scores, read_result, read_stored, run_batches

BEHIND = -1  # stands for a token behind an answer's end


@dataclasses.dataclass(frozen=True)
class Answers:
    """Free answers of many users, as tokens and as the items that they name.

    Attributes:
      users: [U'] dense users.
      tokens: [U', A] int32 each answer with its EOS, BEHIND behind its end and in all of a row that
        is not yet answered.
      items: [U', N] int32 items in the order written, several where they share a title; 0 for a
        line that names none, -1 in unfilled slots.
      scores: [U', N] float32 the line's place, negative; -inf in unfilled slots.
      lines: [U'] int32 lines of each answer; of these
      invalid: [U'] int32 those that name no item,
      repeated: [U'] int32 those that name items of earlier lines,
      seen: [U'] int32 those that name items of the user's history.
      seconds: spent generating, compilation included.
      computed: tokens computed, padding included.
    """

    users: np.ndarray
    tokens: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    lines: np.ndarray
    invalid: np.ndarray
    repeated: np.ndarray
    seen: np.ndarray
    seconds: float
    computed: int

    @property
    def valid(self) -> np.ndarray:
        """[U'] bool: users with at least one line that names an item.

        HR over these users, times their share, is HR over all.
        """
        return (self.items > 0).any(axis=1)

    def normalized(self, how: str) -> np.ndarray:
        """[U', N] the scores, whatever `how` is: a place has no length to be divided by."""
        return self.scores

    def shares(self) -> dict[str, float]:
        """Of all lines those invalid, repeated and seen; of the users those with no valid line."""
        lines = max(int(self.lines.sum()), 1)
        counts = {name: getattr(self, name).sum() for name in ('invalid', 'repeated', 'seen')}
        shares = {name: float(count) / lines for name, count in counts.items()}
        return shares | {'unanswered': float(np.mean(~self.valid)) if len(self.users) else 0.0}


def generate_users(
    name: str,
    users: np.ndarray,
    items: np.ndarray,
    queries: Sequence[Query],
    encoder: Encoder,
    params: Any,
    config,
    *,
    model: LlamaConfig,
    lora: LoraSpec | None,
    dtype: Any,
    path: epath.Path,
    identity: str,
    mesh: Mesh | None = None,
    number: int = LINES,
) -> Scores:
    """Lets the model write the best `number` of every user's candidates, continuing `path`.

    Args:
      name: shown with the progress.
      users: [U'] dense users.
      items: [U', C] their candidates, -1 in unfilled slots.
      queries: [U'] their queries; slots that are filled, in the same order.
      encoder: whose replies the candidates are.
      params: the model's.
      config: `config.ranking`.
      model: the architecture.
      lora: the adapters in `params`, if any.
      dtype: of the activations.
      path: where the scores are kept, written as they come.
      identity: of everything that the scores depend on; a file with another one, or of other
        users or candidates, is replaced.
      mesh: of the run.
      number: of titles that are written.

    Returns:
      Scores whose sums are the places, negative, and behind the last place for candidates that were
      not written; finite wherever there is a candidate. All sizes are 1: nothing is normalised.

    Raises:
      InputError: see `place_queries`.
    """
    identity = f'generate {number} {identity}'
    filled = items >= 0
    scores = read_stored(Scores, path, identity, users, items)
    if scores is None:
        unknown = np.where(filled, np.nan, -np.inf).astype(np.float32)
        ones = np.ones(items.shape, np.int32)
        scores = Scores(users, items, unknown, ones, ones, seconds=0.0, computed=0)
    # Who has no candidate is refused below, and not left out.
    todo = np.flatnonzero(np.isnan(scores.sums).any(axis=1) | ~filled.any(axis=1))
    sums = scores.sums.copy()
    batches = place_queries(
        make_writer(model, lora, dtype, mesh, number=number),
        params,
        [queries[i] for i in todo],
        encoder.line_break,
        number=number,
        batch_size=config.batch_size,
        max_shapes=config.max_shapes,
        max_positions=model.max_positions,
    )

    def take(rows, places):
        for row, of_user in zip(rows, places):
            own = np.zeros((1, items.shape[1]), np.int32)
            own[0, filled[row]] = of_user[: filled[row].sum()]
            sums[row] = score_places(own, filled[[row]])[0]

    def result(seconds, computed):
        return dataclasses.replace(scores, sums=sums, seconds=seconds, computed=computed)

    return run_batches(name, scores, todo, batches, take, result, path, identity)


def answer_users(
    name: str,
    users: np.ndarray,
    queries: Sequence[Query],
    histories: Sequence[Collection[int]],
    encoder: Encoder,
    params: Any,
    config,
    *,
    model: LlamaConfig,
    lora: LoraSpec | None,
    dtype: Any,
    path: epath.Path,
    identity: str,
    mesh: Mesh | None = None,
    most: int,
) -> Answers:
    """Lets the model answer every user's prompt as it likes, continuing what `path` holds.

    Args:
      name: shown with the progress.
      users: [U'] dense users.
      queries: [U'] their queries, of which the candidates are not read.
      histories: [U'] items of each user's history, which are counted where they are named.
      encoder: of the catalogue; answers are matched to its replies.
      params: the model's.
      config: `config.ranking`.
      model: the architecture.
      lora: the adapters in `params`, if any.
      dtype: of the activations.
      path: where the answers are kept, written as they come.
      identity: of everything that the answers depend on; a file with another one, or of other
        users, is replaced.
      mesh: of the run.
      most: tokens of an answer; a line that they cut short names nothing.

    Raises:
      InputError: see `generate_batches`.
    """
    identity = f'answer {most} {identity}'
    eos_id = int(encoder.eos[0])
    index = index_replies(encoder)

    stored = read_stored(Answers, path, identity, users)
    tokens = np.full((len(users), most), BEHIND, np.int32) if stored is None else stored.tokens
    todo = np.flatnonzero((tokens == BEHIND).all(axis=1))

    def read(row):
        own = tokens[row, (tokens[row] != BEHIND) & (tokens[row] != eos_id)]
        return read_answer(encoder.tokenizer.decode(own.tolist()), index, histories[row])

    found = [read(row) for row in range(len(users))]

    def take(rows, answers):
        for row, answer in zip(rows, answers):
            tokens[row, : len(answer)] = answer
            found[row] = read(row)

    def result(seconds, computed):
        items, scores = rank_answers(found)
        counts = {
            name: np.array([getattr(answer, name) for answer in found], np.int32)
            for name in ('lines', 'invalid', 'repeated', 'seen')
        }
        return Answers(users, tokens, items, scores, **counts, seconds=seconds, computed=computed)

    batches = generate_batches(
        make_generator(model, lora, dtype, mesh, eos_id=eos_id, most=most),
        params,
        [queries[i].prompt for i in todo],
        eos_id=eos_id,
        most=most,
        batch_size=config.batch_size,
        max_shapes=config.max_shapes,
        max_positions=model.max_positions,
        names=[queries[i].label(i) for i in todo],
    )

    stored = stored or result(0.0, 0)
    return run_batches(name, stored, todo, batches, take, result, path, identity)


def read_answers(path: epath.PathLike) -> Answers:
    """Reads the answers that `answer_users` kept."""
    return read_result(Answers, path)
