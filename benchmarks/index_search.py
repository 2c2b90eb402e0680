"""Searching item vectors: the index of palr_jax, ScaNN tuned by hand, exact search and faiss.

    python benchmarks/index_search.py --faiss-python=faiss/bin/python --out=index_search.json

Unit vectors of 64 dimensions, 50 neighbours by dot product, 1,000 queries in one batch, two cores.
`clustered` vectors (and queries) come from sqrt(I) normal distributions as wide as their centres
lie apart, `random` ones from one, which is the hardest case: no index can leave much out. Each
method runs in a process of its own over a grid of settings; the table shows the fastest that reach
a recall of .95 and .98, the JSON file every setting. Memory is what the process gains while the
index is built; the vectors that it is built from are not counted.

A run that was stopped continues: what --out holds is not measured again. The interpreter of
--faiss-python needs faiss-cpu and NumPy alone; where it has no faiss, those rows are left out.
"""

import argparse
import functools
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, QUERIES, K, CORES = 64, 1000, 50, 2
TARGETS = (0.95, 0.98)
ENOUGH = 0.995  # no setting is tried that would find more

# Settings by name, from fast to thorough; a call searches all queries -> rows [QUERIES, K].
Line = dict[str, Callable[[], np.ndarray]]


def make_vectors(kind: str, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [I, D] and queries [QUERIES, D]."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((items + QUERIES, WIDTH), np.float32)
    if kind == 'clustered':
        centres = rng.standard_normal((round(math.sqrt(items)), WIDTH), np.float32)
        vectors += centres[rng.integers(len(centres), size=len(vectors))]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[:items], vectors[items:]


def palr_jax(vectors: np.ndarray, queries: np.ndarray, backend: str) -> list[Line]:
    from palr_jax.retrieval.index import build_index

    index = build_index(vectors, backend)
    return [{index.backend: lambda: index.search(queries, K)[0] - 1}]


def scann(vectors: np.ndarray, queries: np.ndarray) -> list[Line]:
    from scann import scann_ops_pybind

    leaves = round(math.sqrt(len(vectors)))
    searcher = (
        scann_ops_pybind.builder(vectors, K, 'dot_product')
        .tree(leaves, leaves, training_sample_size=min(len(vectors), 250_000))
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(K)
        .build()
    )
    shares = [round(share * leaves) for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)]
    few = [count for count in (1, 2, 3, 4, 6, 8, 12, 20, 30) if count < shares[0]]

    def search(reorder: int, count: int) -> np.ndarray:
        return searcher.search_batched_parallel(queries, K, reorder, count)[0]

    return [
        {
            f'{count} leaves of {leaves}, reorder {reorder}': functools.partial(
                search, reorder, count
            )
            for count in few + shares
        }
        for reorder in (100, 150, 200, 300, 600, 1000, 1500)
    ]


def faiss_ivf(
    vectors: np.ndarray, queries: np.ndarray, lists_to_root: int, compressed: bool
) -> list[Line]:
    """Inverted lists of vectors, or of 4-bit codes whose best are scored again exactly."""
    import faiss

    faiss.omp_set_num_threads(CORES)
    lists = round(lists_to_root * math.sqrt(len(vectors)))
    spec = f'IVF{lists},' + ('PQ32x4fs,RFlat' if compressed else 'Flat')
    index = faiss.index_factory(WIDTH, spec, faiss.METRIC_INNER_PRODUCT)
    inner = faiss.extract_index_ivf(index)
    inner.cp.max_points_per_centroid = 64  # of the default of 256, training takes minutes
    index.train(vectors)
    index.add(vectors)

    def search(probes: int, factor: int) -> np.ndarray:
        settings = faiss.SearchParametersIVF(nprobe=probes)
        if compressed:
            settings = faiss.IndexRefineSearchParameters(
                k_factor=factor, base_index_params=settings
            )
        return index.search(queries, K, params=settings)[1]

    probes = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512) if n < lists / 2]
    probes += [round(lists * share) for share in (0.5, 0.7, 1)]
    return [
        {
            f'nprobe {n} of {lists}' + f', refine {factor * K}' * compressed: functools.partial(
                search, n, factor
            )
            for n in probes
        }
        for factor in ((2, 4, 8, 16, 32) if compressed else (1,))
    ]


def faiss_hnsw(vectors: np.ndarray, queries: np.ndarray) -> list[Line]:
    import faiss

    faiss.omp_set_num_threads(CORES)
    index = faiss.IndexHNSWFlat(WIDTH, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 40
    index.add(vectors)

    def search(ef: int) -> np.ndarray:
        settings = faiss.SearchParametersHNSW(efSearch=ef)
        return index.search(queries, K, params=settings)[1]

    return [
        {f'efSearch {ef}': functools.partial(search, ef) for ef in (50, 100, 200, 400, 800, 1600)}
    ]


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], list[Line]]] = {
    'exact': functools.partial(palr_jax, backend='exact'),  # first: the truth for the others
    'palr_jax': functools.partial(palr_jax, backend='auto'),
    'scann': scann,
    'faiss ivf': functools.partial(faiss_ivf, lists_to_root=1, compressed=False),
    'faiss ivf, 4 x lists': functools.partial(faiss_ivf, lists_to_root=4, compressed=False),
    'faiss ivf-pq': functools.partial(faiss_ivf, lists_to_root=1, compressed=True),
    'faiss hnsw': faiss_hnsw,
}


def measure(method: str, folder: Path) -> dict[str, Any]:
    """Builds and searches in this process."""
    vectors, queries = np.load(folder / 'vectors.npy'), np.load(folder / 'queries.npy')
    METHODS[method](vectors[:1000], queries)  # imports the library and starts its threads
    gc.collect()
    before, began, cpu = anonymous_mib(), time.perf_counter(), time.process_time()
    lines = METHODS[method](vectors, queries)
    result = {
        'build_seconds': round(time.perf_counter() - began, 2),
        'build_core_seconds': round(time.process_time() - cpu, 2),
        'mib': round(anonymous_mib() - before),
        'settings': [],
    }
    truth = folder / 'truth.npy'
    for line in lines:
        reached = 0.0
        for name, search in line.items():
            rows = search()
            if method == 'exact':
                np.save(truth, rows)
            hits = [np.isin(best, found).mean() for best, found in zip(np.load(truth), rows)]
            recall = float(np.mean(hits))
            timing = {'setting': name, 'recall': round(recall, 4)} | rates(search)
            result['settings'].append(timing)
            if recall > ENOUGH or (reached > 0.9 and recall - reached < 1e-4):
                break
            reached = recall
    return result


def rates(search: Callable[[], np.ndarray]) -> dict[str, int]:
    """Queries a second and a second of one core, of the best of several searches."""
    seconds, cores = [], []
    while sum(seconds) < 0.3 or (len(seconds) < 3 and sum(seconds) < 3):
        began, cpu = time.perf_counter(), time.process_time()
        search()
        seconds.append(time.perf_counter() - began)
        cores.append(time.process_time() - cpu)
    return {
        'queries_per_second': round(QUERIES / min(seconds)),
        'queries_per_core_second': round(QUERIES / min(cores)),
    }


def anonymous_mib() -> float:
    """MiB of anonymous pages now."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('RssAnon'):
            return int(line.split()[1]) / 1024
    raise SystemExit('/proc/self/status has no RssAnon: this needs Linux.')


def measure_elsewhere(method: str, folder: Path, python: str) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [python, __file__, '--measure', method, str(folder)]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'OMP_WAIT_POLICY': 'passive'}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / 'result.json').read_text())


def fastest(settings: list[dict[str, Any]], recall: float) -> dict[str, Any] | None:
    enough = [setting for setting in settings if setting['recall'] >= recall]
    return max(enough, key=lambda setting: setting['queries_per_second'], default=None)


def report(name: str, cells: dict[str, dict[str, Any]]) -> None:
    print(f'\n{name}')
    print(f'{"":21}{"build s":>8}{"MiB":>6}  {"recall":8}{"queries/s":>9}{"a core":>8}  setting')
    for method, cell in cells.items():
        start = f'{method:21}{cell["build_seconds"]:8.1f}{cell["mib"]:6}'
        shown = [(f'>= {target}', fastest(cell['settings'], target)) for target in TARGETS]
        if shown[0][1] == shown[1][1] is not None:
            shown = shown[1:]
        for target, setting in shown:
            if setting is None:
                best = max(setting['recall'] for setting in cell['settings'])
                print(f'{start}  {target:8} not reached; the highest is {best:.3f}')
            else:
                print(
                    f'{start}  {setting["recall"]:<8.3f}{setting["queries_per_second"]:9,}'
                    f'{setting["queries_per_core_second"]:8,}  {setting["setting"]}'
                )
            start = ' ' * len(start)
    for target in TARGETS:
        found = {m: fastest(cell['settings'], target) for m, cell in cells.items()}
        best = {
            side: max(s['queries_per_second'] for m, s in found.items() if s and side in m)
            for side in ('scann', 'faiss')
            if any(s and side in m for m, s in found.items())
        }
        if len(best) == 2:
            ratio = best['scann'] / best['faiss']
            print(f'recall >= {target}: ScaNN has {ratio:.2f} times the queries of the best faiss')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--items', default='10000,100000,1000000', help='sizes, comma-separated')
    parser.add_argument('--kinds', default='clustered,random')
    parser.add_argument('--faiss-python', default=sys.executable, help='interpreter with faiss')
    parser.add_argument('--out', type=Path, help='JSON file of the results, continued if it exists')
    arguments = parser.parse_args()

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    has_faiss = subprocess.run(
        [arguments.faiss_python, '-c', 'import faiss'], stderr=subprocess.DEVNULL, check=False
    )
    methods = [m for m in METHODS if not m.startswith('faiss') or has_faiss.returncode == 0]
    out, results = arguments.out, {}
    if out and out.exists():
        results = json.loads(out.read_text())
    for items in map(int, arguments.items.split(',')):
        for kind in arguments.kinds.split(','):
            name = f'{kind}, {items:,} items'
            cells = results.setdefault(name, {})
            missing = [method for method in methods if method not in cells]
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                if missing:
                    vectors, queries = make_vectors(kind, items)
                    np.save(folder / 'vectors.npy', vectors)
                    np.save(folder / 'queries.npy', queries)
                    del vectors
                    missing = ['exact', *(m for m in missing if m != 'exact')]
                for method in missing:
                    python = arguments.faiss_python if 'faiss' in method else sys.executable
                    cells[method] = measure_elsewhere(method, folder, python)
                    if out:
                        out.write_text(json.dumps(results, indent=1) + '\n')
            report(name, {method: cells[method] for method in methods})


if __name__ == '__main__':
    if sys.argv[1:2] == ['--measure']:
        result = measure(sys.argv[2], Path(sys.argv[3]))
        (Path(sys.argv[3]) / 'result.json').write_text(json.dumps(result))
    else:
        main()
