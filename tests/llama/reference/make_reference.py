"""Makes the stored values of this folder with other people's software.

Needs, beside palr_jax: torch, transformers (logits), sentencepiece, xllamacpp (llama.cpp). Run in
the repository root:

    python tests/llama/reference/make_reference.py [--smollm2 SmolLM2-135M-Instruct.Q4_1.gguf]

- `logits.npz`, `logits.json`: tiny random LLaMAs in transformers + torch, float32.
- `tokenizers.json`: small vocabularies, and the ids that llama.cpp and sentencepiece give.
- `spm/tokenizer.model`: the same SentencePiece vocabulary as its own file.
- `smollm2.json`: greedy answers and logits of SmolLM2 in transformers + torch from the dequantised
  weights, and llama.cpp's ids of the texts.
"""

import argparse
import dataclasses
import io
import json
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers
import xllamacpp

from palr_jax.llama.config import RopeScaling
from palr_jax.llama.load import load_model
from palr_jax.testing.llama import (
    random_params,
    tiny_config,
    tiny_tokenizer,
    write_gguf_file,
    write_hf_folder,
)

HERE = Path(__file__).parent
LLAMA3 = RopeScaling('llama3', 8.0, 1.0, 4.0, 32)
# name: (config, lengths of the rows, positions whose logits are kept)
# New cases go to the end: a case's seed is its place.
CASES = {
    'grouped': (tiny_config(vocab_size=272), (24, 24), (0, 1, 11, 23)),
    'tied': (tiny_config(vocab_size=272, tied_head=True), (16,), (0, 7, 15)),
    'wide_heads': (
        tiny_config(vocab_size=272, kv_heads=4, head_dim=16, rope_theta=500000.0, norm_eps=1e-6),
        (16,),
        (0, 7, 15),
    ),
    'linear': (
        tiny_config(vocab_size=272, rope_scaling=RopeScaling('linear', 4.0), max_positions=128),
        (100,),
        (0, 31, 32, 63, 99),
    ),
    # Base 100 gives frequencies that are kept, blended and divided.
    'llama3': (
        tiny_config(
            vocab_size=272, head_dim=16, rope_theta=100.0, rope_scaling=LLAMA3, max_positions=128
        ),
        (100,),
        (0, 31, 32, 63, 99),
    ),
    'padded': (tiny_config(vocab_size=272), (5, 12, 9), (0, 4, 8, 11)),
    'padded_left': (tiny_config(vocab_size=272), (5, 12, 9), (0, 3, 7, 11)),
    'llama1': (tiny_config(vocab_size=272, kv_heads=4, norm_eps=1e-6), (24,), (0, 1, 11, 23)),
    # Tied and scaled, as Llama 3.2 is.
    'llama3_padded_left': (
        tiny_config(
            vocab_size=272,
            head_dim=16,
            rope_theta=100.0,
            rope_scaling=LLAMA3,
            tied_head=True,
            max_positions=128,
        ),
        (45, 100),
        (0, 54, 55, 63, 99),
    ),
}
CORPUS = (
    'The film was shown again in 1995, and people who had seen it before came back to see it.',
    'Once upon a time in the west there was a railway; the station was built in 1968.',
    "They don't know what they're looking for, but we'll find out and I'd rather wait.",
    'A history of films: comedies, dramas, thrillers and westerns, with the years of release.',
    'user: which of these films would you watch next? assistant: the second of the candidates.',
    'Misérables, Les; Café de Flore; Amélie Poulain; Señor Gómez; Übermensch; naïve; garçon.',
)
TEXTS = (
    'Heat (1995)',
    ' Heat (1995)',
    'History:\n1. "Misérables, Les (1995)"\n2. "2001: A Space Odyssey (1968)"\n\nAnswer:',
    "They're here, don't they'll wait?  I'D say so: WE'VE seen 'em.",
    'digits 7 42 365 2001 31415926 1,000,000.50',
    '  two blanks,\ttab,\n\n\n three breaks   \n and blanks at the end  ',
    'x' * 40 + ' ' * 7 + '\r\n' + '-' * 11 + '!?!...',
    '日本語のタイトル · Москва слезам не верит · 기생충 · فیلم',
    '🙂🎬 e\u0301 ﬁ ½ ² ٣٤ \u00a0\u2009x\u200b',
    'a\x00b\x7fc',
    '<|im_start|>user\nhello<|im_end|>\n',
    'an injected <|im_end|> and </s> and <s> and <0x0A> in a title',
    '',
)
JOINS = (
    ('Answer:', ' Heat (1995)'),
    ('Answer:\n', 'Heat (1995)'),
    ('1. "', 'Once Upon a Time in the West (1968)"'),
    ('next:', ' Misérables, Les'),
)
PROMPTS = ('What is the capital of France?', 'Describe the film "Casablanca" in one sentence.')


def make_logits() -> None:
    tokenizer = tiny_tokenizer(CORPUS, vocab_size=272)
    arrays, cases = {}, []
    for seed, (name, (config, lengths, positions)) in enumerate(CASES.items()):
        params = random_params(config, seed)
        tokens = np.random.default_rng(1000 + seed).integers(
            3, config.vocab_size, (len(lengths), max(lengths)), dtype=np.int32
        )
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        padding = 'left' if name.endswith('left') else 'right'
        if padding == 'left':
            mask = mask[:, ::-1].copy()
        tokens = np.where(mask, tokens, tokenizer.pad_id).astype(np.int32)
        with tempfile.TemporaryDirectory() as folder:
            write_hf_folder(folder, config, params, tokenizer)
            model = torch_model(folder)
            with torch.no_grad():
                logits = model(
                    torch.tensor(tokens.astype(np.int64)),
                    attention_mask=torch.tensor(mask.astype(np.int64)),
                    position_ids=torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0)),
                ).logits.numpy()
        arrays[f'{name}/tokens'] = tokens
        arrays[f'{name}/logits'] = logits[:, list(positions)]
        checksum = sum(float(np.abs(leaf).sum(dtype=np.float64)) for leaf in leaves(params))
        cases.append(
            {
                'name': name,
                'seed': seed,
                'config': dataclasses.asdict(config),
                'lengths': lengths,
                'padding': padding,
                'positions': positions,
                'checksum': checksum,
            }
        )
    np.savez_compressed(HERE / 'logits.npz', **arrays)
    write('logits.json', {'made_with': versions(), 'cases': cases})


def make_tokenizers() -> None:
    byte_level = tiny_tokenizer(CORPUS, vocab_size=480)
    state = json.loads(byte_level.backend.to_str())
    config = tiny_config(vocab_size=byte_level.size)
    params = random_params(config, seed=0)
    special = [token['content'] for token in state['added_tokens']]
    tokens = sorted(state['model']['vocab'], key=state['model']['vocab'].get)
    bpe = {
        'tokens': tokens,
        'types': [3 if token in special else 1 for token in tokens],
        'merges': [' '.join(merge) for merge in state['model']['merges']],
        'ids': {},
        'literal_ids': {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for pre in ('gpt-2', 'smollm', 'llama-bpe'):
            path = Path(folder) / f'{pre}.gguf'
            write_gguf_file(path, config, params, byte_level, pre=pre)
            encode = llama_cpp(path)
            bpe['ids'][pre] = [encode(text, True) for text in TEXTS]
            bpe['literal_ids'][pre] = [encode(text, False) for text in TEXTS]

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=400,
        model_type='bpe',
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (HERE / 'spm').mkdir(exist_ok=True)
    (HERE / 'spm' / 'tokenizer.model').write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(processor.get_piece_size())

    def kind(i: int) -> int:
        unknown, control, byte = processor.is_unknown, processor.is_control, processor.is_byte
        return 2 if unknown(i) else 3 if control(i) else 6 if byte(i) else 1

    spm = {
        'tokens': [processor.id_to_piece(i) for i in pieces],
        'scores': [processor.get_score(i) for i in pieces],
        'types': [kind(i) for i in pieces],
        'ids': [processor.encode(text) for text in TEXTS],
        'joins': [[*join, processor.encode(''.join(join))] for join in JOINS],
    }
    write('tokenizers.json', {'made_with': versions(), 'texts': TEXTS, 'bpe': bpe, 'spm': spm})


def make_smollm2(path: Path) -> None:
    loaded = load_model(path)
    encode = llama_cpp(path)
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        write_hf_folder(folder, loaded.config, loaded.params, loaded.tokenizer)
        model = torch_model(folder)
    for prompt in PROMPTS:
        text = f'<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n'
        ids = encode(text, True)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].numpy()
            answer = model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=24, eos_token_id=2
            )[0, len(ids) :].tolist()
        top = np.argsort(-logits)[:8]
        answers.append(
            {
                'prompt': text,
                'prompt_ids': ids,
                'answer_ids': answer,
                'answer': loaded.tokenizer.decode(answer),
                'top_ids': top.tolist(),
                'top_logits': [float(logit) for logit in logits[top]],
            }
        )
    write(
        'smollm2.json',
        {
            'made_with': versions(),
            'texts': TEXTS,
            'ids': [encode(text, True) for text in TEXTS],
            'literal_ids': [encode(text, False) for text in TEXTS],
            'answers': answers,
        },
    )


def torch_model(folder: str) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='eager'
    ).eval()


def llama_cpp(path: Path) -> Callable[[str, bool], list[int]]:
    """(text, whether special tokens are recognised) -> ids, from llama.cpp's own server."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 128
    server = xllamacpp.Server(params)

    def encode(text: str, special: bool) -> list[int]:
        body = {'content': text, 'add_special': False, 'parse_special': special}
        request = urllib.request.Request(
            server.listening_address + '/tokenize',
            json.dumps(body).encode(),
            {'Content-Type': 'application/json'},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)['tokens']

    return encode


def leaves(tree: dict | np.ndarray) -> list[np.ndarray]:
    if isinstance(tree, np.ndarray):
        return [tree]
    return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]


def versions() -> dict[str, str]:
    return {
        'torch': torch.__version__.split('+')[0],
        'transformers': transformers.__version__,
        'sentencepiece': sentencepiece.__version__,
        'xllamacpp': xllamacpp.__version__,
        'numpy': np.__version__,
    }


def write(name: str, content: dict) -> None:
    text = json.dumps(content, ensure_ascii=False, separators=(',', ':'))
    (HERE / name).write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--smollm2', type=Path, help='make smollm2.json from this GGUF file')
    arguments = parser.parse_args()
    make_logits()
    make_tokenizers()
    if arguments.smollm2:
        make_smollm2(arguments.smollm2)
