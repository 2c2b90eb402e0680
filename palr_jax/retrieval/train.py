"""Training SASRec with the full softmax: every item of the catalogue competes at every position.

A user's training part is cut from its end into pieces of `length` steps, and pieces of several
users share a row, so that hardly any padding is computed and there is one program. Training stops
when NDCG@10 on the validation targets, ranked over the whole catalogue, no longer rises; the best
parameters are kept. A killed run continues from its last validation to the same bits.

Axes: N rows, T tokens of a row (`config.length`), D width, I items, M tokens.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from palr_jax import storage
from palr_jax.data.splits import Split
from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import ndcg
from palr_jax.progress import Progress
from palr_jax.retrieval.candidates import target_ranks
from palr_jax.retrieval.losses import Loss
from palr_jax.retrieval.popularity import fit_popularity
from palr_jax.retrieval.retriever import TrainedRetriever
from palr_jax.retrieval.sasrec import Params, SASRec, SasrecConfig, init_params

CHECKPOINT = 'training.npz'
# The fields of config.retrieval that the training reads; a change of another leaves it as it is.
FIELDS = (
    *('encoder', 'width', 'blocks', 'heads', 'length', 'dropout', 'exclude_history'),
    *('loss', 'negatives', 'popular_negatives', 'gbce_t', 'learning_rate', 'schedule'),
    *('batch_size', 'epochs', 'evaluate_every', 'patience'),
)


class Rows(NamedTuple):
    """Training sequences, several a row; each field is [N, T] int32, 0 where nothing is."""

    ids: np.ndarray  # the items read
    targets: np.ndarray  # the item that follows each
    positions: np.ndarray  # counted from the end of the sequence
    segments: np.ndarray  # number of the sequence in its row, from 1


def cut_sequences(split: Split, length: int) -> list[np.ndarray]:
    """Training parts in pieces of at most length + 1 items, cut from the end of each.

    Neighbouring pieces share one item: the target of one is the first input of the next.
    """
    pieces = []
    for user in range(len(split.train_end)):
        items = split.train(user)
        for end in range(len(items), 1, -length):
            pieces.append(items[max(0, end - length - 1) : end])
    return pieces


def pack(sequences: list[np.ndarray], length: int) -> Rows:
    """Puts sequences of 2 to length + 1 items into rows: longest first, each where it fits best."""
    rows: list[list[np.ndarray]] = []
    with_space: list[list[int]] = [[] for _ in range(length + 1)]  # rows by free tokens
    for sequence in sorted(sequences, key=len, reverse=True):
        steps = len(sequence) - 1
        space = next((s for s in range(steps, length + 1) if with_space[s]), None)
        if space is None:
            row, space = len(rows), length
            rows.append([])
        else:
            row = with_space[space].pop()
        rows[row].append(sequence)
        with_space[space - steps].append(row)

    packed = Rows(*(np.zeros((len(rows), length), np.int32) for _ in Rows._fields))
    for row, members in enumerate(rows):
        start = 0
        for number, sequence in enumerate(members, start=1):
            steps = len(sequence) - 1
            at = row, slice(start, start + steps)
            packed.ids[at], packed.targets[at] = sequence[:-1], sequence[1:]
            packed.positions[at], packed.segments[at] = np.arange(steps)[::-1], number
            start += steps
    return packed


def batches(rows: Rows, batch_size: int, seed: int, epoch: int) -> Iterator[Rows]:
    """All rows once, in the order of (seed, epoch); the last batch is filled with empty rows."""
    order = np.random.default_rng([seed, epoch]).permutation(len(rows.ids))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        empty = batch_size - len(part)
        yield Rows(*(np.pad(field[part], ((0, empty), (0, 0))) for field in rows))


def train_sasrec(
    split: Split,
    items: int,
    config: ConfigDict,
    seed: int,
    folder: epath.PathLike | None = None,
) -> TrainedRetriever:
    """Trains SASRec on the training part of `split`.

    Args:
      items: I, the size of the catalogue.
      config: `config.retrieval`.
      seed: of initial values, order and dropout.
      folder: where the checkpoint goes from which the same call continues; None: none is written.

    Returns:
      The parameters of the best validation, or the last ones where nobody has a validation target.

    Raises:
      InputError: nobody has two training items, the heads do not divide the width, or the training
        diverges.
    """
    if config.width % config.heads:
        raise InputError(
            f'config.retrieval.heads is {config.heads}; allowed: a divisor of '
            f'config.retrieval.width, which is {config.width}.'
        )
    rows = pack(cut_sequences(split, config.length), config.length)
    if not len(rows.ids):
        raise InputError('No user has two training items; the retriever has nothing to learn from.')
    shape = SasrecConfig(
        config.encoder, items, config.width, config.blocks, config.heads, config.length
    )
    dropout_key = jax.random.key(seed, impl='unsafe_rbg')  # threefry costs more than the products
    steps = -(-len(rows.ids) // config.batch_size)
    loss = Loss(config.loss, config.negatives, config.popular_negatives, config.gbce_t)
    decay_steps = config.epochs * steps if config.schedule == 'cosine' else None
    optimizer, step = make_step(shape, loss, config.learning_rate, config.dropout, decay_steps)
    counts = jnp.asarray(fit_popularity(split, items).counts)
    logging.info(
        'SASRec: %d rows of %d tokens (%.1f %% padding), %d steps an epoch',
        *rows.ids.shape,
        100 * np.mean(rows.ids == 0),
        steps,
    )

    params = init_params(shape, seed)
    state = _State(params, optimizer.init(params), _on_host(params))
    log: list[dict[str, Any]] = []
    path = None if folder is None else epath.Path(folder) / CHECKPOINT
    identity = _identity(split, items, config, seed)
    if path is not None and (stored := _read_checkpoint(path, identity, state)) is not None:
        state, log = stored
        logging.info('SASRec: continues after epoch %d', log[-1]['epoch'])
    first = log[-1]['epoch'] if log else 0
    with Progress('SASRec', config.epochs * steps, 'steps', done=first * steps) as progress:
        for epoch in range(first, config.epochs):
            if _validations_since_best(log) >= config.patience:
                break
            params, moments, losses = state.params, state.moments, []
            for number, batch in enumerate(batches(rows, config.batch_size, seed, epoch)):
                key = jax.random.fold_in(dropout_key, epoch * steps + number)
                params, moments, loss = step(params, moments, batch, counts, key)
                losses.append(loss)
                progress.update(note=_note(log))
            state, mean = _State(params, moments, state.best), float(np.mean(losses))
            if not np.isfinite(mean):
                raise InputError(
                    f'The loss of SASRec is {mean} in epoch {epoch + 1}; try a '
                    f'config.retrieval.learning_rate below {config.learning_rate:g}.'
                )
            if (epoch + 1) % config.evaluate_every and epoch + 1 < config.epochs:
                continue
            now = _on_host(params)
            score = validation_ndcg(TrainedRetriever(shape, now), split, config.exclude_history)
            log.append({'epoch': epoch + 1, 'loss': mean, 'NDCG@10': score})
            if not _validations_since_best(log):
                state = state._replace(best=now)
            logging.info('SASRec: %s', _note(log))
            if path is not None:
                _write_checkpoint(path, identity, state, log)
    return TrainedRetriever(shape, state.best, tuple(log))


@functools.cache
def make_step(
    config: SasrecConfig,
    loss: Loss,
    learning_rate: float,
    dropout: float,
    decay_steps: int | None = None,
) -> tuple[optax.GradientTransformation, Callable]:
    """Adam and a jitted (params, moments, Rows of a batch, counts, key) -> (params, moments, loss).

    The learning rate falls as a cosine to a hundredth at `decay_steps`; None: it stays.
    """
    model, rate = SASRec(config), learning_rate
    if decay_steps is not None:
        rate = optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=0.01)
    optimizer = optax.adam(rate, b2=0.98)  # b2 as in the code of SASRec's authors

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, moments: optax.OptState, batch: Rows, counts: jax.Array, key):
        def loss_of(params: Params) -> jax.Array:
            inputs = batch.ids, batch.positions, batch.segments
            states = model.apply({'params': params}, *inputs, dropout, rngs={'dropout': key})
            states, table = states.reshape(-1, config.width), params['items']['embedding']
            draws = jax.random.fold_in(key, 1)  # not those of the dropout
            return loss(states, table, batch.targets.ravel(), counts, draws)

        value, gradient = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    return optimizer, step


def validation_ndcg(retriever: TrainedRetriever, split: Split, exclude: bool) -> float | None:
    """Mean NDCG@10 of the validation targets in the whole catalogue; None without any."""
    users = split.users('valid')
    if not len(users):
        return None
    histories = [split.history(user, 'valid') for user in users]
    queries = retriever.user_vectors(histories)
    targets = split.targets('valid')[users]
    ranks = target_ranks(queries, retriever.item_vectors, targets, histories, exclude)
    return float(ndcg(ranks, 10).mean())


def _validations_since_best(log: list[dict[str, Any]]) -> int:
    """0 if the last validation is the best one, or if there is nothing to go by."""
    scores = [row['NDCG@10'] for row in log]
    if not scores or None in scores:
        return 0
    return len(scores) - 1 - scores.index(max(scores))


def _note(log: list[dict[str, Any]]) -> str:
    if not log:
        return ''
    last = log[-1]
    note = f'epoch {last["epoch"]}, loss {last["loss"]:.3f}'
    if last['NDCG@10'] is None:
        return note
    best = max(row['NDCG@10'] for row in log)
    return f'{note}, validation NDCG@10 {last["NDCG@10"]:.4f} (best {best:.4f})'


class _State(NamedTuple):
    params: Params
    moments: optax.OptState
    best: Params  # on the host: the step donates the others


def _on_host(params: Params) -> Params:
    return jax.tree.map(np.array, params)


def _identity(split: Split, items: int, config: ConfigDict, seed: int) -> str:
    """A hash of all that the training depends on."""
    fields = {name: config[name] for name in FIELDS}
    digest = hashlib.sha256(json.dumps([items, seed, fields], sort_keys=True).encode())
    for array in (split.offsets, split.items, split.train_end, split.valid_at):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _write_checkpoint(
    path: epath.Path, identity: str, state: _State, log: list[dict[str, Any]]
) -> None:
    leaves = {f'leaf_{i}': np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    about = json.dumps({'identity': identity, 'log': log})
    storage.write_arrays(path, about=np.array(about), **leaves)


def _read_checkpoint(
    path: epath.Path, identity: str, like: _State
) -> tuple[_State, list[dict[str, Any]]] | None:
    """None where there is none, or where it belongs to another training."""
    if not path.exists():
        return None
    stored = storage.read_arrays(path)
    about = json.loads(str(stored['about']))
    if about['identity'] != identity:
        logging.info('%s belongs to another training and is not used', path)
        return None
    leaves, tree = jax.tree.flatten(like)
    state = jax.tree.unflatten(tree, [stored[f'leaf_{i}'] for i in range(len(leaves))])
    return state, about['log']
