"""Prepares a log of any size with Apache Beam as a TFDS data set: one user an example.

    python -m palr_jax.data.beam_builder --config=configs/base.py --to=DIR
        --config.data.source=table --config.data.path=events/
    python -m palr_jax.main … --config.data.source=tfds --config.data.path=DIR/palr_sequences/events

Repeated pairs and what falls to the k-core of `config.data.k_core` are gone. Without --beam_options
it runs in this process; on Dataflow with --to=gs://BUCKET/data and --beam_options='--project=…
--runner=DataflowRunner --region=… --temp_location=gs://BUCKET/temp', and palr_jax on the workers
(Beam's --setup_file, or a container). Needs the extra `beam`.
"""

import shlex
from typing import Any

import tensorflow_datasets as tfds
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError as error:
    raise ImportError(
        f"This needs apache-beam ({error}); install it with pip install 'palr_jax[beam]'."
    ) from error

from palr_jax import cli
from palr_jax.config import validate
from palr_jax.data import beam, streams
from palr_jax.data.sources import Prepared
from palr_jax.data.tfds_builders import FEATURES, SPLIT, make_metadata

TEMPORARY = 'pipelines'  # what one pipeline hands to the next, below the data set


class PalrSequences(tfds.core.GeneratorBasedBuilder):
    """Users with the items of their events in time order, after the k-core."""

    VERSION = tfds.core.Version('1.0.0')

    def __init__(self, *, config: str, data: ConfigDict, options: PipelineOptions, **more: Any):
        """See `prepare`; `config` is the name of the data set."""
        self._data, self._options = data, options
        config = tfds.core.BuilderConfig(name=config)
        super().__init__(config=config, file_format='array_record', **more)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            metadata=tfds.core.MetadataDict(),
            features=FEATURES,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        data, options, k = self._data, self._options, self._data.k_core
        # TFDS makes a data set in a folder that it removes where something fails.
        temporary = epath.Path(self.data_path) / TEMPORARY
        rows = beam.drop_repeated(data, temporary / 'first', options)
        folder, before, rounds = beam.k_core(temporary / 'first', k, temporary, options)
        item_ids = beam.item_ids(folder, temporary, options)
        repeated = rows - before['interactions']
        prepared = Prepared(rows, repeated, k, before, tuple(rounds))
        described = streams.describe(data, item_ids)
        self.info.metadata.update(
            make_metadata(self.builder_config.name, described, prepared, item_ids)
        )
        return {SPLIT: beam.Sequences(folder) | apache_beam.Map(_example)}

    def _generate_examples(self) -> None:
        raise AssertionError('_split_generators gives the examples.')


def _example(sequence: tuple[str, list[str], list[int]]) -> tuple[str, dict[str, Any]]:
    user, items, times = sequence
    return user, {'user': user, 'items': items, 'times': times}


def prepare(data: ConfigDict, to: epath.PathLike | None, options: PipelineOptions) -> epath.Path:
    """Runs the pipelines over the log of `data`.

    Args:
      data: the part `data` of the config; source, path, k_core and what the source reads.
      to: where data sets of TFDS are kept; None is their usual place.
      options: of Beam; the runner among them.

    Returns:
      The folder of the data set, for `data.path` with `data.source='tfds'`.

    Raises:
      InputError: a field or a file is wrong.
    """
    name = streams.open_stream(data).name
    builder = PalrSequences(config=name, data=data, options=options, data_dir=to)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(beam_options=options))
    folder = epath.Path(builder.data_path)
    if (folder / TEMPORARY).exists():
        (folder / TEMPORARY).rmtree()
    return folder


def main(_: list[str]) -> None:
    validate(CONFIG.value)
    options = PipelineOptions(shlex.split(BEAM_OPTIONS.value))
    print(prepare(CONFIG.value.data, TO.value, options))


if __name__ == '__main__':
    CONFIG = config_flags.DEFINE_config_file(
        'config', None, 'A config file; its part data is read.'
    )
    TO = flags.DEFINE_string('to', None, 'Where data sets of TFDS are kept.')
    # Not DirectRunner, which first tries to download a runner of another kind.
    BEAM_OPTIONS = flags.DEFINE_string(
        'beam_options', '--runner=FnApiRunner', 'Pipeline options of Apache Beam.'
    )
    flags.mark_flags_as_required(['config'])
    cli.run(main)
