"""TFDS builders of MovieLens and Amazon 2014 around the same parsers, without TensorFlow.

One example a user: the raw id, the raw ids of the items in time order (repeated pairs dropped), and
the seconds. What is known of the items, the hashes of the raw files and the counts of what was
dropped are in the metadata of the data set, so `data.source='tfds'` gives what the raw files give.

    python -m palr_jax.data.tfds_builders --dataset=palr_movielens/ml1m --path=ml-1m.zip --to=DIR
    python -m palr_jax.data.tfds_builders --dataset=palr_amazon/Beauty --to=DIR
    python -m palr_jax.main … --config.data.source=tfds --config.data.path=DIR/palr_amazon/Beauty

Without --path the files are downloaded, and checked where the publisher states a hash. Without --to
the data set goes where TFDS keeps its data (TFDS_DATA_DIR, else ~/tensorflow_datasets), where a
relative `config.data.path` is looked for, too.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from palr_jax import cli
from palr_jax.data import interactions
from palr_jax.data.fetch import AMAZON_CATEGORIES
from palr_jax.data.interactions import Interactions, Item, RawLog
from palr_jax.data.sources import Parsed, Prepared, parse
from palr_jax.data.streams import Described
from palr_jax.errors import InputError

FORMAT = 1  # of the metadata
SPLIT = 'users'


@dataclass(kw_only=True)
class SourceConfig(tfds.core.BuilderConfig):
    """Where the raw files are."""

    source: str  # of config.data
    path: str  # of config.data; where the builder is given none


class _Histories(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One example a user."""

    VERSION = tfds.core.Version('1.0.0')
    HOMEPAGE: str
    CITATION: str

    def __init__(self, *, path: epath.PathLike | None = None, **arguments: Any):
        """`path` is the archive or folder of the raw files; None is the publisher's, downloaded."""
        self._path = path
        super().__init__(**arguments, file_format='array_record')

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            metadata=tfds.core.MetadataDict(),
            features=FEATURES,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # `fetch` downloads, and checks the hashes
        path = self.builder_config.path if self._path is None else os.fspath(self._path)
        parsed = parse(ConfigDict({'source': self.builder_config.source, 'path': path}))
        events, item_ids, repeated = interactions.build(parsed.log)
        prepared = Prepared(rows=len(parsed.log.users), repeated=repeated)
        described = Described(parsed.log.metadata, parsed.log.placeholders, parsed.sha256)
        self.info.metadata.update(make_metadata(parsed.name, described, prepared, item_ids))
        return {SPLIT: _examples(events, item_ids)}

    def _generate_examples(self) -> None:
        raise AssertionError('_split_generators gives the examples.')


FEATURES = tfds.features.FeaturesDict(
    {
        'user': tfds.features.Text(),
        'items': tfds.features.Sequence(tfds.features.Text()),
        'times': tfds.features.Sequence(tfds.features.Scalar(np.int64)),
    }
)


class PalrMovielens(_Histories):
    """Users of MovieLens with the films that they rated, in time order."""

    HOMEPAGE = 'https://grouplens.org/datasets/movielens/'
    CITATION = """@article{harper2015movielens,
  title={The {MovieLens} Datasets: History and Context},
  author={Harper, F. Maxwell and Konstan, Joseph A.},
  journal={ACM Transactions on Interactive Intelligent Systems},
  volume={5}, number={4}, year={2015}, doi={10.1145/2827872}
}"""
    BUILDER_CONFIGS: ClassVar[list[SourceConfig]] = [
        SourceConfig(name='ml100k', source='ml100k', path='download:ml-100k'),
        SourceConfig(name='ml1m', source='ml1m', path='download:ml-1m'),
    ]


class PalrAmazon(_Histories):
    """Users of Amazon with the products of a category that they reviewed until 2014."""

    HOMEPAGE = 'https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html'
    CITATION = """@inproceedings{he2016ups,
  title={Ups and Downs: Modeling the Visual Evolution of Fashion Trends with One-Class
    Collaborative Filtering},
  author={He, Ruining and McAuley, Julian},
  booktitle={Proceedings of the 25th International Conference on World Wide Web},
  year={2016}, doi={10.1145/2872427.2883037}
}"""
    BUILDER_CONFIGS: ClassVar[list[SourceConfig]] = [
        SourceConfig(name=category, source='amazon', path=f'download:amazon-{category}')
        for category in AMAZON_CATEGORIES.split()
    ]


def make_metadata(
    name: str, described: Described, prepared: Prepared, item_ids: Sequence[str]
) -> dict[str, Any]:
    """All but the histories: what `read` needs to give the same log, and the same record."""
    items = [described.metadata.get(raw_id, Item('', ())) for raw_id in item_ids]
    return {
        'format': FORMAT,
        'name': name,
        'sha256': described.sha256,
        'prepared': prepared._asdict(),
        'item_ids': list(item_ids),
        'titles': [item.title for item in items],
        'keywords': [list(item.keywords) for item in items],
        'placeholders': [described.placeholders.get(raw_id) for raw_id in item_ids],
    }


def _examples(
    events: Interactions, item_ids: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    ends = np.cumsum(np.bincount(events.users, minlength=len(events.user_ids)))
    for user, (items, times) in enumerate(
        zip(np.split(events.items, ends[:-1]), np.split(events.times, ends[:-1]))
    ):
        raw_items = [item_ids[item - 1] for item in items]
        yield user, {'user': events.user_ids[user], 'items': raw_items, 'times': times}


def read(path: epath.PathLike) -> Parsed:
    """Reads a data set that a builder of this file has prepared.

    Args:
      path: its folder; that of a version, or the one above where there is one version. A relative
        path that does not exist is looked for below TFDS_DATA_DIR.

    Raises:
      InputError: there is no such data set.
    """
    folder = _find(epath.Path(path))
    builder = tfds.builder_from_directory(folder)
    metadata = builder.info.metadata or {}
    if metadata.get('format') != FORMAT:
        raise InputError(
            f'{folder}: format is {metadata.get("format")}; this version reads {FORMAT}: prepare '
            'it with python -m palr_jax.data.tfds_builders.'
        )
    item_codes = {raw_id: code for code, raw_id in enumerate(metadata['item_ids'])}
    user_ids, items, times = [], [], []
    for example in builder.as_data_source(split=SPLIT):
        user_ids.append(example['user'].decode())
        items.append(np.array([item_codes[i.decode()] for i in example['items']], np.int64))
        times.append(np.array(example['times'], np.int64))
    described = zip(metadata['item_ids'], metadata['titles'], metadata['keywords'])
    placeholders = zip(metadata['item_ids'], metadata['placeholders'])
    log = RawLog(
        users=np.repeat(np.arange(len(user_ids)), [len(part) for part in times]),
        items=np.concatenate(items),
        times=np.concatenate(times),
        user_ids=tuple(user_ids),
        item_ids=tuple(metadata['item_ids']),
        metadata={raw_id: Item(title, tuple(words)) for raw_id, title, words in described},
        files=(),
        placeholders={raw_id: text for raw_id, text in placeholders if text},
    )
    prepared = Prepared(**metadata['prepared'])
    return Parsed(folder, metadata['name'], log, metadata['sha256'], prepared)


def _find(path: epath.Path) -> epath.Path:
    home = epath.Path(os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()
    for folder in (path, home / path):
        if not folder.is_dir():
            continue
        versions = [child for child in (folder, *folder.iterdir()) if _prepared(child)]
        if len(versions) == 1:
            return versions[0]
        raise InputError(
            f'config.data.path: {folder} holds {len(versions)} versions of a prepared data set; '
            'needed is one (its folder has the file dataset_info.json).'
        )
    raise InputError(
        f'config.data.path: {path} exists neither as it stands nor in {home}; needed is what '
        'python -m palr_jax.data.tfds_builders has prepared.'
    )


def _prepared(folder: epath.Path) -> bool:
    return (folder / 'dataset_info.json').exists()


def main(_: list[str]) -> None:
    name, _, config = DATASET.value.partition('/')
    builders = {'palr_movielens': PalrMovielens, 'palr_amazon': PalrAmazon}
    if name not in builders or config not in builders[name].builder_configs:
        allowed = [f'{n}/{c}' for n, b in builders.items() for c in b.builder_configs]
        raise InputError(f'--dataset is {DATASET.value!r}; allowed are {", ".join(allowed)}.')
    builder = builders[name](config=config, path=PATH.value, data_dir=TO.value)
    builder.download_and_prepare()
    print(builder.data_path)


if __name__ == '__main__':
    DATASET = flags.DEFINE_string('dataset', None, 'Builder and config: palr_movielens/ml1m.')
    PATH = flags.DEFINE_string('path', None, 'Archive or folder of the raw files.')
    TO = flags.DEFINE_string('to', None, 'Where data sets of TFDS are kept.')
    flags.mark_flags_as_required(['dataset'])
    cli.run(main)
