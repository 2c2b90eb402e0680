"""A random LLaMA-7B-shaped checkpoint: written to disk, loaded, one user ranked, peak memory told.

    python benchmarks/rank_7b.py --folder=llama7b [--layers=32] [--dtype=bfloat16] [--keep]

The 13.5 GB of bfloat16 safetensors are removed afterwards. Peaks are of what the process itself
holds (anonymous pages, sampled twenty times a second); `max_rss_gib` counts everything, the pages
of mapped files included. The result is printed and written as JSON where --out says.
"""

import argparse
import json
import resource
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from palr_jax import storage
from palr_jax.llama.config import LlamaConfig, to_hf
from palr_jax.llama.hf import TABLE
from palr_jax.llama.load import open_checkpoint
from palr_jax.llama.weights import leaf_shapes, tensor_names
from palr_jax.ranking.score import Query, make_batch, make_scorer, plan_batches
from palr_jax.testing.llama import tiny_tokenizer

GIB = 2**30
PROMPT, CANDIDATES, TITLE = 1024, 50, 24  # tokens, titles, tokens a title


def llama_7b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        width=4096,
        layers=layers,
        heads=32,
        kv_heads=32,
        head_dim=128,
        hidden=11008,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tied_head=False,
        max_positions=2048,
    )


def write_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """One safetensors file a layer; a seeded normal block of numbers, shifted for every tensor."""
    tokenizer = tiny_tokenizer(['Heat (1995)'])
    storage.write_json(
        folder / 'config.json', to_hf(config) | {'eos_token_id': 2, 'bos_token_id': 0}
    )
    tokenizer.save(folder)
    shapes = leaf_shapes(config)
    block = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
    files: dict[str, dict[str, np.ndarray]] = {}
    weight_map = {}
    for number, (name, row, layer) in enumerate(tensor_names(TABLE, config)):
        shape = shapes[tuple(row.path.split('/'))]
        shape = shape[1:] if '{}' in row.name else shape
        if len(shape) == 1:
            tensor = np.ones(shape, ml_dtypes.bfloat16)
        else:
            values = np.resize(np.roll(block, number), shape[::-1] if row.transposed else shape)
            tensor = (values * shape[0] ** -0.5).astype(ml_dtypes.bfloat16)
        file = f'model-{layer + 1 if "{}" in row.name else 0:05d}.safetensors'
        files.setdefault(file, {})[name] = tensor
        weight_map[name] = file
        done = [f for f in files if f not in (file, 'model-00000.safetensors')]
        if sum(t.nbytes for f in files for t in files[f].values()) > 2 * GIB:
            done = list(files)
        for ready in done:
            part = f'{ready.removesuffix(".safetensors")}-{number}.safetensors'
            weight_map |= dict.fromkeys(files[ready], part)
            save_file(files.pop(ready), folder / part, {'format': 'pt'})
    for ready, tensors in files.items():
        save_file(tensors, folder / ready, {'format': 'pt'})
    storage.write_json(
        folder / 'model.safetensors.index.json', {'metadata': {}, 'weight_map': weight_map}
    )


class Peak:
    """The largest anonymous memory of this process while the block runs, in GiB."""

    def __enter__(self) -> 'Peak':
        self.gib, self._running = 0.0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.gib = max(self.gib, anonymous())
            time.sleep(0.05)

    def __exit__(self, *exc: object) -> None:
        self._running = False
        self._thread.join()
        self.gib = max(self.gib, anonymous())


def anonymous() -> float:
    """GiB of anonymous pages now."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('RssAnon'):
            return int(line.split()[1]) * 1024 / GIB
    raise SystemExit('/proc/self/status has no RssAnon: this needs Linux.')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--folder', type=Path, required=True)
    parser.add_argument('--layers', type=int, default=32)
    parser.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float32'))
    parser.add_argument('--keep', action='store_true', help='leave the checkpoint on disk')
    parser.add_argument('--out', type=Path, help='JSON file of the result')
    arguments = parser.parse_args()

    config = llama_7b(arguments.layers)
    dtype = jnp.dtype(arguments.dtype)
    scorer = make_scorer(config, None, dtype)
    rng = np.random.default_rng(0)
    query = Query(
        rng.integers(3, 300, PROMPT).astype(np.int32),
        tuple(rng.integers(3, 300, TITLE).astype(np.int32) for _ in range(CANDIDATES)),
    )
    ((_, shape),) = plan_batches([query], 1, 64, 1, config.max_positions)
    batch = make_batch([query], shape)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    params: dict = {}
    for path, leaf in leaf_shapes(config).items():
        at = params
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = jax.ShapeDtypeStruct(leaf, dtype)
    began = time.monotonic()
    compiled = scorer.lower(params, abstract).compile()
    memory = compiled.memory_analysis()
    result = {
        'layers': config.layers,
        'dtype': arguments.dtype,
        'tokens': shape.tokens,
        'compile_seconds': round(time.monotonic() - began, 1),
        'parameters_gib': round(memory.argument_size_in_bytes / GIB, 2),
        'temporaries_gib': round(memory.temp_size_in_bytes / GIB, 2),
    }
    print(json.dumps(result), flush=True)

    try:
        if not (arguments.folder / 'model.safetensors.index.json').exists():
            arguments.folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(arguments.folder, config)
        began = time.monotonic()
        with Peak() as peak:
            loaded = open_checkpoint(arguments.folder).params(arguments.dtype)
            jax.block_until_ready(loaded)
        result |= {
            'load_seconds': round(time.monotonic() - began, 1),
            'load_peak_gib': round(peak.gib, 2),
            'loaded_gib': round(sum(x.nbytes for x in jax.tree.leaves(loaded)) / GIB, 2),
        }
        print(json.dumps(result), flush=True)
        began = time.monotonic()
        with Peak() as peak:
            scores = np.asarray(compiled(loaded, batch))
        result |= {
            'rank_seconds': round(time.monotonic() - began, 1),
            'rank_peak_gib': round(peak.gib, 2),
            'max_rss_gib': round(
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2
            ),
            'finite': bool(np.isfinite(scores).all()),
        }
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder, ignore_errors=True)
    print(json.dumps(result), flush=True)
    if arguments.out:
        storage.write_json(arguments.out, result)


if __name__ == '__main__':
    main()
