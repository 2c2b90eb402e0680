"""Training throughput of SASRec here and in PyTorch, on the same two cores.

    python benchmarks/sasrec_torch.py --data=ml-1m.zip --torch-python=torch/bin/python

Both sides have the same blocks, shapes, full cross-entropy and Adam; before anything is timed, loss
and gradient are compared from equal parameters, without dropout. PyTorch trains on one history a
row, padded on the right so that its causal attention needs no mask, and on the packed rows of
palr_jax under a block mask; in float32 and in bfloat16 (autocast), eager and compiled. The best way
of each layout and precision is then timed in turns with palr_jax, which computes in float32.

Without --data, histories as long as those of MovieLens-1M are made up. The interpreter of
--torch-python needs PyTorch and NumPy alone (and a C++ compiler, or nothing is compiled); palr_jax
runs in the one that runs this script. All steps of all systems learn from about as many items.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sides import Side, report, serve

WIDTH, BLOCKS, HEADS, DROPOUT = 64, 2, 2, 0.2
LEARNING_RATE, BETAS = 1e-3, (0.9, 0.98)
TOLERANCE = 1e-4
FIELDS = ('ids', 'targets', 'positions', 'segments')  # [N, T] each, as palr_jax packs its rows
LAYOUTS = ('packed', 'padded')
OURS = 'palr_jax, packed, float32'

# Items in the training part of a user of MovieLens-1M (5-core, leave-one-out), by quantile.
QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
LENGTHS = (16, 25, 42, 94, 205, 398, 904, 2275)
USERS, ITEMS = 6040, 3416


def palr_jax_step(items: int, length: int, dropout: float) -> tuple[Callable, Callable]:
    """Of the trainer: params -> moments, and (params, moments, batch, key) -> the same and loss."""
    import jax.numpy as jnp

    from palr_jax.retrieval.losses import Loss
    from palr_jax.retrieval.sasrec import SasrecConfig
    from palr_jax.retrieval.train import Rows, make_step

    config = SasrecConfig('sasrec', items, WIDTH, BLOCKS, HEADS, length)
    optimizer, step = make_step(config, Loss('full_ce'), LEARNING_RATE, dropout)
    counts = jnp.zeros(items)  # of training events, which the full cross-entropy does not use

    def adapted(params, moments, batch, key):
        return step(params, moments, Rows(**batch), counts, key)

    return optimizer.init, adapted


def jax_side(folder: Path) -> dict[str, Callable]:
    """What the process of palr_jax can be asked for."""
    import jax
    import jax.numpy as jnp
    from flax import traverse_util
    from optax import tree_utils

    rows, flat, items = read(folder)
    length = rows['packed']['ids'].shape[1]
    start, step = palr_jax_step(items, length, DROPOUT)

    def fresh():
        params = traverse_util.unflatten_dict({k: jnp.array(v) for k, v in flat.items()}, sep='/')
        return params, start(params)

    def check(layout: str, size: int, **_) -> dict[str, Any]:
        _, clean = palr_jax_step(items, length, 0.0)
        batch = checked(rows[layout], size)
        _, moments, loss = clean(*fresh(), batch, jax.random.key(0))
        # Adam's first moment after the first step is a tenth of the gradient.
        first = traverse_util.flatten_dict(tree_utils.tree_get(moments, 'mu'), sep='/')
        gradient = {name: np.asarray(leaf) / (1 - BETAS[0]) for name, leaf in first.items()}
        return write_gradient(folder / 'jax.npz', loss, gradient)

    def run(layout: str, size: int, steps: int, seed: int, **_) -> dict[str, Any]:
        params, moments = fresh()
        key = jax.random.key(seed, impl='unsafe_rbg')  # as in the trainer

        def train(batch):
            nonlocal params, moments
            params, moments, loss = step(params, moments, batch, key)
            return loss

        return timed(train, batches(rows[layout], size, steps, seed))

    about = f'JAX {jax.__version__} ({jax.default_backend()})'
    return {'about': lambda: {'version': about}, 'check': check, 'run': run}


def torch_side(folder: Path) -> dict[str, Callable]:
    """What the process of PyTorch can be asked for: a plain SASRec, as fast as CPUs take it."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows, flat, _ = read(folder)

    def encode(p, ids, positions, mask, dropout):
        """[B, T] twice and [B, 1, T, T] or None (causal) -> [B, T, D]."""

        def norm(x, name):
            return F.layer_norm(x, (WIDTH,), p[f'{name}/scale'], p[f'{name}/bias'], 1e-6)

        def linear(x, *names):  # several share one product
            kernel = torch.cat([p[f'{name}/kernel'] for name in names], 1)
            return F.linear(x, kernel.T, torch.cat([p[f'{name}/bias'] for name in names]))

        # Padding reads item 1: no loss is taken there, and no item attends to it.
        x = F.embedding((ids - 1).clamp(min=0), p['items/embedding']) * WIDTH**0.5
        x = F.dropout(x + F.embedding(positions, p['positions/embedding']), dropout)
        for i in range(BLOCKS):
            block = f'block_{i}'
            y = linear(
                norm(x, f'{block}/attention_norm'), *(f'{block}/attention/{n}' for n in 'qkv')
            )
            q, k, v = y.view(*ids.shape, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            y = linear(y.transpose(1, 2).reshape(*ids.shape, WIDTH), f'{block}/attention/o')
            x = x + F.dropout(y, dropout)
            y = F.relu(linear(norm(x, f'{block}/mlp_norm'), f'{block}/mlp/up'))
            x = x + F.dropout(linear(y, f'{block}/mlp/down'), dropout)
        return norm(x, 'final_norm')

    def cross_entropy(states, table, targets):
        """[M, D], [I, D], [M] rows of the table -> mean."""
        return F.cross_entropy(F.linear(states, table), targets)

    ways = {False: (encode, cross_entropy)}
    ways[True] = tuple(torch.compile(part) for part in ways[False])

    def loss_of(p, batch, layout, dropout, precision, compiled):
        encode, cross_entropy = ways[compiled]
        ids, targets, positions, segments = (torch.from_numpy(batch[f]).long() for f in FIELDS)
        mask = None
        if layout == 'packed':
            same = segments[:, None, :, None] == segments[:, None, None, :]
            mask = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
        real = targets.view(-1).nonzero().squeeze(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
            states = encode(p, ids, positions, mask, dropout).reshape(-1, WIDTH)[real]
            return cross_entropy(states, p['items/embedding'], targets.view(-1)[real] - 1)

    def fresh():
        return {name: torch.tensor(leaf, requires_grad=True) for name, leaf in flat.items()}

    def check(layout: str, size: int, precision: str, compiled: bool) -> dict[str, Any]:
        p, batch = fresh(), checked(rows[layout], size)
        loss = loss_of(p, batch, layout, 0.0, precision, compiled)
        loss.backward()
        gradient = {name: leaf.grad.numpy() for name, leaf in p.items()}
        return write_gradient(folder / 'torch.npz', loss.detach(), gradient)

    def run(layout: str, size: int, steps: int, seed: int, precision: str, compiled: bool):
        torch.manual_seed(seed)
        p = fresh()
        adam = torch.optim.Adam(p.values(), lr=LEARNING_RATE, betas=BETAS, fused=True)

        def train(batch):
            loss = loss_of(p, batch, layout, DROPOUT, precision, compiled)
            adam.zero_grad()
            loss.backward()
            adam.step()
            return loss.detach()

        return timed(train, batches(rows[layout], size, steps, seed))

    about = f'PyTorch {torch.__version__}'
    return {'about': lambda: {'version': about}, 'check': check, 'run': run}


def timed(train: Callable, data: Iterator[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Items learned from a second, over all batches; the last loss waits for all that ran."""
    tokens, loss = 0, None
    cpu, began = time.process_time(), time.perf_counter()
    for batch in data:
        tokens += int((batch['targets'] > 0).sum())
        loss = train(batch)
    loss = float(loss)
    seconds = time.perf_counter() - began
    return {
        'tokens_per_second': round(tokens / seconds, 1),
        'tokens_per_core_second': round(tokens / (time.process_time() - cpu), 1),
        'tokens': tokens,
        'loss': round(loss, 4),
    }


def batches(
    rows: dict[str, np.ndarray], size: int, steps: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """`steps` batches of `size` rows, the same for both sides."""
    order = np.random.default_rng(seed).permutation(len(rows['ids']))
    for start in range(0, size * steps, size):
        part = np.take(order, range(start, start + size), mode='wrap')
        yield {name: field[part] for name, field in rows.items()}


def checked(rows: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """A batch of the timed shape; few rows have targets, so that hardly a ReLU's input is near 0.

    Where it is 0 up to rounding, two right sides may differ in a token's whole gradient.
    """
    batch = next(batches(rows, size, 1, seed=0))
    batch['targets'][8:] = 0
    return batch


def write_gradient(path: Path, loss: Any, gradient: dict[str, np.ndarray]) -> dict[str, Any]:
    np.savez(path, **gradient)
    return {'loss': float(loss)}


def read(folder: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], int]:
    """Rows by layout and field, initial parameters by name, and the number of items."""
    with np.load(folder / 'rows.npz') as file:
        rows = {x: {name: file[f'{x}_{name}'] for name in FIELDS} for x in LAYOUTS}
    with np.load(folder / 'parameters.npz') as file:
        flat = dict(file)
    return rows, flat, len(flat['items/embedding'])


def parameters(items: int, length: int) -> dict[str, np.ndarray]:
    """Random leaves by their names in palr_jax, biases and scales too."""
    d, f = WIDTH, 4 * WIDTH
    norm = {'scale': (d,), 'bias': (d,)}
    layers = {'items': {'embedding': (items, d)}, 'positions': {'embedding': (length, d)}}
    layers['final_norm'] = norm
    for block in (f'block_{i}' for i in range(BLOCKS)):
        layers |= {f'{block}/{name}': norm for name in ('attention_norm', 'mlp_norm')}
        layers |= {f'{block}/attention/{n}': {'kernel': (d, d), 'bias': (d,)} for n in 'qkvo'}
        layers[f'{block}/mlp/up'] = {'kernel': (d, f), 'bias': (f,)}
        layers[f'{block}/mlp/down'] = {'kernel': (f, d), 'bias': (d,)}
    rng = np.random.default_rng(0)
    flat = {}
    for layer, leaves in layers.items():
        for leaf, shape in leaves.items():
            size = shape[0] ** -0.5 if leaf == 'kernel' else 0.02
            flat[f'{layer}/{leaf}'] = (leaf == 'scale') + rng.normal(0, size, shape)
    return {name: leaf.astype(np.float32) for name, leaf in flat.items()}


def write_data(folder: Path, data: str | None, users: int, length: int) -> dict[str, Any]:
    """Writes the rows of both layouts and the parameters; says what they are."""
    from palr_jax.config import default_config
    from palr_jax.data import load, make_split
    from palr_jax.data.splits import Split
    from palr_jax.retrieval.train import cut_sequences, pack

    if data:
        config = default_config().data
        config.source, config.path = 'ml1m', data
        source = load(config)
        split, items = make_split(source.interactions, 'leave_one_out'), source.catalogue.items
    else:
        rng, items, none = np.random.default_rng(0), ITEMS, np.full(users, -1, np.int32)
        counts = np.exp(np.interp(rng.random(users), QUANTILES, np.log(LENGTHS))).astype(np.int32)
        events = (1 + items * rng.random(counts.sum()) ** 2).astype(np.int32)  # some are popular
        split = Split(np.append(0, np.cumsum(counts)), events, counts, none, none)
    pieces = cut_sequences(split, length)
    rows = {'packed': pack(pieces, length)._asdict()}
    padded = {name: np.zeros((len(pieces), length), np.int32) for name in FIELDS}
    for row, piece in enumerate(pieces):
        steps = len(piece) - 1
        padded['ids'][row, :steps], padded['targets'][row, :steps] = piece[:-1], piece[1:]
        padded['positions'][row, :steps] = np.arange(steps)[::-1]
        padded['segments'][row, :steps] = 1
    rows['padded'] = padded
    named = {f'{x}_{name}': rows[x][name] for x in LAYOUTS for name in FIELDS}
    np.savez(folder / 'rows.npz', **named)
    np.savez(folder / 'parameters.npz', **parameters(items, length))
    return {
        'data': 'MovieLens-1M' if data else 'made up, lengths of MovieLens-1M',
        'items': items,
        'length': length,
        'rows': {x: len(rows[x]['ids']) for x in LAYOUTS},
        'filled': {x: round(float(np.mean(rows[x]['ids'] > 0)), 4) for x in LAYOUTS},
    }


def difference(folder: Path, losses: tuple[float, float]) -> dict[str, float]:
    """Of the two sides: of the losses, and of the gradients relative to their norm."""
    with np.load(folder / 'jax.npz') as ours, np.load(folder / 'torch.npz') as theirs:
        apart = sum(np.sum((ours[name] - theirs[name]) ** 2) for name in ours)
        norm = sum(np.sum(ours[name] ** 2) for name in ours)
    return {'loss': abs(losses[0] - losses[1]), 'gradient': float(np.sqrt(apart / norm))}


def choose(
    sides: dict[str, Side], sizes: dict[str, int], folder: Path, result: dict[str, Any]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is timed: name -> (side, arguments of its runs); all are compared and warm by then."""
    ours = {'layout': 'packed', 'size': sizes['packed']}
    sides['jax'].ask('run', steps=2, seed=1000, **ours)
    systems = {OURS: ('jax', ours)}
    result |= {'tried': {}, 'differences': {}}
    for layout in LAYOUTS:
        expected = sides['jax'].ask('check', layout=layout, size=sizes[layout])
        for precision in ('float32', 'bfloat16'):
            fastest, best = 0.0, {}
            for compiled in (False, True):
                way = {'layout': layout, 'size': sizes[layout]}
                way |= {'precision': precision, 'compiled': compiled}
                name = f'torch, {layout}, {precision}{", compiled" * compiled}'
                probes = [
                    sides['torch'].ask('run', steps=2, seed=seed, **way)
                    for seed in range(1000, 1004)
                ]
                answer = max(probes, key=lambda probe: probe.get('tokens_per_second', 0))
                result['tried'][name] = answer
                print(f'tried {name}: {answer.get("error") or answer["tokens_per_second"]}')
                if answer.get('tokens_per_second', 0) > fastest:
                    fastest, best, chosen = answer['tokens_per_second'], way, name
            if not best:
                raise SystemExit(f'PyTorch fails: {result["tried"]}')
            found = sides['torch'].ask('check', **best)
            apart = difference(folder, (expected['loss'], found['loss']))
            result['differences'][chosen] = apart
            print(
                f'{chosen}: the same within {apart["loss"]:.1e} (loss), '
                f'{apart["gradient"]:.1e} (gradient)',
                flush=True,
            )
            if precision == 'float32' and max(apart.values()) > TOLERANCE:
                raise SystemExit('The two sides do not compute the same function.')
            systems[chosen] = ('torch', best)
    return systems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', help='ml-1m.zip or its folder')
    parser.add_argument('--torch-python', default=sys.executable, help='interpreter with PyTorch')
    parser.add_argument('--length', type=int, default=200, help='items of a row')
    parser.add_argument('--batch', type=int, default=128, help='histories a step, where padded')
    parser.add_argument('--users', type=int, default=USERS, help='of the made-up histories')
    parser.add_argument('--steps', type=int, default=6, help='steps a run')
    parser.add_argument('--runs', type=int, default=5, help='runs, in turns')
    parser.add_argument('--out', type=Path, help='JSON file of the result')
    arguments = parser.parse_args()

    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = write_data(folder, arguments.data, arguments.users, arguments.length)
        filled = result['filled']
        result['rows_per_step'] = sizes = {
            'packed': max(1, round(arguments.batch * filled['padded'] / filled['packed'])),
            'padded': arguments.batch,
        }
        sides = {
            'jax': Side('jax', sys.executable, __file__, folder),
            'torch': Side('torch', arguments.torch_python, __file__, folder),
        }
        result['versions'] = [side.ask('about')['version'] for side in sides.values()]
        systems = choose(sides, sizes, folder, result)
        result['systems'] = {name: {'runs': []} for name in systems}
        for number in range(arguments.runs):
            for system, (side, about) in systems.items():
                answer = sides[side].ask('run', steps=arguments.steps, seed=number, **about)
                result['systems'][system]['runs'].append(answer)
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=1) + '\n')
        for side in sides.values():
            side.close()
    report(result, OURS, 'items/s')
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--side']:
        serve({'jax': jax_side, 'torch': torch_side}[sys.argv[2]](Path(sys.argv[3])))
    else:
        main()
