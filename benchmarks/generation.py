"""Greedy writing with SmolLM2-135M here and with transformers, on the same two cores and prompts.

    python benchmarks/generation.py --data=ml-1m.zip --torch-python=torch/bin/python

The prompts ask MovieLens-1M's users for recommendations without a list of candidates; all answers
have one length, as no EOS ends them. Each side reads a batch of prompts of similar length and
writes its answers, with a cache of keys and values. What counts are the tokens written in a second,
reading the prompts included. Before anything is timed the answers are compared, token for token up
to the first difference: in float32 they must agree, in bfloat16 their agreement is told.

The floor of a step of writing is the bytes that it has to read: all weights, and of each row the
keys and values of the tokens before. They are told, not timed.

The interpreter of --torch-python needs torch and transformers alone.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sides import Side, movielens, report, serve

HISTORY = 20
NO_EOS = -1
AGREE = 0.95  # of the tokens in float32; near ties are decided by the last bits
OURS = 'palr_jax'


def jax_side(folder: Path) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp

    from palr_jax.llama.load import open_checkpoint
    from palr_jax.ranking.generate import generate

    checkpoint = open_checkpoint(folder / 'model')
    params = {
        dtype: jax.tree.map(jnp.asarray, checkpoint.params(dtype))
        for dtype in ('float32', 'bfloat16')
    }

    def write(dtype: str, size: int, most: int) -> list[np.ndarray]:
        """In bfloat16 by the CPU's matrix units, as `model.matmul_precision='default'` asks."""
        precision = 'highest' if dtype == 'float32' else 'default'
        with jax.default_matmul_precision(precision):
            return generate(
                params[dtype],
                read(folder)[:size],
                config=checkpoint.config,
                dtype=jnp.dtype(dtype),
                eos_id=NO_EOS,
                most=most,
                batch_size=size,
            )

    def check(**about: Any) -> dict[str, Any]:
        """Compiles too."""
        return {'answers': [answer.tolist() for answer in write(**about)]}

    def step_bytes(dtype: str, size: int, most: int) -> dict[str, Any]:
        """Read by a step in the middle of the answers."""
        config = checkpoint.config
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params[dtype]))
        tokens = sum(len(prompt) + most // 2 for prompt in read(folder)[:size])
        slot = 2 * config.layers * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
        return {'weights': weights, 'cache': tokens * slot}

    version = f'JAX {jax.__version__} ({jax.default_backend()})'
    return {
        'about': lambda: {'version': version},
        'check': check,
        'run': lambda **about: timed(lambda: write(**about), **about),
        'bytes': step_bytes,
    }


def torch_side(folder: Path) -> dict[str, Callable]:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    models = {
        dtype: transformers.AutoModelForCausalLM.from_pretrained(
            folder / 'model', dtype=getattr(torch, dtype), attn_implementation='sdpa'
        ).eval()
        for dtype in ('float32', 'bfloat16')
    }

    def write(dtype: str, size: int, most: int) -> list[list[int]]:
        prompts = [prompt.tolist() for prompt in read(folder)[:size]]
        longest = max(map(len, prompts))
        inputs = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        output = models[dtype].generate(
            input_ids=inputs,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=most,
            min_new_tokens=most,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[:, longest:].tolist()

    version = f'PyTorch {torch.__version__}, transformers {transformers.__version__}'
    return {
        'about': lambda: {'version': version},
        'check': lambda **about: {'answers': write(**about)},
        'run': lambda **about: timed(lambda: write(**about), **about),
    }


def timed(write: Callable[[], Any], *, size: int, most: int, **_: Any) -> dict[str, Any]:
    began = time.perf_counter()
    write()
    return {'tokens_per_second': size * most / (time.perf_counter() - began)}


def read(folder: Path) -> list[np.ndarray]:
    return [np.array(prompt, np.int32) for prompt in json.loads((folder / 'p.json').read_text())]


def write_inputs(folder: Path, data: str, users: int) -> dict[str, Any]:
    """The model as a Hugging Face folder and the users' prompts; says what they are."""
    from palr_jax.ranking.users import make_query

    project = movielens(folder, data, history=HISTORY, candidates=False)
    config, split = project.config, project.dataset.split
    able = [u for u in split.users('test') if len(split.history(u, 'test')) >= HISTORY]
    prompts = []
    for user in np.random.default_rng(0).permutation(able)[:users]:
        seen = split.history(user, 'test')
        (profile,) = project.profiles([seen.tolist()])
        query, _ = make_query(project.encoder, config.prompts, seen, profile, seen[:0], (0,))
        prompts.append(query.prompt.tolist())
    (folder / 'p.json').write_text(json.dumps(prompts))
    return {
        'model': config.model.path,
        'data': project.dataset.record['name'],
        'prompt_tokens': [len(prompt) for prompt in prompts],
    }


def measure(sides: dict[str, Side], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for dtype, size in itertools.product(('float32', 'bfloat16'), arguments.batches):
        about = {'dtype': dtype, 'size': size, 'most': arguments.tokens}
        names = {OURS: 'jax', 'transformers': 'torch'}
        ours, theirs = (
            np.array(sides[side].ask('check', **about)['answers']) for side in names.values()
        )
        # What follows the first difference is another text.
        same = float(np.mean(np.cumprod(ours == theirs, axis=1)))
        result = about | {'same': same, 'bytes': sides['jax'].ask('bytes', **about)}
        print(f'\n{dtype}, {size} at a time: {same:.3f} of the tokens before a difference')
        if dtype == 'float32' and same < AGREE:
            raise SystemExit('The sides do not write the same.')
        result['systems'] = {name: {'runs': []} for name in names}
        for _ in range(arguments.runs):
            for name, side in names.items():
                result['systems'][name]['runs'].append(sides[side].ask('run', **about))
        report(result, OURS, 'tokens/s')
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True, help='ml-1m.zip or its folder')
    parser.add_argument('--torch-python', default=sys.executable, help='with transformers')
    parser.add_argument('--batches', default='1,16', help='users at a time')
    parser.add_argument('--tokens', type=int, default=64, help='written for each user')
    parser.add_argument('--runs', type=int, default=5, help='in turns')
    parser.add_argument('--out', type=Path, help='JSON file of the result')
    arguments = parser.parse_args()
    arguments.batches = [int(size) for size in arguments.batches.split(',')]

    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = write_inputs(folder, arguments.data, max(arguments.batches))
        sides = {
            'jax': Side('jax', sys.executable, __file__, folder),
            'torch': Side('torch', arguments.torch_python, __file__, folder),
        }
        found['versions'] = [side.ask('about')['version'] for side in sides.values()]
        found['batches'] = measure(sides, arguments)
        for side in sides.values():
            side.close()
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--side']:
        serve({'jax': jax_side, 'torch': torch_side}[sys.argv[2]](Path(sys.argv[3])))
    else:
        main()
