"""Fine-tuning SmolLM2-135M here and with transformers + peft, on the same two cores and examples.

    python benchmarks/finetune_peft.py --data=ml-1m.zip --torch-python=torch/bin/python

Both sides train LoRA of rank 8 on q and v on the two instruction tasks of MovieLens-1M, in float32
with AdamW, the loss on the answers alone, with as many tokens a step at most. Both sides have
batches of examples of similar length, as many as fit: here in at most twelve shapes
(`finetune.pack=False`), each compiled once and untimed, there padded to the longest of the batch,
with `eager` or `sdpa` for the attention, whichever is faster. What counts is useful tokens a
second: prompt and answer, no padding. Before anything is timed the mean loss of the same examples
is compared.

The interpreter of --torch-python needs torch, transformers and peft alone.
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

SHAPES = 12  # `finetune.max_shapes`
RANK, ALPHA, TARGETS = 8, 16.0, ('q', 'v')
LEARNING_RATE, CLIP = 3e-4, 1.0
TOLERANCE = 1e-4  # of the mean loss of an answer token, in nats
OURS = 'palr_jax'


def jax_side(folder: Path) -> dict[str, Callable]:
    import functools

    import jax
    import jax.numpy as jnp

    from palr_jax.config import default_config
    from palr_jax.finetune import input as finetune_input
    from palr_jax.finetune.optimizer import make_optimizer
    from palr_jax.finetune.train import Program, answer_losses, train_step
    from palr_jax.llama import lora
    from palr_jax.llama.load import open_checkpoint

    checkpoint = open_checkpoint(folder / 'model')
    frozen = jax.tree.map(jnp.asarray, checkpoint.params('float32'))
    examples = [finetune_input.Tokens(*example) for example in read(folder)]
    length = json.loads((folder / 'about.json').read_text())['length']
    spec = lora.LoraSpec(RANK, ALPHA, TARGETS)
    program = Program(checkpoint.config, spec, jnp.dtype('float32'))
    config = default_config().finetune
    config.learning_rate, config.clip_norm = LEARNING_RATE, CLIP
    optimizer = make_optimizer(config)
    step = jax.jit(
        functools.partial(train_step, program=program, optimizer=optimizer), donate_argnums=(0, 1)
    )

    def fresh() -> tuple[Any, Any]:
        adapter = lora.init_adapter(checkpoint.config, spec, 0)
        return adapter, optimizer.init(lora.join(adapter, frozen))

    def check(count: int) -> dict[str, Any]:
        adapter, _ = fresh()
        losses = answer_losses(lora.join(adapter, frozen), program, examples[:count], length)
        return {'loss': [float(loss) for loss in losses]}

    compiled = set()

    def run(tokens: int, steps: int, seed: int) -> dict[str, Any]:
        # One row of all the tokens of a step stands for as many rows as fit.
        source = finetune_input.GroupedRows(examples, tokens, 1, steps, seed, SHAPES)
        adapter, state = fresh()

        def train(batch: Any) -> jax.Array:
            nonlocal adapter, state
            adapter, state, metrics = step(adapter, state, frozen, batch)
            return metrics['loss']

        batches = [source[number] for number in range(steps)]
        for batch in batches:
            if batch.tokens.shape not in compiled:
                for _ in range(2):  # the second takes what the first gave
                    float(train(batch))
                compiled.add(batch.tokens.shape)
        adapter, state = fresh()
        return timed(train, batches, lambda batch: int((batch.segments > 0).sum()))

    about = f'JAX {jax.__version__} ({jax.default_backend()})'
    return {'about': lambda: {'version': about}, 'check': check, 'run': run}


def torch_side(folder: Path) -> dict[str, Callable]:
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    examples = read(folder)

    def load(attention: str) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / 'model', dtype=torch.float32, attn_implementation=attention
        )
        names = [f'{name}_proj' for name in TARGETS]
        return peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
        )

    models = {name: load(name) for name in ('sdpa', 'eager')}

    def collate(part: list[tuple[np.ndarray, int]]) -> dict[str, torch.Tensor]:
        longest = max(len(tokens) for tokens, _ in part)
        ids = np.zeros((len(part), longest), np.int64)
        labels, mask = np.full_like(ids, -100), np.zeros_like(ids)
        for row, (tokens, answer) in enumerate(part):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, answer : len(tokens)] = tokens[answer:]
        return {
            'input_ids': torch.from_numpy(ids),
            'attention_mask': torch.from_numpy(mask),
            'labels': torch.from_numpy(labels),
        }

    def check(count: int) -> dict[str, Any]:
        with torch.no_grad():
            losses = [models['sdpa'](**collate([example])).loss for example in examples[:count]]
        return {'loss': [float(loss) for loss in losses]}

    def run(tokens: int, steps: int, seed: int, attention: str) -> dict[str, Any]:
        model = models[attention].train()
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)

        def train(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            loss = model(**batch).loss
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            adam.step()
            return loss.detach()

        groups = grouped(examples, tokens, seed)
        batches = [collate(next(groups)) for _ in range(steps)]
        return timed(train, batches, lambda batch: int(batch['attention_mask'].sum()))

    about = f'PyTorch {torch.__version__}, transformers {transformers.__version__}'
    return {
        'about': lambda: {'version': f'{about}, peft {peft.__version__}'},
        'check': check,
        'run': run,
    }


def grouped(
    examples: list[tuple[np.ndarray, int]], tokens: int, seed: int
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Batches of examples of similar length, of at most `tokens` with their padding, shuffled."""
    lengths = np.array([len(example) for example, _ in examples])
    batches, part = [], []
    for number in np.argsort(lengths, kind='stable'):
        if part and (len(part) + 1) * lengths[number] > tokens:
            batches.append(part)
            part = []
        part.append(number)
    batches.append(part)
    for number in np.random.default_rng(seed).permutation(len(batches)):
        yield [examples[i] for i in batches[number]]


def timed(train: Callable, batches: list[Any], count: Callable[[Any], int]) -> dict[str, Any]:
    """Useful tokens a second over all batches; the last loss waits for all that ran."""
    began, loss = time.perf_counter(), None
    for batch in batches:
        loss = train(batch)
    loss = float(loss)
    seconds = time.perf_counter() - began
    useful = sum(count(batch) for batch in batches)
    return {'tokens_per_second': round(useful / seconds, 1), 'tokens': useful, 'loss': loss}


def read(folder: Path) -> list[tuple[np.ndarray, int]]:
    """(tokens, where the answer begins) of every example."""
    with np.load(folder / 'examples.npz') as file:
        tokens, ends, answers = file['tokens'], file['ends'], file['answers']
    return list(zip(np.split(tokens, ends[:-1]), answers.tolist()))


def write_inputs(folder: Path, data: str, users: int, length: int) -> dict[str, Any]:
    """The model as a Hugging Face folder and the encoded examples; says what they are."""
    from palr_jax import data as palr_data
    from palr_jax.config import default_config
    from palr_jax.llm_input import encode_examples, training_examples
    from palr_jax.pipeline import prepare_data
    from palr_jax.project import Project
    from palr_jax.testing.llama import write_hf_folder

    config = default_config()
    config.data.source, config.data.path = 'ml1m', data
    config.prompts.length, config.finetune.length = 1280, length
    project = Project(config, folder / 'run')
    prepare_data(project)
    some = np.random.default_rng(0).permutation(len(project.dataset.split.train_end))[:users]
    tokens = encode_examples(project, training_examples(project, np.sort(some)))
    (folder / 'model').mkdir()
    checkpoint = project.checkpoint
    write_hf_folder(folder / 'model', checkpoint.config, project.base, checkpoint.tokenizer)
    lengths = np.array([len(example.tokens) for example in tokens])
    np.savez(
        folder / 'examples.npz',
        tokens=np.concatenate([example.tokens for example in tokens]),
        ends=np.cumsum(lengths),
        answers=np.array([example.answer for example in tokens]),
    )
    about = {
        'model': config.model.path,
        'data': palr_data.read(folder / 'run' / 'data').record['name'],
        'length': length,
        'examples': len(tokens),
        'mean_tokens': round(float(lengths.mean()), 1),
        'mean_answer_tokens': round(float(np.mean([len(e.tokens) - e.answer for e in tokens])), 1),
    }
    (folder / 'about.json').write_text(json.dumps(about))
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True, help='ml-1m.zip or its folder')
    parser.add_argument('--torch-python', default=sys.executable, help='interpreter with peft')
    parser.add_argument('--users', type=int, default=100, help='who give examples')
    parser.add_argument('--length', type=int, default=1024, help='tokens of an example')
    parser.add_argument('--tokens', type=int, default=2048, help='a step, padding included')
    parser.add_argument('--steps', type=int, default=3, help='steps a run')
    parser.add_argument('--runs', type=int, default=5, help='runs, in turns')
    parser.add_argument('--out', type=Path, help='JSON file of the result')
    arguments = parser.parse_args()

    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = write_inputs(folder, arguments.data, arguments.users, arguments.length)
        result['tokens_per_step'] = arguments.tokens
        sides = {
            'jax': Side('jax', sys.executable, __file__, folder),
            'torch': Side('torch', arguments.torch_python, __file__, folder),
        }
        result['versions'] = [side.ask('about')['version'] for side in sides.values()]
        losses = [side.ask('check', count=4)['loss'] for side in sides.values()]
        result['difference'] = float(np.abs(np.subtract(*losses)).max())
        print(
            f'the loss of four examples is the same within {result["difference"]:.1e}', flush=True
        )
        if result['difference'] > TOLERANCE:
            raise SystemExit('The two sides do not compute the same function.')

        about = {'tokens': arguments.tokens}
        sides['jax'].ask('run', steps=1, seed=1000, **about)
        tried = {
            name: sides['torch'].ask('run', steps=2, seed=1000, attention=name, **about)
            for name in ('sdpa', 'eager')
        }
        result['tried'] = tried
        best = max(tried, key=lambda name: tried[name].get('tokens_per_second', 0))
        systems = {
            OURS: ('jax', about),
            f'transformers + peft ({best})': ('torch', about | {'attention': best}),
        }
        result['systems'] = {system: {'runs': []} for system in systems}
        for number in range(arguments.runs):
            for system, (side, about) in systems.items():
                answer = sides[side].ask('run', steps=arguments.steps, seed=number, **about)
                result['systems'][system]['runs'].append(answer)
                print(f'{number + 1}: {system}: {answer}', flush=True)
        for side in sides.values():
            side.close()
    report(result, OURS, 'tokens/s')
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--side']:
        serve({'jax': jax_side, 'torch': torch_side}[sys.argv[2]](Path(sys.argv[3])))
    else:
        main()
