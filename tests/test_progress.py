"""Progress without a terminal: log lines with a rate and the time left."""

import pytest
from absl import logging

from palr_jax import progress
from palr_jax.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    time = [0.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: time[0])
    return time


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_lines_come_at_intervals_and_at_the_end(clock, caplog):
    with caplog.at_level(logging.INFO), Progress('ranking', 100, 'users') as shown:
        for _ in range(100):
            clock[0] += 1.0
            shown.update(note='loss 2.0')
    assert lines(caplog)[0] == 'ranking: 15 of 100 users, 1.0 users/s, 01:25 left; loss 2.0'
    assert lines(caplog)[-1] == 'ranking: 100 of 100 users, 1.0 users/s, 00:00 left; loss 2.0'
    assert len(caplog.records) == 7


def test_work_of_an_earlier_session_does_not_count_in_the_rate(clock, caplog):
    with caplog.at_level(logging.INFO), Progress('finetune', 20, 'steps', done=10) as shown:
        clock[0] += 30.0
        shown.update()
    assert lines(caplog) == ['finetune: 11 of 20 steps, 2.0 steps/min, 04:30 left']
