"""Logs read event by event are those that the parsers read whole."""

import pytest

from palr_jax.config import default_config
from palr_jax.data import streams
from palr_jax.data.sources import parse
from palr_jax.testing import write_amazon, write_ml1m, write_ml100k, write_recbole


@pytest.mark.parametrize(
    ('write', 'source'),
    [
        (write_ml100k, 'ml100k'),
        (write_ml1m, 'ml1m'),
        (write_recbole, 'recbole'),
        (write_recbole, 'ml100k'),
        (write_recbole, 'ml1m'),
        (write_amazon, 'amazon'),
    ],
)
def test_events_and_items_are_those_of_the_parser(tmp_path, write, source):
    """MovieLens in RecBole's form too."""
    config = default_config().data
    config.update({'source': source, 'path': str(write(tmp_path))})
    parsed, stream = parse(config), streams.open_stream(config)
    log = parsed.log
    whole = [
        (log.user_ids[user], log.item_ids[item], time)
        for user, item, time in zip(log.users, log.items, log.times.tolist())
    ]
    assert stream.name == parsed.name
    assert [event for m in stream.members for event in streams.events(config, m)] == whole
    described = streams.describe(config, log.item_ids)
    assert described.metadata == log.metadata
    assert described.placeholders == log.placeholders
    assert described.sha256 == parsed.sha256
