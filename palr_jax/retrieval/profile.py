"""The profile retriever: users and items meet in what the LLM makes of their texts.

An item's text is its title and its keywords, as the prompt that asks for a profile shows them. The
vector of a text is the mean, over its tokens, of the base model's hidden states a quarter of the
way up: no later layer found more, and a quarter of the layers is a quarter of the work. Hidden
states all point nearly the same way, so the catalogue's mean comes off and the directions in which
its texts differ most are weighed down (`whiten`); without that, far fewer targets are found.

A user is made of the latest items, each counting less than the one after it, and of the profile:
the keywords that were counted or that the LLM chose. A keyword is the mean of the items that have
it, as a bare keyword is no item and its text lands far from theirs. No event is learnt from: new
items need only their texts, and new users not even the LLM.

Axes: n texts, I items, D width, K keywords, B batch, T tokens, U' the users at hand.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from palr_jax import storage
from palr_jax.data import Catalogue
from palr_jax.errors import InputError
from palr_jax.llama.attention import Causal
from palr_jax.llama.config import LlamaConfig
from palr_jax.llama.model import Llama
from palr_jax.llama.tokenizer import Tokenizer
from palr_jax.progress import Progress
from palr_jax.ranking.score import CAST_IN_LAYER, choose_groups

FORMAT = 1
FILE = 'profile.npz'
DEPTH = 4  # the hidden states are those after a DEPTH-th of the layers
LENGTH_STEP = 8  # lengths are rounded up to a multiple of this before shapes are chosen
SHRINKAGE = 0.2  # share of the mean variance that is added to each direction's
RECENT = 50  # latest items of a history; the weights of earlier ones vanish
ABOUT = ('keywords', 'share', 'decay', 'fingerprint')  # fields that are written as JSON

# Histories [U'] -> the keywords of each, most important first.
Profiles = Callable[[Sequence[np.ndarray]], Sequence[tuple[str, ...]]]


def item_texts(catalogue: Catalogue) -> list[str]:
    """The texts of the items 1 … I: `"Heat (1995)": Action, Crime`."""
    return [
        f'"{title}"' + (f': {", ".join(keywords)}' if keywords else '')
        for title, keywords in zip(catalogue.titles[1:], catalogue.keywords[1:])
    ]


def embed_texts(
    params: Any,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    dtype: Any = jnp.float32,
    batch_size: int = 64,
    max_tokens: int = 64,
    max_shapes: int = 4,
) -> np.ndarray:
    """The mean hidden state of each text: [n, D] float32; an empty text has the zero vector.

    Every text follows the token that begins one (BOS, or EOS where the model has none). It is not
    counted: attention parks there, so it is large and says nothing. Equal texts are computed once.

    Args:
      params: the tree of `Llama`, of any stored type; adapters in it are not read.
      config: the architecture.
      tokenizer: of the model.
      texts: n texts; strings of special tokens in them stay text.
      dtype: of the activations; bfloat16 finds as much as float32.
      batch_size: texts computed at once.
      max_tokens: of a text; what follows is not read.
      max_shapes: compiled programs, at most; texts of similar length share one.

    Raises:
      InputError: a hidden state is not finite.
    """
    lower = dataclasses.replace(config, layers=-(-config.layers // DEPTH))
    layers = jax.tree.map(lambda leaf: leaf[: lower.layers], params['layers'])
    params = jax.device_put(params | {'layers': layers})
    program = _make_program(lower, jnp.dtype(dtype))
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    room = min(max_tokens, config.max_positions - 1)
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    tokens = [[start, *tokenizer.piece(t, allow_special=False)[:room]] for t in place]
    lengths = np.array([-(-len(row) // LENGTH_STEP) * LENGTH_STEP for row in tokens], int)
    means = np.zeros((len(tokens), config.width), np.float32)
    with Progress('texts', len(tokens), 'texts') as progress:
        for members in choose_groups(lengths, np.zeros_like(lengths), max_shapes, batch_size):
            for first in range(0, len(members), batch_size):
                part = members[first : first + batch_size]
                batch = np.zeros((batch_size, lengths[members].max()), np.int32)
                sizes = np.ones(batch_size, np.int32)
                for row, i in enumerate(part):
                    batch[row, : len(tokens[i])], sizes[row] = tokens[i], len(tokens[i])
                means[part] = program(params, batch, sizes)[: len(part)]
                progress.update(len(part))
    finite = np.isfinite(means).all(1)
    if not finite.all():
        raise InputError(
            f'The hidden states of the text {list(place)[finite.argmin()]!r} are not finite; '
            'check the weights, and that tokenizer and model belong together.'
        )
    return means[[place[text] for text in texts]]


@functools.cache
def _make_program(config: LlamaConfig, dtype: jnp.dtype) -> Callable[..., jax.Array]:
    """A jitted (params, tokens [B, T], sizes [B]) -> [B, D] float32 means."""
    model = Llama(config, None, dtype)

    def means(params: Any, tokens: jax.Array, sizes: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        real = positions < sizes[:, None]
        hidden = model.apply({'params': params}, tokens, positions, Causal(real.astype(jnp.int32)))
        counted = (real & (positions > 0))[..., None]
        total = jnp.sum(jnp.where(counted, hidden.astype(jnp.float32), 0.0), axis=1)
        return total / jnp.maximum(sizes - 1, 1)[:, None]

    narrow = dtype != jnp.float32 and jax.default_backend() == 'cpu'
    return jax.jit(means, compiler_options=CAST_IN_LAYER if narrow else None)


def whiten(vectors: np.ndarray) -> np.ndarray:
    """[n, D] -> [n, D] float32 of unit length, without the mean and with evened-out directions.

    Each principal direction is divided by its standard deviation, after a share of the mean
    variance is added to its own: directions that hold only noise must not count like the others.
    """
    vectors = vectors - np.mean(vectors, 0, dtype=np.float64)
    variances, directions = np.linalg.eigh(vectors.T @ vectors / len(vectors))
    floor = SHRINKAGE * variances.mean() or 1.0  # where all texts are alike, all vectors are zero
    scales = (np.maximum(variances, 0) + floor) ** -0.5
    return unit(vectors @ (directions * scales) @ directions.T).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; a zero row stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


@dataclasses.dataclass(frozen=True)
class ProfileRetriever:
    """A `Retriever` that needs no training.

    Attributes:
      item_vectors: [I, D] float32 of unit length; row 0 is item 1.
      keywords: the K keywords of the catalogue.
      keyword_vectors: [K, D] float32 of unit length.
      share: of the profile in a user's vector, from 0 (latest items alone) to 1 (profile alone).
      decay: weight of an item relative to the one after it, above 0, at most 1.
      fingerprint: of the model that made the vectors.
      profiles: names the keywords of histories.
    """

    item_vectors: np.ndarray
    keywords: tuple[str, ...]
    keyword_vectors: np.ndarray
    share: float
    decay: float
    fingerprint: str
    profiles: Profiles

    def user_vectors(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """See `Retriever`; of the items the latest RECENT count, the profile sees all of them.

        Raises:
          InputError: an id is not in the catalogue, or a profile names a keyword that no item has.
        """
        latest = np.zeros((len(histories), self.item_vectors.shape[1]), np.float32)
        for row, history in enumerate(histories):
            history = np.asarray(history, int)
            bad = (history < 1) | (history > len(self.item_vectors))
            if bad.any():
                raise InputError(
                    f'The history in row {row} holds the item id {history[bad.argmax()]}; '
                    f'item ids are 1 to {len(self.item_vectors)}.'
                )
            items = self.item_vectors[history[-RECENT:] - 1]
            latest[row] = self.decay ** np.arange(len(items))[::-1] @ items
        if not self.share:  # profiles may cost a pass of the LLM
            return unit(latest)
        profile, number = np.zeros_like(latest), {k: i for i, k in enumerate(self.keywords)}
        for row, keywords in enumerate(self.profiles(histories)):
            if unknown := [keyword for keyword in keywords if keyword not in number]:
                raise InputError(
                    f'The profile in row {row} names {unknown[0]!r}, no keyword of the catalogue.'
                )
            profile[row] = self.keyword_vectors[[number[k] for k in keywords]].sum(0)
        return (1 - self.share) * unit(latest) + self.share * unit(profile)


def fit_profile(
    catalogue: Catalogue,
    vectors: np.ndarray,
    profiles: Profiles,
    fingerprint: str,
    share: float = 0.1,
    decay: float = 0.8,
) -> ProfileRetriever:
    """A retriever over a catalogue, from what `embed_texts` made of its `item_texts`: [I, D]."""
    items = whiten(vectors)
    keywords = tuple(sorted({k for of_item in catalogue.keywords for k in of_item}))
    number = {keyword: i for i, keyword in enumerate(keywords)}
    sums = np.zeros((len(keywords), items.shape[1]), np.float32)
    for vector, of_item in zip(items, catalogue.keywords[1:]):
        for keyword in of_item:  # an item has one vote, as in `count_profile`
            sums[number[keyword]] += vector / len(of_item)
    return ProfileRetriever(items, keywords, unit(sums), share, decay, fingerprint, profiles)


def save(retriever: ProfileRetriever, folder: epath.PathLike) -> None:
    """Writes `profile.npz`: the vectors, and the rest but `profiles` as JSON text."""
    about = {'format': FORMAT} | {name: getattr(retriever, name) for name in ABOUT}
    storage.write_arrays(
        epath.Path(folder) / FILE,
        about=np.array(json.dumps(about)),
        item_vectors=retriever.item_vectors,
        keyword_vectors=retriever.keyword_vectors,
    )


def load(folder: epath.PathLike, profiles: Profiles, fingerprint: str) -> ProfileRetriever:
    """Reads what `save` wrote.

    Raises:
      InputError: the file is missing, damaged or of another format, or another model made it.
    """
    path = epath.Path(folder) / FILE
    arrays = dict(storage.read_arrays(path))
    about = json.loads(str(arrays.pop('about', '{}')))
    if (found := about.pop('format', None)) != FORMAT:
        raise InputError(f'{path}: format is {found}; this version reads {FORMAT}.')
    if (found := about['fingerprint']) != fingerprint:
        raise InputError(
            f'{path}: these vectors are of the model {found[:12]}…; the model at hand is '
            f'{fingerprint[:12]}….'
        )
    about['keywords'] = tuple(about['keywords'])
    return ProfileRetriever(**arrays, **about, profiles=profiles)
