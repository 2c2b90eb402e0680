"""Training to rank: lists of candidates, whose scores by the one-pass program are the logits.

A list is what the ranking reads: a prompt with candidates, and the answer tokens of each. The loss
is the softmax cross-entropy of the candidates that the user chose (Cao et al., 2007, ListNet's
top-one probability), so a gradient step looks at all candidates of a list for the price of one pass
over the prompt.

Lists of similar length share one of a few compiled shapes, as in the ranking. The batch of a step
is a pure function of the seed and the step.

Axis letters: B batch (lists), C candidates, L prompt length, R rows, S row length.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from palr_jax.errors import InputError
from palr_jax.finetune.input import plan_steps
from palr_jax.parallel.mesh import own_rows
from palr_jax.prompts.encode import Encoder
from palr_jax.prompts.tasks import Example
from palr_jax.ranking.fuse import standardize
from palr_jax.ranking.score import (
    Batch,
    Query,
    Shape,
    make_batch,
    one_pass_scores,
    plan_groups,
    useful_tokens,
)

ROW_LENGTH = 64  # tokens of a packed candidate row, at least


@dataclasses.dataclass(frozen=True)
class Choice:
    """A list and what was chosen of it.

    Attributes:
      query: the prompt and the answers of the candidates, in the order listed.
      targets: [C] bool, the chosen candidates; at least one.
      offsets: [C] float32, what is added to their scores, as told by the retriever.
    """

    query: Query
    targets: np.ndarray
    offsets: np.ndarray

    @property
    def tokens(self) -> int:
        """Useful tokens of the list: prompt and answer inputs."""
        return useful_tokens(self.query)


@flax.struct.dataclass
class Lists:
    """A batch of lists.

    Attributes:
      batch: for the one-pass program.
      filled: [B, C] bool, False on padding.
      targets: [B, C] float32, the shares of the chosen candidates, which sum to 1 in each row.
      offsets: [B, C] float32, of `Choice`; 0 on padding.
      lengths: [B, C] float32, answer tokens; 1 on padding.
      weights: [B] float32, 1 for a list, 0 for padding.
    """

    batch: Batch
    filled: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray


def encode_choice(
    example: Example,
    encoder: Encoder,
    profile: Sequence[str],
    length: int,
    retriever_weight: float = 0.0,
) -> Choice:
    """Encodes prompt and candidates; prompt and the longest answer keep to `length` tokens.

    Args:
      example: in item ids; it has candidates.
      encoder: of the catalogue that the example is of; its own length limits the prompt too.
      profile: keywords of `example.past`, empty for a prompt without them.
      length: tokens allowed.
      retriever_weight: of the retriever's standardised scores in the offsets; above 0 only where
        the example has them.

    Raises:
      InputError: the wording and the candidates alone are longer.
    """
    answers = tuple(encoder.replies(example.candidates, example.candidates))
    longest = max(map(len, answers))
    prompt = encoder.prompt(
        example.task,
        example.history,
        profile,
        example.candidates,
        max_length=min(length - longest, encoder.max_length),
    )
    offsets = np.zeros(len(answers), np.float32)
    if retriever_weight:
        offsets += retriever_weight * standardize(np.array([example.scores]))[0]
    targets = np.isin(example.candidates, example.targets)
    query = Query(prompt.tokens, answers, f'A list of dense user {example.user}')
    return Choice(query, targets, offsets)


class ListBatches:
    """Random access to the batches of a run, for Grain: batch i is the same whoever asks."""

    def __init__(
        self,
        choices: Sequence[Choice],
        batch_size: int,
        steps: int,
        seed: int,
        max_shapes: int,
        max_positions: int,
        mesh: Mesh | None = None,
    ):
        """`steps` batches of `batch_size` lists in at most `max_shapes` shapes; see `plan_steps`.

        On a mesh a process has the lists that its devices hold.

        Raises:
          InputError: there is no list, or one has more tokens than the model reads.
        """
        if not choices:
            raise InputError(
                'There is no list to learn from: tasks.users leaves no user, nobody has two '
                'training items, or no later item of a user was retrieved.'
            )
        self._choices = choices
        self._own = own_rows(batch_size, mesh)
        queries = [choice.query for choice in choices]
        groups = plan_groups(queries, batch_size, ROW_LENGTH, max_shapes, max_positions)
        members, shapes = zip(*groups)
        plan = plan_steps(members, [batch_size] * len(groups), steps, seed)
        self._plan = [(part, shapes[group]) for group, part in plan]
        computed = sum(batch_size * shape.tokens for _, shape in self._plan)
        useful = sum(choices[i].tokens for members, _ in self._plan for i in members)
        logging.info(
            'finetune: %d batches of %d lists in %d shapes, %.0f %% of their tokens are padding',
            steps,
            batch_size,
            len({shape for _, shape in self._plan}),
            100 * (1 - useful / max(1, computed)),
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Lists:
        members, shape = self._plan[index]
        own = [self._choices[i] for i in members[self._own]]
        return lay_out(own, dataclasses.replace(shape, users=len(own)))


def lay_out(choices: Sequence[Choice], shape: Shape) -> Lists:
    """One batch in `shape`; missing lists are padding."""
    B, C = shape.users, shape.candidates
    filled, targets = np.zeros((B, C), bool), np.zeros((B, C), np.float32)
    offsets, lengths = np.zeros((B, C), np.float32), np.ones((B, C), np.float32)
    weights = np.zeros(B, np.float32)
    for b in range(B):
        choice = choices[b] if b < len(choices) else choices[0]
        count = len(choice.targets)
        filled[b, :count] = True
        targets[b, :count] = choice.targets / choice.targets.sum()
        offsets[b, :count] = choice.offsets
        lengths[b, :count] = [len(answer) for answer in choice.query.candidates]
        weights[b] = b < len(choices)
    batch = make_batch([choice.query for choice in choices], shape)
    return Lists(batch, filled, targets, offsets, lengths, weights)


def list_losses(params: Any, lists: Lists, program, key: jax.Array | None = None) -> jax.Array:
    """[B] the loss of each list, in nats.

    `listwise`: the cross-entropy of the chosen candidates under the softmax of all scores, each
    the log-likelihood of a candidate's answer divided by the temperature, plus its offset: the
    gradient is of what the offsets leave unexplained, as in boosting (Friedman, 2001). `both` adds
    the mean negative log-likelihood of a token of the chosen answers, which `listwise` alone may
    give away: only differences count there.
    """
    scores = one_pass_scores(
        params,
        lists.batch,
        config=program.model,
        lora=program.lora,
        dtype=program.dtype,
        remat=program.remat,
        key=key,
    )
    logits = jnp.where(lists.filled, scores / program.temperature + lists.offsets, -jnp.inf)
    shares = jnp.where(lists.filled, jax.nn.log_softmax(logits), 0.0)
    losses = -jnp.sum(lists.targets * shares, axis=1)
    if program.objective == 'both':
        known = jnp.where(lists.filled, scores, 0.0)
        losses -= jnp.sum(lists.targets * known / lists.lengths, axis=1)
    return losses
