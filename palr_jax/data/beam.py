"""The log of `data`, prepared by Apache Beam pipelines for logs larger than memory.

One pipeline reads the events and drops repeated pairs; one a round drops users and items with too
few events, until none is dropped; the last hands over each user's sequence. Only the events of one
user, and the catalogue of the items that are kept, have to fit into the memory of one machine. The
results are those of `interactions.build` and `interactions.k_core`, count by count.

Between two pipelines the events lie in text files, one JSON list a line: user, item, time, and the
position in the raw files, which breaks ties as the file order does.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from etils import epath
from ml_collections import ConfigDict

from palr_jax.data import streams

# User, item, time, and the numbers of the file and of the row in it.
Event = tuple[str, str, float, int, int]
Pair = tuple[str, str]
When = tuple[float, int, int]
Counts = dict[str, int]


def read_events(config: dict[str, Any], part: tuple[int, str]) -> Iterator[Event]:
    """Yields the events of one raw file."""
    number, member = part
    for row, (user, item, time) in enumerate(streams.events(ConfigDict(config), member)):
        yield user, item, time, number, row


def drop_repeated(config: ConfigDict, folder: epath.Path, options: PipelineOptions) -> int:
    """Writes the first event of each (user, item) pair below `folder`.

    Returns:
      The number of rows that were read.
    """
    stream = streams.open_stream(config)
    plain = config.to_dict()
    with beam.Pipeline(options=options) as pipeline:
        events = (
            pipeline
            | beam.Create(list(enumerate(stream.members)))
            | beam.Reshuffle()
            | beam.FlatMap(lambda part: read_events(plain, part))
        )
        _write_numbers(events | beam.Map(lambda _: ('rows', 1)), folder / 'counts')
        first = events | beam.Map(_by_pair) | beam.CombinePerKey(min) | beam.Map(_event)
        _write_events(first, folder / 'events')
    return _read_numbers(folder / 'counts').get('rows', 0)


# The annotations of these functions choose Beam's coders, so they are exact.
def _by_pair(event: Event) -> tuple[Pair, When]:
    return event[:2], event[2:]


def _event(first: tuple[Pair, When]) -> Event:
    return *first[0], *first[1]


def _by_user(event: Event) -> tuple[str, Event]:
    return event[0], event


def _parse(line: str) -> Event:
    return tuple(json.loads(line))


def k_core_round(
    folder: epath.Path, k: int, to: epath.Path, options: PipelineOptions
) -> tuple[Counts, int]:
    """Writes below `to` the events of `folder` whose user and item have `k` events or more.

    Returns:
      The counts before, and the number of events that are kept.
    """
    with beam.Pipeline(options=options) as pipeline:
        by_user = (
            _read_events(pipeline, folder / 'events')
            | beam.Map(_by_user)
            | 'Of user' >> beam.GroupByKey()
        )
        by_item = by_user | beam.FlatMap(_judge_user, k) | 'Of item' >> beam.GroupByKey()
        kept = by_item | beam.FlatMap(_judge_item, k)
        _write_events(kept, to / 'events')
        numbers = (
            by_user | 'Users' >> beam.Map(lambda _: ('users', 1)),
            by_item | 'Items' >> beam.Map(lambda _: ('items', 1)),
            by_item
            | 'Events' >> beam.Map(lambda group: ('interactions', sum(1 for _ in group[1]))),
            kept | 'Kept' >> beam.Map(lambda _: ('kept', 1)),
        )
        _write_numbers(numbers | beam.Flatten(), to / 'counts')
    found = _read_numbers(to / 'counts')
    counts = {name: found.get(name, 0) for name in ('users', 'items', 'interactions')}
    return counts, found.get('kept', 0)


def _judge_user(
    group: tuple[str, Iterable[Event]], k: int
) -> Iterator[tuple[str, tuple[Event, bool]]]:
    events = list(group[1])
    for event in events:
        yield event[1], (event, len(events) >= k)


def _judge_item(group: tuple[str, Iterable[tuple[Event, bool]]], k: int) -> Iterator[Event]:
    """An item may have more events than fit into memory, so they are run through twice."""
    enough = sum(1 for _ in group[1]) >= k
    for event, of_user in group[1]:
        if enough and of_user:
            yield event


def k_core(
    folder: epath.Path, k: int, temporary: epath.Path, options: PipelineOptions
) -> tuple[epath.Path, Counts, list[Counts]]:
    """Rounds until nothing is dropped.

    Returns:
      The folder of the events that are left, the counts before, and those after each round that
      dropped something.
    """
    before: list[Counts] = []
    while True:
        to = temporary / f'round-{len(before)}'
        counts, kept = k_core_round(folder, k, to, options)
        before.append(counts)
        if kept == counts['interactions']:
            return folder, before[0], before[1:]
        folder = to


def item_ids(folder: epath.Path, temporary: epath.Path, options: PipelineOptions) -> list[str]:
    """The raw ids of the items that have events, in no order."""
    with beam.Pipeline(options=options) as pipeline:
        ids = _read_events(pipeline, folder / 'events') | beam.Map(lambda event: event[1])
        lines = ids | beam.Distinct() | 'Line' >> beam.Map(json.dumps)
        _write_lines(lines, temporary / 'items')
    shards = sorted((temporary / 'items').glob('part-*'))
    return [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]


class Sequences(beam.PTransform):
    """Each user's (raw id, raw item ids, seconds) in time order."""

    def __init__(self, folder: epath.Path):
        super().__init__()
        self._folder = folder

    def expand(self, pipeline: beam.Pipeline) -> beam.PCollection:
        return (
            _read_events(pipeline, self._folder / 'events')
            | beam.Map(_by_user)
            | 'Of user' >> beam.GroupByKey()
            | beam.Map(_sequence)
        )


def _sequence(group: tuple[str, Iterable[Event]]) -> tuple[str, list[str], list[int]]:
    events = sorted(group[1], key=lambda event: event[2:])
    return group[0], [event[1] for event in events], [math.floor(event[2]) for event in events]


def _write_events(events: beam.PCollection, folder: epath.Path) -> None:
    _write_lines(events | f'Lines of {folder}' >> beam.Map(json.dumps), folder)


def _read_events(pipeline: beam.Pipeline, folder: epath.Path) -> beam.PCollection:
    lines = pipeline | f'Read {folder}' >> beam.io.ReadFromText(f'{folder}/part-*')
    return lines | f'Parse {folder}' >> beam.Map(_parse)


def _write_lines(lines: beam.PCollection, folder: epath.Path, shards: int = 0) -> None:
    _ = lines | f'Write {folder}' >> beam.io.WriteToText(f'{folder}/part', num_shards=shards)


def _write_numbers(numbers: beam.PCollection, folder: epath.Path) -> None:
    """Writes the sums of (name, number)."""
    sums = numbers | f'Sums of {folder}' >> beam.CombinePerKey(sum)
    _write_lines(sums | f'Lines of {folder}' >> beam.Map(json.dumps), folder, shards=1)


def _read_numbers(folder: epath.Path) -> Counts:
    lines = [line for shard in folder.glob('part-*') for line in shard.read_text().splitlines()]
    return dict(map(json.loads, lines))
