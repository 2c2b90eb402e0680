"""The fine-tuning loop: one jitted step, Orbax checkpoints, resume.

The objective is the likelihood of written answers (`sft`, the paper's) or the choice from a list
(`listwise`, `both`; see `lists.py`).

A checkpoint holds the adapter, the optimiser's state and, as its step number, the position in the
input. The base is never written: it is read again from where it came from.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from palr_jax.errors import InputError
from palr_jax.finetune import input as finetune_input
from palr_jax.finetune.checkpoints import Checkpoints
from palr_jax.finetune.input import Rows, Tokens
from palr_jax.finetune.lists import (
    ROW_LENGTH,
    Choice,
    ListBatches,
    Lists,
    list_losses,
)
from palr_jax.finetune.lists import lay_out as lay_out_lists
from palr_jax.finetune.optimizer import learning_rate, make_optimizer, update
from palr_jax.finetune.throughput import Trace, Work, log_overview, utilisation
from palr_jax.llama import lora
from palr_jax.llama.attention import Causal
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import Llama, log_likelihood, stored_head
from palr_jax.metric_writer import MetricWriter
from palr_jax.parallel import rules
from palr_jax.parallel.mesh import (
    ROW_AXES,
    check_rows,
    constrain,
    join_rows,
    own_rows,
    row_shards,
    shard_rows,
    using,
)
from palr_jax.progress import Progress
from palr_jax.ranking.score import plan_batches

Params = Any
Batch = Rows | Lists

HELD_OUT_SHAPES = 2  # compiled shapes of held-out lists, at most


@dataclasses.dataclass(frozen=True)
class Program:
    """What the step is compiled for.

    Attributes:
      model: the architecture.
      lora: the adapter's shape; None in full fine-tuning, where the base itself is trained.
      dtype: of the frozen base and of the activations.
      remat: what the backward pass keeps of a layer, a name of `llama.model.REMAT`.
      parts: a batch is run in so many parts, whose gradients are summed.
      objective: 'sft', which learns from `Rows`; 'listwise' or 'both', which learn from `Lists`.
      temperature: of the softmax over a list's scores.
    """

    model: LlamaConfig
    lora: LoraSpec | None
    dtype: Any
    remat: str = 'projections'
    parts: int = 1
    objective: str = 'sft'
    temperature: float = 1.0


def answer_log_likelihood(
    params: Params, rows: Rows, program: Program, key: jax.Array | None = None
) -> jax.Array:
    """[B, M] log-probability of every answer token; padding places hold a meaningless value.

    With a `key` the adapter's inputs have dropout, drawn from it.
    """
    model = Llama(program.model, program.lora, program.dtype, program.remat)
    hidden = model.apply(
        {'params': params},
        rows.tokens,
        rows.positions,
        Causal(rows.segments),
        rngs=None if key is None else {'dropout': key},
    )
    before = jnp.take_along_axis(hidden, rows.before[..., None], axis=1)
    head, axis = stored_head(params)
    return log_likelihood(
        constrain(before, ROW_AXES), rows.targets, head.astype(program.dtype), axis
    )


def summed_loss(
    adapter: Params,
    frozen: Params,
    batch: Batch,
    program: Program,
    key: jax.Array | None = None,
) -> jax.Array:
    """Sum over the batch's answer tokens, or over its lists, in nats."""
    params = lora.join(adapter, frozen)
    if program.objective == 'sft':
        values = -answer_log_likelihood(params, batch, program, key)
    else:
        values = list_losses(params, batch, program, key)
    return jnp.sum(values * batch.weights)


def loss_and_gradient(
    adapter: Params, frozen: Params, batch: Batch, program: Program, key: jax.Array | None = None
) -> tuple[jax.Array, Params]:
    """The mean loss of the batch and its gradient in the adapter; 0 if nothing has a weight.

    Both are summed over `program.parts` and divided at the end: it is the mean of the whole batch,
    however its answer tokens are spread over the parts.
    """
    value_and_grad = jax.value_and_grad(summed_loss)
    total = jnp.maximum(jnp.sum(batch.weights), 1.0)
    if program.parts == 1:
        found = value_and_grad(adapter, frozen, batch, program, key)
        return jax.tree.map(lambda x: x / total, found)

    def split(array):
        """[B, …] -> [parts, B / parts, …], of every device's rows the same share: none moves."""
        array = array.reshape(-1, program.parts, *array.shape[1:]).swapaxes(0, 1)
        return constrain(array, None, ROW_AXES)

    def add(sums, inputs):
        number, part = inputs
        part_key = None if key is None else jax.random.fold_in(key, number)
        return jax.tree.map(
            jnp.add, sums, value_and_grad(adapter, frozen, part, program, part_key)
        ), None

    nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, adapter)
    numbered = jnp.arange(program.parts), jax.tree.map(split, batch)
    sums, _ = jax.lax.scan(add, nothing, numbered)
    return jax.tree.map(lambda x: x / total, sums)


def train_step(
    adapter: Params,
    state: optax.OptState,
    frozen: Params,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    program: Program,
    optimizer: optax.GradientTransformation,
) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
    """One optimiser step: (adapter, state, {'loss', 'gradient_norm'}). Only the adapter moves.

    `key` is for the dropout; without one there is none. In full fine-tuning `adapter` is the whole
    tree, and `frozen` is empty.
    """
    value, gradient = loss_and_gradient(adapter, frozen, batch, program, key)
    adapter, state = update(optimizer, gradient, state, adapter, frozen)
    return adapter, state, {'loss': value, 'gradient_norm': optax.tree.norm(gradient)}


def make_step(
    program: Program, optimizer: optax.GradientTransformation, shardings: Any = None
) -> Callable[..., tuple[Params, optax.OptState, dict[str, jax.Array]]]:
    """The jitted `train_step`, which gives its first two arguments' memory to its results.

    `shardings` are those of the adapter and of the state, in that order.
    """
    step = functools.partial(train_step, program=program, optimizer=optimizer)
    places = {} if shardings is None else {'out_shardings': (*shardings, None)}
    return jax.jit(step, donate_argnums=(0, 1), **places)


def train(
    frozen: Params,
    program: Program,
    examples: Sequence[Tokens] | Sequence[Choice],
    config,
    *,
    seed: int,
    workdir: epath.PathLike,
    mesh: Mesh | None = None,
) -> Params:
    """Trains an adapter for `config.steps` steps, from the newest checkpoint if there is any.

    Args:
      frozen: the base parameters, on `mesh` if there is one. Full fine-tuning takes their memory.
      program: what to compile for.
      examples: the encoded examples; lists where the objective is one of lists.
      config: `config.finetune`.
      seed: of the adapter's start, of the order of the examples and of the dropout.
      workdir: checkpoints go to `finetune/checkpoints` in it, the curves to `metrics.jsonl`.
      mesh: the devices that share the work; None for the default device alone.

    Returns:
      The adapter leaves, or all of them in full fine-tuning.

    Raises:
      InputError: loss or gradient are not finite, or a longer run than was asked for lies there.
    """
    check_rows('finetune.batch_size', config.batch_size, mesh, program.parts)
    source = make_source(examples, program, config, seed, mesh)
    if jax.process_count() > 1:
        here = len(own_rows(config.batch_size, mesh))
        logging.info('finetune: %d of each %d rows are laid out here', here, config.batch_size)
    full = program.lora is None
    optimizer = make_optimizer(config, full)
    if full:
        adapter, frozen = frozen, {}
    else:
        adapter = lora.init_adapter(program.model, program.lora, seed)
        adapter = rules.shard(adapter, mesh, program.model)
    state, places = init_state(optimizer, adapter, frozen, program.model, mesh)
    log_overview({'trained': adapter, 'frozen': frozen, 'optimiser': state})
    step_fn = make_step(program, optimizer, places)
    schedule = learning_rate(config)
    key = jax.random.key(seed)
    trace = Trace(epath.Path(workdir) / 'finetune' / 'profile', config)

    folder = epath.Path(workdir) / 'finetune' / 'checkpoints'
    with using(mesh), Checkpoints(folder, config.checkpoint_every) as checkpoints:
        start = checkpoints.latest
        if start > config.steps:
            raise InputError(
                f'finetune.steps is {config.steps}, but {folder} holds a run of {start} steps; '
                f'allowed: {start} or more, or --overwrite.'
            )
        if start:
            adapter, state = checkpoints.restore(adapter, state)
            logging.info('finetune: continuing after step %d', start)
        with (
            MetricWriter(workdir, {'finetune': start + 1}) as writer,
            Progress('finetune', config.steps, 'steps', done=start) as progress,
            trace,
        ):
            for step in range(start, config.steps):
                trace.at(step + 1)
                began = time.monotonic()
                own = source[step]
                batch = join_rows(own, mesh)
                # A step's key follows from its number: a resumed run draws the same.
                step_key = jax.random.fold_in(key, step)
                adapter, state, metrics = step_fn(adapter, state, frozen, batch, step_key)
                metrics = {name: float(value) for name, value in metrics.items()}
                for name in ('loss', 'gradient_norm'):
                    # Before the checkpoint: a gradient of NaN has spoilt the adapter already.
                    if not np.isfinite(metrics[name]):
                        raise InputError(
                            f'finetune: {name} is {metrics[name]} at step {step + 1}; lower '
                            'finetune.learning_rate or check the weights of model.path.'
                        )
                seconds = time.monotonic() - began
                # Of all rows, by those of this process: each has the same number of them.
                work = Work.of(own).times(len(batch.weights) / len(own.weights))
                writer.write(
                    step + 1,
                    'finetune',
                    **metrics,
                    learning_rate=float(schedule(step)),
                    tokens_per_second=work.tokens / seconds,
                    model_flops_utilisation=utilisation(program, work, seconds, mesh),
                )
                if step + 1 == config.steps or checkpoints.due(step + 1):
                    writer.flush()  # first: a run that goes on from there does not write it again
                    checkpoints.save(step + 1, adapter, state)
                progress.update(note=f'loss {metrics["loss"]:.3f}')
        checkpoints.wait()
    return adapter


def make_source(
    examples: Sequence[Tokens] | Sequence[Choice],
    program: Program,
    config,
    seed: int,
    mesh: Mesh | None = None,
) -> grain.MapDataset:
    """Step -> the batch of that step, from what the objective learns from.

    On a mesh a process has the rows that its devices hold.

    Raises:
      InputError: there is no example, or one is too long.
    """
    if program.objective == 'sft' and not config.pack:
        grouped = finetune_input.GroupedRows(
            examples,
            config.length,
            config.batch_size,
            config.steps,
            seed,
            config.max_shapes,
            mesh,
        )
        return grain.MapDataset.source(grouped)
    if program.objective == 'sft':
        number = config.steps * config.batch_size
        rows = finetune_input.PackedRows(examples, config.length, number, seed)
        return finetune_input.batches(rows, config.batch_size, mesh)
    lists = ListBatches(
        examples,
        config.batch_size,
        config.steps,
        seed,
        config.max_shapes,
        program.model.max_positions,
        mesh,
    )
    return grain.MapDataset.source(lists)


def init_state(
    optimizer: optax.GradientTransformation,
    adapter: Params,
    frozen: Params,
    model: LlamaConfig,
    mesh: Mesh | None,
) -> tuple[optax.OptState, Any]:
    """The optimiser's state, and the shardings for `make_step`; no frozen leaf is copied."""
    params = lora.join(adapter, frozen)
    if mesh is None:
        return optimizer.init(params), None
    of_state = rules.tree_shardings(jax.eval_shape(optimizer.init, params), mesh, model)
    places = rules.tree_shardings(adapter, mesh, model), of_state
    return jax.jit(optimizer.init, out_shardings=of_state)(params), places


def answer_losses(
    params: Params,
    program: Program,
    examples: Sequence[Tokens],
    row_length: int,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """[examples] mean negative log-likelihood of each example's answer tokens, in nats.

    Every example has a row of its own, and rows are cut to the longest example, so that no value
    depends on what else is measured. On a mesh each device that holds rows has one at a time.
    """
    if not examples:
        return np.zeros(0, np.float32)
    length = min(row_length, max(len(e.tokens) for e in examples))
    answers = max(len(e.tokens) - e.answer for e in examples)
    score = _measure(answer_log_likelihood, program, mesh)
    size = 1 if mesh is None else row_shards(mesh)
    losses = np.empty(len(examples), np.float32)
    with using(mesh), Progress('held-out loss', len(examples), 'examples') as progress:
        for start in range(0, len(examples), size):
            members = examples[start : start + size]
            padded = [*members, *members[:1] * (size - len(members))]
            rows = finetune_input.stack(
                [finetune_input.lay_out([example], length, answers) for example in padded]
            )
            values = np.asarray(score(params, shard_rows(rows, mesh))) * rows.weights
            mean = -np.sum(values, axis=1) / np.sum(rows.weights, axis=1)
            losses[start : start + size] = mean[: len(members)]
            progress.update(len(members))
    return losses


def choice_losses(
    params: Params, program: Program, choices: Sequence[Choice], mesh: Mesh | None = None
) -> np.ndarray:
    """[lists] the loss of each list, in nats; no value depends on what else is measured."""
    score = _measure(list_losses, program, mesh)
    size = 1 if mesh is None else row_shards(mesh)
    losses = np.empty(len(choices), np.float32)
    queries = [choice.query for choice in choices]
    plan = plan_batches(queries, size, ROW_LENGTH, HELD_OUT_SHAPES, program.model.max_positions)
    with using(mesh), Progress('held-out loss', len(choices), 'lists') as progress:
        for members, shape in plan:
            lists = lay_out_lists([choices[i] for i in members], shape)
            losses[members] = np.asarray(score(params, shard_rows(lists, mesh)))[: len(members)]
            progress.update(len(members))
    return losses


@functools.cache  # before and after training it is the same program
def _measure(
    losses: Callable[..., jax.Array], program: Program, mesh: Mesh | None
) -> Callable[[Params, Batch], jax.Array]:
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(functools.partial(losses, program=program), out_shardings=whole)
