"""Training rows: examples as tokens, addressed by the global step.

Examples are packed several to a row of one length (`PackedRows`), or have a row each, in batches of
similar length (`GroupedRows`). Packing wastes least where many examples fit a row, or where the
attention skips what lies between them, as the splash kernel does; a row each wastes no attention.

The plan of an epoch is a pure function of the seed, the epoch and the examples' lengths, so a run
that resumes at step n reads what the uninterrupted run would have read at step n. A longer run
reads the same rows first, in the same shapes.

Axis letters: B batch (rows), T row length, M answer tokens of a row.
"""

import dataclasses
import math
from collections.abc import Sequence

import flax.struct
import grain
import numpy as np
from absl import logging
from jax.sharding import Mesh

from palr_jax.errors import InputError
from palr_jax.parallel.mesh import own_rows
from palr_jax.prompts.encode import Encoder, Prompt
from palr_jax.prompts.tasks import Example
from palr_jax.ranking.score import choose_groups

LENGTH_STEP = 16  # T of a group is rounded up to a multiple of this
ANSWER_STEP = 16  # M is rounded up to a multiple of this
ANSWER_SLACK = 1.25  # M over the answer tokens of a row of average examples
OPEN_ROWS = 64  # rows that an example may still join while an epoch is packed


@dataclasses.dataclass(frozen=True)
class Tokens:
    """An encoded example.

    Attributes:
      tokens: [n] int32, prompt and answer.
      answer: where the answer begins; tokens[answer:] are predicted.
    """

    tokens: np.ndarray
    answer: int


@flax.struct.dataclass
class Rows:
    """Packed rows; without the leading B for one row.

    Attributes:
      tokens: [B, T] int32, 0 on padding.
      positions: [B, T] int32, restarting with each example.
      segments: [B, T] int32, the example of the row, from 1; 0 on padding.
      before: [B, M] int32, the position whose hidden state predicts each answer token.
      targets: [B, M] int32, the answer tokens.
      weights: [B, M] float32, 1 on answer tokens, 0 on padding.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    before: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def encode_example(
    example: Example, encoder: Encoder, profile: Sequence[str], length: int
) -> Tokens:
    """Encodes prompt and answer within `length` tokens; the answer is never cut.

    Args:
      example: in item ids.
      encoder: of the catalogue that the example is of; its own length limits the prompt too.
      profile: keywords of `example.past`, empty for a prompt without them.
      length: tokens allowed, at most the row length.

    Raises:
      InputError: the answer, the wording and the candidates alone are longer.
    """
    prompt, answer = example_prompt(example, encoder, profile, length)
    return Tokens(np.concatenate([prompt.tokens, answer]), len(prompt.tokens))


def example_prompt(
    example: Example, encoder: Encoder, profile: Sequence[str], length: int
) -> tuple[Prompt, np.ndarray]:
    """(the prompt, the answer's tokens); see `encode_example`."""
    answer = encoder.answer(example.targets, example.candidates)
    prompt = encoder.prompt(
        example.task,
        example.history,
        profile,
        example.candidates,
        max_length=min(length - len(answer), encoder.max_length),
    )
    return prompt, answer


def answer_room(lengths: np.ndarray, answers: np.ndarray, row_length: int) -> int:
    """M: the answer tokens that a row may hold.

    The logits, the largest arrays of a step, grow with M and not with the row length. It depends on
    the examples alone, not on how many rows a run reads, so a longer run has the same shapes.
    """
    average = row_length * answers.sum() / lengths.sum()
    room = max(ANSWER_SLACK * average, answers.max())
    return math.ceil(room / ANSWER_STEP) * ANSWER_STEP


def pack_epoch(
    lengths: np.ndarray,
    answers: np.ndarray,
    row_length: int,
    most_answers: int,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Shuffles the examples and packs them in that order: the first open row with room takes each.

    Args:
      lengths: [examples] tokens of each, at most `row_length`.
      answers: [examples] answer tokens of each, at most `most_answers`.
      row_length: T.
      most_answers: M.
      seed: of the order.
      epoch: from 0; every epoch has an order of its own.

    Returns:
      For every row, the examples in it.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens and answer tokens that still fit
    for example in np.random.default_rng([seed, 3, epoch]).permutation(len(lengths)).tolist():
        length, answer = int(lengths[example]), int(answers[example])
        for row in range(max(0, len(rows) - OPEN_ROWS), len(rows)):
            if length <= room[row][0] and answer <= room[row][1]:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append((row_length, most_answers))
        rows[row].append(example)
        room[row] = room[row][0] - length, room[row][1] - answer
    return rows


class PackedRows:
    """Random access to the rows of a run, for Grain: row i is the same whoever asks, and when."""

    def __init__(self, examples: Sequence[Tokens], row_length: int, rows: int, seed: int):
        """`rows` is how many the run needs; epochs follow one another until there are so many.

        Raises:
          InputError: there is no example, or one is longer than a row.
        """
        lengths, answers = _sizes(examples, row_length)
        self._examples = examples
        self._length = row_length
        self._answers = answer_room(lengths, answers, row_length)
        self._plan: list[list[int]] = []
        epoch = 0
        while len(self._plan) < rows:
            self._plan += pack_epoch(lengths, answers, row_length, self._answers, seed, epoch)
            epoch += 1
        del self._plan[rows:]
        useful = sum(int(lengths[row].sum()) for row in self._plan)
        logging.info(
            'finetune: %d rows of %d tokens, %.0f %% of them padding',
            rows,
            row_length,
            100 * (1 - useful / max(1, rows * row_length)),
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Rows:
        return lay_out([self._examples[i] for i in self._plan[index]], self._length, self._answers)


class GroupedRows:
    """Random access to the batches of a run, for Grain, whose rows hold one example each.

    On a mesh a process has the rows that its devices hold.

    Examples of similar length share one of at most `max_shapes` shapes. A batch has as many rows as
    fit its tokens, a multiple of `batch_size`, so that meshes and parts divide each as they divide
    `batch_size`.
    """

    def __init__(
        self,
        examples: Sequence[Tokens],
        row_length: int,
        batch_size: int,
        steps: int,
        seed: int,
        max_shapes: int,
        mesh: Mesh | None = None,
    ):
        """`steps` batches of up to `batch_size` * `row_length` tokens; see `plan_steps`.

        Raises:
          InputError: there is no example, or one is longer than a row.
        """
        lengths, answers = _sizes(examples, row_length)
        padded = np.minimum(-(-lengths // LENGTH_STEP) * LENGTH_STEP, row_length)
        groups = choose_groups(padded, answers, max_shapes, batch_size)
        self._examples = examples
        self._mesh = mesh
        self._shapes = [
            (
                int(padded[members].max()),
                math.ceil(answers[members].max() / ANSWER_STEP) * ANSWER_STEP,
            )
            for members in groups
        ]
        sizes = [batch_size * (row_length // length) for length, _ in self._shapes]
        self._plan = plan_steps(groups, sizes, steps, seed)
        useful = sum(int(lengths[members].sum()) for _, members in self._plan)
        computed = sum(len(members) * self._shapes[group][0] for group, members in self._plan)
        logging.info(
            'finetune: %d batches in rows of %s tokens, %.0f %% of them padding',
            steps,
            ', '.join(str(length) for length, _ in self._shapes),
            100 * (1 - useful / max(1, computed)),
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Rows:
        group, members = self._plan[index]
        own = members[own_rows(len(members), self._mesh)]
        return stack([lay_out([self._examples[i]], *self._shapes[group]) for i in own])


def plan_steps(
    groups: Sequence[np.ndarray], sizes: Sequence[int], steps: int, seed: int
) -> list[tuple[int, np.ndarray]]:
    """(group, [size of the group] members) of each of `steps` batches; epochs follow one another.

    In an epoch each member of a group comes once, in an order of its own, and the batches of all
    groups are shuffled; the last batch of a group is filled up with members from the epoch's start.
    """
    plan: list[tuple[int, np.ndarray]] = []
    epoch = 0
    while len(plan) < steps:
        rng = np.random.default_rng([seed, 3, epoch])
        batches = []
        for group, (members, size) in enumerate(zip(groups, sizes)):
            order = rng.permutation(members)
            full = np.resize(order, -(-len(order) // size) * size)
            batches += [(group, part) for part in full.reshape(-1, size)]
        plan += [batches[i] for i in rng.permutation(len(batches))]
        epoch += 1
    return plan[:steps]


def _sizes(examples: Sequence[Tokens], row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """([examples] tokens, [examples] answer tokens), checked."""
    if not examples:
        raise InputError(
            'There is no fine-tuning example: tasks.users leaves no user, or nobody has two '
            'training items.'
        )
    lengths = np.array([len(e.tokens) for e in examples])
    answers = lengths - np.array([e.answer for e in examples])
    if lengths.max() > row_length:
        raise InputError(
            f'A fine-tuning example has {lengths.max()} tokens; allowed: at most '
            f'finetune.length, which is {row_length}.'
        )
    return lengths, answers


def lay_out(examples: Sequence[Tokens], row_length: int, answers: int) -> Rows:
    """One row of T = `row_length` tokens with M = `answers` places for answer tokens."""
    tokens, positions, segments = (np.zeros(row_length, np.int32) for _ in range(3))
    before, targets = (np.zeros(answers, np.int32) for _ in range(2))
    weights = np.zeros(answers, np.float32)
    at = answer_at = 0
    for segment, example in enumerate(examples, start=1):
        n = len(example.tokens)
        tokens[at : at + n] = example.tokens
        positions[at : at + n] = np.arange(n)
        segments[at : at + n] = segment
        m = n - example.answer
        before[answer_at : answer_at + m] = np.arange(at + example.answer - 1, at + n - 1)
        targets[answer_at : answer_at + m] = example.tokens[example.answer :]
        weights[answer_at : answer_at + m] = 1.0
        at, answer_at = at + n, answer_at + m
    return Rows(tokens, positions, segments, before, targets, weights)


def batches(rows: PackedRows, batch_size: int, mesh: Mesh | None = None) -> grain.MapDataset:
    """Step -> Rows with a leading B; step s holds the rows s*B … s*B + B - 1.

    On a mesh a process has those of them that its devices hold.
    """
    own = own_rows(batch_size, mesh)
    steps = grain.MapDataset.range(len(rows) // batch_size)
    return steps.map(lambda step: stack([rows[step * batch_size + row] for row in own]))


def stack(rows: Sequence[Rows]) -> Rows:
    """Puts single rows together to a batch."""
    return Rows(
        **{f.name: np.stack([getattr(r, f.name) for r in rows]) for f in dataclasses.fields(Rows)}
    )
