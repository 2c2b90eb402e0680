"""The probes on a whole run of a tiny model, through the command and through bad input."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from palr_jax import pipeline, storage
from palr_jax.config import default_config
from palr_jax.errors import InputError
from palr_jax.llm_input import queries_of
from palr_jax.probes import invariance, memory, order
from palr_jax.probes.finished import open_run
from palr_jax.ranking.users import make_query
from palr_jax.recommend import rank_candidates
from palr_jax.summary import prompt_notes
from palr_jax.testing import write_ml100k
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

ROOT = pathlib.Path(__file__).parent.parent.parent
ORDERS = ('', '_order1', '_order2')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """Of one whole run."""
    inputs = tmp_path_factory.mktemp('inputs')
    write_ml100k(inputs / 'ml-100k', users=40, items=60, seed=0)
    tokenizer = tiny_tokenizer([(inputs / 'ml-100k' / 'u.item').read_bytes().decode('latin-1')])
    model = tiny_config(vocab_size=tokenizer.size, max_positions=1024)
    write_hf_folder(inputs / 'model', model, random_params(model, 0), tokenizer)
    config = default_config()
    config.data.path = str(inputs / 'ml-100k')
    config.model.path = str(inputs / 'model')
    config.retrieval.width = 16
    config.retrieval.epochs = 2
    config.retrieval.candidates = 12
    config.prompts.history = 4
    config.prompts.length = 700
    config.tasks.candidates = 6
    config.tasks.targets = 2
    config.finetune.steps = 2
    config.finetune.batch_size = 2
    config.finetune.length = 700
    config.finetune.held_out = 4
    config.ranking.candidates = 10
    config.ranking.users = 12
    config.ranking.valid_users = 4
    config.ranking.batch_size = 2
    config.ranking.max_shapes = 1
    config.evaluation.resamples = 200
    config.stages = ('data', 'retrieval', 'finetune', 'ranking')
    workdir = tmp_path_factory.mktemp('run')
    pipeline.run(config, workdir)
    return workdir


def command(*arguments):
    """Runs the real program; (exit status, lines of output, error lines)."""
    done = subprocess.run(
        [sys.executable, '-m', 'palr_jax.probe', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert 'Traceback' not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines(), errors


@pytest.mark.slow
def test_the_command_writes_what_it_prints(workdir):
    status, lines, errors = command(
        f'--workdir={workdir}', '--what=order', '--users=4', '--shuffles=3'
    )
    assert (status, errors) == (0, [])
    assert max(map(len, lines[:-1])) <= 80
    assert lines[0].startswith('llm: 4 users, 3 orders of 10 candidates; ')
    found = storage.read_json(workdir / 'probes' / 'order_llm.json')
    assert (found['probe'], found['users'], found['orders']) == ('order', 4, 3)
    assert found['candidate_order'] == 'shuffled'
    assert sum(found['slots']['counts']) == 12
    assert not list(workdir.rglob('*.tmp'))


@pytest.mark.slow
def test_the_first_order_is_the_runs_own(workdir):
    """Its scores are those that the run kept."""
    run = open_run(workdir, 'llm_zero_shot')
    users, items = run.sample(5, 50)
    found = order.score_orders(run, users, items, 2)
    arrays = storage.read_arrays(workdir / 'ranking' / 'llm_zero_shot_test.npz')
    rows = np.searchsorted(arrays['users'], users)
    kept = arrays['sums'][rows] / arrays['tokens'][rows]
    np.testing.assert_allclose(found.scores[:, 0], kept, atol=1e-5)
    assert np.abs(found.scores[:, 1] - kept).max() > 1e-3  # the other order is read
    assert sorted(found.slots[0, 1].tolist()) == list(range(10))
    assert json.loads(json.dumps(order.probe(run, None, 2)))['users'] == 12  # all that there are


@pytest.mark.slow
def test_the_first_order_of_a_run_of_numbers_has_the_scores_of_numbers(workdir):
    run = open_run(workdir, 'llm_zero_shot')
    config = run.project.config
    config.prompts.answer = config.ranking.mode = 'index'
    config.ranking.normalize = 'sum'
    users, items = run.sample(4, 50)
    own = run.score('own', queries_of(run.project, 'test', users, items)[0])
    found = order.score_orders(run, users, items, 2)
    np.testing.assert_allclose(found.scores[:, 0], own, atol=1e-5)


@pytest.mark.slow
def test_what_the_ranking_takes_off_is_taken_off_in_every_order(workdir):
    run = open_run(workdir, 'llm')
    users, items = run.sample(5, 50)
    run.project.config.ranking.normalize = 'untuned'
    found = order.score_orders(run, users, items, 2)
    tuned, untuned = (
        storage.read_arrays(workdir / 'ranking' / f'{name}_test.npz')
        for name in ('llm', 'llm_zero_shot')
    )
    rows = np.searchsorted(tuned['users'], users)
    learned = tuned['sums'][rows] - untuned['sums'][rows]
    np.testing.assert_allclose(found.scores[:, 0], learned, atol=1e-4)
    run.project.config.ranking.normalize = 'prior'
    prior = order.score_orders(run, users, items, 2).scores
    assert np.abs(prior - found.scores).max() > 1e-3
    nobody, _ = queries_of(run.project, 'test', users, items, of_user=False)
    raw_ids = [run.project.dataset.user_ids[user] for user in users]
    assert [query.name for query in nobody] == [f'User {raw_id}' for raw_id in raw_ids]
    without = tuned['sums'][rows] - run.score('prior', nobody)
    np.testing.assert_allclose(prior[:, 0], without, atol=1e-4)


@pytest.mark.slow
def test_a_run_of_several_orders_ranks_by_their_mean(workdir, tmp_path):
    """Less the prior, in the ranking and in a recommendation."""
    config = open_run(workdir, 'llm').project.config
    config.ranking.update({'orders': 3, 'normalize': 'prior'})
    again = tmp_path / 'run'
    shutil.copytree(workdir, again, ignore=shutil.ignore_patterns('ranking', 'probes'))
    pipeline.run(config, again, overwrite=True)
    assert any('scores are means over 3 such' in note for note in prompt_notes(config))
    run = open_run(again, 'llm')
    users, items = run.sample(4, 50)
    of_orders = order.score_orders(run, users, items, 3).scores
    scores = run.project.llm_scores('llm', 'test')
    rows = np.searchsorted(scores.users, users)
    kept = scores.normalized('prior')[rows]
    np.testing.assert_allclose(kept, of_orders.mean(axis=1), atol=1e-4)
    assert np.abs(kept - of_orders[:, 0]).max() > 1e-3
    names = {path.name for path in (again / 'ranking').glob('llm*_valid.npz')}
    assert names == {f'llm{prior}{k}_valid.npz' for prior in ('', '_prior') for k in ORDERS}

    def recommended(orders, history):
        run.project.config.ranking.orders = orders
        return rank_candidates(run.project, *run.model, history, items[0])[0]

    history = run.project.dataset.split.history(users[0], 'test')
    mean = recommended(3, history)
    alone = recommended(1, history)
    assert np.abs(mean - alone).max() > 1e-3
    asked = [
        make_query(run.project.encoder, config.prompts, of, profile, items[0], [0, 5, *further])[0]
        for further in ([], [1], [2])
        for of, profile in zip([history, history[:0]], run.project.profiles([history.tolist(), []]))
    ]
    with_user, without = run.score('recommended', asked).reshape(3, 2, -1).mean(axis=0)
    np.testing.assert_allclose(mean, with_user - without, atol=1e-4)


@pytest.mark.slow
def test_a_run_passes_and_a_scorer_that_looks_at_batch_mates_fails(workdir, monkeypatch):
    """C04, E09: the same sums whatever the batch; the order of the block changes no bit."""
    run = open_run(workdir, 'llm')
    found = invariance.probe(run, 6)
    assert found['passed'], found
    by_name = {change['name']: change for change in found['changes']}
    assert len(by_name) == 7
    assert by_name['order of the scored block']['bit_equal']

    right = run.score

    def leaking(name, queries, **changes):
        return right(name, queries, **changes) + np.float32(0.01) * (len(queries) != 6)

    monkeypatch.setattr(run, 'score', leaking)
    changes = invariance.probe(run, 6)['changes']
    assert [change['name'] for change in changes if not change['passed']] == ['batch-mates']


@pytest.mark.slow
def test_a_failure_ends_in_status_1(workdir):
    """The real program, allowing what nothing can keep to: a difference below 0."""
    program = (
        'import runpy; from palr_jax.probes import invariance; invariance.TOLERANCE = -1.0; '
        "runpy.run_module('palr_jax.probe', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, '-c', program, f'--workdir={workdir}', '--what=invariance', '--users=2'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count('FAIL') == 5
    assert done.stdout.count('PASS') == 2
    assert not storage.read_json(workdir / 'probes' / 'invariance_llm.json')['passed']


@pytest.mark.slow
def test_a_random_model_knows_nothing_by_heart(workdir):
    run = open_run(workdir, 'llm_zero_shot')
    found = memory.probe(run, 12)
    assert json.loads(json.dumps(found)) == found
    title, year, keyword = (found['questions'][name] for name in ('title', 'year', 'keyword'))
    assert title['share'] == year['share'] == 0
    assert keyword['items'] == 12
    known = {k for of_item in run.project.dataset.catalogue.keywords for k in of_item}
    assert {answer['said'] for answer in keyword['answers']} <= known
    assert max(map(len, memory.table(found | {'model': 'tiny'}).splitlines())) <= 80
    assert memory.probe(run, 12) == found


@pytest.mark.slow
def test_what_a_run_has_not_is_named(workdir):
    run = open_run(workdir, None)
    assert run.system == 'llm'
    with pytest.raises(InputError, match=r'--users=13; allowed: 1 to 12, the test users that the'):
        order.probe(run, 13, 2)
    with pytest.raises(InputError, match=r'--users=1; allowed for --what=invariance: 2 or more'):
        invariance.probe(run, 1)
    with pytest.raises(InputError, match=r'--items=1000; allowed: 1 to \d+, the items of the cat'):
        memory.probe(run, 1000)
    run.project.config.prompts.candidates = False
    with pytest.raises(InputError, match=r'config\.prompts\.candidates of the run is False'):
        order.probe(run, 4, 2)
    run.project.config.ranking.mode = 'generate'
    for listed in (False, True):
        run.project.config.prompts.candidates = listed
        for probe in (lambda: order.probe(run, 4, 2), lambda: invariance.probe(run, 4)):
            with pytest.raises(
                InputError, match=r"mode of the run is 'generate': it writes titles"
            ):
                probe()


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match='holds no finished run'):
        open_run(tmp_path, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (('--what=taste',), '--what=taste'),
        (('--what=order', '--shuffles=1'), '--shuffles=1'),
        (('--what=memory', '--users=3'), '--users says nothing to --what=memory; allowed: --items'),
        (('--what=order',), 'holds no finished run'),
    ],
)
def test_bad_flags_are_one_sentence_and_status_2(arguments, named, tmp_path):
    status, _, errors = command(f'--workdir={tmp_path}', *arguments)
    assert status == 2
    assert len(errors) == 1
    assert named in errors[0]
