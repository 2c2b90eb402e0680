"""One-pass scoring: a user's prompt runs once and all candidates attend to it.

The score of a candidate is the log-likelihood of its answer tokens after the prompt. Scoring n
answer tokens takes n - 1 input tokens: the first is scored by the prompt's last hidden state, which
all candidates share, and the last is never an input. Tokens that all answers begin with, as the
quote before a title, stand once at the end of the prompt. The other inputs are packed several
candidates to a row of S tokens (`llama.attention.OnePass`), so little padding is computed.
Candidates with the same tokens are computed once, and the layout does not depend on the candidates'
order: equal titles tie to the bit, and no bit of a score says where in the list a candidate stood.

Users are grouped into at most a few shapes (prompt length, rows), chosen to compute the fewest
tokens; each shape is compiled once.

Axis letters: B batch (users), L prompt length, P shared beginning, R rows, S row length,
C candidates, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from palr_jax.errors import InputError
from palr_jax.llama.attention import OnePass
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import Llama, head_logits, log_likelihood, stored_head
from palr_jax.parallel.mesh import check_rows, shard_rows, using

# XLA's CPU backend multiplies in float32. Left to itself it moves the casts of the kernels out of
# the scan over layers: a float32 copy of the whole model, three times the memory of a 7B one.
HOISTING = 'while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion'
CAST_IN_LAYER = {'xla_disable_hlo_passes': HOISTING}
PROMPT_STEP = 16  # prompt lengths are rounded up to a multiple of this before shapes are chosen


@dataclasses.dataclass(frozen=True)
class Query:
    """One user to rank, in tokens.

    Attributes:
      prompt: [l] int32, all of it before the answer, at least one token.
      candidates: the answer tokens of each candidate, at least one token each.
      name: whose it is, as an error says it at the beginning of a sentence: 'User 196'.
    """

    prompt: np.ndarray
    candidates: tuple[np.ndarray, ...]
    name: str = ''

    def label(self, number: int) -> str:
        """What an error calls it: its name or, without one, its `number` among the queries."""
        return self.name or f'Query {number}'


@dataclasses.dataclass(frozen=True)
class Shape:
    """A compiled shape: every batch is padded to it."""

    users: int  # B
    length: int  # L
    rows: int  # R
    row_length: int  # S
    candidates: int  # C
    beginning: int = 0  # P, at most

    @property
    def tokens(self) -> int:
        """Tokens computed for one user."""
        return self.length + self.rows * self.row_length


@flax.struct.dataclass
class Batch:
    """A batch of users as the program reads it.

    Attributes:
      tokens: [B, L + R*S] int32, the prompt and then the rows.
      positions: [B, L + R*S] int32; a candidate's restart at the end of its user's prompt.
      prompt: [B, L] bool, True on the tokens of the prompt and of the shared beginning.
      rows: [B, R, S] int32, the answer that a row token belongs to, counted from 1; 0 is padding.
      targets: [B, R*S] int32, the answer token that follows each row token.
      beginning: [B, P] int32, the tokens that all answers begin with; shorter ones have -1 before.
      first: [B, C] int32, each answer's first token after those; there are as many answers as
        candidates, or fewer where candidates share one.
      answers: [B, C] int32, each candidate's answer, counted from 0.
    """

    tokens: np.ndarray
    positions: np.ndarray
    prompt: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    beginning: np.ndarray
    first: np.ndarray
    answers: np.ndarray


def one_pass_scores(
    params: Any,
    batch: Batch,
    *,
    config: LlamaConfig,
    lora: LoraSpec | None,
    dtype: Any,
    remat: str = 'projections',
    key: jax.Array | None = None,
) -> jax.Array:
    """[B, C] float32 sums of the answer tokens' log-probabilities. Differentiable in `params`.

    In training `remat` says what is kept of a layer for the backward pass, and with a `key` the
    adapter's inputs have dropout.
    """
    L = batch.prompt.shape[1]
    C, P = batch.first.shape[1], batch.beginning.shape[1]
    model = Llama(config, lora, dtype, remat)
    hidden = model.apply(
        {'params': params},
        batch.tokens,
        batch.positions,
        OnePass(batch.prompt, batch.rows),
        rngs=None if key is None else {'dropout': key},
    )
    head, axis = stored_head(params)

    last = jnp.sum(batch.prompt, axis=1, keepdims=True) - 1
    places = jnp.maximum(last + jnp.arange(-P, 1), 0)  # below 0 only where no token is shared
    ends = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logits = head_logits(ends[:, -1], head, axis)
    first = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.first, axis=1)

    scored = jnp.concatenate([ends[:, :-1], hidden[:, L:]], axis=1)
    targets = jnp.concatenate([batch.beginning, batch.targets], axis=1)
    values = log_likelihood(scored, targets, head, axis)
    shared = jnp.sum(jnp.where(batch.beginning >= 0, values[:, :P], 0.0), axis=1, keepdims=True)
    rest = values[:, None, P:]
    # A masked sum, not a scatter: its order is fixed on every device, and padding, whatever its
    # value, stays out of it.
    own = batch.rows.reshape(len(rest), 1, -1) == jnp.arange(1, C + 1)[:, None]
    sums = shared + first + jnp.sum(jnp.where(own, rest, 0.0), axis=-1)
    return jnp.take_along_axis(sums, batch.answers, axis=1)


def make_scorer(
    config: LlamaConfig,
    lora: LoraSpec | None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Callable[[Any, Batch], jax.Array]:
    """The program (params, batch) -> [B, C] sums; weights are arguments, not constants.

    On a mesh its devices share the users; the sums are whole on each of them.
    """
    narrow = jnp.dtype(dtype) != jnp.float32 and jax.default_backend() == 'cpu'
    program = jax.jit(
        functools.partial(one_pass_scores, config=config, lora=lora, dtype=dtype),
        compiler_options=CAST_IN_LAYER if narrow else None,
        out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()),
    )
    if mesh is None:
        return program

    def scorer(params: Any, batch: Batch) -> jax.Array:
        check_rows('ranking.batch_size', len(batch.tokens), mesh)
        with using(mesh):
            return program(params, shard_rows(batch, mesh))

    return scorer


def score_queries(
    scorer: Callable[[Any, Batch], jax.Array],
    params: Any,
    queries: Sequence[Query],
    *,
    batch_size: int,
    row_length: int,
    max_shapes: int,
    max_positions: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Plans batches of the queries and scores them; see `plan_batches` and `score_batches`."""
    plan = plan_batches(queries, batch_size, row_length, max_shapes, max_positions)
    return score_batches(scorer, params, queries, plan)


def score_batches(
    scorer: Callable[[Any, Batch], jax.Array],
    params: Any,
    queries: Sequence[Query],
    plan: Sequence[tuple[np.ndarray, Shape]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores every query; yields (indices of the batch's queries [n], their sums [n, C]).

    C is the largest number of candidates of any query; slots beyond a query's own are -inf. The
    order of the candidates changes no bit; batch size, batch-mates and shapes only the last ones.

    Raises:
      InputError: a score is not finite.
    """
    started = (
        (indices, scorer(params, make_batch([queries[i] for i in indices], shape)))
        for indices, shape in plan
    )
    # While a batch is computed the next one is laid out and started.
    for (indices, scores), _ in itertools.pairwise(itertools.chain(started, [None])):
        sums = np.asarray(scores)[: len(indices)]
        counts = np.array([len(queries[i].candidates) for i in indices])
        filled = np.arange(sums.shape[1]) < counts[:, None]
        wrong = filled & ~np.isfinite(sums)
        if wrong.any():
            row, c = np.argwhere(wrong)[0]
            label = queries[indices[row]].label(indices[row])
            raise InputError(
                f'{label}: the score of candidate {c} is {sums[row, c]}; allowed: a finite number. '
                'Check the weights, and that tokenizer and model belong together.'
            )
        yield indices, np.where(filled, sums, -np.inf)


def plan_batches(
    queries: Sequence[Query],
    batch_size: int,
    row_length: int,
    max_shapes: int,
    max_positions: int,
) -> list[tuple[np.ndarray, Shape]]:
    """Groups the queries into batches of at most `max_shapes` different shapes.

    Returns:
      (indices of the batch's queries, at most `batch_size`; its shape) of every batch.

    Raises:
      InputError: see `plan_groups`.
    """
    return [
        (members[start : start + batch_size], shape)
        for members, shape in plan_groups(
            queries, batch_size, row_length, max_shapes, max_positions
        )
        for start in range(0, len(members), batch_size)
    ]


def plan_groups(
    queries: Sequence[Query],
    batch_size: int,
    row_length: int,
    max_shapes: int,
    max_positions: int,
) -> list[tuple[np.ndarray, Shape]]:
    """(indices of the queries, their shape) of at most `max_shapes` groups.

    Raises:
      InputError: a query has no prompt, no candidate, an empty one, or more tokens than
        `max_positions`.
    """
    if not queries:
        return []
    lengths = np.empty(len(queries), np.int64)
    rows = np.empty(len(queries), np.int64)
    beginnings = np.empty(len(queries), np.int64)
    longest = max((len(tokens) for query in queries for tokens in query.candidates), default=0)
    row_length = max(row_length, -(-(longest - 1) // PROMPT_STEP) * PROMPT_STEP)
    for i, query in enumerate(queries):
        _check(query, query.label(i), max_positions)
        answers, _ = distinct_answers(query)
        beginnings[i] = begin = shared_beginning(answers)
        lengths[i] = -(-(len(query.prompt) + begin) // PROMPT_STEP) * PROMPT_STEP
        rows[i] = max(1, len(pack([len(answer) - begin - 1 for answer in answers], row_length)))
    candidates = max(len(query.candidates) for query in queries)

    groups = []
    for members in choose_groups(lengths, rows * row_length, max_shapes, batch_size):
        shape = Shape(
            batch_size,
            int(lengths[members].max()),
            int(rows[members].max()),
            row_length,
            candidates,
            int(beginnings[members].max()),
        )
        groups.append((members, shape))
    return groups


def choose_groups(
    lengths: np.ndarray, extra: np.ndarray, max_groups: int, batch_size: int = 1
) -> list[np.ndarray]:
    """Cuts the queries, sorted by length, into the groups that compute the fewest tokens.

    Each member of a group is padded to the group's largest length plus its largest extra (the row
    tokens), and its last batch to `batch_size` members. Equal lengths stay together. Dynamic
    programming over the distinct lengths: cost[g][j] is the fewest tokens computed for the j
    shortest lengths in g groups.

    Args:
      lengths: [Q] prompt lengths.
      extra: [Q] further tokens.
      max_groups: at most so many groups.
      batch_size: members of a full batch.

    Returns:
      The indices of each group, in increasing order of length.
    """
    order = np.argsort(lengths, kind='stable')
    distinct, starts = np.unique(lengths[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    largest_extra = np.maximum.reduceat(extra[order], starts)
    n = len(distinct)
    cost = np.full((max_groups + 1, n + 1), np.inf)
    cost[:, 0] = 0.0
    best_start = np.zeros((max_groups + 1, n + 1), np.int64)
    for j in range(1, n + 1):
        # Group of the distinct lengths i..j-1, for every i at once.
        widest = np.maximum.accumulate(largest_extra[:j][::-1])[::-1]
        members = -(-(ends[j - 1] - starts[:j]) // batch_size) * batch_size
        group = members * (distinct[j - 1] + widest)
        for g in range(1, max_groups + 1):
            total = cost[g - 1, :j] + group
            best_start[g, j] = int(np.argmin(total))
            cost[g, j] = total[best_start[g, j]]
    groups = []
    g, j = int(np.argmin(cost[:, n])), n
    while j > 0:
        i = best_start[g, j]
        groups.append(order[starts[i] : ends[j - 1]])
        g, j = g - 1, i
    return groups[::-1]


def distinct_answers(query: Query) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The query's different answers, and which of them each candidate is, [C].

    Their order, longest first, follows from their tokens alone.
    """
    candidates = [tuple(np.asarray(tokens).tolist()) for tokens in query.candidates]
    answers = sorted(set(candidates), key=lambda answer: (-len(answer), answer))
    place = {answer: i for i, answer in enumerate(answers)}
    return answers, np.array([place[candidate] for candidate in candidates])


def shared_beginning(answers: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all answers begin with, leaving each of them at least one more."""
    lowest, highest = min(answers), max(answers)  # what these two share, those between do, too
    most = min(map(len, answers)) - 1
    differ = (i for i in range(most) if lowest[i] != highest[i])
    return next(differ, most)


def useful_tokens(query: Query) -> int:
    """Tokens that the model has to read to score the query's candidates."""
    answers, _ = distinct_answers(query)
    begin = shared_beginning(answers)
    return len(query.prompt) + begin + sum(len(answer) - begin - 1 for answer in answers)


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """First-fit decreasing: which items share a row; items of length 0 need none."""
    rows: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] == 0:
            continue
        row = next((r for r, space in enumerate(free) if lengths[item] <= space), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(row_length)
        rows[row].append(item)
        free[row] -= lengths[item]
    return rows


def make_batch(queries: Sequence[Query], shape: Shape) -> Batch:
    """Lays the queries out in `shape`; missing batch-mates repeat the first query."""
    B, L, R, S = shape.users, shape.length, shape.rows, shape.row_length
    tokens = np.zeros((B, L + R * S), np.int32)
    positions = np.zeros((B, L + R * S), np.int32)
    prompt = np.zeros((B, L), bool)
    rows = np.zeros((B, R * S), np.int32)
    targets = np.zeros((B, R * S), np.int32)
    beginning = np.full((B, shape.beginning), -1, np.int32)
    first = np.zeros((B, shape.candidates), np.int32)
    answers = np.zeros((B, shape.candidates), np.int32)
    for b in range(B):
        query = queries[b] if b < len(queries) else queries[0]
        distinct, answers[b, : len(query.candidates)] = distinct_answers(query)
        begin = min(shape.beginning, shared_beginning(distinct))
        length = len(query.prompt) + begin
        beginning[b, shape.beginning - begin :] = distinct[0][:begin]
        tokens[b, :length] = [*query.prompt, *distinct[0][:begin]]
        positions[b, :length] = np.arange(length)
        prompt[b, :length] = True
        rests = [answer[begin:] for answer in distinct]
        first[b, : len(rests)] = [rest[0] for rest in rests]
        for r, members in enumerate(pack([len(rest) - 1 for rest in rests], S)):
            at = r * S
            for i in members:
                n = len(rests[i]) - 1
                tokens[b, L + at : L + at + n] = rests[i][:-1]
                positions[b, L + at : L + at + n] = length + np.arange(n)
                rows[b, at : at + n] = i + 1
                targets[b, at : at + n] = rests[i][1:]
                at += n
    rows = rows.reshape(B, R, S)
    return Batch(tokens, positions, prompt, rows, targets, beginning, first, answers)


def padding_share(queries: Sequence[Query], batches: Sequence[tuple[np.ndarray, Shape]]) -> float:
    """Share of the computed tokens that are of no use: padding and missing batch-mates."""
    useful = sum(map(useful_tokens, queries))
    computed = sum(shape.users * shape.tokens for _, shape in batches)
    return 1.0 - useful / computed if computed else 0.0


def _check(query: Query, label: str, max_positions: int) -> None:
    if len(query.prompt) == 0:
        raise InputError(f'{label} has an empty prompt; at least 1 token is needed.')
    if not query.candidates:
        raise InputError(f'{label} has no candidates; at least 1 is needed.')
    for c, answer in enumerate(query.candidates):
        if len(answer) == 0:
            raise InputError(f'{label}: candidate {c} has no tokens; at least 1 is needed.')
        if len(query.prompt) + len(answer) > max_positions:
            raise InputError(
                f'{label}: prompt and candidate {c} have '
                f'{len(query.prompt) + len(answer)} tokens; the model reads {max_positions}.'
            )
