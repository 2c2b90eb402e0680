"""The whole system on made-up data and a tiny model: what a run writes, resumes and refuses."""

import dataclasses
import functools
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl import logging

from palr_jax import pipeline, storage
from palr_jax.config import default_config, restore, validate
from palr_jax.data import read
from palr_jax.errors import InputError
from palr_jax.llm_input import encode_examples, less_untuned, make_lessons, make_queries
from palr_jax.project import Project
from palr_jax.prompts import split_users
from palr_jax.ranking import users
from palr_jax.ranking.fuse import standardize
from palr_jax.ranking.users import read_scores
from palr_jax.recommend import find_items, rank_candidates, recommend, retrieve_for
from palr_jax.stages import flatten
from palr_jax.summary import BASE
from palr_jax.testing import write_ml100k
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

ROOT = pathlib.Path(__file__).parent.parent
SYSTEMS = [
    *('popularity', 'retriever', 'random', 'popularity_reranked', 'llm_zero_shot', 'llm'),
    *('fused', 'fused_popularity', 'fused_shuffled'),
]


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """A folder with made-up ratings and a tiny model in their official layouts."""
    folder = tmp_path_factory.mktemp('inputs')
    write_ml100k(folder / 'ml-100k', users=40, items=60, seed=0)
    lines = (folder / 'ml-100k' / 'u.item').read_bytes().decode('latin-1')
    tokenizer = tiny_tokenizer([lines])
    config = tiny_config(vocab_size=tokenizer.size, max_positions=1024)
    write_hf_folder(folder / 'model', config, random_params(config, 0), tokenizer)
    return folder


def small_config(inputs):
    config = default_config()
    config.data.path = str(inputs / 'ml-100k')
    config.model.path = str(inputs / 'model')
    config.retrieval.width = 16
    config.retrieval.epochs = 4
    config.retrieval.candidates = 12
    config.prompts.history = 4
    config.prompts.length = 700
    config.tasks.candidates = 6
    config.tasks.targets = 2
    config.tasks.users = 0.5
    config.finetune.steps = 4
    config.finetune.batch_size = 2
    config.finetune.length = 700
    config.finetune.checkpoint_every = 2
    config.finetune.held_out = 4
    config.ranking.candidates = 10
    config.ranking.users = 12
    config.ranking.valid_users = 10
    config.ranking.max_shapes = config.finetune.max_shapes = 1  # compiling takes the time here
    config.evaluation.resamples = 200
    return config


@pytest.fixture(scope='module')
def finished(inputs, tmp_path_factory):
    """(workdir, report) of one whole run."""
    workdir = tmp_path_factory.mktemp('run')
    return workdir, pipeline.run(small_config(inputs), workdir)


@pytest.mark.slow
def test_the_report_has_all_systems_on_the_same_users(finished):
    _, report = finished
    rows = [run for run in report['runs'] if 'group' not in run]
    everyone, sampled = rows[:2], rows[2:]
    assert [run['system'] for run in everyone] == SYSTEMS[:2]
    assert [run['system'] for run in sampled] == SYSTEMS
    assert {run['users'] for run in everyone} == {40}
    assert {run['users'] for run in sampled} == {12}
    assert len({run['user_set']['sha256'] for run in sampled}) == 1
    for run in report['runs']:
        assert 0 <= run['HR@1'] <= run['HR@5'] <= run['HR@10'] <= 1
        low, high = run['ci95']['NDCG@10']
        assert low <= run['NDCG@10'] <= high
    assert report['retrieval']['recall_vs_exact'] == 1.0
    assert report['dataset']['users'] == 40
    assert report['finetune']['examples'] > 0


@pytest.mark.slow
def test_the_retrievers_of_a_mix_have_rows_of_their_own(inputs, tmp_path):
    config = small_config(inputs)
    config.stages = ('data', 'retrieval', 'report')
    config.retrieval.systems = ('sequence', 'covisitation')
    report = pipeline.run(config, tmp_path)
    systems = [run['system'] for run in report['runs']]
    assert systems == ['popularity', 'retriever', 'sequence', 'covisitation']
    assert {run['users'] for run in report['runs']} == {40}
    compared = [(c['a'], c['b']) for c in report['comparisons']]
    assert ('retriever', 'covisitation') in compared
    assert report['retrieval']['recall_vs_exact'] == 1.0


@pytest.mark.slow
def test_a_retriever_that_reads_texts_depends_on_the_model(inputs, tmp_path):
    config = small_config(inputs)
    config.stages = ('data', 'retrieval', 'report')
    config.retrieval.systems = ('sequence', 'profile')
    config.retrieval.cold_items = True
    report = pipeline.run(config, tmp_path)
    systems = [run['system'] for run in report['runs']]
    assert systems == ['popularity', 'retriever', 'sequence', 'profile']
    config.model.dtype = 'bfloat16'
    with pytest.raises(InputError, match=r"model\.dtype was 'float32' there .*stage retrieval"):
        pipeline.run(config, tmp_path)


@pytest.mark.slow
def test_all_files_of_the_contract_are_there(finished):
    workdir, report = finished
    for name in (
        *('config.json', 'metrics.jsonl', 'finetune/adapter/adapter_config.json'),
        *('finetune/adapter/adapter_model.safetensors', 'report/report.md'),
        *('report/comparison.png', 'report/metrics.json', 'report/details.json'),
        *('report/report.html', 'ranking/examples.json'),
    ):
        assert (workdir / name).stat().st_size > 0, name
    assert json.loads((workdir / 'report' / 'metrics.json').read_text()) == report
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if line['stage'] == 'finetune'] == [1, 2, 3, 4]
    assert not list(workdir.rglob('*.tmp'))


@pytest.mark.slow
def test_the_page_names_ten_users_and_what_their_prompts_show(finished, inputs):
    workdir, _ = finished
    page = (workdir / 'report' / 'report.html').read_text()
    assert len(page) < 1_000_000
    dataset = read(workdir / 'data')
    found = storage.read_json(workdir / 'report' / 'details.json')
    examples = found['examples']
    assert len(examples['users']) == 10
    assert examples['of'] == 12
    for user in examples['users']:
        assert f'<strong>User {user["user"]}</strong>' in page
    assert len(found['curves']['finetune']['loss']) == 4

    # The first of them once more, from the files of the stages.
    user = examples['users'][0]
    dense = dataset.user_ids.index(user['user'])
    titles, split = dataset.catalogue.titles, dataset.split
    assert user['target'] == titles[split.target(dense, 'test')]
    assert user['history'] == [titles[item] for item in split.history(dense, 'test')[-4:]]
    genres = {
        genre for item in split.history(dense, 'test') for genre in dataset.catalogue.keywords[item]
    }
    assert set(user['profile']) <= genres
    config = small_config(inputs)
    scores = Project(config, workdir).llm_scores('llm', 'test')
    (row,) = np.flatnonzero(scores.users == dense)
    best = scores.items[row, scores.normalized(config.ranking.normalize)[row].argmax()]
    (first,) = (c for c in user['candidates'] if c['places']['llm'][0] == 1)
    assert first['title'] == titles[best]
    assert [c['places']['retriever'][0] for c in user['candidates']] == list(range(1, 11))


@pytest.mark.slow
def test_the_same_command_again_does_no_finished_work(finished, inputs, monkeypatch):
    workdir, report = finished
    files = {path: path.stat().st_mtime_ns for path in workdir.rglob('*') if path.is_file()}

    def work(*_, **__):
        raise AssertionError('finished work is done again')

    for name in ('prepare_data', 'retrieve_candidates', 'finetune', 'rank_users', 'write_report'):
        monkeypatch.setattr(pipeline, name, work)
    assert pipeline.run(small_config(inputs), workdir) == report
    changed = {p for p, t in files.items() if p.stat().st_mtime_ns != t}
    assert changed <= {workdir / 'config.json', workdir / storage.LOCK}


@pytest.mark.slow
def test_the_same_command_elsewhere_gives_the_same_numbers(finished, inputs, tmp_path):
    _, report = finished
    again = pipeline.run(small_config(inputs), tmp_path)
    for key in ('runs', 'comparisons', 'retrieval', 'dataset', 'finetune'):
        assert again[key] == report[key], key


@pytest.mark.slow
def test_ranking_continues_with_the_users_not_yet_scored(finished, inputs, tmp_path, caplog):
    """A run killed while ranking scores only the missing users, and ends with the same scores."""
    workdir, _ = finished
    path = workdir / 'ranking' / 'llm_test.npz'
    before = storage.read_arrays(path)
    sums = before['sums'].copy()
    sums[3:7] = np.nan
    storage.write_arrays(path, **(before | {'sums': sums}))
    (workdir / 'ranking' / 'stage.json').unlink()
    with caplog.at_level(logging.INFO):
        pipeline.run(small_config(inputs), workdir)
    assert [r.args[1] for r in caplog.records if 'in %d shapes' in r.msg] == [4]
    np.testing.assert_allclose(storage.read_arrays(path)['sums'], before['sums'], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('told', [True, False])
def test_seen_users_are_those_who_gave_an_example(finished, inputs, tmp_path, told):
    """Of who was drawn, as fine-tuning told; an older version did not."""
    workdir = tmp_path / 'again'
    shutil.copytree(finished[0], workdir)
    config = small_config(inputs)
    project = Project(config, workdir)
    path = workdir / 'finetune' / 'held_out_loss.npz'
    losses = dict(storage.read_arrays(path))
    drawn, _ = split_users(project.dataset.split, config.tasks.users, config.seed)
    assert losses.pop('tuned').tolist() == drawn.tolist()
    seen = np.intersect1d(project.llm_scores('llm', 'test').users, drawn)
    if told:
        seen = seen[1:]
        losses['tuned'] = seen
    storage.write_arrays(path, **losses)
    (workdir / 'report' / 'stage.json').unlink()
    rows = pipeline.run(config, workdir)['runs']
    groups = [row for row in rows if row.get('group') == 'fine-tuning: seen users']
    assert {row['users'] for row in groups} == {len(seen)}


@pytest.mark.slow
def test_more_steps_continue_the_run_and_keep_what_does_not_read_the_adapter(
    finished, inputs, tmp_path
):
    workdir = tmp_path / 'longer'
    shutil.copytree(finished[0], workdir)
    zero_shot = (workdir / 'ranking' / 'llm_zero_shot_test.npz').read_bytes()
    config = small_config(inputs)
    config.finetune.steps = 6
    longer = pipeline.run(config, workdir)
    steps = [
        json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()
    ]
    assert steps[-6:] == [1, 2, 3, 4, 5, 6]
    assert (workdir / 'ranking' / 'llm_zero_shot_test.npz').read_bytes() == zero_shot
    tuned = {run['system']: run for run in longer['runs']}
    assert tuned['retriever'] == {r['system']: r for r in finished[1]['runs']}['retriever']
    fresh = pipeline.run(config, tmp_path / 'fresh')
    assert fresh['runs'] == longer['runs']


def test_only_the_stages_asked_for(inputs, tmp_path):
    config = small_config(inputs)
    config.stages = ('data',)
    assert pipeline.run(config, tmp_path) is None
    record = read(tmp_path / 'data').record
    assert record['users'] == 40
    started = storage.read_json(tmp_path / 'report' / 'metrics.json')
    assert started == {'schema': 1, 'dataset': record, 'runs': []}
    assert not (tmp_path / 'retrieval').exists()


@pytest.mark.slow
def test_a_report_without_an_llm(inputs, tmp_path):
    config = small_config(inputs)
    config.stages = ('data', 'retrieval', 'report')
    report = pipeline.run(config, tmp_path)
    assert [run['system'] for run in report['runs']] == SYSTEMS[:2]
    assert report['finetune'] is None
    assert 'No LLM ranked in this run' in (tmp_path / 'report' / 'report.html').read_text()


@pytest.mark.long
def test_profiles_by_the_llm_are_made_once_and_serve_every_stage(inputs, tmp_path, monkeypatch):
    config = small_config(inputs)
    config.prompts.profile = 'llm'
    config.prompts.profile_history = 5
    config.finetune.steps = 2
    config.ranking.users = config.ranking.valid_users = 4
    report = pipeline.run(config, tmp_path)
    assert [r['system'] for r in report['runs'][2:] if 'group' not in r] == SYSTEMS
    kept = storage.read_json(tmp_path / 'profiles.json')
    catalogue = read(tmp_path / 'data').catalogue
    assert set(kept.values()) <= {k for keywords in catalogue.keywords for k in keywords}
    with monkeypatch.context() as patch:
        patch.setattr(Project, 'base_scores', None)  # calling it would fail
        (tmp_path / 'ranking' / 'stage.json').unlink()
        assert pipeline.run(config, tmp_path)['runs'] == report['runs']
    assert len(recommend(tmp_path, [catalogue.titles[3], catalogue.titles[5]], 3)) == 3


def of_users(report):
    """The rows over the ranked users, by system."""
    rows = [run for run in report['runs'] if run['user_set'] != 'all' and 'group' not in run]
    return {run['system']: run for run in rows}


@pytest.mark.long
def test_numbers_are_ranked_and_recommended(inputs, tmp_path):
    config = small_config(inputs)
    config.prompts.answer = config.ranking.mode = 'index'
    config.ranking.normalize = 'sum'
    config.tasks.recommend_retrieval = 1.0
    report = pipeline.run(config, tmp_path)
    rows = of_users(report)
    assert list(rows) == SYSTEMS
    assert rows['llm']['mode'] == rows['fused']['mode'] == 'index'
    assert rows['llm']['objective'] == 'sft'
    assert rows['random']['mode'] is None
    scores = Project(config, tmp_path).llm_scores('llm', 'test')
    assert scores.tokens.max() == 3  # '1', '0' and the full stop
    assert len(np.unique(scores.sums)) > 20
    catalogue = read(tmp_path / 'data').catalogue
    assert len(recommend(tmp_path, [catalogue.titles[3], catalogue.titles[5]], 3)) == 3


@pytest.mark.long
def test_lists_of_retrieved_candidates_are_learned(inputs, tmp_path):
    """Out of fold, ranked less the prior, and misses unscored: the same numbers as when scored."""
    config = small_config(inputs)
    config.finetune.objective = 'listwise'
    config.tasks.update({'candidates_from': 'retriever', 'recommend_retrieval': 1.0, 'folds': 2})
    config.ranking.update({'normalize': 'prior', 'skip_misses': True})
    report = pipeline.run(config, tmp_path)
    rows = of_users(report)
    assert rows['llm']['objective'] == 'listwise'
    assert report['finetune']['of'] == 'list'
    project = Project(config, tmp_path)
    scored = project.llm_scores('llm', 'test')
    assert len(scored.users) < rows['llm']['users'] == 12
    targets = project.dataset.split.targets('test')[scored.users]
    assert (scored.items == targets[:, None]).any(axis=1).all()
    lists = storage.read_arrays(tmp_path / 'finetune' / 'candidates.npz')
    assert lists['items'].shape[1] == 6
    assert {p.name for p in (tmp_path / 'finetune' / 'retrieval').iterdir()} == {'fold_0', 'fold_1'}
    gave = {example.user for example in make_lessons(project).examples}
    losses = storage.read_arrays(tmp_path / 'finetune' / 'held_out_loss.npz')
    assert losses['tuned'].tolist() == sorted(gave)

    config.ranking.skip_misses = False
    again = of_users(pipeline.run(config, tmp_path, overwrite=True))
    for system in SYSTEMS:
        for metric in ('HR@1', 'HR@10', 'NDCG@10', 'MRR'):
            if system != 'fused_shuffled':  # other users take part in the shuffle
                assert again[system][metric] == pytest.approx(rows[system][metric], abs=1e-6)
        of_lists = [found[system]['coverage@10'] is None for found in (rows, again)]
        assert of_lists == [system not in ('popularity', 'retriever'), False], system
    catalogue = read(tmp_path / 'data').catalogue
    assert len(recommend(tmp_path, [catalogue.titles[3], catalogue.titles[5]], 3)) == 3


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['title', 'generate'])
def test_nobody_is_ranked_where_no_target_was_retrieved(inputs, tmp_path, mode):
    """Every user is a miss of every system, as he would be if he were scored."""
    config = small_config(inputs)
    config.stages = ('data', 'retrieval')
    pipeline.run(config, tmp_path)
    config.stages += ('ranking', 'report')
    config.ranking.update({'mode': mode, 'candidates': 1, 'skip_misses': True})
    config.ranking.update({'users': 1, 'valid_users': 1})
    project = Project(config, tmp_path)

    def missed(part, seed):
        config.ranking.users_seed = seed
        return not len(make_queries(project, part)[0])

    config.ranking.users_seed = next(seed for seed in range(50) if missed('test', seed))
    assert missed('valid', config.ranking.users_seed)
    rows = of_users(pipeline.run(config, tmp_path))
    assert {row['HR@10'] for system, row in rows.items() if system not in BASE} == {0.0}
    assert storage.read_json(tmp_path / 'ranking' / 'fusion.json')['fused']['weight'] == 0


@pytest.mark.slow
def test_lists_can_come_from_co_visitation_whatever_the_retriever_is(inputs, finished, tmp_path):
    """With fewer candidates than there may be targets; none of them is in the user's history."""
    config = small_config(inputs)
    config.tasks.update({'candidates_from': 'covisitation', 'recommend_retrieval': 1.0})
    config.tasks.update({'targets': 10, 'swap': 1.0})
    validate(config)
    shutil.copytree(finished[0] / 'data', tmp_path / 'data')
    project = Project(config, tmp_path)
    lessons = make_lessons(project)
    assert {len(example.candidates) for example in lessons.examples} == {6}
    for example in lessons.examples:
        own = project.dataset.split.train(example.user)[: len(example.past)]
        assert example.past == tuple(own)
        assert not set(example.candidates) & set(own)
    fitted = {path.name for path in (tmp_path / 'finetune' / 'retrieval' / 'fold_0').iterdir()}
    assert 'covisitation.npz' in fitted
    assert 'sasrec.npz' not in fitted


@pytest.mark.long
def test_what_the_retriever_and_the_untuned_model_say_is_not_learned_again(
    inputs, tmp_path, monkeypatch
):
    """Before the first step a list's scores are the retriever's alone, as they are tuned for."""
    config = small_config(inputs)
    config.finetune.update({'objective': 'listwise', 'temperature': 2.0})
    config.finetune.update({'retriever_weight': 0.5, 'less_untuned': True})
    config.tasks.update({'candidates_from': 'covisitation', 'recommend_retrieval': 1.0})
    config.ranking.normalize = 'untuned'
    pipeline.run(config, tmp_path)
    project = Project(config, tmp_path)
    held_out = storage.read_arrays(tmp_path / 'finetune' / 'held_out_loss.npz')
    for example, loss in zip(make_lessons(project).held_out, held_out['before'], strict=True):
        logits = 0.5 * standardize(np.array([example.scores]))[0]
        shares = np.exp(logits) / np.exp(logits).sum()
        chosen = np.isin(example.candidates, example.targets)
        assert loss == pytest.approx(-np.log(shares[chosen]).mean(), abs=1e-5)
    examples = make_lessons(project).examples
    choices = encode_examples(project, examples)
    with monkeypatch.context() as patches:  # a run that goes on does not ask the model again
        patches.setattr(users, 'score_batches', None)
        kept = less_untuned(project, 'training', examples, choices)
    said = read_scores(tmp_path / 'finetune' / 'untuned_training.npz').sums
    for choice, offset, sums in zip(choices, kept, said, strict=True):
        np.testing.assert_allclose(offset.offsets, choice.offsets - sums / 2.0, rtol=1e-6)
    for part in ('valid', 'test'):
        tuned, untuned = (
            read_scores(tmp_path / 'ranking' / f'{name}_{part}.npz').sums
            for name in ('llm', 'llm_zero_shot')
        )
        learned = project.llm_scores('llm', part).normalized('untuned')
        np.testing.assert_array_equal(learned, tuned - untuned)
        np.testing.assert_array_equal(project.llm_scores('llm_zero_shot', part).sums, untuned)
    catalogue = project.dataset.catalogue
    found = recommend(tmp_path, [catalogue.titles[3], catalogue.titles[5]], 3)
    untuned = Project(config, tmp_path)
    untuned.config.ranking.normalize = 'sum'
    history = find_items([catalogue.titles[3], catalogue.titles[5]], catalogue)
    items = retrieve_for(untuned, history)[0]
    ask = functools.partial(rank_candidates, untuned, history=history, items=items)
    said = ask(*untuned.adapted())[0] - ask(untuned.base, None)[0]
    by_title = dict(zip((catalogue.titles[item] for item in items), said))
    for one in found:
        assert one.llm == pytest.approx(by_title[one.title], abs=1e-4)


@pytest.mark.slow
def test_all_users_are_ranked_and_no_row_is_there_twice(inputs, tmp_path):
    config = small_config(inputs)
    config.stages = ('data', 'retrieval', 'ranking', 'report')
    config.ranking.update({'users': 0, 'valid_users': 4, 'candidates': 6})
    rows = [run for run in pipeline.run(config, tmp_path)['runs'] if 'group' not in run]
    assert [run['system'] for run in rows] == [name for name in SYSTEMS if name != 'llm']
    assert {(run['users'], run['user_set']) for run in rows} == {(40, 'all')}


@pytest.mark.slow
def test_the_model_writes_its_ranking(inputs, tmp_path):
    """Bound to the candidates, then freely; the second run shares data and retriever."""
    config = small_config(inputs)
    config.stages = ('data', 'retrieval', 'ranking', 'report')
    config.ranking.update({'mode': 'generate', 'users': 4, 'valid_users': 4, 'candidates': 6})
    rows = of_users(pipeline.run(config, tmp_path))
    assert list(rows) == [system for system in SYSTEMS if system != 'llm']
    catalogue = read(tmp_path / 'data').catalogue
    assert len(recommend(tmp_path, [catalogue.titles[3], catalogue.titles[5]], 3)) == 3

    config.prompts.candidates = False
    config.tasks.recommend_retrieval = 0.0
    config.ranking.answer_tokens = 24
    report = pipeline.run(config, tmp_path, overwrite=True)
    assert list(of_users(report)) == ['popularity', 'retriever', 'llm_zero_shot']
    assert any('of the users have no valid answer' in note for note in report['notes'])
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert 'The LLM names items of its own choice.' in page
    assert page.count('<strong>User ') == 4
    with pytest.raises(InputError, match='writes freely and ranks no candidates'):
        recommend(tmp_path, [catalogue.titles[3]], 3)


@pytest.mark.slow
def test_recommend_prints_unseen_titles_best_first(finished):
    workdir, _ = finished
    catalogue = read(workdir / 'data').catalogue
    history = [catalogue.titles[3], f'  {catalogue.titles[5].upper()} ']
    found = recommend(workdir, history, 10)
    assert len(found) == 10
    assert len({entry.title for entry in found}) >= 9  # two items may share a title
    assert {catalogue.titles[3], catalogue.titles[5]}.isdisjoint(e.title for e in found)
    assert [e.score for e in found] == sorted((e.score for e in found), reverse=True)
    assert found == recommend(workdir, history, 10)


@pytest.mark.slow
def test_recommend_names_the_nearest_titles(finished):
    workdir, _ = finished
    catalogue = read(workdir / 'data').catalogue
    with pytest.raises(InputError) as error:
        find_items([catalogue.titles[1][:-4]], catalogue)
    assert catalogue.titles[1] in str(error.value)
    with pytest.raises(InputError, match='no title comes near'):
        find_items(['#'], catalogue)


def test_recommend_needs_a_finished_run(tmp_path):
    with pytest.raises(InputError, match='holds no finished run'):
        recommend(tmp_path, ['x'], 10)


def test_a_workdir_that_another_run_has_is_refused(inputs, tmp_path):
    with (
        storage.locked(tmp_path),
        pytest.raises(InputError, match='is in use by another run'),
    ):
        pipeline.run(small_config(inputs), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [storage.LOCK]


@pytest.mark.slow
def test_the_config_of_a_run_is_kept(finished, inputs):
    workdir, _ = finished
    assert restore(storage.read_json(workdir / 'config.json')) == small_config(inputs)


def main(*arguments):
    """Runs the real program; (exit status, error lines)."""
    done = subprocess.run(
        [sys.executable, '-m', 'palr_jax.main', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert 'Traceback' not in done.stderr
    return done.returncode, errors


@dataclasses.dataclass(frozen=True)
class Bad:
    """A command that must fail, and what its one sentence must name."""

    arguments: tuple[str, ...]
    named: str


BAD = {
    'misspelt field': Bad(
        ('--config.finetune.stepz=3',), 'config.finetune.stepz is not a field; did you mean'
    ),
    'wrong type': Bad(('--config.finetune.steps=many',), 'config.finetune.steps=many'),
    'wrong value': Bad(
        ('--config.prompts.style=xml',), "config.prompts.style is 'xml'; allowed: 'plain'"
    ),
    'missing archive': Bad(('--config.data.path=/nowhere/ml-100k.zip',), '/nowhere/ml-100k.zip'),
    'stray argument': Bad(('steps=3',), "'steps=3'"),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_sentence_and_status_2(case, tmp_path):
    status, errors = main(
        '--config=configs/demo.py', f'--workdir={tmp_path / "run"}', *BAD[case].arguments
    )
    assert status == 2
    assert len(errors) == 1
    assert BAD[case].named in errors[0]
    left = [p.name for p in (tmp_path / 'run').rglob('*')]
    assert set(left) <= {'config.json', storage.LOCK}


@pytest.mark.slow
def test_an_unwritable_workdir_and_a_missing_config_are_named(tmp_path):
    (tmp_path / 'file').write_text('')
    status, errors = main('--config=configs/demo.py', f'--workdir={tmp_path / "file" / "run"}')
    assert status == 2
    assert str(tmp_path / 'file' / 'run') in errors[0]
    status, errors = main('--config=configs/nowhere.py', f'--workdir={tmp_path / "run"}')
    assert status == 2
    assert 'configs/nowhere.py' in errors[0]


@pytest.mark.slow
def test_bad_data_and_models_are_named(inputs, tmp_path):
    config = small_config(inputs)
    config.data.k_core = 1000
    with pytest.raises(InputError, match=r'config\.data\.k_core=1000 leaves 0 users'):
        pipeline.run(config, tmp_path / 'a')
    page = tmp_path / 'ml-100k.zip'
    page.write_text('<!DOCTYPE html><html>not found</html>')
    config = small_config(inputs)
    config.data.path = str(page)
    with pytest.raises(InputError, match=str(page)):
        pipeline.run(config, tmp_path / 'b')


@pytest.mark.parametrize(
    ('field', 'value'), [('model.path', 'empty'), ('prompts.template', 'nowhere')]
)
def test_a_wrong_model_or_template_is_named_before_anything_is_trained(
    inputs, tmp_path, field, value
):
    config = small_config(inputs)
    (tmp_path / 'empty').mkdir()
    config.update_from_flattened_dict({field: str(tmp_path / value)})
    with pytest.raises(InputError, match=str(tmp_path / value)):
        pipeline.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'retrieval').exists()


def test_after_bad_input_the_corrected_command_needs_no_overwrite(inputs, tmp_path):
    config = small_config(inputs)
    config.stages = ('data',)
    config.data.path = str(tmp_path / 'nowhere')
    with pytest.raises(InputError, match='nowhere does not exist'):
        pipeline.run(config, tmp_path / 'run')
    config.data.path = small_config(inputs).data.path
    pipeline.run(config, tmp_path / 'run')
    assert read(tmp_path / 'run' / 'data').record['users'] == 40


@pytest.mark.slow
def test_ctrl_c_ends_without_a_traceback_and_the_same_command_continues(inputs, tmp_path):
    config = small_config(inputs)
    config.retrieval.epochs = config.retrieval.patience = 60
    path = tmp_path / 'small.py'
    path.write_text(
        'from palr_jax.config import restore\n'
        f'def get_config(): return restore({flatten(config)!r})\n'
    )
    program = (  # Ctrl-C is ignored where the tests run in the background
        'import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); '
        'runpy.run_module("palr_jax.main", run_name="__main__")'
    )
    command = [sys.executable, '-c', program, f'--config={path}']
    command += [f'--workdir={tmp_path / "run"}', "--config.stages=('data', 'retrieval')"]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            lines.append(line)
            if line.startswith('SASRec: epoch 6,'):  # after the checkpoint of epoch 4
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert lines[-1] == 'interrupted\n'
    assert not any('Traceback' in line for line in lines)
    assert not (tmp_path / 'run' / 'retrieval' / 'stage.json').exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'SASRec: continues after epoch' in done.stderr
