"""A table of stored rows, as docs/results.md shows them.

    python benchmarks/results_table.py docs/results/retriever_*_seed?.json [--systems=A,B]

Each file is the report/metrics.json of a run. Several seeds of one kind get a line with their mean.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

METRICS = ('HR@10', 'NDCG@10', 'MRR')


def rows_of(path: Path, systems: list[str]) -> list[dict[str, Any]]:
    """The rows of a run over all its users, with its recall beside the retriever's."""
    report = json.loads(path.read_text())
    rows = []
    for run in report['runs']:
        if run['system'] not in systems or run['user_set'] != 'all' or run.get('group'):
            continue
        row = {'file': path.name, 'seed': report['seed'], 'users': run['users']} | run
        if run['system'] == 'retriever':
            row |= {f'recall@{k}': report['retrieval'][f'recall@{k}'] for k in (20, 50)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('files', nargs='+', type=Path)
    parser.add_argument('--systems', default='retriever', help='comma-separated')
    arguments = parser.parse_args()
    columns = (*METRICS, 'recall@20', 'recall@50')
    print(f'| run | system | seed | users | {" | ".join(columns)} | 95 % of NDCG@10 | file |')
    print('| --- ' * (len(columns) + 6) + '|')
    systems = arguments.systems.split(',')
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(arguments.files):
        name = re.sub(r'_seed\d+', '', path.stem)
        for row in rows_of(path, systems):
            groups.setdefault((name, row['system']), []).append(row)
    for (name, system), rows in groups.items():
        for row in rows:
            low, high = row['ci95']['NDCG@10']
            values = ' | '.join(f'{row[c]:.4f}' if c in row else '' for c in columns)
            print(
                f'| {name} | {system} | {row["seed"]} | {row["users"]:,} | {values} '
                f'| {low:.4f} to {high:.4f} | {row["file"]} |'
            )
        if len(rows) > 1:
            means = (
                f'{statistics.mean(row[c] for row in rows):.4f}' if c in rows[0] else ''
                for c in columns
            )
            print(f'| {name} | {system} | mean of {len(rows)} | | {" | ".join(means)} | | |')


if __name__ == '__main__':
    main()
