"""Ranking with SmolLM2-135M here and with transformers, on the same two cores, users and prompts.

    python benchmarks/ranking_speed.py --data=ml-1m.zip --torch-python=torch/bin/python [--sweep]

Every side gives the log-likelihood of 50 titles after a prompt of 20 history titles, in float32:

- palr_jax: one pass a user, in batches of the best size; once more for each lower
  model.matmul_precision, by which a CPU with matrix units multiplies bfloat16 (three products of
  halves for one, or one of rounded factors);
- transformers, whole prompt: every title with its prompt, in batches of 10, one user;
- transformers, cached prompt: the prompt once, its cache repeated, in batches of the best size.

Neither of transformers' batches has a mask (padding at the right is behind every token that
counts), titles of one length stand together, and logits are made for the answers alone.

The floor is the time of the multiply-adds that one pass needs, as plain matrix products in the
process of palr_jax: no norm, softmax, rotation or padding. Before anything is timed all
log-likelihoods are compared; those of rounded factors are told, and not held to the tolerance.
--sweep times palr_jax and its floor over the number of candidates and the length of the history
too, and draws them where --picture says.

The interpreter of --torch-python needs torch and transformers alone.
"""

import argparse
import functools
import inspect
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sides import Side, movielens, serve

HISTORY, CANDIDATES = 20, 50
SWEEP = {
    'candidates': [(HISTORY, count) for count in (1, 5, 10, 20, 50, 100, 200)],
    'history': [(length, CANDIDATES) for length in (0, 5, 10, 20, 50)],
}
POPULAR = 500  # candidates are drawn from so many of the most popular items
TOLERANCE = 2e-4  # of a title's log-likelihood, relative
WHOLE_BATCH = 10
OURS, FLOOR = 'palr_jax', 'floor'
LOWER = {'palr_jax, high': 'high', 'palr_jax, default': 'default'}  # model.matmul_precision
WHOLE, CACHED = 'transformers, whole prompt', 'transformers, cached prompt'
ASKED = {WHOLE: '>= 15', CACHED: '>= 2', FLOOR: '>= 0.4'}  # seconds of it over palr_jax's
INK, FAINT = '#222222', '#dddddd'


def jax_side(folder: Path) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp

    from palr_jax.config import default_config
    from palr_jax.llama.load import open_checkpoint
    from palr_jax.llama.model import LOGIT_CHUNK
    from palr_jax.ranking.score import (
        Query,
        distinct_answers,
        make_scorer,
        padding_share,
        plan_batches,
        score_queries,
        shared_beginning,
    )

    checkpoint = open_checkpoint(folder / 'model')
    model = checkpoint.config
    params = jax.tree.map(jnp.asarray, checkpoint.params('float32'))
    scorer = make_scorer(model, None)
    defaults = default_config().ranking

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def multiply(times: int, left: tuple[int, ...], right: tuple[int, ...]) -> jax.Array:
        """The same product `times` times in a row: its memory is taken once, as in the model."""

        def again(_, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            a, y = state
            # One number of the last product, so that no product is left out.
            a = jax.lax.dynamic_update_slice(a, y[(slice(1),) * y.ndim], (0,) * y.ndim)
            return a, a @ b

        b = jnp.full(right, 1 / left[-1])
        start = jnp.ones(left), jnp.ones((*left[:-1], right[-1]))
        return jax.lax.fori_loop(0, times, again, start)[1][..., 0, 0]

    def queries(history: int, candidates: int) -> list[Query]:
        return [
            Query(np.array(prompt), tuple(map(np.array, answers)))
            for prompt, answers in read(folder, history, candidates)
        ]

    def arguments(batch_size: int) -> dict[str, int]:
        return {
            'batch_size': batch_size,
            'row_length': defaults.row_length,
            'max_shapes': defaults.max_shapes,
            'max_positions': model.max_positions,
        }

    def check(
        history: int, candidates: int, batch_size: int, precision: str = 'highest'
    ) -> dict[str, Any]:
        """Compiles the shapes too."""
        asked = queries(history, candidates)
        sums = np.empty((len(asked), candidates))
        with jax.default_matmul_precision(precision):
            for indices, values in score_queries(scorer, params, asked, **arguments(batch_size)):
                sums[indices] = values
        plan = plan_batches(asked, **arguments(batch_size))
        return {'sums': sums.tolist(), 'padding': round(padding_share(asked, plan), 4)}

    def run(
        history: int, candidates: int, batch_size: int, precision: str = 'highest'
    ) -> dict[str, Any]:
        asked = queries(history, candidates)
        began = time.perf_counter()
        with jax.default_matmul_precision(precision):
            for _ in score_queries(scorer, params, asked, **arguments(batch_size)):
                pass
        return {'seconds_per_user': (time.perf_counter() - began) / len(asked)}

    def products(query: Query) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """(how often, shape of the left factor, of the right one) of all that one pass needs.

        A token's keys are as many as it attends to on average. What all titles begin with is read
        once, behind the prompt, and their first token after it is scored by one position.
        """
        distinct, _ = distinct_answers(query)
        begin = shared_beginning(distinct)
        answers = [len(answer) - begin - 1 for answer in distinct]
        prompt, rest = len(query.prompt) + begin, sum(answers)
        tokens = prompt + rest
        pairs = prompt * (prompt + 1) // 2 + prompt * rest
        pairs += sum(n * (n + 1) // 2 for n in answers)
        keys = round(pairs / tokens)
        K, E = model.kv_heads, model.head_dim
        G = model.heads // K
        inner = model.heads * E
        for inputs, outputs, each in (
            (model.width, inner, 1),  # q
            (model.width, K * E, 2),  # k, v
            (inner, model.width, 1),  # o
            (model.width, model.hidden, 2),  # gate, up
            (model.hidden, model.width, 1),  # down
        ):
            yield each * model.layers, (tokens, inputs), (inputs, outputs)
        yield model.layers, (K, G * tokens, E), (K, E, keys)
        yield model.layers, (K, G * tokens, keys), (K, keys, E)
        scored = begin + 1 + rest
        chunks = -(-scored // LOGIT_CHUNK)
        yield chunks, (-(-scored // chunks), model.width), (model.width, model.vocab_size)

    def flops(history: int, candidates: int) -> dict[str, Any]:
        counts = [
            2 * times * int(np.prod(left)) * right[-1]
            for query in queries(history, candidates)
            for times, left, right in products(query)
        ]
        return {'per_user': sum(counts) / len(queries(history, candidates))}

    def floor(history: int, candidates: int) -> dict[str, Any]:
        """Its first call compiles."""
        asked = queries(history, candidates)
        seconds = 0.0
        for query in asked:
            for times, left, right in products(query):
                began = time.perf_counter()
                multiply(times, left, right).block_until_ready()
                seconds += time.perf_counter() - began
        return {'seconds_per_user': seconds / len(asked)}

    about = f'JAX {jax.__version__} ({jax.default_backend()})'
    return {
        'about': lambda: {'version': about},
        'check': check,
        'run': run,
        'flops': flops,
        'floor': floor,
    }


def torch_side(folder: Path) -> dict[str, Callable]:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / 'model', dtype=torch.float32, attn_implementation='sdpa'
    ).eval()
    known = inspect.signature(model.forward).parameters
    cache_name = 'cache' if 'cache' in known else 'past_key_values'

    def log_likelihood(logits: torch.Tensor, answers: list[list[int]]) -> torch.Tensor:
        """[B, n, V] logits, of the answer's tokens from the first or later ones on -> [B] sums."""
        targets = torch.full(logits.shape[:2], -100)
        for row, answer in enumerate(answers):
            targets[row, : len(answer)] = torch.tensor(answer)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction='none'
        )
        return -losses.sum(1)

    def padded(rows: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def whole(prompt: list[int], answers: list[list[int]]) -> torch.Tensor:
        inputs = padded([prompt + answer[:-1] for answer in answers])
        kept = inputs.shape[1] - len(prompt) + 1
        output = model(input_ids=inputs, use_cache=False, logits_to_keep=kept)
        return log_likelihood(output.logits, answers)

    def whole_prompt(prompt: list[int], answers: list[list[int]], size: int) -> np.ndarray:
        return in_batches(answers, size, lambda part: whole(prompt, part))

    def cached_prompt(prompt: list[int], answers: list[list[int]], size: int) -> np.ndarray:
        output = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        first = output.logits[0, -1].log_softmax(-1)
        layers = [(layer.keys, layer.values) for layer in output[cache_name].layers]

        def rest(part: list[list[int]]) -> torch.Tensor:
            sums = first[[answer[0] for answer in part]]
            if max(map(len, part)) == 1:
                return sums
            shape = (len(part), -1, -1, -1)
            cache = transformers.DynamicCache(
                [(keys.expand(shape), values.expand(shape)) for keys, values in layers]
            )
            inputs = padded([answer[:-1] for answer in part])
            logits = model(input_ids=inputs, **{cache_name: cache}).logits
            return sums + log_likelihood(logits, [answer[1:] for answer in part])

        return in_batches(answers, size, rest)

    ways = {WHOLE: whole_prompt, CACHED: cached_prompt}

    def check(way: str, size: int, user: int) -> dict[str, Any]:
        query = read(folder, HISTORY, CANDIDATES)[user]
        return {'sums': ways[way](*query, size).tolist()}

    def run(way: str, size: int, users: list[int]) -> dict[str, Any]:
        queries = read(folder, HISTORY, CANDIDATES)
        began = time.perf_counter()
        for user in users:
            ways[way](*queries[user], size)
        return {'seconds_per_user': (time.perf_counter() - began) / len(users)}

    about = f'PyTorch {torch.__version__}, transformers {transformers.__version__}'
    return {'about': lambda: {'version': about}, 'check': check, 'run': run}


def in_batches(
    answers: list[list[int]], size: int, score: Callable[[list[list[int]]], Any]
) -> np.ndarray:
    """[C] sums of the answers, `size` at a time, those of similar length together."""
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    sums = np.empty(len(answers))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        sums[part] = score([answers[i] for i in part]).numpy()
    return sums


def read(folder: Path, history: int, candidates: int) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt, answers) in tokens of every user."""
    return json.loads((folder / f'{history}_{candidates}.json').read_text())


def write_inputs(
    folder: Path, data: str, users: int, shapes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """The model as a Hugging Face folder and the users' queries of every shape; says what it is."""
    from palr_jax.project import order_seed
    from palr_jax.ranking.users import make_query
    from palr_jax.retrieval import fit_popularity

    # No history is cut, however long the list of candidates.
    project = movielens(folder, data, length=1 << 20)
    config, catalogue, split = project.config, project.dataset.catalogue, project.dataset.split
    rng = np.random.default_rng(0)
    longest = max(history for history, _ in SWEEP['history'])  # the same users in every run
    able = [u for u in split.users('test') if len(split.history(u, 'test')) >= longest]
    popular = 1 + np.argsort(-fit_popularity(split, catalogue.items).counts, kind='stable')
    asked: dict[tuple[int, int], list] = {shape: [] for shape in shapes}
    for user in rng.permutation(able)[:users]:
        seen = split.history(user, 'test')
        unseen = popular[~np.isin(popular, seen)][:POPULAR]
        items = rng.permutation(unseen)
        (profile,) = project.profiles([seen.tolist()])
        for history, candidates in shapes:
            config.prompts.history = history
            query, _ = make_query(
                project.encoder,
                config.prompts,
                seen,
                profile,
                items[:candidates],
                order_seed(config, user),
            )
            answers = [answer.tolist() for answer in query.candidates]
            asked[history, candidates].append([query.prompt.tolist(), answers])
    for (history, candidates), queries in asked.items():
        (folder / f'{history}_{candidates}.json').write_text(json.dumps(queries))
    queries = asked[HISTORY, CANDIDATES]
    return {
        'model': config.model.path,
        'data': project.dataset.record['name'],
        'users': len(queries),
        'prompt_tokens': [len(prompt) for prompt, _ in queries],
        'answer_tokens': [sum(map(len, answers)) for _, answers in queries],
    }


def compare(sides: dict[str, Side], user: int, batch_size: int) -> dict[str, float]:
    """The largest relative differences of a title's log-likelihood between two of the ways."""
    shape = {'history': HISTORY, 'candidates': CANDIDATES}
    found = {}
    for name, precision in {OURS: 'highest', **LOWER}.items():
        answer = sides['jax'].ask('check', batch_size=batch_size, precision=precision, **shape)
        found[name] = answer['sums'][user]
    for way, size in ((WHOLE, WHOLE_BATCH), (CACHED, CANDIDATES)):
        found[way] = sides['torch'].ask('check', way=way, size=size, user=user)['sums']
    return {
        f'{a} - {b}': float(np.abs(np.subtract(found[a], found[b]) / found[b]).max())
        for a, b in itertools.combinations(found, 2)
    }


def fastest(
    side: Side, sizes: Sequence[int], name: str, tried: dict[str, Any], **about: Any
) -> int:
    """The size of batches with the least time a user in one warm run each."""
    seconds = {}
    for size in sizes:
        if name == OURS:
            side.ask('check', batch_size=size, **about)
            answer = side.ask('run', batch_size=size, **about)
        else:
            answer = side.ask('run', size=size, **about)
        seconds[size] = tried[f'{name}, batches of {size}'] = answer['seconds_per_user']
        print(f'tried {name}, batches of {size}: {seconds[size]:.2f} s a user', flush=True)
    return min(seconds, key=seconds.get)


def measure(sides: dict[str, Side], arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Adds the alternating runs of all systems to `result`."""
    shape = {'history': HISTORY, 'candidates': CANDIDATES}
    prompts = result['prompt_tokens']
    users = list(range(len(prompts)))
    median = int(np.argsort(prompts)[len(prompts) // 2])  # the whole-prompt way's one user
    result['tried'] = tried = {}
    ours = fastest(sides['jax'], arguments.batches, OURS, tried, **shape)
    result['difference'] = compare(sides, median, ours)
    print(f'log-likelihoods differ by at most, of their size: {result["difference"]}', flush=True)
    rounded = next(name for name, precision in LOWER.items() if precision == 'default')
    held = [d for pair, d in result['difference'].items() if rounded not in pair]
    if not max(held) <= TOLERANCE:
        raise SystemExit('The sides do not compute the same function.')
    cached = fastest(
        sides['torch'], arguments.cached_batches, CACHED, tried, way=CACHED, users=[median]
    )
    sides['jax'].ask('floor', **shape)
    systems = {
        OURS: ('jax', 'run', shape | {'batch_size': ours}, arguments.runs),
        **{
            name: (
                'jax',
                'run',
                shape | {'batch_size': ours, 'precision': precision},
                arguments.runs,
            )
            for name, precision in LOWER.items()
        },
        FLOOR: ('jax', 'floor', shape, arguments.runs),
        CACHED: (
            'torch',
            'run',
            {'way': CACHED, 'size': cached, 'users': users},
            arguments.runs,
        ),
        WHOLE: (
            'torch',
            'run',
            {'way': WHOLE, 'size': WHOLE_BATCH, 'users': [median]},
            arguments.slow_runs,
        ),
    }
    result['padding'] = sides['jax'].ask('check', batch_size=ours, **shape)['padding']
    result['flops_per_user'] = sides['jax'].ask('flops', **shape)['per_user']
    result['systems'] = {
        name: {'arguments': about, 'runs': []} for name, (_, _, about, _) in systems.items()
    }
    for number in range(max(arguments.runs, arguments.slow_runs)):
        for name, (side, question, about, runs) in systems.items():
            if number < runs:
                answer = sides[side].ask(question, **about)
                result['systems'][name]['runs'].append(answer['seconds_per_user'])
                print(f'{number + 1}: {name}: {answer["seconds_per_user"]:.3f} s', flush=True)


def sweep(side: Side, arguments: argparse.Namespace, batch_size: int) -> list[dict[str, Any]]:
    """Seconds a user of palr_jax and of its floor for every shape of the sweep."""
    rows = []
    for history, candidates in dict.fromkeys(SWEEP['candidates'] + SWEEP['history']):
        shape = {'history': history, 'candidates': candidates}
        side.ask('check', batch_size=batch_size, **shape)
        side.ask('floor', **shape)
        runs: dict[str, list[float]] = {OURS: [], FLOOR: []}
        for _ in range(arguments.runs):
            answer = side.ask('run', batch_size=batch_size, **shape)
            runs[OURS].append(answer['seconds_per_user'])
            runs[FLOOR].append(side.ask('floor', **shape)['seconds_per_user'])
        rows.append(shape | {'flops': side.ask('flops', **shape)['per_user'], 'runs': runs})
        print(
            f'{history} titles of history, {candidates} candidates: '
            f'{statistics.median(runs[OURS]):.3f} s, floor {statistics.median(runs[FLOOR]):.3f} s, '
            f'{rows[-1]["flops"] / 1e9:.0f} GFLOP',
            flush=True,
        )
    return rows


def report(result: dict[str, Any]) -> None:
    """Adds the medians and the ratios to palr_jax's, and prints them."""
    systems = result['systems']
    for system in systems.values():
        system['seconds_per_user'] = statistics.median(system['runs'])
    ours = systems[OURS]['seconds_per_user']
    print(
        f'\n{"system":32} {"s a user":>9} {"lowest":>9} {"highest":>9} {"it / " + OURS:>13} asked'
    )
    for name, system in systems.items():
        system['ratio'] = round(system['seconds_per_user'] / ours, 3)
        print(
            f'{name:32} {system["seconds_per_user"]:9.3f} {min(system["runs"]):9.3f} '
            f'{max(system["runs"]):9.3f} {system["ratio"]:13.2f} {ASKED.get(name, "")}'
        )
    for name in LOWER:
        seconds = systems[name]['seconds_per_user']
        cached, whole = (systems[way]['seconds_per_user'] / seconds for way in (CACHED, WHOLE))
        print(f'against {name}: the cached prompt {cached:.2f}, the whole prompt {whole:.1f} times')
    speed = result['flops_per_user'] / systems[FLOOR]['seconds_per_user'] / 1e9
    print(
        f'palr_jax takes {1 / systems[FLOOR]["ratio"]:.2f} times the floor '
        f'({result["flops_per_user"] / 1e9:.0f} GFLOP a user at {speed:.0f} GFLOP/s); '
        f'{100 * result["padding"]:.0f} % of its tokens are padding'
    )


def picture(rows: list[dict[str, Any]]) -> bytes:
    """PNG: seconds a user over candidates and over history, measured and the floor's prediction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    lines = ((OURS, '#d55e00', 'o', '-'), (FLOOR, '#0072b2', 's', '--'))
    found = {(row['history'], row['candidates']): row['runs'] for row in rows}
    for panel, (axis, shapes) in zip(figure.subplots(1, 2), SWEEP.items()):
        places = [shape[axis == 'candidates'] for shape in shapes]
        for name, colour, marker, style in lines:
            seconds = [statistics.median(found[shape][name]) for shape in shapes]
            label = name if name == OURS else 'its matrix products alone'
            panel.plot(places, seconds, style, color=colour, marker=marker, label=label)
        panel.set_ylim(0)
        panel.set_xlim(0)
        panel.grid(color=FAINT, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[['top', 'right']].set_visible(False)
        panel.set_ylabel('seconds a user', color=INK)
        panel.legend(frameon=False)
        panel.set_xlabel(
            f'candidates ({HISTORY} titles of history)'
            if axis == 'candidates'
            else f'titles of history ({CANDIDATES} candidates)',
            color=INK,
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [positive(number) for number in text.split(',')]

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise ValueError(text)  # argparse tells of it
        return number

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True, help='ml-1m.zip or its folder')
    parser.add_argument('--torch-python', default=sys.executable, help='with transformers')
    parser.add_argument('--users', type=positive, default=4, help='who are ranked in a run')
    parser.add_argument('--batches', type=numbers, default=[1, 2, 4], help='users, tried here')
    parser.add_argument(
        '--cached-batches', type=numbers, default=[5, 10, 25, 50], help='titles, tried there'
    )
    parser.add_argument('--runs', type=positive, default=5, help='runs, in turns')
    parser.add_argument('--slow-runs', type=positive, default=2, help='of the whole-prompt way')
    parser.add_argument('--sweep', action='store_true', help='over candidates and history too')
    parser.add_argument('--out', type=Path, help='JSON file of the result')
    parser.add_argument('--picture', type=Path, help='PNG of the sweep')
    arguments = parser.parse_args()

    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    shapes = {(HISTORY, CANDIDATES)}
    if arguments.sweep:
        shapes |= {shape for part in SWEEP.values() for shape in part}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = write_inputs(folder, arguments.data, arguments.users, sorted(shapes))
        sides = {
            'jax': Side('jax', sys.executable, __file__, folder),
            'torch': Side('torch', arguments.torch_python, __file__, folder),
        }
        result['versions'] = [side.ask('about')['version'] for side in sides.values()]
        measure(sides, arguments, result)
        sides['torch'].close()
        report(result)
        if arguments.sweep:
            size = result['systems'][OURS]['arguments']['batch_size']
            result['sweep'] = sweep(sides['jax'], arguments, size)
        sides['jax'].close()
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + '\n')
    if arguments.picture and arguments.sweep:
        arguments.picture.write_bytes(picture(result['sweep']))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--side']:
        serve({'jax': jax_side, 'torch': torch_side}[sys.argv[2]](Path(sys.argv[3])))
    else:
        main()
