"""The counts of a data set as a table for people."""

from collections.abc import Mapping
from typing import Any


def counts_table(record: Mapping[str, Any]) -> str:
    """What every step of the data stage left, from the record that it saves."""
    names = ('users', 'items', 'interactions')
    rows = [('', *names), ('rows read', '', '', record['rows_read'])]
    rows.append(('first of each pair', *(record['before_k_core'][name] for name in names)))
    k = record['k_core']['k']
    for number, counts in enumerate(record['k_core']['rounds'], start=1):
        rows.append((f'{k}-core, round {number}', *(counts[name] for name in names)))
    rows.append(('kept', *(record[name] for name in names)))
    split = record['split']
    if 'train_events' in split:
        trained = record['users'] - split['users_without_training']
        rows.append(('training', trained, '', split['train_events']))
    for part in ('valid', 'test'):
        targets = split[f'{part}_users']
        cold = f', {split[f"{part}_cold"]:,} cold'
        rows.append((f'{part} targets{cold}', targets, '', targets))
    texts = [[cell if isinstance(cell, str) else f'{cell:,}' for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    lines = [
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in texts
    ]
    return '\n'.join([f'{record["name"]}: ties in {record["tie_rule"]}', *lines])
