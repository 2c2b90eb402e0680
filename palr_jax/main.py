"""Runs PALR: `python -m palr_jax.main --config=configs/demo.py --workdir=runs/demo`.

Every field of the config can be set on the command line: `--config.finetune.steps=200`. The same
command again continues an interrupted run, and does nothing twice.
"""

from absl import flags
from etils import epath
from ml_collections import config_flags

from palr_jax import cli, data, evaluation, pipeline
from palr_jax.parallel import distributed

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The config file, configs/NAME.py, with :ARGUMENT if it takes one.'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is written.')
DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'This is one of several processes of a run; see docs/launch.md.'
)
WAIT = flags.DEFINE_integer(
    'wait', 300, 'Seconds until all processes must be there.', lower_bound=1
)
OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Redo the stages that a changed config affects.')


def main(_: list[str]) -> None:
    if DISTRIBUTED.value:
        distributed.start(WAIT.value)
    with distributed.ending_together():
        report = pipeline.run(CONFIG.value, WORKDIR.value, overwrite=OVERWRITE.value)
    if not distributed.is_writer():
        return
    if report is not None:
        print(evaluation.table(report))
    else:
        print(data.counts_table(data.read(epath.Path(WORKDIR.value) / 'data').record))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    cli.run(main)
