"""The curves of a run survive kills and resumes, and hold no NaN."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from palr_jax import metric_writer
from palr_jax.errors import InputError, LocalError
from palr_jax.metric_writer import MetricWriter


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def train(workdir, steps, **options):
    with MetricWriter(workdir, **options) as writer:
        for step in steps:
            writer.write(step, 'finetune', loss=1 / (step + 1))


def events(folder):
    """The events of a TensorBoard folder; a record is length (8), crc (4), data, crc (4)."""
    found = []
    for path in sorted(folder.glob('events.out.tfevents.*')):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], 'little')
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_a_line_a_step(tmp_path):
    with MetricWriter(tmp_path / 'new' / 'run') as writer:
        writer.write(3, 'retrieval', loss=jnp.float32(0.5), users=np.int64(7))
        assert lines(tmp_path / 'new' / 'run') == [
            {'step': 3, 'stage': 'retrieval', 'loss': 0.5, 'users': 7}
        ]


def test_non_finite_is_null(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, 'finetune', loss=float('nan'), norm=jnp.inf, rate=0.1)
    assert lines(tmp_path) == [
        {'step': 1, 'stage': 'finetune', 'loss': None, 'norm': None, 'rate': 0.1}
    ]
    assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()
    written = [
        value.tag
        for event in events(tmp_path / 'tensorboard/finetune')
        for value in event.summary.value
    ]
    assert written == ['rate']


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """Killed after step 7, resumed from the checkpoint of step 5: no step is there twice."""
    train(tmp_path / 'whole', range(10))
    train(tmp_path / 'killed', range(8))
    train(tmp_path / 'killed', range(5, 10), from_step={'finetune': 5})
    assert lines(tmp_path / 'killed') == lines(tmp_path / 'whole')


def test_only_the_resumed_stage_loses_lines(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(9, 'retrieval', loss=1.0)
        writer.write(9, 'finetune', loss=2.0)
    MetricWriter(tmp_path, from_step={'finetune': 0}).close()
    assert [line['stage'] for line in lines(tmp_path)] == ['retrieval']
    train(tmp_path, [0])
    assert [line['stage'] for line in lines(tmp_path)] == ['retrieval', 'finetune']


@pytest.mark.parametrize('cut', [1, 2, 10])
def test_a_line_cut_off_by_a_kill_is_mended(tmp_path, cut):
    """Cut by its line end alone, the line is whole and stays."""
    train(tmp_path, range(3))
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(path.read_bytes()[:-cut])
    train(tmp_path, [3])
    assert [line['step'] for line in lines(tmp_path)] == ([0, 1, 2, 3] if cut == 1 else [0, 1, 3])


@pytest.mark.parametrize('damage', ['garbage\n', '[1]\n', '{"loss": 1}\n'])
def test_a_damaged_file_is_refused_by_line_and_kept(tmp_path, damage):
    train(tmp_path, range(2))
    path = tmp_path / 'metrics.jsonl'
    path.write_text(path.read_text() + damage)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r'metrics\.jsonl, line 3'):
        MetricWriter(tmp_path, from_step={'finetune': 0})
    assert path.read_bytes() == before


def test_tensorboard_gets_the_scalars_and_hides_what_is_repeated(tmp_path):
    train(tmp_path, range(3))
    folder = tmp_path / 'tensorboard' / 'finetune'
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
    ]
    assert scalars == [(0, 'loss', 1), (1, 'loss', 0.5), (2, 'loss', pytest.approx(1 / 3))]
    for path in folder.iterdir():
        path.unlink()
    train(tmp_path, [2], from_step={'finetune': 2})
    starts = [
        event.step
        for event in events(folder)
        if event.session_log.status == event_pb2.SessionLog.START
    ]
    assert starts == [2]


def test_a_full_disk_is_one_sentence_which_the_process_that_writes_has_alone(tmp_path):
    writer = MetricWriter(tmp_path)
    writer._file.close()
    writer._file = open('/dev/full', 'a')  # noqa: SIM115
    full = pytest.raises(LocalError, match=r'metrics\.jsonl: cannot be written \(No space left')
    with full, writer:
        writer.write(0, 'finetune', loss=1.0)


def test_a_damaged_file_is_met_by_the_process_that_writes_alone(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('garbage\n')
    with pytest.raises(LocalError):
        MetricWriter(tmp_path)


def test_words_are_no_metrics(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(TypeError, match='must be a number'):
        writer.write(0, 'finetune', loss='low')
    assert lines(tmp_path) == []


def test_where_nothing_can_be_appended_the_file_is_uploaded_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writer, '_is_remote', lambda path: True)
    now = [0.0]
    monkeypatch.setattr(metric_writer.time, 'monotonic', lambda: now[0])
    train(tmp_path, range(2))
    with MetricWriter(tmp_path, from_step={'finetune': 1}) as writer:
        writer.write(1, 'finetune', loss=0.0)
        assert [line['step'] for line in lines(tmp_path)] == [0]
        now[0] = 61.0
        writer.write(2, 'finetune', loss=0.0)
        assert [line['step'] for line in lines(tmp_path)] == [0, 1, 2]
        writer.write(3, 'finetune', loss=0.0)
        assert len(lines(tmp_path)) == 3
        writer.flush()
        assert len(lines(tmp_path)) == 4
        writer.write(4, 'finetune', loss=0.0)
    assert [line['step'] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert not (tmp_path / 'tensorboard').exists()
