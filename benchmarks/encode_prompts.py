"""How many prompts a minute the encoder makes, on one core.

    python benchmarks/encode_prompts.py
    python benchmarks/encode_prompts.py --source=ml1m --data=ml-1m.zip --model=model.gguf

Without --data the catalogue is made up, with titles as long as those of MovieLens; without --model
a small tokenizer is trained on the titles. The first pass tokenises every title that it meets; the
second finds all of them in the encoder's caches, as every pass of a run but the first does.
"""

import time

import numpy as np
from absl import flags

from palr_jax import cli
from palr_jax.config import default_config
from palr_jax.data import Catalogue, load, resolve
from palr_jax.llama.load import open_checkpoint
from palr_jax.prompts import Encoder, load_template
from palr_jax.testing.llama import tiny_tokenizer

PROMPTS = flags.DEFINE_integer('prompts', 5000, 'Prompts a pass.', lower_bound=1)
HISTORY = flags.DEFINE_integer('history', 20, 'Titles in the history.', lower_bound=0)
CANDIDATES = flags.DEFINE_integer('candidates', 50, 'Titles in the candidate list.', lower_bound=1)
ITEMS = flags.DEFINE_integer('items', 3416, 'Titles of the made-up catalogue.', lower_bound=1)
SOURCE = flags.DEFINE_string('source', 'ml1m', 'Parser of --data, as config.data.source.')
DATA = flags.DEFINE_string('data', None, 'A real data set, as config.data.path.')
MODEL = flags.DEFINE_string('model', None, 'Whose tokenizer to use, as config.model.path.')

WORDS = ('the', 'of', 'star', 'night', 'last', 'love', 'story', 'time', 'blue', 'house', 'heart')


def made_up_catalogue(items: int, rng: np.random.Generator) -> Catalogue:
    """Titles of two to five words and a year, two keywords an item."""
    titles = ['']
    for _ in range(items):
        words = rng.choice(WORDS, rng.integers(2, 6))
        titles.append(f'{" ".join(words).title()} ({rng.integers(1930, 2001)})')
    raw_ids = tuple(map(str, range(items + 1)))
    keywords = ((), *[('Drama', 'Comedy')] * items)
    return Catalogue(raw_ids, tuple(titles), (None,) * (items + 1), keywords)


def main(_: list[str]) -> None:
    rng = np.random.default_rng(0)
    if DATA.value:
        config = default_config().data
        config.source, config.path = SOURCE.value, DATA.value
        catalogue = load(config).catalogue
    else:
        catalogue = made_up_catalogue(ITEMS.value, rng)
    if MODEL.value:
        tokenizer = open_checkpoint(resolve(MODEL.value)).tokenizer
    else:
        tokenizer = tiny_tokenizer(catalogue.titles, vocab_size=4096)
    encoder = Encoder(catalogue, tokenizer, load_template('movies'), 'chatml', max_length=2**14)
    shape = PROMPTS.value, HISTORY.value + CANDIDATES.value
    shown = rng.integers(1, catalogue.items, shape, endpoint=True).tolist()
    for name in ('first pass', 'second pass'):
        tokens = 0
        began = time.perf_counter()
        for items in shown:
            history, candidates = items[: HISTORY.value], items[HISTORY.value :]
            prompt = encoder.prompt('recommend_retrieval', history, ('Drama', 'Comedy'), candidates)
            tokens += len(prompt.tokens)
        seconds = time.perf_counter() - began
        print(
            f'{name}: {PROMPTS.value / seconds * 60:,.0f} prompts a minute, '
            f'{tokens / seconds:,.0f} tokens a second, {tokens / PROMPTS.value:.0f} tokens a prompt'
        )


if __name__ == '__main__':
    cli.run(main)
