"""SmolLM2-135M from its GGUF file, as the demo uses it, against torch and llama.cpp.

The file comes from the package registry, through the cache that the demo uses too.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palr_jax.data import resolve
from palr_jax.errors import InputError
from palr_jax.llama.load import load_model
from palr_jax.llama.model import apply_logits
from palr_jax.ranking.score import Query, make_scorer, score_queries
from palr_jax.testing.llama import write_hf_folder

pytestmark = [pytest.mark.torch, pytest.mark.slow]
REFERENCE = json.loads((Path(__file__).parent / 'reference/smollm2.json').read_text('utf-8'))


@pytest.fixture(scope='module')
def model():
    try:
        path = resolve('wheel:smollm2-135m-instruct')
    except InputError as error:
        pytest.skip(str(error))
    return load_model(path)


@pytest.fixture(scope='module')
def greedy(model):
    """The greedy continuation of a prompt by a given number of tokens, without a cache."""
    logits = jax.jit(lambda params, tokens: apply_logits(params, model.config, tokens))

    def generate(prompt, number):
        row = list(prompt)
        for _ in range(number):
            tokens = jnp.array([row + [0] * (64 - len(row))])
            row.append(int(logits(model.params, tokens)[0, len(row) - 1].argmax()))
        return row[len(prompt) :]

    return generate


def test_ids_are_those_of_llama_cpp(model):
    for text, ids, literal in zip(
        REFERENCE['texts'], REFERENCE['ids'], REFERENCE['literal_ids'], strict=True
    ):
        assert model.tokenizer.encode(text) == ids
        assert model.tokenizer.encode(text, allow_special=False) == literal
        assert model.tokenizer.decode(ids) == text


def test_logits_and_words_are_the_stored_ones_of_torch(model, greedy):
    for answer in REFERENCE['answers']:
        prompt = model.tokenizer.encode(answer['prompt'])
        assert prompt == answer['prompt_ids']
        logits = np.asarray(apply_logits(model.params, model.config, np.array([prompt])))[0, -1]
        # Logits near 28: float32 leaves them about a part in 1e4 after 30 layers.
        np.testing.assert_allclose(logits[answer['top_ids']], answer['top_logits'], 0, atol=2e-3)
        assert greedy(prompt, len(answer['answer_ids'])) == answer['answer_ids']
        assert model.tokenizer.decode(answer['answer_ids']) == answer['answer']


def test_one_pass_scores_are_the_likelihoods_of_whole_sequences(model):
    """Prompt and titles in one pass, against every title behind the prompt on its own."""
    titles = (
        'Toy Story (1995)',
        'Toy Story 2 (1999)',
        'Heat (1995)',
        "Schindler's List (1993)",
        '2001: A Space Odyssey (1968)',
    )
    lines = '\n'.join(f'"{title}"' for title in titles)
    prompt = model.tokenizer.encode(
        '<|im_start|>user\nFilms that I liked, the latest last:\n"Aladdin (1992)"\n'
        '"Lion King, The (1994)"\n"Babe (1995)"\nWhich of these would I like best?\n'
        f'{lines}<|im_end|>\n<|im_start|>assistant\n'
    )
    answers = tuple(np.array(model.tokenizer.encode(f'"{title}"')) for title in titles)
    [(_, [found])] = score_queries(
        make_scorer(model.config, None),
        model.params,
        [Query(np.array(prompt), answers)],
        batch_size=1,
        row_length=32,
        max_shapes=1,
        max_positions=model.config.max_positions,
    )
    for score, answer in zip(found, answers, strict=True):
        tokens = np.array([[*prompt, *answer]])
        logits = apply_logits(model.params, model.config, tokens)[0, len(prompt) - 1 : -1]
        each = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(answer)), answer]
        np.testing.assert_allclose(score, each.sum(), rtol=1e-4)


def test_logits_and_first_words_are_those_of_torch_here(model, greedy, tmp_path):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    write_hf_folder(tmp_path, model.config, model.params, model.tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = model.tokenizer.encode(
        '<|im_start|>user\nName a film about toys.<|im_end|>\n<|im_start|>assistant\n'
    )
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([prompt])).logits.numpy()
        words = (
            theirs.eval()
            .generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=2)[
                0, len(prompt) :
            ]
            .tolist()
        )
    assert greedy(prompt, len(words)) == words
    logits = apply_logits(model.params, model.config, np.array([prompt]))
    np.testing.assert_allclose(logits, expected, 0, atol=2e-3)


def test_the_chat_template_of_the_file_works_in_transformers(model, tmp_path):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('jinja2')
    model.tokenizer.save(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hello'}]
    text = opened.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n'
        '<|im_start|>assistant\n'
    )
