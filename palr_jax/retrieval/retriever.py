"""A trained SASRec: vectors of users and items, saved and loaded without the training.

Axes: U' the users at hand, I items, D width, T tokens of a row.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.retrieval.sasrec import Params, SASRec, SasrecConfig, init_params

FORMAT = 1
FILE = 'sasrec.npz'
BATCH = 256  # users encoded at once
SHORTEST = 8  # tokens of the smallest program


@dataclass(frozen=True)
class TrainedRetriever:
    """A model and how it was trained.

    Attributes:
      config: the shape of the model.
      params: what `SASRec` declares, NumPy float32.
      log: one row a validation: epoch, loss, NDCG@10 of the validation targets (None without any).
    """

    config: SasrecConfig
    params: Params
    log: tuple[Mapping[str, Any], ...] = ()

    @property
    def item_vectors(self) -> np.ndarray:
        """[I, D]; row 0 is item 1. SASRec's output table is its input table."""
        return self.params['items']['embedding']

    def user_vectors(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """[U', D] float32: the state after each history, which scores the next item.

        A user who was not there in training needs no training. Users of similar length share a
        batch, rows have a power of two of tokens and batches always the same size, so there is at
        most one program for each power of two up to `config.length`. An empty history has the zero
        vector.

        Args:
          histories: U' arrays of item ids, oldest first; the latest `config.length` are read.

        Raises:
          InputError: an id is not in the catalogue (0, which is padding, is none either).
        """
        config = self.config
        histories = [np.asarray(h)[-config.length :] for h in histories]
        for row, history in enumerate(histories):
            bad = (history < 1) | (history > config.items)
            if bad.any():
                raise InputError(
                    f'The history in row {row} holds the item id {history[bad.argmax()]}; '
                    f'item ids are 1 to {config.items}.'
                )
        vectors = np.zeros((len(histories), config.width), np.float32)
        lengths = np.array([len(h) for h in histories], int)
        rows = np.argsort(lengths, kind='stable')
        batch = min(BATCH, 1 << (len(histories) - 1).bit_length()) if histories else BATCH
        params = jax.device_put(self.params)
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            longest = max(SHORTEST, lengths[part[-1]])
            ids = np.zeros(
                (batch, min(config.length, 1 << int(longest - 1).bit_length())), np.int32
            )
            for place, row in enumerate(part):
                ids[place, ids.shape[1] - lengths[row] :] = histories[row]
            vectors[part] = _last_state(params, ids, config)[: len(part)]
        return vectors


@functools.partial(jax.jit, static_argnames='config')
def _last_state(params: Params, ids: jax.Array, config: SasrecConfig) -> jax.Array:
    return SASRec(config).apply({'params': params}, ids)[:, -1]


def save(retriever: TrainedRetriever, folder: epath.PathLike) -> None:
    """Writes `sasrec.npz`: the parameters by path, and the configuration and log as JSON text."""
    about = {'format': FORMAT, 'config': asdict(retriever.config), 'log': list(retriever.log)}
    flat = traverse_util.flatten_dict(retriever.params, sep='/')
    storage.write_arrays(epath.Path(folder) / FILE, about=np.array(json.dumps(about)), **flat)


def load(folder: epath.PathLike) -> TrainedRetriever:
    """Reads what `save` wrote.

    Raises:
      InputError: the file is missing, damaged or of another format, or its parameters are not those
        of its configuration.
    """
    path = epath.Path(folder) / FILE
    arrays = dict(storage.read_arrays(path))
    about = json.loads(str(arrays.pop('about', '{}')))
    if about.get('format') != FORMAT:
        raise InputError(f'{path}: format is {about.get("format")}; this version reads {FORMAT}.')
    config = SasrecConfig(**about['config'])
    expected = traverse_util.flatten_dict(
        jax.eval_shape(lambda: init_params(config, seed=0)), sep='/'
    )
    shapes = {name: array.shape for name, array in arrays.items()}
    wanted = {name: leaf.shape for name, leaf in expected.items()}
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise InputError(
                f'{path}: the parameter {name} has shape {shapes.get(name)}; its configuration '
                f'asks for {wanted.get(name)}.'
            )
    params = traverse_util.unflatten_dict(arrays, sep='/')
    return TrainedRetriever(config, params, tuple(about['log']))
