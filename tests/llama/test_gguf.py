"""GGUF files: block formats, row order, metadata, and what is refused."""

import gguf
import jax
import numpy as np
import pytest

from palr_jax.errors import InputError
from palr_jax.llama.config import RopeScaling
from palr_jax.llama.gguf import TABLE, File, deinterleave
from palr_jax.llama.load import load_model
from palr_jax.llama.weights import check_tensors, tensor_names
from palr_jax.testing.llama import (
    random_params,
    tiny_config,
    tiny_tokenizer,
    write_gguf_file,
    write_hf_folder,
)

CONFIG = tiny_config(vocab_size=272)
ARCHITECTURE = {
    'context_length': 512,
    'embedding_length': 32,
    'block_count': 2,
    'feed_forward_length': 64,
    'attention.head_count': 4,
    'attention.head_count_kv': 2,
}


@pytest.fixture(scope='module')
def tokenizer():
    return tiny_tokenizer(['Heat (1995)'])


def header(path, architecture='llama', changes=None, tensors=None, kinds=None):
    """A file with metadata and a few tensors, not a whole model."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**ARCHITECTURE, **(changes or {})}.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](key if key.startswith('split.') else f'{architecture}.{key}', value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor('token_embd.weight', np.zeros((272, 32), np.float32))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize('tied', [False, True])
def test_m01_gguf_equals_the_hf_import(tmp_path, tokenizer, tied):
    """Head dimension 8, 4 query heads over 2 key heads: with 4 the row order is its own inverse."""
    config = tiny_config(vocab_size=272, tied_head=tied)
    params = random_params(config, seed=3)
    write_gguf_file(tmp_path / 'model.gguf', config, params, tokenizer)
    write_hf_folder(tmp_path / 'hf', config, params, tokenizer)
    ours, theirs = load_model(tmp_path / 'model.gguf'), load_model(tmp_path / 'hf')
    assert ours.config.tied_head is tied
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_m01_rows_go_back_to_their_places():
    """One head's rows 0..7 are stored as [0 4 1 5 2 6 3 7]; the index back is [0 2 4 6 1 3 5 7]."""
    stored = np.array([0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15])
    rows = np.repeat(stored[:, None], 3, axis=1)
    np.testing.assert_array_equal(deinterleave(rows, heads=2)[:, 0], np.arange(16))
    np.testing.assert_array_equal(rows[[0, 2, 4, 6, 1, 3, 5, 7], 0], np.arange(8))


def test_m01_keys_are_put_back_by_key_heads(tmp_path):
    """k has 2 heads of 8 rows; taken as q's 4 heads of 4 rows, other rows would come out."""
    stored = np.array([0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15], np.float32)
    tensor = np.repeat(stored[:, None], 32, axis=1)
    path = header(tmp_path / 'x.gguf', tensors={'blk.0.attn_k.weight': tensor})
    assert File(path).read('blk.0.attn_k.weight')[:, 0].tolist() == list(range(16))


@pytest.mark.parametrize('architecture', ['qwen2', 'gemma', 'mistral3'])
def test_m02_other_architectures_are_refused(tmp_path, architecture):
    path = header(tmp_path / 'x.gguf', architecture)
    with pytest.raises(InputError, match=f"general.architecture is '{architecture}'; allowed"):
        File(path)


def test_m02_unexpected_bias_is_refused(tmp_path):
    """Every tensor of the model and one more: dropped in silence, it would change the numbers."""
    names = tensor_names(TABLE, tiny_config(tied_head=True))
    shapes = {name: (2, 2) for name, _, _ in names if name != 'token_embd.weight'}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tensors['blk.0.attn_q.bias'] = np.zeros(32, np.float32)
    file = File(header(tmp_path / 'x.gguf', tensors=tensors))
    with pytest.raises(InputError, match=r'holds 1 tensor: blk\.0\.attn_q\.bias'):
        check_tensors(TABLE, file.config, file.source())


# Largest error of a value, in shares of the largest magnitude: half a step, or a whole one where
# Q4_0 clamps its positive end; block formats add the rounding of their float16 scale.
ROUNDING = {
    'F32': 0,
    'F16': 2**-11,
    'BF16': 2**-8,
    'Q8_0': 1 / 254 + 2**-11,
    'Q4_0': 1 / 8 + 2**-11,
    'Q4_1': 1 / 15 + 2**-11,
}


@pytest.mark.parametrize('kind', ROUNDING)
@pytest.mark.parametrize('shape', [(8, 64), (3, 256)])
def test_m10_block_formats(tmp_path, kind, shape):
    """Shape, layout and values: within the rounding of the format, equal to the gguf package."""
    stored = gguf.GGMLQuantizationType[kind]
    # An offset tells Q4_1, which has a minimum, from Q4_0, which has none.
    values = np.random.default_rng(0).normal(5, 1, shape).astype(np.float32)
    quantised = gguf.quants.quantize(values, stored)
    path = header(tmp_path / 'x.gguf', tensors={'some': quantised}, kinds={'some': stored})
    file = File(path)
    assert file.shapes['some'] == shape
    read = file.read('some')
    assert (read.dtype, read.shape) == (np.float32, shape)
    np.testing.assert_array_equal(read, gguf.quants.dequantize(quantised, stored))
    assert np.abs(read - values).max() <= ROUNDING[kind] * np.abs(values).max()


def test_m10_q4_k_by_hand(tmp_path):
    """Super-blocks of 256 in 8 blocks: value = d * scale * nibble - dmin * minimum (ggml).

    The 6-bit scales and minima of blocks 0 to 3 lie in bytes 0 to 3 and 4 to 7; those of blocks 4
    to 7 have their low 4 bits in bytes 8 to 11 and their high 2 bits atop bytes 0 to 7. Every 32
    bytes hold two blocks, low nibbles first.
    """
    rng = np.random.default_rng(0)
    rows = []
    blocks = []
    for _ in range(3):
        scales, minima = rng.integers(0, 64, 8), rng.integers(0, 64, 8)
        nibbles = rng.integers(0, 16, (8, 32))
        packed = np.zeros(12, np.uint8)
        packed[0:4] = scales[:4] | (scales[4:] >> 4) << 6
        packed[4:8] = minima[:4] | (minima[4:] >> 4) << 6
        packed[8:12] = (scales[4:] & 15) | (minima[4:] & 15) << 4
        quants = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)
        factors = np.array([0.25, 0.125], np.float16)
        blocks.append(factors.tobytes() + packed.tobytes() + quants.tobytes())
        rows.append((0.25 * scales[:, None] * nibbles - 0.125 * minima[:, None]).reshape(-1))
    data = np.frombuffer(b''.join(blocks), np.uint8).reshape(3, 144)
    kind = gguf.GGMLQuantizationType.Q4_K
    path = header(tmp_path / 'x.gguf', tensors={'some': data}, kinds={'some': kind})
    np.testing.assert_array_equal(File(path).read('some'), np.array(rows, np.float32))


def test_m10_q6_k_by_hand(tmp_path):
    """Super-blocks of 256 in 16 blocks of 16: value = d * scale * (6-bit quant - 32) (ggml).

    In each half of 128, low nibbles of 64 bytes hold quants 0 to 63 and high nibbles 64 to 127; the
    high 2 bits of quant l + 32 k lie in byte l of the half's 32, at bit 2 k.
    """
    rng = np.random.default_rng(1)
    rows = []
    blocks = []
    for _ in range(3):
        quants = rng.integers(0, 64, (2, 4, 32))
        scales = rng.integers(-128, 128, 16).astype(np.int8)
        low = (quants[:, :2] & 15) | (quants[:, 2:] & 15) << 4
        high = sum((quants[:, k] >> 4) << 2 * k for k in range(4))
        parts = [low.astype(np.uint8), high.astype(np.uint8), scales, np.array([0.5], np.float16)]
        blocks.append(b''.join(part.tobytes() for part in parts))
        rows.append(0.5 * np.repeat(scales.astype(float), 16) * (quants.reshape(-1) - 32))
    data = np.frombuffer(b''.join(blocks), np.uint8).reshape(3, 210)
    kind = gguf.GGMLQuantizationType.Q6_K
    path = header(tmp_path / 'x.gguf', tensors={'some': data}, kinds={'some': kind})
    np.testing.assert_array_equal(File(path).read('some'), np.array(rows, np.float32))


def test_m10_unsupported_type_is_named_before_any_weight_is_read(tmp_path):
    kind = gguf.GGMLQuantizationType.Q5_K
    data = {'blk.1.ffn_up.weight': np.zeros((4, 176), np.uint8)}
    path = header(tmp_path / 'x.gguf', tensors=data, kinds=dict.fromkeys(data, kind))
    with pytest.raises(
        InputError, match=r'blk\.1\.ffn_up\.weight is stored as Q5_K; allowed: F32, F16'
    ):
        File(path)


@pytest.mark.parametrize('kind', ['BF16', 'Q8_0', 'Q4_1'])
def test_quantised_model_is_near_its_original(tmp_path, tokenizer, kind):
    params = random_params(CONFIG, seed=0)
    write_gguf_file(tmp_path / 'x.gguf', CONFIG, params, tokenizer, kind)
    loaded = load_model(tmp_path / 'x.gguf').params
    assert loaded['embed']['embedding'].shape == (272, 32)

    def check(ours, original):
        error = np.abs(ours - original).max() / np.abs(original).max()
        assert error <= ROUNDING[kind]

    jax.tree.map(check, loaded, params)


def test_configuration_from_metadata(tmp_path, tokenizer):
    config = tiny_config(
        vocab_size=272, head_dim=16, rope_theta=5e5, norm_eps=2**-17, tied_head=True
    )
    write_gguf_file(tmp_path / 'x.gguf', config, random_params(config, 0), tokenizer)
    assert load_model(tmp_path / 'x.gguf').config == config


def test_sizes_that_metadata_may_leave_out(tmp_path):
    config = File(header(tmp_path / 'x.gguf')).config
    assert (config.head_dim, config.rope_theta, config.rope_scaling) == (8, 10000.0, None)
    assert config.vocab_size == 272


@pytest.mark.parametrize(
    'changes',
    [
        {'rope.scaling.type': 'linear', 'rope.scaling.factor': 4.0},
        {'rope.scaling.factor': 4.0},
        {'rope.scale_linear': 4.0},
    ],
)
def test_m06_linear_scaling_keys(tmp_path, changes):
    path = header(tmp_path / 'x.gguf', changes=changes)
    assert File(path).config.rope_scaling == RopeScaling('linear', 4.0)


def test_m06_llama3_divisors_of_the_converter(tmp_path):
    """The loop of convert_hf_to_gguf.py, for Llama 3.2 1B."""
    divisors = []
    for i in range(0, 64, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / 64)
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / 32.0 + smooth))
    changes = {'attention.key_length': 64, 'rope.freq_base': 500000.0}
    tensors = {'rope_freqs.weight': np.array(divisors, np.float32)}
    file = File(header(tmp_path / 'a.gguf', changes=changes, tensors=tensors))
    assert file.config.rope_scaling == RopeScaling('llama3', 32.0, 1.0, 4.0, 8192)
    assert 'rope_freqs.weight' not in file.shapes

    tensors = {'rope_freqs.weight': np.ones(32, np.float32)}
    file = File(header(tmp_path / 'b.gguf', changes=changes, tensors=tensors))
    assert file.config.rope_scaling is None

    tensors = {'rope_freqs.weight': np.linspace(1, 32, 32, dtype=np.float32)}
    with pytest.raises(InputError, match=r'rope_freqs\.weight is not that of Llama 3\.1'):
        File(header(tmp_path / 'c.gguf', changes=changes, tensors=tensors))


@pytest.mark.parametrize(
    ('changes', 'part'),
    [
        ({'rope.scaling.type': 'yarn'}, "rope.scaling.type is 'yarn'; allowed: none, linear"),
        ({'expert_count': 8}, 'llama.expert_count is 8'),
        ({'attention.sliding_window': 4096}, 'llama.attention.sliding_window is 4096'),
        ({'rope.dimension_count': 4}, 'llama.rope.dimension_count is 4; allowed: 8'),
        ({'attention.head_count_kv': 3}, '3 key-value heads'),
        ({'block_count': 0}, 'block_count is 0'),
        ({'split.count': 2}, 'is one of 2 parts'),
    ],
)
def test_metadata_beyond_plain_llama_is_refused(tmp_path, changes, part):
    path = header(tmp_path / 'x.gguf', changes=changes)
    with pytest.raises(InputError) as caught:
        File(path)
    assert part in str(caught.value)


@pytest.mark.parametrize('content', [b'', b'<!doctype html><html>404</html>', b'GGML\x01\0\0\0'])
def test_other_files_named_gguf(tmp_path, content):
    (tmp_path / 'x.gguf').write_bytes(content)
    with pytest.raises(InputError, match=r'x\.gguf: begins with .*allowed: b"GGUF"'):
        load_model(tmp_path / 'x.gguf')


def test_truncated_gguf(tmp_path, tokenizer):
    """A download that broke off anywhere, in the header or in the last tensor."""
    path = tmp_path / 'x.gguf'
    write_gguf_file(path, CONFIG, random_params(CONFIG, 0), tokenizer)
    data = path.read_bytes()
    for keep in [4, 6, 9, 20, *range(40, 12000, 397), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:keep])
        with pytest.raises(InputError, match='is no whole GGUF file'):
            load_model(path)


def test_metadata_that_is_no_text_is_refused(tmp_path, tokenizer):
    path = tmp_path / 'x.gguf'
    write_gguf_file(path, CONFIG, random_params(CONFIG, 0), tokenizer)
    path.write_bytes(path.read_bytes().replace(b'<|im_end|>', b'<|im_end|\xff'))
    with pytest.raises(InputError, match=r"x\.gguf: is no whole GGUF file .*'utf-8' codec"):
        load_model(path)


def test_unknown_version(tmp_path):
    (tmp_path / 'x.gguf').write_bytes(b'GGUF' + (9).to_bytes(4, 'little') + bytes(64))
    with pytest.raises(InputError, match='version 9'):
        load_model(tmp_path / 'x.gguf')
