"""The base in int8 and nf4: what is stored, and that training and ranking go on as before."""

import functools
import json
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from palr_jax.config import default_config
from palr_jax.errors import InputError
from palr_jax.finetune.input import Tokens
from palr_jax.finetune.optimizer import make_optimizer
from palr_jax.finetune.train import Program, train
from palr_jax.llama import lora, quantize
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.load import load_model
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import REMAT, apply_logits
from palr_jax.llama.weights import (
    Row,
    TensorSource,
    build,
    leaf_shapes,
    put,
    tensor_names,
)
from palr_jax.project import Project
from palr_jax.ranking.score import Query, Shape, make_batch, make_scorer, score_queries
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

# Levels of NormalFloat-4 as QLoRA's appendix E prints them.
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    hidden=11008,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tied_head=False,
    max_positions=4096,
)
MODEL = tiny_config(vocab_size=41)
SPEC = LoraSpec(4, 8.0, ('q', 'v', 'o', 'down'))
KINDS = ('int8', 'nf4')


def quantized_tree(params, kind):
    """These leaves, the kernels of the layers quantised."""

    def stored(path, leaf):
        narrow = kind != 'none' and quantize.is_quantized(tuple(step.key for step in path))
        return quantize.quantize(np.asarray(leaf), kind) if narrow else leaf

    return jax.tree_util.tree_map_with_path(stored, params)


def draw_kernel(layers=2, inputs=128, outputs=24):
    """Columns of very different sizes, one of them zero."""
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal((layers, inputs, outputs)) * 10.0 ** rng.uniform(-3, 1, outputs)
    kernel[0, :, 5] = 0
    return kernel.astype(np.float32)


def reference(kernel, kind):
    """[in, out] quantised and back, by a search for the nearest value of each block."""
    inputs, outputs = kernel.shape
    size, levels = (inputs, np.arange(-127, 128) / 127) if kind == 'int8' else (64, PUBLISHED)
    found = np.zeros(kernel.shape, np.float64)
    for start in range(0, inputs, size):
        for column in range(outputs):
            block = kernel[start : start + size, column].astype(np.float64)
            values = np.abs(block).max() * np.array(levels)
            nearest = np.abs(block[:, None] - values).argmin(axis=1)
            found[start : start + size, column] = values[nearest]
    return found


def draw_examples():
    rng = np.random.default_rng(0)
    return [Tokens(rng.integers(0, 41, n).astype(np.int32), n - 4) for n in (9, 15, 12, 8, 11)]


def settings(**fields):
    return ConfigDict(
        {
            'steps': 10,
            'batch_size': 2,
            'length': 32,
            'learning_rate': 0.02,
            'warmup': 2,
            'decay_steps': 100,
            'weight_decay': 0.1,
            'clip_norm': 1.0,
            'checkpoint_every': 4,
            'profile_at': 0,
            'profile_steps': 1,
            'pack': True,
        }
        | fields
    )


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_levels_are_the_published_ones():
    assert quantize.LEVELS.dtype == np.float32
    np.testing.assert_allclose(quantize.LEVELS, PUBLISHED, atol=2e-7, rtol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_every_weight_becomes_the_nearest_value_of_its_block(kind):
    """Against a search in NumPy; a column of zeros stays zero."""
    kernel = draw_kernel()
    stored = quantize.quantize(kernel, kind)
    back = jax.vmap(quantize.dequantize)(stored)
    for layer in range(2):
        expected = reference(kernel[layer], kind)
        np.testing.assert_allclose(back[layer], expected, rtol=1e-6, atol=1e-9)
        # The furthest that a value can lie from its nearest level, in its block's magnitude.
        gap = np.diff(PUBLISHED).max() if kind == 'nf4' else 1 / 127
        error = np.abs(back[layer] - kernel[layer]) / np.abs(kernel[layer]).max(axis=0).clip(1e-9)
        assert error.max() <= gap / 2 + 1e-6


def test_what_is_stored_by_hand():
    """A block whose largest is 2: 2 -> 15, -2 -> 0, 0 -> 7, 0.16 (0.08) -> 8; outputs in pairs."""
    kernel = np.zeros((1, 16, 2), np.float32)
    kernel[0, :4, 0] = 2, -2, 0, 0.16
    kernel[0, 1, 1] = 0.5
    stored = quantize.quantize(kernel, 'nf4')
    assert stored['nf4'].dtype == np.uint8
    assert stored['nf4'][0, :, 0].tolist() == [0x7F, 0xF0, 0x77, 0x78, *[0x77] * 12]
    np.testing.assert_array_equal(stored['scale'], [[[2.0, 0.5]]])
    stored = quantize.quantize(kernel, 'int8')
    assert stored['int8'].dtype == np.int8
    assert stored['int8'][0, :4, 0].tolist() == [127, -127, 0, 10]  # 0.08 * 127 = 10.16
    np.testing.assert_allclose(stored['scale'], [[[2 / 127, 0.5 / 127]]], rtol=1e-6)


@pytest.mark.parametrize(('inputs', 'size'), [(4096, 64), (11008, 64), (96, 32), (80, 16)])
def test_blocks_shrink_where_64_does_not_divide(inputs, size):
    assert quantize.block_size(inputs) == size
    stored = quantize.quantize(np.ones((1, inputs, 2), np.float32), 'nf4')
    assert stored['scale'].shape == (1, inputs // size, 2)
    assert stored['nf4'].shape == (1, inputs, 1)
    np.testing.assert_array_equal(quantize.dequantize({k: v[0] for k, v in stored.items()}), 1)


def test_inputs_that_no_block_divides_are_refused():
    with pytest.raises(InputError, match=r"quantize is 'nf4', and a kernel has 100 inputs; allow"):
        quantize.quantize(np.ones((1, 100, 2), np.float32), 'nf4')
    assert quantize.quantize(np.ones((1, 100, 2), np.float32), 'int8')['int8'].shape == (1, 100, 2)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_product_is_that_with_the_dequantised_kernel(kind, dtype):
    stored = {name: part[0] for name, part in quantize.quantize(draw_kernel(), kind).items()}
    x = np.random.default_rng(1).standard_normal((3, 5, 128)).astype(np.float32)
    x = jnp.asarray(x, dtype)
    found = quantize.matmul(x, stored)
    assert found.dtype == dtype
    exact = np.asarray(x, np.float64) @ np.asarray(quantize.dequantize(stored), np.float64)
    limit = 1e-5 if dtype == jnp.float32 else 1e-2
    assert np.abs(np.asarray(found, np.float64) - exact).max(axis=(0, 1)) == pytest.approx(
        0, abs=limit * np.abs(exact).max()
    )
    assert np.all(found[..., 5] == 0)


def draw_stored(kind):
    return {name: part[0] for name, part in quantize.quantize(draw_kernel(), kind).items()}


def draw_narrow(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.bfloat16)


@pytest.mark.parametrize('kind', KINDS)
def test_a_product_of_bfloat16_is_rounded_once(kind):
    """The sums of int8 take their scale before; the values of nf4 are bfloat16 themselves."""
    stored, x = draw_stored(kind), draw_narrow(3, 50, 128)
    found = np.asarray(quantize.matmul(x, stored), np.float64)
    kernel = quantize.dequantize(stored)
    kernel = kernel if kind == 'int8' else kernel.astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(found, exact, rtol=1.01 * 2**-8, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('dtype', 'most'), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_the_gradient_of_a_product(kind, dtype, most):
    """Of sum(y * weight), by the chain rule in float64."""
    stored, x, weight = draw_stored(kind), draw_narrow(3, 5, 128), draw_narrow(3, 5, 24)
    loss = lambda x: jnp.sum((quantize.matmul(x, stored) * weight).astype(jnp.float32))  # noqa: E731
    found = jax.grad(loss)(x.astype(dtype))
    assert found.dtype == dtype
    kernel = np.asarray(quantize.dequantize(stored), np.float64)
    exact = np.asarray(weight, np.float64) @ kernel.T
    assert np.abs(np.asarray(found, np.float64) - exact).max() < most * np.abs(exact).max()


@pytest.mark.parametrize('kind', KINDS)
def test_matrix_units_are_asked_for_products_of_bfloat16_in_float32(kind):
    """Forward and backward; what the backward pass of a layer keeps is bfloat16 all the same."""
    stored = draw_stored(kind)

    def loss(x):
        return jnp.sum(jax.nn.silu(quantize.matmul(x, stored)).astype(jnp.float32))

    kept = jax.checkpoint(loss, policy=REMAT['projections'])
    text = jax.jit(jax.grad(kept)).lower(draw_narrow(3, 5, 128)).as_text()
    products = [line for line in text.splitlines() if 'stablehlo.dot_general' in line]
    assert products
    for line in products:
        assert re.search(r'\(tensor<\S*xbf16>, tensor<\S*xbf16>\) -> tensor<\S*xf32>', line)
    _, pull = jax.vjp(kept, draw_narrow(3, 5, 128))
    of_results = [leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.shape == (3, 5, 24)]
    assert of_results == [jnp.bfloat16]


@pytest.mark.parametrize('kind', KINDS)
def test_the_model_computes_with_the_dequantised_kernels(kind):
    """The scan takes the quantised stacks apart; embedding, head and norms are as they were."""
    params = random_params(MODEL, seed=1)
    quantized = quantized_tree(params, kind)
    back = jax.tree.map(
        lambda leaf: jax.vmap(quantize.dequantize)(leaf) if isinstance(leaf, dict) else leaf,
        quantized,
        is_leaf=lambda leaf: isinstance(leaf, dict) and 'scale' in leaf and len(leaf) == 2,
    )
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for part in ('embed', 'head', 'final_norm'):
        assert_same_bits(quantized[part], params[part])
    tokens = np.arange(24).reshape(2, 12)
    logits = jax.jit(functools.partial(apply_logits, config=MODEL))
    expected = logits(back, tokens=tokens)
    np.testing.assert_allclose(logits(quantized, tokens=tokens), expected, atol=2e-5)
    assert np.abs(expected - logits(params, tokens=tokens)).max() > 0.01


@pytest.mark.parametrize('kind', KINDS)
def test_adapters_are_told_from_the_quantised_base(kind):
    """L01: labels, split and join go by path, whatever stands where the kernel was."""
    frozen = quantized_tree(random_params(MODEL, seed=1), kind)
    adapter = lora.init_adapter(MODEL, SPEC, seed=0)
    params = lora.join(adapter, frozen)
    assert set(params['layers']['attention']['q']['kernel']) == {kind, 'scale'}
    assert set(jax.tree.leaves(lora.labels(frozen))) == {lora.FROZEN}
    ours, theirs = lora.split(params)
    assert_same_bits(ours, adapter)
    assert_same_bits(theirs, frozen)


@pytest.fixture
def compiled_once(tmp_path):
    """`train` jits its step anew in every run; the runs of a test share the program."""
    options = {
        'jax_compilation_cache_dir': str(tmp_path / 'programs'),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.usefixtures('compiled_once')
def test_training_over_a_quantised_base(kind, tmp_path):
    """L01, L02, O05: the loss falls, the base keeps its bits, the optimiser has no leaf of it,
    and a run in two pieces is the run in one."""
    frozen = quantized_tree(random_params(MODEL, seed=1), kind)
    program = Program(MODEL, SPEC, jnp.float32)

    def run(folder, steps):
        return train(
            frozen, program, draw_examples(), settings(steps=steps), seed=0, workdir=folder
        )

    adapter = run(tmp_path / 'whole', 10)
    assert_same_bits(frozen, quantized_tree(random_params(MODEL, seed=1), kind))
    lines = (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in lines]
    assert losses[-1] < losses[0] - 0.5

    run(tmp_path / 'pieces', 6)
    assert_same_bits(run(tmp_path / 'pieces', 10), adapter)

    state = make_optimizer(settings()).init(lora.join(adapter, frozen))
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(adapter)])


@pytest.mark.parametrize('kind', KINDS)
def test_one_pass_scores_equal_naive_ones(kind):
    """C01 over a quantised base with an adapter, to 1e-4: every candidate in a row of its own."""
    rng = np.random.default_rng(0)
    adapter = lora.init_adapter(MODEL, SPEC, seed=0)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), adapter)
    params = lora.join(adapter, quantized_tree(random_params(MODEL, seed=2), kind))
    draw = lambda n: rng.integers(0, 41, n).astype(np.int32)  # noqa: E731
    queries = [Query(draw(n), tuple(draw(m) for m in (1, 3, 7, 4))) for n in (5, 21)]

    naive = np.zeros((2, 4))
    of_all = jax.jit(functools.partial(apply_logits, config=MODEL, lora=SPEC))
    for row, query in enumerate(queries):
        for c, answer in enumerate(query.candidates):
            tokens = np.zeros(32, np.int32)
            whole = np.concatenate([query.prompt, answer])
            tokens[: len(whole)] = whole
            logs = jax.nn.log_softmax(of_all(params, tokens=tokens[None])[0])
            places = np.arange(len(query.prompt), len(whole))
            naive[row, c] = np.sum(np.asarray(logs)[places - 1, whole[places]])

    found = score_queries(
        make_scorer(MODEL, SPEC),
        params,
        queries,
        batch_size=2,
        row_length=16,
        max_shapes=1,
        max_positions=512,
    )
    for indices, sums in found:
        np.testing.assert_allclose(sums, naive[indices], rtol=0, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_loading_quantises_the_kernels_of_the_layers(kind, tmp_path):
    tokenizer = tiny_tokenizer(['Heat (1995)'])
    config = tiny_config(vocab_size=tokenizer.size)
    params = random_params(config, seed=4)
    write_hf_folder(tmp_path, config, params, tokenizer)
    loaded = load_model(tmp_path, quantize=kind).params
    assert_same_bits(loaded, quantized_tree(params, kind))
    assert sum(quantize.is_quantized(path) for path in leaf_shapes(config)) == 7


@pytest.mark.parametrize('kind', quantize.KINDS)
def test_the_config_says_what_the_pipeline_loads(kind, tmp_path):
    tokenizer = tiny_tokenizer(['Heat (1995)'])
    config = tiny_config(vocab_size=tokenizer.size)
    params = random_params(config, seed=4)
    write_hf_folder(tmp_path, config, params, tokenizer)
    run = default_config()
    run.model.path, run.model.quantize = str(tmp_path), kind
    assert_same_bits(Project(run, None).base, quantized_tree(params, kind))


@pytest.mark.parametrize('kind', KINDS)
def test_one_leaf_exists_in_full_at_a_time(kind):
    """Seven leaves of 1 MB. The next is allocated, not touched, before the last is let go."""
    config = tiny_config(
        vocab_size=64, width=128, layers=16, heads=4, kv_heads=4, head_dim=32, hidden=128
    )
    rng = np.random.default_rng(0)
    table = [Row(f'{"/".join(p)}/{{}}', '/'.join(p), False) for p in leaf_shapes(config)]
    table = [row if 'layers' in row.path else row._replace(name=row.path) for row in table]
    shapes = {name: _shape(config, row) for name, row, _ in tensor_names(table, config)}
    read = lambda name, _: rng.standard_normal(shapes[name]).astype(np.float32)  # noqa: E731

    def load():
        return build(table, config, TensorSource('here', shapes, read), 'float32', kind)

    load()  # compiles
    tracemalloc.start()
    try:
        params = load()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    leaf_bytes = 16 * 128 * 128 * 4
    assert peak < kept + 2 * leaf_bytes + 2**19  # and the tensor that was read
    assert kept + 2 * leaf_bytes + 2**19 < 7 * leaf_bytes


def _shape(config, row):
    shape = leaf_shapes(config)[tuple(row.path.split('/'))]
    return shape[1:] if '{}' in row.name else shape


def abstract_params(config, kind):
    """The bfloat16 tree, as shapes and types alone."""
    params = {}
    for path, shape in leaf_shapes(config).items():
        leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        if kind != 'none' and quantize.is_quantized(path):
            leaf = jax.eval_shape(jax.vmap(functools.partial(quantize.encode, kind=kind)), leaf)
        put(params, path, leaf)
    return params


@pytest.mark.slow
def test_memory_at_the_shapes_of_llama_7b():
    """Norms, embedding and head included, as the compiled ranking program sees its arguments.

    6,738,415,616 weights of 2 bytes, by hand; of them 6,476,005,376 in kernels of the layers.
    """
    query = Query(np.zeros(64, np.int32), (np.zeros(8, np.int32),) * 4)
    batch = make_batch([query], Shape(users=1, length=64, rows=1, row_length=32, candidates=4))
    batch_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    sizes = {}
    for kind in quantize.KINDS:
        scorer = make_scorer(LLAMA_7B, None, jnp.bfloat16)
        memory = scorer.lower(abstract_params(LLAMA_7B, kind), batch).compile().memory_analysis()
        sizes[kind] = memory.argument_size_in_bytes - batch_bytes
        if kind != 'none':
            # One layer's kernels in float32 have 0.81 GB, all layers' 25.9 GB.
            assert memory.temp_size_in_bytes < 2e9
    assert sizes['none'] == pytest.approx(2 * 6_738_415_616, rel=1e-6)
    assert sizes['int8'] <= 0.55 * sizes['none']
    assert sizes['nf4'] <= 0.32 * sizes['none']
