"""A made-up log of 20 million rows through the data stage: seconds and peak memory.

    python benchmarks/large_log.py --rows=20000000 --kind=csv

A user has 100 events on average, an item 400, some many times more; there are ties and repeated
pairs, and the rows stand in no order. They are written to a temporary folder first, by a process of
its own, so that the peak is that of the data stage alone.
"""

import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from absl import flags

from palr_jax import cli
from palr_jax.config import default_config
from palr_jax.data import load, make_split, save

ROWS = flags.DEFINE_integer('rows', 20_000_000, 'Events of the log.', lower_bound=1000)
KIND = flags.DEFINE_enum('kind', 'csv', ['csv', 'parquet', 'jsonl'], 'Kind of file.')
_CHUNK = 1_000_000  # rows written at once


def write(folder: Path, rows: int, kind: str) -> None:
    """Writes the log and a table of its items."""
    rng = np.random.default_rng(0)
    users, items = rows // 100 + 10, rows // 400 + 10
    with (folder / f'log.{kind}').open('wb') as stream:
        writer = None
        for start in range(0, rows, _CHUNK):
            size = min(_CHUNK, rows - start)
            skewed = rng.random(size) ** 3  # the first items are many times more popular
            table = pa.table(
                {
                    'user': [f'user-{u:07d}' for u in rng.integers(users, size=size)],
                    'item': [f'B{i:09d}' for i in (items * skewed).astype(np.int64)],
                    'time': rng.integers(1_300_000_000, 1_400_000_000, size=size) // 60 * 60,
                }
            )
            if kind == 'jsonl':
                columns = zip(*(column.to_pylist() for column in table.columns))
                line = '{{"user": "{}", "item": "{}", "time": {}}}\n'
                stream.write(''.join(line.format(*row) for row in columns).encode())
                continue
            if writer is None:
                make = pa_csv.CSVWriter if kind == 'csv' else pq.ParquetWriter
                writer = make(stream, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    titles = pa.table(
        {
            'item': [f'B{i:09d}' for i in range(items)],
            'title': [f'Product number {i}' for i in range(items)],
            'keywords': [[f'Kind {i % 50}'] for i in range(items)],
        }
    )
    pq.write_table(titles, folder / 'items.parquet')


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawn = multiprocessing.get_context('spawn')
        writer = spawn.Process(target=write, args=(folder, ROWS.value, KIND.value))
        writer.start()
        writer.join()
        config = default_config().data
        config.source = 'table'
        config.path = str(folder / f'log.{KIND.value}')
        config.items_path = str(folder / 'items.parquet')
        size = (folder / f'log.{KIND.value}').stat().st_size
        start = time.perf_counter()
        source = load(config)
        split = make_split(source.interactions, 'leave_one_out')
        save(source, split, folder / 'out')
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    record = source.record
    print(f'{KIND.value}: {record["rows_read"]:,} rows, {size / 2**20:,.0f} MiB')
    print(
        f'kept: {record["users"]:,} users, {record["items"]:,} items, '
        f'{record["interactions"]:,} interactions; dropped {record["dropped"]}'
    )
    print(f'{seconds:.1f} s, peak {peak:.2f} GiB')


if __name__ == '__main__':
    cli.run(main)
