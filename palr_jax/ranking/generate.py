"""Greedy generation with a key-value cache: what the model itself would answer.

The prompts of a batch run once, padded at the right; then each step reads one token a row and
attends to the keys and values of all before it (`llama.attention.Cached`). A row that has ended
goes on with EOS, and the loop ends with the last row.

Axis letters: Q prompts, B batch, L prompt length, A tokens of the longest answer, D width,
V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from palr_jax.errors import InputError
from palr_jax.llama.attention import Cached
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import Llama, head_logits, stored_head
from palr_jax.parallel.mesh import HEAD_AXIS, ROW_AXES, check_rows, constrain, shard_rows, using
from palr_jax.progress import Progress
from palr_jax.ranking.score import CAST_IN_LAYER, PROMPT_STEP, choose_groups

NOT_FINITE = -1  # stands for a token where the logits are no numbers


def generate(
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    config: LlamaConfig,
    lora: LoraSpec | None = None,
    dtype: Any = jnp.float32,
    eos_id: int,
    most: int,
    batch_size: int,
) -> list[np.ndarray]:
    """The most probable next tokens after each prompt, one at a time.

    Args:
      params: the tree of `Llama`.
      prompts: int32 tokens, at least one each.
      config: the architecture.
      lora: the adapters in `params`, if any.
      dtype: of the activations.
      eos_id: the token that ends an answer.
      most: tokens of an answer, at most.
      batch_size: prompts a program call.

    Returns:
      Each prompt's answer [a], a <= `most`; EOS is its last token unless `most` cut it short.

    Raises:
      InputError: as `generate_batches`.
    """
    generator = make_generator(config, lora, dtype, eos_id=eos_id, most=most)
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    with Progress('generate', len(prompts), 'prompts') as progress:
        for indices, found, _ in generate_batches(
            generator,
            params,
            prompts,
            eos_id=eos_id,
            most=most,
            batch_size=batch_size,
            max_shapes=len(prompts),
            max_positions=config.max_positions,
        ):
            for i, answer in zip(indices, found):
                answers[i] = answer
            progress.update(len(indices))
    return answers


def generate_batches(
    generator: Callable[[Any, np.ndarray, np.ndarray], jax.Array],
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    eos_id: int,
    most: int,
    batch_size: int,
    max_shapes: int,
    max_positions: int,
    names: Sequence[str] | None = None,
) -> Iterator[tuple[np.ndarray, list[np.ndarray], int]]:
    """Answers every prompt, a batch at a time.

    Prompts of similar length share a batch; a prompt's answer does not depend on its batch-mates.

    Args:
      generator: from `make_generator`, with the same `eos_id` and `most`.
      params: the tree of `Llama`.
      prompts: int32 tokens, at least one each.
      eos_id: the token that ends an answer.
      most: tokens of an answer, at most.
      batch_size: prompts a program call.
      max_shapes: prompt lengths that are compiled, at most.
      max_positions: tokens that the model reads.
      names: what an error calls each prompt; without them its number.

    Yields:
      (indices of the batch's prompts [n], their answers, tokens computed with padding).

    Raises:
      InputError: a prompt is empty, or too long with its answer; or a logit is not finite.
    """
    names = names or [f'Prompt {i}' for i in range(len(prompts))]
    if most < 1:
        raise InputError(f'Answers of {most} tokens are asked for; allowed: 1 or more.')
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= max_positions - most:
            raise InputError(
                f'{names[i]}: the prompt has {len(prompt)} tokens; allowed: 1 to '
                f'{max_positions - most}, so that {most} more fit the model.'
            )
    for indices, length in plan_prompts(prompts, most, batch_size, max_shapes):
        tokens, lengths = lay_out_prompts([prompts[i] for i in indices], batch_size, length)
        answers = []
        for i, answer in zip(indices, np.asarray(generator(params, tokens, lengths))):
            if NOT_FINITE in answer:
                raise InputError(
                    f'{names[i]}: the logits are not finite; check the weights, and that '
                    'tokenizer and model belong together.'
                )
            ends = np.flatnonzero(answer == eos_id)
            answers.append(answer[: ends[0] + 1] if len(ends) else answer)
        longest = max(map(len, answers))
        yield indices, answers, batch_size * (length + longest - 1)


def plan_prompts(
    prompts: Sequence[np.ndarray], extra: int, batch_size: int, max_shapes: int
) -> list[tuple[np.ndarray, int]]:
    """Batches of prompts of similar length, padded to at most `max_shapes` different lengths.

    Args:
      prompts: [Q] tokens.
      extra: tokens that each row computes beside its prompt.
      batch_size: prompts of a full batch.
      max_shapes: at least 1.

    Returns:
      (indices of the batch's prompts, at most `batch_size`; the length L of its rows) of each.
    """
    if not len(prompts):
        return []
    rounded = np.array([-(-len(prompt) // PROMPT_STEP) * PROMPT_STEP for prompt in prompts])
    groups = choose_groups(rounded, np.full(len(prompts), extra), max_shapes, batch_size)
    return [
        (group[start : start + batch_size], int(rounded[group].max()))
        for group in groups
        for start in range(0, len(group), batch_size)
    ]


def lay_out_prompts(
    prompts: Sequence[np.ndarray], batch_size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, L] int32, lengths [B] int32); missing batch-mates repeat the first prompt."""
    rows = [prompts[b] if b < len(prompts) else prompts[0] for b in range(batch_size)]
    tokens = np.zeros((batch_size, length), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


@functools.cache
def make_generator(
    config: LlamaConfig,
    lora: LoraSpec | None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    *,
    eos_id: int,
    most: int,
) -> Callable[[Any, np.ndarray, np.ndarray], jax.Array]:
    """The program (params, tokens [B, L], lengths [B]) -> [B, A] of `greedy`.

    On a mesh its devices share the rows; the answers are whole on each of them.
    """
    fixed = {'config': config, 'lora': lora, 'dtype': dtype, 'eos_id': eos_id, 'most': most}
    return on_mesh(compiled(functools.partial(greedy, **fixed), dtype, mesh), mesh)


def compiled(function: Callable[..., Any], dtype: Any, mesh: Mesh | None) -> Callable[..., Any]:
    """`function` jitted for activations of `dtype`; what it returns is whole on every device."""
    narrow = jnp.dtype(dtype) != jnp.float32 and jax.default_backend() == 'cpu'
    return jax.jit(
        function,
        compiler_options=CAST_IN_LAYER if narrow else None,
        out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()),
    )


def on_mesh(program: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`program(params, *arrays [B, …])` with the rows of the arrays divided over the mesh."""
    if mesh is None:
        return program

    def run(params: Any, *arrays: Any) -> Any:
        check_rows('ranking.batch_size', len(jax.tree.leaves(arrays)[0]), mesh)
        with using(mesh):
            return program(params, *shard_rows(arrays, mesh))

    return run


def greedy(
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: LlamaConfig,
    lora: LoraSpec | None,
    dtype: Any,
    eos_id: int,
    most: int,
) -> jax.Array:
    """tokens [B, L] int32, the first `lengths` [B] of a row its prompt -> [B, A] answers.

    A is `most`; places behind an answer's end hold EOS. Of equal logits the first token is taken.
    """
    B, L = tokens.shape
    read = reader(params, config, lora, dtype, L + most - 1)  # an answer's last token is not read

    def choose(hidden):
        """[B, D] -> [B] the next tokens."""
        logits, finite = next_logits(params, hidden)
        return jnp.where(finite, jnp.argmax(logits, axis=-1), NOT_FINITE).astype(jnp.int32)

    def unfinished(state):
        i, answers, _ = state
        return (i < most) & jnp.any(answers[:, i - 1] != eos_id)

    def step(state):
        i, answers, cache = state
        last = answers[:, i - 1]
        hidden, cache = read(last[:, None], lengths + i - 1, cache)
        chosen = jnp.where(last == eos_id, eos_id, choose(hidden[:, 0]))
        return i + 1, answers.at[:, i].set(chosen), cache

    hidden, cache = read(tokens, jnp.zeros(B, jnp.int32), None)
    answers = jnp.full((B, most), eos_id, jnp.int32)
    answers = answers.at[:, 0].set(choose(hidden_at(hidden, lengths - 1)))
    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), answers, cache))[1]


def reader(
    params: Any, config: LlamaConfig, lora: LoraSpec | None, dtype: Any, size: int
) -> Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]:
    """(tokens [B, T], starts [B], cache) -> (hidden states [B, T, D], cache with the tokens).

    A row's tokens have the positions from `starts` on; the cache holds those before. It has `size`
    slots a row; None begins one, at position 0.
    """
    model = Llama(config, lora, dtype)

    def read(tokens, starts, cache):
        variables = {'params': params} if cache is None else {'params': params, 'slots': cache}
        positions = starts[:, None] + jnp.arange(tokens.shape[1])
        hidden, made = model.apply(variables, tokens, positions, Cached(starts), mutable=['new'])
        if cache is None:
            room = [(0, 0)] * 3 + [(0, size - tokens.shape[1]), (0, 0)]
            cache = jax.tree.map(lambda new: jnp.pad(_bits(new), room), made['new'])
        else:
            cache = jax.tree.map(functools.partial(_store, starts), cache, made['new'])
        # [layers, B, K, size, E]: rows and heads lie where those of the activations do.
        return hidden, jax.tree.map(lambda x: constrain(x, None, ROW_AXES, HEAD_AXIS), cache)

    return read


def _bits(x: jax.Array) -> jax.Array:
    """Floats as integers of the same bits.

    To write a few numbers into an array of bfloat16, XLA's CPU backend converts all of it to
    float32 and back; of integers it writes the few in place.
    """
    return x.view(f'uint{8 * x.itemsize}')


def _store(starts: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """slots [layers, B, K, N, E] with `new` [layers, B, K, T, E] from the slot `starts` [B] on.

    Once a pass, behind all layers, and in place: a scanned layer that wrote its own slots would
    give back a copy of all of them.
    """
    B, T = new.shape[1], new.shape[3]
    rows = jnp.arange(B)[:, None]
    places = starts[:, None] + jnp.arange(T)
    # One index a token: the axes of B and T come first.
    return slots.at[:, rows, :, places].set(_bits(new).transpose(1, 3, 0, 2, 4))


def hidden_at(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """Of hidden states [B, T, D] the one at `index` [B] of each row: [B, D]."""
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def next_logits(params: Any, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """hidden [B, D] -> (float32 logits [B, V], whether all of a row are finite [B])."""
    # A CPU's matrix units take no product of one row in bfloat16.
    alone = len(hidden) == 1 and hidden.dtype == jnp.bfloat16
    rows = jnp.repeat(hidden, 2, axis=0) if alone else hidden
    logits = head_logits(rows, *stored_head(params))[: len(hidden)]
    return logits, jnp.isfinite(logits).all(axis=-1)
