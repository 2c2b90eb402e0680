"""Asks a finished run what its scores depend on, and what its base model knew before.

    python -m palr_jax.probe --workdir=runs/demo --what=order

order: how much of the ranking is the order in which the prompt lists the candidates. invariance:
whether the scores depend on batches and padding, which they must not; the exit status is 1 if they
do. memory: how much of the catalogue the untuned model knows by heart. docs/probes.md reads them.
"""

import sys

from absl import flags
from etils import epath

from palr_jax import cli, storage
from palr_jax.errors import InputError
from palr_jax.probes import finished, invariance, memory, order

WORKDIR = flags.DEFINE_string('workdir', None, 'Of a finished run.')
WHAT = flags.DEFINE_enum('what', None, ['order', 'invariance', 'memory'], 'Which probe.')
SYSTEM = flags.DEFINE_enum(
    'system',
    None,
    finished.SYSTEMS,
    'Tuned model or base; left out, the tuned one if there is one.',
)
USERS = flags.DEFINE_integer(
    'users', None, f'Of a seeded sample: {order.USERS} (order), {invariance.USERS} (invariance).'
)
SHUFFLES = flags.DEFINE_integer('shuffles', 8, 'Orders of the candidates.', lower_bound=2)
ITEMS = flags.DEFINE_integer('items', None, f'Of a seeded sample: {memory.ITEMS}.')

READS = {
    'order': ('system', 'users', 'shuffles'),
    'invariance': ('system', 'users'),
    'memory': ('items',),
}
FAILED = 1  # exit status of a probe that fails; bad input has another


def main(_: list[str]) -> None:
    what = WHAT.value
    for name in ('system', 'users', 'shuffles', 'items'):
        if flags.FLAGS[name].present and name not in READS[what]:
            raise InputError(
                f'--{name} says nothing to --what={what}; allowed: '
                f'{", ".join(f"--{read}" for read in READS[what])}.'
            )
    run = finished.open_run(WORKDIR.value, 'llm_zero_shot' if what == 'memory' else SYSTEM.value)
    if what == 'order':
        found, table = order.probe(run, USERS.value, SHUFFLES.value), order.table
    elif what == 'invariance':
        found, table = invariance.probe(run, USERS.value), invariance.table
    else:
        found, table = memory.probe(run, ITEMS.value), memory.table
    path = epath.Path(WORKDIR.value) / 'probes' / f'{what}_{run.system}.json'
    storage.write_json(path, {'probe': what} | found)
    print(table(found))
    print(f'written to {path}')
    if not found.get('passed', True):
        sys.exit(FAILED)


if __name__ == '__main__':
    flags.mark_flags_as_required(['workdir', 'what'])
    cli.run(main)
