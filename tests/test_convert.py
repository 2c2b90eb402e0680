"""Conversion: the folder holds the sum of base and adapter, whole or not at all."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from safetensors.numpy import load_file

from palr_jax.convert import MERGED, convert, merged
from palr_jax.errors import InputError
from palr_jax.llama import lora
from palr_jax.llama.load import load_model, open_checkpoint
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import apply_logits
from palr_jax.llama.peft import save_adapter
from palr_jax.testing.llama import (
    random_params,
    tiny_config,
    tiny_tokenizer,
    write_gguf_file,
    write_hf_folder,
)

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = tiny_config(vocab_size=272)
SPEC = LoraSpec(4, 8.0, lora.TARGETS, rslora=True)
TOKENS = np.random.default_rng(3).integers(0, 272, (2, 20))


def draw_adapter(folder, spec=SPEC, config=CONFIG):
    rng = np.random.default_rng(7)
    drawn = lora.init_adapter(config, spec, seed=0)
    drawn = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), drawn)
    save_adapter(folder, drawn, spec, 'base')
    return drawn


def write_base(folder, config=CONFIG, **options):
    write_hf_folder(
        folder, config, random_params(config, 7), tiny_tokenizer(['Heat (1995)']), **options
    )


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """A folder with a base and an adapter, and the logits of both together."""
    folder = tmp_path_factory.mktemp('inputs')
    write_base(folder / 'base', shards=2)
    params = lora.join(draw_adapter(folder / 'adapter'), random_params(CONFIG, 7))
    return folder, np.asarray(apply_logits(params, CONFIG, TOKENS, lora=SPEC))


def logits_of(folder):
    model = load_model(folder)
    return np.asarray(apply_logits(model.params, model.config, TOKENS))


@pytest.mark.parametrize(('shard_bytes', 'files'), [(10**9, 1), (30_000, 5)])
def test_the_merged_folder_gives_the_logits_of_base_and_adapter(
    inputs, tmp_path, shard_bytes, files
):
    """L06, X04: in one file or in shards.

    Embedding and head have 34,816 bytes each and go alone; the layers have 74,240 in rows of the
    table, of which the attention, three halves of the MLP and the rest fit one file each.
    """
    folder, expected = inputs
    out = tmp_path / 'new' / 'merged'
    convert(folder / 'base', out, adapter=folder / 'adapter', shard_bytes=shard_bytes)
    shards = sorted(out.glob('*.safetensors'))
    assert len(shards) == files
    if files > 1:
        assert shards[0].name == 'model-00001-of-00005.safetensors'
        assert all(path.stat().st_size < 30_000 + 1500 for path in shards[1:4])  # and a header
    np.testing.assert_allclose(logits_of(out), expected, atol=1e-4)
    assert np.abs(expected - logits_of(folder / 'base')).max() > 0.1
    text = 'Heat (1995)<|im_end|>'
    assert load_model(out).tokenizer.encode(text) == load_model(folder / 'base').tokenizer.encode(
        text
    )
    assert [path.name for path in out.parent.iterdir()] == ['merged']


def test_without_an_adapter_every_bit_is_kept(inputs, tmp_path):
    """From a Hugging Face folder and from GGUF, whose q and k rows lie in another order."""
    params = random_params(CONFIG, 7)
    write_gguf_file(tmp_path / 'x.gguf', CONFIG, params, tiny_tokenizer(['Heat (1995)']))
    for source in (inputs[0] / 'base', tmp_path / 'x.gguf'):
        out = tmp_path / f'from {source.name}'
        convert(source, out)
        loaded = load_model(out)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
        assert (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id) == (0, 2)


def test_the_sum_is_rounded_once(inputs, tmp_path):
    """X04: a bfloat16 base is widened, the delta added in float32, and the sum rounded."""
    folder, _ = inputs
    convert(folder / 'base', tmp_path / 'half', dtype='bfloat16')
    convert(tmp_path / 'half', tmp_path / 'merged', adapter=folder / 'adapter', dtype='bfloat16')
    config = json.loads((tmp_path / 'merged' / 'config.json').read_text())
    assert config['torch_dtype'] == 'bfloat16'
    kernel = random_params(CONFIG, 7)['layers']['mlp']['down']['kernel']
    factors = draw_adapter(tmp_path / 'again')['layers']['mlp']['down']
    a, b = (np.asarray(factors[name], np.float64) for name in ('lora_a', 'lora_b'))
    exact = kernel.astype(ml_dtypes.bfloat16).astype(np.float64) + 8.0 / 2.0 * (a @ b)
    # The tolerance: half a unit in the last of 8 bits, of each weight.
    found = np.asarray(load_model(tmp_path / 'merged').params['layers']['mlp']['down']['kernel'])
    half = ml_dtypes.bfloat16
    np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-6)
    assert np.mean(found == exact.astype(half)) > 0.999  # float32 itself rounds, rarely to a tie
    twice = kernel.astype(half) + (4 * (a @ b)).astype(half)
    assert np.mean(found == twice) < 0.9


@pytest.mark.parametrize('source', ['hf', 'x.gguf'])
def test_m04_a_tied_head_stays_tied_and_has_no_second_copy(tmp_path, source):
    config = dataclasses.replace(CONFIG, tied_head=True, norm_eps=2**-17)  # float32 holds it
    write_base(tmp_path / 'hf', config)
    tokenizer = tiny_tokenizer(['Heat (1995)'])
    write_gguf_file(tmp_path / 'x.gguf', config, random_params(config, 7), tokenizer)
    draw_adapter(tmp_path / 'adapter', config=config)
    convert(tmp_path / source, tmp_path / 'out', adapter=tmp_path / 'adapter')
    names = set(load_file(tmp_path / 'out' / 'model.safetensors'))
    assert 'model.embed_tokens.weight' in names
    assert 'lm_head.weight' not in names
    settings = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert settings['tie_word_embeddings'] is True
    assert load_model(tmp_path / 'out').config == config


def test_one_tensor_is_read_at_a_time(inputs):
    checkpoint = open_checkpoint(inputs[0] / 'base')
    read = []

    def recorded(name):
        read.append(name)
        return checkpoint.source.read(name)

    source = dataclasses.replace(checkpoint.source, read=recorded)
    tensors = merged(dataclasses.replace(checkpoint, source=source))
    for number in range(1, 5):
        next(tensors)
        assert len(read) == number


def test_what_the_base_brings_along_is_kept(inputs, tmp_path):
    base = tmp_path / 'base'
    write_base(base)
    (base / 'chat_template.jinja').write_text('{{ messages }}')
    config = json.loads((base / 'config.json').read_text())
    (base / 'config.json').write_text(json.dumps(config | {'a_note': 'ours', 'dtype': 'float16'}))
    convert(base, tmp_path / 'out')
    assert (tmp_path / 'out' / 'chat_template.jinja').read_text() == '{{ messages }}'
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['a_note'] == 'ours'
    assert 'dtype' not in config


def test_the_chat_template_of_a_gguf_file_is_carried(tmp_path):
    """What llama.cpp's own tool put into the file is what transformers finds in the folder."""
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer(['Heat (1995)'])
    write_gguf_file(tmp_path / 'plain.gguf', CONFIG, random_params(CONFIG, 7), tokenizer)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim }}"
        '<|im_end|>\n{% endfor %}{# « \U0001f3ac » #}'
    )
    details = MetadataDetails(gguf.GGUFValueType.STRING, template)
    copy_with_new_metadata(
        gguf.GGUFReader(tmp_path / 'plain.gguf'),
        gguf.GGUFWriter(tmp_path / 'chat.gguf', 'llama'),
        {gguf.Keys.Tokenizer.CHAT_TEMPLATE: details},
        [],
    )
    for source, expected in (('chat', template), ('plain', None)):
        convert(tmp_path / f'{source}.gguf', tmp_path / source)
        theirs = AutoTokenizer.from_pretrained(tmp_path / source)
        assert theirs.chat_template == expected
        assert theirs.encode('Heat') == [0, *tokenizer.encode('Heat')]


def test_an_adapter_is_not_merged_twice(inputs, tmp_path):
    """X04."""
    folder, _ = inputs
    convert(folder / 'base', tmp_path / 'once', adapter=folder / 'adapter')
    with pytest.raises(InputError, match='merged into it already'):
        convert(tmp_path / 'once', tmp_path / 'twice', adapter=folder / 'adapter')
    assert not (tmp_path / 'twice').exists()


def test_a_note_of_merged_adapters_may_be_null(inputs, tmp_path):
    write_base(tmp_path / 'base')
    settings = json.loads((tmp_path / 'base' / 'config.json').read_text())
    (tmp_path / 'base' / 'config.json').write_text(json.dumps(settings | {MERGED: None}))
    convert(tmp_path / 'base', tmp_path / 'out', adapter=inputs[0] / 'adapter')
    assert len(json.loads((tmp_path / 'out' / 'config.json').read_text())[MERGED]) == 1


def test_remote_paths_keep_their_scheme(inputs, tmp_path, monkeypatch):
    """The weights must be local; the adapter is read where it is, by etils."""
    with pytest.raises(InputError, match=r'^gs://bucket/base: weights are memory-mapped'):
        convert('gs://bucket/base', tmp_path / 'out')
    folder, _ = inputs
    adapter = 'gs://bucket/run/finetune/adapter'
    opened = []

    def read_bytes(path):
        opened.append(os.fspath(path))
        local = opened[-1].replace(adapter, str(folder / 'adapter'))
        return pathlib.Path(local).read_bytes()

    of_etils = type(epath.Path(adapter))
    monkeypatch.setattr(of_etils, 'read_bytes', read_bytes)
    monkeypatch.setattr(of_etils, 'read_text', lambda path: read_bytes(path).decode())
    convert(folder / 'base', tmp_path / 'out', adapter=adapter)
    assert opened.count(f'{adapter}/adapter_model.safetensors') == 2  # its numbers and its digest


def test_a_failure_leaves_nothing_behind(tmp_path):
    params = random_params(CONFIG, 7)
    params['layers']['mlp']['down']['kernel'][1, 2, 3] = np.nan
    write_hf_folder(tmp_path / 'base', CONFIG, params, tiny_tokenizer(['Heat (1995)']))
    with pytest.raises(InputError, match=r'layers\.1\.mlp\.down_proj\.weight holds NaN'):
        convert(tmp_path / 'base', tmp_path / 'out')
    assert [path.name for path in tmp_path.iterdir()] == ['base']


def test_bad_requests(inputs, tmp_path):
    folder, _ = inputs
    (tmp_path / 'out').mkdir()
    with pytest.raises(InputError, match=r'--out=.*out exists; allowed: the name of a folder'):
        convert(folder / 'base', tmp_path / 'out')
    with pytest.raises(InputError, match='allowed: a folder on a local disk'):
        convert(folder / 'base', 'gs://bucket/out')
    other = tiny_config(vocab_size=272, width=64)
    draw_adapter(tmp_path / 'adapter', config=other)
    with pytest.raises(InputError, match='allowed for this base and rank'):
        convert(folder / 'base', tmp_path / 'new', adapter=tmp_path / 'adapter')
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'width': 64}, r'q_proj\.lora_A\.weight has shape .* allowed for this base and rank: '),
        ({'layers': 3}, r'layers\.2\.mlp\.down_proj\.lora_A\.weight has no place in this base'),
        ({'layers': 1}, r'layers\.1\.self_attn\.q_proj\.lora_A\.weight is missing'),
        (None, r'target_modules is \["c_attn"\]; allowed: a list of one or more of q_proj k_proj'),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_a_weight_is_read(
    tmp_path, changes, message
):
    """Of another base, or with targets that match nothing; the first weight read would be NaN."""
    params = random_params(CONFIG, 7)
    params['embed']['embedding'][:] = np.nan
    write_hf_folder(tmp_path / 'base', CONFIG, params, tiny_tokenizer(['Heat (1995)']))
    draw_adapter(tmp_path / 'adapter', config=dataclasses.replace(CONFIG, **changes or {}))
    if changes is None:
        path = tmp_path / 'adapter' / 'adapter_config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | {'target_modules': ['c_attn']}))
    with pytest.raises(InputError, match=message):
        convert(tmp_path / 'base', tmp_path / 'out', adapter=tmp_path / 'adapter')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_the_command(inputs, tmp_path):
    folder, expected = inputs
    command = [sys.executable, '-m', 'palr_jax.convert', f'--model={folder / "base"}']
    command += [f'--adapter={folder / "adapter"}', f'--out={tmp_path / "out"}']
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    np.testing.assert_allclose(logits_of(tmp_path / 'out'), expected, atol=1e-4)
    again = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith('error: --out=')


@pytest.mark.torch
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('shard_bytes', [10**9, 30_000])
def test_transformers_opens_what_was_merged(tmp_path, tied, shard_bytes):
    """X04: logits of transformers + torch equal ours with the adapter beside the kernels."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    config = dataclasses.replace(CONFIG, tied_head=tied)
    tokenizer = tiny_tokenizer(['Heat (1995)'])
    params = random_params(config, 7)
    write_gguf_file(tmp_path / 'x.gguf', config, params, tokenizer)
    write_hf_folder(tmp_path / 'hf', config, params, tokenizer)
    adapted = lora.join(draw_adapter(tmp_path / 'adapter', config=config), params)
    expected = apply_logits(adapted, config, TOKENS, lora=SPEC)
    for source in ('x.gguf', 'hf'):
        out = tmp_path / f'from {source}'
        convert(tmp_path / source, out, adapter=tmp_path / 'adapter', shard_bytes=shard_bytes)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            out, output_loading_info=True
        )
        assert not found['missing_keys']
        assert not found['unexpected_keys']
        assert model.dtype == torch.float32
        with torch.no_grad():
            logits = model.eval()(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        opened = transformers.AutoTokenizer.from_pretrained(out)
        text = 'Heat (1995)<|im_end|>'
        assert opened.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert opened.eos_token_id == 2
