"""Runs a study, a base config and variants of it, and compares the variants with the base.

    python -m palr_jax.ablate --config=configs/ablations/prompt_components.py --workdir=runs/prompts

The same command again continues; a variant that was added is run alone, stages in common are made
once. On several machines with one disk, each runs --variant=NAME, and --report collects them; where
one needs a stage that another is making, it waits. On an object store, which has no locks, run
--variant=base first.

Fields of the base can be set on the command line: --config.base.ranking.users=500.
"""

from absl import flags
from ml_collections import config_flags

from palr_jax import cli, study, study_report
from palr_jax.errors import InputError
from palr_jax.evaluation.study_text import table
from palr_jax.parallel import distributed

CONFIG = config_flags.DEFINE_config_file('config', None, 'The study, configs/ablations/NAME.py.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Where the study is written.')
VARIANT = flags.DEFINE_string('variant', None, 'Run this variant alone, and write no report.')
REPORT = flags.DEFINE_bool('report', False, 'Run nothing; report what is finished.')
DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'This is one of several processes of each run; see docs/launch.md.'
)
WAIT = flags.DEFINE_integer(
    'wait', 300, 'Seconds until all processes must be there.', lower_bound=1
)


def main(_: list[str]) -> None:
    if REPORT.value and VARIANT.value:
        raise InputError('--report runs nothing; allowed: --report or --variant, not both.')
    if DISTRIBUTED.value:
        distributed.start(WAIT.value)
    opened = study.open_study(CONFIG.value)
    failed, missing = {}, []
    if not REPORT.value:
        with distributed.ending_together():
            failed = study.run(opened, WORKDIR.value, VARIANT.value)
    if not VARIANT.value and distributed.is_writer():
        report = study_report.write(opened, WORKDIR.value)
        print(table(report))
        failed = {v['name']: v['error'] for v in report['variants'] if v['status'] == 'failed'}
        missing = report['missing']
    problems = [f'variant {name} failed: {why}' for name, why in failed.items()]
    problems += [f'variant {name} is not finished' for name in missing]
    if problems:
        raise InputError('; '.join(problems))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    cli.run(main, within='base.')
