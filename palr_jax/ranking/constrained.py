"""Generation bound to the candidates: the model writes the titles that it would rank first.

The answer is the one that the model is trained to give: different titles of the prompt, one a line.
Each next token is the most probable of those that continue a title not yet written, greedily; so
every line is a candidate, and none comes twice. The titles form a trie that is kept as plain
arrays: the tokens of all of a user's titles, and a mask of those that agree with the line so far.

What the trie leaves no choice about needs no logits: the rest of a title once it is the only one
left, the line break behind it, the beginning that all remaining titles share. Such tokens wait in a
queue, and a pass reads up to READ of them at once. So a title costs about as many passes as there
are choices in it, and a pass costs about the same for one token as for a few, as long as reading
the weights is most of it.

Shapes: titles and their number are padded to the largest of all users, prompts to at most
`max_shapes` lengths; one program is compiled for each of those.

Axis letters: B batch, L prompt length, C different titles (the line break is part of a title here),
A tokens of the longest, N tokens of an answer at most, D width, V vocabulary.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from palr_jax.errors import InputError
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import LoraSpec
from palr_jax.ranking.generate import (
    compiled,
    hidden_at,
    lay_out_prompts,
    next_logits,
    on_mesh,
    plan_prompts,
    reader,
)
from palr_jax.ranking.score import Query, distinct_answers

READ = 8  # tokens of a row that a pass reads, at most
NOT_FINITE = -1  # the place of every title of a user whose logits are no numbers


@flax.struct.dataclass
class Titles:
    """The titles of a batch of users, the line break behind each.

    Attributes:
      tokens: [B, C, A] int32, -1 behind a title's end; no title is the beginning of another.
      sizes: [B, C] int32 tokens of each title; 0 where a user has no more titles.
    """

    tokens: jax.Array
    sizes: jax.Array


@flax.struct.dataclass
class Line:
    """What a batch of users has written.

    Attributes:
      active: [B, C] bool, the titles that the current line may become; none in a finished row.
      depth: [B] int32 tokens of the current line; all active titles begin with them.
      places: [B, C] int32, the line on which a title stands, from 1; 0 is not written.
      text: [B, N] int32, the answer so far.
      written: [B] int32 tokens of `text`.
    """

    active: jax.Array
    depth: jax.Array
    places: jax.Array
    text: jax.Array
    written: jax.Array


def place_queries(
    writer: Callable[..., tuple[jax.Array, jax.Array]],
    params: Any,
    queries: Sequence[Query],
    line_break: np.ndarray,
    *,
    number: int,
    batch_size: int,
    max_shapes: int,
    max_positions: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Lets the model write `number` of each query's candidates, or all where there are fewer.

    Candidates of the same tokens are written once and share the place. A user's places do not
    depend on the batch-mates, nor on the order of the candidates beyond what the prompt shows.

    Args:
      writer: from `make_writer`, with the same `number`.
      params: the tree of `Llama`.
      queries: prompts and candidates.
      line_break: [n] int32 tokens between two lines of an answer, at least one.
      number: lines of an answer.
      batch_size: users a program call.
      max_shapes: prompt lengths that are compiled, at most.
      max_positions: tokens that the model reads.

    Yields:
      (indices of the batch's queries [n]; places [n, C] int32, 1 for the candidate written first, 0
      for one not written and in slots beyond a query's own; tokens computed, padding included).

    Raises:
      InputError: a query has no prompt, no candidate, an empty one, or one that begins another; or
        more tokens than the model reads; or a logit is not finite.
    """
    if number < 1:
        raise InputError(f'Answers of {number} titles are asked for; allowed: 1 or more.')
    if not queries:
        return
    answers = [_titles(query, query.label(i), line_break) for i, query in enumerate(queries)]
    lengths = [sorted(map(len, titles), reverse=True) for titles, _ in answers]
    longest = [sum(of_one[:number]) for of_one in lengths]
    for i, (query, extra) in enumerate(zip(queries, longest)):
        if len(query.prompt) + extra > max_positions:
            raise InputError(
                f'{query.label(i)}: the prompt has {len(query.prompt)} tokens and an answer of '
                f'{min(number, len(lengths[i]))} titles up to {extra}; the model reads '
                f'{max_positions}.'
            )
    shape = max(map(len, lengths)), max(of_one[0] for of_one in lengths)
    slots = max(len(query.candidates) for query in queries)
    room = max(longest)
    plan = plan_prompts([query.prompt for query in queries], room, batch_size, max_shapes)
    for indices, length in plan:
        prompts, of_prompts = lay_out_prompts(
            [queries[i].prompt for i in indices], batch_size, length
        )
        titles = _lay_out_titles([answers[i][0] for i in indices], batch_size, shape)
        written, passes = writer(params, prompts, of_prompts, titles, room=room)
        written = np.asarray(written)
        places = np.zeros((len(indices), slots), np.int32)
        for row, i in enumerate(indices):
            if NOT_FINITE in written[row]:
                raise InputError(
                    f'{queries[i].label(i)}: the logits are not finite; check the weights, and '
                    'that tokenizer and model belong together.'
                )
            places[row, : len(queries[i].candidates)] = written[row][answers[i][1]]
        yield indices, places, batch_size * (length + READ * int(passes))


@functools.cache
def make_writer(
    config: LlamaConfig,
    lora: LoraSpec | None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    *,
    number: int,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The program (params, tokens [B, L], lengths [B], titles, room=N) of `write_titles`.

    On a mesh its devices share the users; the places are whole on each of them.
    """

    @functools.cache
    def program(room):
        fixed = {'config': config, 'lora': lora, 'dtype': dtype, 'number': number, 'room': room}
        return on_mesh(compiled(functools.partial(write_titles, **fixed), dtype, mesh), mesh)

    return lambda params, *arrays, room: program(room)(params, *arrays)


def write_titles(
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    titles: Titles,
    *,
    config: LlamaConfig,
    lora: LoraSpec | None,
    dtype: Any,
    number: int,
    room: int,
) -> tuple[jax.Array, jax.Array]:
    """Writes `number` titles a user, or all where there are fewer.

    Args:
      params: the tree of `Llama`.
      tokens: [B, L] int32, the first `lengths` [B] of a row its prompt.
      lengths: [B] int32.
      titles: what may be written.
      config: the architecture.
      lora: the adapters in `params`, if any.
      dtype: of the activations.
      number: titles to write.
      room: N, tokens of an answer at most.

    Returns:
      (places [B, C] int32, from 1, 0 for a title not written and NOT_FINITE in all of a row whose
      logits are not finite; passes after that over the prompts).
    """
    B, L = tokens.shape
    C = titles.sizes.shape[1]
    read = reader(params, config, lora, dtype, L + room + READ)

    def go_on(line, hidden, ready):
        """Where `ready` [B]: the next token after `hidden` [B, D], and all that then is certain."""
        logits, finite = next_logits(params, hidden)
        line = narrow(line, titles, logits, ready)
        # No title goes on where its token is not in the vocabulary.
        broken = (ready & ~(finite & line.active.any(axis=1)))[:, None]
        line = write_certain(write_certain(line, titles, number), titles, number)
        return line.replace(
            active=line.active & ~broken, places=jnp.where(broken, NOT_FINITE, line.places)
        )

    def step(state):
        line, done, cache, passes = state
        index = done[:, None] + jnp.arange(READ)
        # Slots behind the last token hold rubbish until their own token overwrites it.
        next_tokens = jnp.take_along_axis(line.text, index, axis=1, mode='clip')
        hidden, cache = read(next_tokens, lengths + done, cache)
        count = jnp.clip(line.written - done, 0, READ)
        done += count
        ready = (done == line.written) & line.active.any(axis=1)
        line = go_on(line, hidden_at(hidden, jnp.maximum(count - 1, 0)), ready)
        return line, done, cache, passes + 1

    hidden, cache = read(tokens, jnp.zeros(B, jnp.int32), None)
    line = Line(
        active=titles.sizes > 0,
        depth=jnp.zeros(B, jnp.int32),
        places=jnp.zeros((B, C), jnp.int32),
        text=jnp.zeros((B, room), jnp.int32),
        written=jnp.zeros(B, jnp.int32),
    )
    line = write_certain(line, titles, number)
    ready = (line.written == 0) & line.active.any(axis=1)
    line = go_on(line, hidden_at(hidden, lengths - 1), ready)
    state = line, jnp.zeros(B, jnp.int32), cache, jnp.int32(0)
    line, _, _, passes = jax.lax.while_loop(lambda state: state[0].active.any(), step, state)
    return line.places, passes


def narrow(line: Line, titles: Titles, logits: jax.Array, ready: jax.Array) -> Line:
    """Where `ready` [B], keeps the active titles that go on with the most probable token.

    Only tokens that continue an active title are compared; of equal ones the first is taken.
    """
    C = titles.sizes.shape[1]
    depth = jnp.broadcast_to(line.depth[:, None, None], (len(logits), C, 1))
    following = jnp.take_along_axis(titles.tokens, depth, axis=2, mode='clip')[..., 0]
    values = jnp.take_along_axis(logits, jnp.maximum(following, 0), axis=1)
    values = jnp.where(line.active, values, -jnp.inf)
    best = line.active & (values == values.max(axis=1, keepdims=True))  # of NaN, none
    chosen = jnp.where(best, following, logits.shape[1]).min(axis=1, keepdims=True)
    return line.replace(active=line.active & (~ready[:, None] | (following == chosen)))


def write_certain(line: Line, titles: Titles, number: int) -> Line:
    """Writes the tokens that all active titles share.

    Where one title alone is active it gets its place, and the next line begins with all titles
    that are not yet written; a row with `number` titles, or all, is finished. Changes nothing
    where nothing is certain.
    """
    first = line.active.argmax(axis=1)[:, None]
    one = jnp.take_along_axis(titles.tokens, first[..., None], axis=1)[:, 0]
    size = jnp.take_along_axis(titles.sizes, first, axis=1)[:, 0]
    same = (~line.active[..., None] | (titles.tokens == one[:, None])).all(axis=1)
    shared = jnp.minimum(jnp.cumprod(same.astype(jnp.int32), axis=1).sum(axis=1), size)
    count = line.active.sum(axis=1)
    shared = jnp.where(count > 0, shared, line.depth)

    places = jnp.arange(line.text.shape[1])
    source = line.depth[:, None] + places - line.written[:, None]
    new = (places >= line.written[:, None]) & (source < shared[:, None])
    copied = jnp.take_along_axis(one, jnp.maximum(source, 0), axis=1, mode='clip')
    written = line.written + shared - line.depth

    alone = (count == 1)[:, None]
    last = line.places.max(axis=1, keepdims=True)
    of_titles = jnp.where(alone & line.active, last + 1, line.places)
    remaining = (titles.sizes > 0) & (of_titles == 0) & (last + 1 < number)
    return Line(
        active=jnp.where(alone, remaining, line.active),
        depth=jnp.where(alone[:, 0], 0, shared),
        places=of_titles,
        text=jnp.where(new, copied, line.text),
        written=written,
    )


def _titles(
    query: Query, label: str, line_break: np.ndarray
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """A query's different titles with the line break, and the one of each candidate, [C]."""
    if len(query.prompt) == 0:
        raise InputError(f'{label} has an empty prompt; at least 1 token is needed.')
    if not query.candidates:
        raise InputError(f'{label} has no candidates; at least 1 is needed.')
    if any(len(answer) == 0 for answer in query.candidates):
        raise InputError(f'{label} has a candidate of no tokens; at least 1 is needed.')
    distinct, of_candidates = distinct_answers(query)
    titles = [(*answer, *line_break.tolist()) for answer in distinct]
    in_order = sorted(titles)
    for title, following in itertools.pairwise(in_order):
        if following[: len(title)] == title:
            raise InputError(
                f'{label}: a candidate of {len(title) - len(line_break)} tokens, with the '
                'line break, is the beginning of another; allowed: candidates that a closing quote '
                'or the line break ends.'
            )
    return titles, of_candidates


def _lay_out_titles(
    titles: Sequence[Sequence[tuple[int, ...]]], batch_size: int, shape: tuple[int, int]
) -> Titles:
    """The titles of each row in arrays of `shape` (C, A); missing batch-mates repeat the first."""
    tokens = np.full((batch_size, *shape), -1, np.int32)
    sizes = np.zeros((batch_size, shape[0]), np.int32)
    for b in range(batch_size):
        for c, title in enumerate(titles[b] if b < len(titles) else titles[0]):
            tokens[b, c, : len(title)] = title
            sizes[b, c] = len(title)
    return Titles(tokens, sizes)
