"""Greedy generation with a key-value cache: what the model itself would answer.

The prompts of a batch run once, padded at the right; then each step reads one token a row and
attends to the keys and values of all before it (`llama.attention.Cached`). A row that has ended
goes on with EOS, and the loop ends with the last row.

Axis letters: B batch, L prompt length, A tokens of the longest answer, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palr_jax.errors import InputError
from palr_jax.llama.attention import Cached
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import Llama, output_head
from palr_jax.progress import Progress
from palr_jax.ranking.score import PROMPT_STEP

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

    Prompts of similar length share a batch; a prompt's answer does not depend on its batch-mates.

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
      InputError: a prompt is empty, or too long with its answer; or a logit is not finite.
    """
    if most < 1:
        raise InputError(f'Answers of {most} tokens are asked for; allowed: 1 or more.')
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= config.max_positions - most:
            raise InputError(
                f'Prompt {i} has {len(prompt)} tokens; allowed: 1 to '
                f'{config.max_positions - most}, so that {most} more fit the model.'
            )
    order = np.argsort([len(prompt) for prompt in prompts], kind='stable')
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    with Progress('generate', len(prompts), 'prompts') as progress:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            # Missing batch-mates repeat the first prompt.
            rows = [prompts[i] for i in np.resize(members, batch_size)]
            lengths = np.array([len(row) for row in rows], np.int32)
            tokens = np.zeros(
                (batch_size, -(-lengths.max() // PROMPT_STEP) * PROMPT_STEP), np.int32
            )
            for b, row in enumerate(rows):
                tokens[b, : len(row)] = row
            found = np.asarray(
                _greedy(
                    params,
                    tokens,
                    lengths,
                    config=config,
                    lora=lora,
                    dtype=dtype,
                    eos_id=eos_id,
                    most=most,
                )
            )
            for i, answer in zip(members, found):
                if NOT_FINITE in answer:
                    raise InputError(
                        f'Prompt {i}: the logits are not finite; check the weights, and that '
                        'tokenizer and model belong together.'
                    )
                ends = np.flatnonzero(answer == eos_id)
                answers[i] = answer[: ends[0] + 1] if len(ends) else answer
            progress.update(len(members))
    return answers


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
    model, head = Llama(config, lora, dtype), output_head(params)
    size = L + most - 1  # the last token of an answer is never read

    def read(tokens, positions, cache):
        """[B, T] -> hidden states [B, T, D] and the cache with these tokens in it."""
        variables = {'params': params} | cache
        plan = Cached(positions, size)
        return model.apply(variables, tokens, positions, plan, mutable=['cache'])

    def choose(hidden):
        """[B, D] -> [B] the next tokens."""
        logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
        best = jnp.argmax(logits, axis=-1)
        return jnp.where(jnp.isfinite(logits).all(axis=-1), best, NOT_FINITE).astype(jnp.int32)

    def unfinished(state):
        i, answers, _ = state
        return (i < most) & jnp.any(answers[:, i - 1] != eos_id)

    def step(state):
        i, answers, cache = state
        last = answers[:, i - 1]
        hidden, cache = read(last[:, None], (lengths + i - 1)[:, None], cache)
        chosen = jnp.where(last == eos_id, eos_id, choose(hidden[:, 0]))
        return i + 1, answers.at[:, i].set(chosen), cache

    positions = jnp.broadcast_to(jnp.arange(L), (B, L))
    hidden, cache = read(tokens, positions, {})
    hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    answers = jnp.full((B, most), eos_id, jnp.int32).at[:, 0].set(choose(hidden))
    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), answers, cache))[1]


_greedy = jax.jit(greedy, static_argnames=('config', 'lora', 'dtype', 'eos_id', 'most'))
