"""Studies on made-up data and a tiny model: what is shared, continued, compared and refused."""

import functools
import json
import multiprocessing
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax import pipeline, recommend, storage, study, study_report
from palr_jax.config import check_name, default_config
from palr_jax.errors import InputError, LocalError
from palr_jax.evaluation import Run, TargetRanks, render, study_text
from palr_jax.evaluation import study as report
from palr_jax.evaluation.metrics import ndcg
from palr_jax.evaluation.statistics import holm, randomisation_test, smallest_detectable
from palr_jax.project import Project, ranked_users
from palr_jax.stages import flatten
from palr_jax.testing import write_ml100k
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

ROOT = pathlib.Path(__file__).parent.parent
STUDIES = sorted(
    p for p in (ROOT / 'configs' / 'ablations').glob('*.py') if p.stem not in ('__init__', 'base')
)
VARIANTS = {
    'byte': {'ranking.normalize': 'byte'},  # ranks alone
    'no_profile': {'prompts.profile': 'none'},  # tunes too
}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inputs')
    write_ml100k(folder / 'ml-100k', users=40, items=60, seed=0)
    lines = (folder / 'ml-100k' / 'u.item').read_bytes().decode('latin-1')
    tokenizer = tiny_tokenizer([lines])
    model = tiny_config(vocab_size=tokenizer.size, max_positions=1024)
    write_hf_folder(folder / 'model', model, random_params(model, 0), tokenizer)
    config = default_config()
    config.data.path = str(folder / 'ml-100k')
    config.model.path = str(folder / 'model')
    config.retrieval.update({'width': 16, 'epochs': 2, 'candidates': 12})
    config.prompts.update({'history': 3, 'length': 400})
    config.tasks.update({'candidates': 4, 'targets': 2, 'users': 0.5})
    config.finetune.update({'steps': 2, 'batch_size': 1, 'length': 400, 'held_out': 1})
    config.finetune.checkpoint_every = 1
    config.ranking.update({'candidates': 12, 'users': 24, 'valid_users': 4, 'max_shapes': 1})
    config.evaluation.resamples = 200
    return config


def make(base, variants=VARIANTS, name='tiny'):
    return study.open_study(study.define(name, base, *variants.items()))


@pytest.fixture(scope='module')
def finished(base, tmp_path_factory):
    """(folder, report) of a study that one process has run."""
    workdir = tmp_path_factory.mktemp('study')
    opened = make(base)
    assert study.run(opened, workdir) == {}
    return workdir, study_report.write(opened, workdir)


def without_seconds(found):
    """All of a report but what the clock says."""
    found = json.loads(json.dumps(found))
    for variant in found['variants']:
        for cost in ('finetune_seconds', 'ranking_seconds'):
            variant.get('costs', {}).pop(cost, None)
    return found


def of_name(found, name):
    return next(variant for variant in found['variants'] if variant['name'] == name)


# --- what is shared ---------------------------------------------------------------------------


@pytest.mark.slow
def test_variants_share_every_stage_that_they_have_in_common(finished):
    workdir, found = finished
    stages = [path.name.split('-')[0] for path in sorted((workdir / 'stages').glob('*-*'))]
    assert stages == [
        *('data', 'finetune', 'finetune', 'ranking', 'ranking', 'ranking', 'retrieval'),
        *('untuned', 'untuned', 'untuned'),
    ]
    folders = {v['name']: v['folders'] for v in found['variants']}
    assert folders['byte']['finetune'] == folders['base']['finetune']
    assert folders['no_profile']['retrieval'] == folders['base']['retrieval']
    assert folders['no_profile']['finetune'] != folders['base']['finetune']
    assert not (workdir / 'variants' / 'base' / 'data').exists()


@pytest.mark.slow
def test_each_training_has_its_curves_where_tensorboard_finds_them(finished):
    workdir, _ = finished
    files = sorted(workdir.rglob('events.out.tfevents.*'))
    names = {path.relative_to(workdir).parts[1] for path in files}
    assert len(names) == 2
    assert all(name.startswith('finetune-') for name in names)
    for name in names:
        lines = (workdir / 'stages' / name / 'metrics.jsonl').read_text().splitlines()
        assert [json.loads(line)['step'] for line in lines] == [1, 2]


@pytest.mark.slow
def test_a_variant_is_the_run_that_the_same_config_is_by_itself(finished, base, tmp_path):
    workdir, _ = finished
    config = make(base).variants[2].config
    alone = pipeline.run(config, tmp_path)
    stored = storage.read_json(workdir / 'variants' / 'no_profile' / 'report' / 'metrics.json')
    for key in ('runs', 'comparisons', 'retrieval', 'dataset', 'finetune'):
        assert stored[key] == alone[key], key


@pytest.mark.slow
def test_a_variant_recommends_and_is_no_run_of_its_own(finished, base):
    variant = finished[0] / 'variants' / 'no_profile'
    title = Project(base, variant).dataset.catalogue.titles[1]
    assert len(recommend.recommend(variant, [title], 3)) == 3
    with pytest.raises(InputError, match=r'is a variant of a study, which palr_jax\.ablate runs'):
        pipeline.run(base, variant)


@pytest.mark.slow
def test_the_same_command_again_does_no_finished_work(finished, base, monkeypatch):
    workdir, found = finished

    def work(*_, **__):
        raise AssertionError('finished work is done again')

    for name in ('prepare_data', 'retrieve_candidates', 'finetune', 'rank_users', 'write_report'):
        monkeypatch.setattr(pipeline, name, work)
    opened = make(base)
    assert study.run(opened, workdir) == {}
    assert study_report.write(opened, workdir) == found


@pytest.mark.slow
def test_added_variants_run_alone_and_a_failing_one_stops_nothing(finished, base, tmp_path, caplog):
    workdir = tmp_path / 'study'
    shutil.copytree(finished[0], workdir)
    before = {p: p.stat().st_mtime_ns for p in workdir.glob('stages/*/stage.json')}
    more = {
        'broken': {'prompts.length': 30, 'finetune.length': 60},
        'learned': {'ranking.normalize': 'untuned'},
        'users_100': {'tasks.users': 1.0, 'finetune.steps': 1},
    }
    opened = make(base, VARIANTS | more)
    failed = study.run(opened, workdir)
    assert list(failed) == ['broken']
    assert 'tokens' in failed['broken']
    found = study_report.write(opened, workdir)
    assert of_name(found, 'broken') | {'changes': None} == {
        'name': 'broken',
        'changes': None,
        'status': 'failed',
        'error': failed['broken'],
    }
    assert 'broken failed: ' in (workdir / 'report' / 'study.md').read_text()
    assert [of_name(found, name)['status'] for name in ('users_100', 'learned')] == ['finished'] * 2
    assert {p: p.stat().st_mtime_ns for p in before} == before
    made = {p.parent.name.split('-')[0] for p in workdir.glob('stages/*/stage.json')} - {
        p.parent.name for p in before
    }
    assert made <= {'data', 'retrieval', 'finetune', 'ranking'}
    assert len(list(workdir.glob('stages/finetune-*/stage.json'))) == 3  # and not of `learned`
    # The untuned model's scores serve users_100 too, which differs in the tuning alone.
    assert len(list(workdir.glob('stages/untuned-*/llm_zero_shot_test.npz'))) == 4
    learned = Project(opened.variants[4].config, workdir / 'variants' / 'learned')
    for part in ('valid', 'test'):  # the one that is fused needs both parts of both
        tuned, untuned = (learned.sums(name, part).sums for name in ('llm', 'llm_zero_shot'))
        assert (tuned != untuned).any()
        np.testing.assert_array_equal(learned.llm_scores('llm', part).sums, tuned - untuned)
    for name in ('byte', 'no_profile'):
        ours, theirs = (of_name(f, name) for f in (found, finished[1]))
        for role, row in theirs['systems'].items():
            for metric in ('HR@10', 'NDCG@10', 'ci95'):
                assert ours['systems'][role][metric] == row[metric]


def test_a_bug_in_a_variant_is_reported_and_the_next_command_tries_it_again(tmp_path, monkeypatch):
    opened = study.open_study(defined(('a', {'seed': 1}), ('b', {'seed': 2})))
    ran = []

    def run(config, folder, shared):
        ran.append(folder.name)
        if folder.name == 'a' and len(ran) < 4:
            raise ZeroDivisionError('by zero\nand more')

    monkeypatch.setattr(pipeline, 'run', run)
    assert study.run(opened, tmp_path) == {'a': 'ZeroDivisionError: by zero'}
    assert ran == ['base', 'a', 'b']
    assert study.failure(opened.variants[1], tmp_path) == 'ZeroDivisionError: by zero'
    assert study.run(opened, tmp_path) == {}
    assert study.failure(opened.variants[1], tmp_path) is None


def test_no_variant_follows_a_failure_that_the_other_processes_do_not_know_of(
    tmp_path, monkeypatch
):
    """They are still in that variant."""
    ran = []

    def run(config, folder, shared):
        ran.append(folder.name)
        raise LocalError('scores.npz: cannot be written (No space left on device).')

    monkeypatch.setattr(pipeline, 'run', run)
    monkeypatch.setattr(study.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(study.distributed, 'by_one', lambda work: work())
    with pytest.raises(LocalError, match='No space left'):
        study.run(study.open_study(defined(('a', {'seed': 1}))), tmp_path)
    assert ran == ['base']


class Stopped(BaseException):
    """As Ctrl-C: nothing catches it."""


@pytest.mark.slow
def test_one_variant_a_process_stopped_and_continued_gives_the_same_report(
    finished, base, tmp_path, monkeypatch
):
    """The base is stopped within its fine-tuning, a variant is a real process of its own."""
    workdir = tmp_path / 'study'
    opened = make(base)
    original = pipeline.peft.save_adapter

    def stop(*_, **__):
        raise Stopped

    monkeypatch.setattr(pipeline.peft, 'save_adapter', stop)
    with pytest.raises(Stopped):
        study.run(opened, workdir, 'base')
    monkeypatch.setattr(pipeline.peft, 'save_adapter', original)
    with pytest.raises(InputError, match='a report needs the base and one more variant'):
        study_report.write(opened, workdir)

    path = tmp_path / 'tiny.py'
    path.write_text(
        'from palr_jax.config import restore\nfrom palr_jax.study import define\n'
        'def get_config():\n'
        f"    return define('tiny', restore({flatten(base)!r}), *{VARIANTS!r}.items())\n"
    )
    status, out, errors = command(f'--config={path}', f'--workdir={workdir}', '--variant=byte')
    assert (status, out, errors) == (0, '', [])
    assert study.run(opened, workdir, 'base') == {}  # the process of byte has tuned by now
    assert study_report.write(opened, workdir)['missing'] == ['no_profile']
    assert study.run(opened, workdir, 'no_profile') == {}
    status, out, errors = command(f'--config={path}', f'--workdir={workdir}', '--report')
    assert (status, errors) == (0, [])
    assert out.strip() == study_text.table(finished[1]).strip()
    found = storage.read_json(workdir / 'report' / 'study.json')
    assert without_seconds(found) == without_seconds(finished[1])


def command(*arguments):
    """Runs the real program: (exit status, what it prints, error lines)."""
    done = subprocess.run(
        [sys.executable, '-m', 'palr_jax.ablate', *arguments],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert 'Traceback' not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    return done.returncode, done.stdout, errors


def hold(folder, ready, release):
    with storage.locked(folder):
        ready.set()
        release.wait(60)


def test_a_stage_that_another_process_makes_is_waited_for(tmp_path, monkeypatch):
    context = multiprocessing.get_context('spawn')
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, release))
    other.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match='in use by another run'), storage.locked(tmp_path):
        pass
    told = []

    def info(text, *values):
        told.append(text % values)
        release.set()

    monkeypatch.setattr(storage.logging, 'info', info)
    with storage.locked(tmp_path, wait=True):
        assert 'waiting for another run (process' in told[0]
    other.join()


# --- what is reported -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_numbers_are_those_of_the_stored_ranks(finished, base):
    """NDCG by hand from the stored scores; tests and Holm by their own functions."""
    workdir, found = finished
    values = {}
    for variant in make(base).variants:
        project = Project(variant.config, workdir / 'variants' / variant.name)
        scores = project.llm_scores('llm', 'test')
        targets = project.dataset.split.targets('test')[scores.users]
        shown = scores.normalized(variant.config.ranking.normalize)
        gains = np.append(1 / np.log2(np.arange(2, 12)), np.zeros(shown.shape[1]))
        value = []
        for items, target, row in zip(scores.items, targets, shown):
            mine = row[items == target]
            first = (row > mine).sum() if len(mine) else len(gains) - 1
            ties = (row == mine).sum() if len(mine) else 1
            value.append(gains[first : first + ties].mean())
        values[variant.name] = np.array(value)
        row = of_name(found, variant.name)['systems']['llm']
        assert row['NDCG@10'] == pytest.approx(values[variant.name].mean())
        assert row['users'] == 24
        tokens = storage.read_arrays(project.folder('ranking') / 'prompts_test.npz')['tokens']
        assert of_name(found, variant.name)['costs']['prompt_tokens'] == tokens.mean()
    tested = {
        name: of_name(found, name)['systems']['llm']['difference'].get('NDCG@10')
        for name in VARIANTS
    }
    tested = {name: row for name, row in tested.items() if row}
    assert tested
    p = [
        randomisation_test(values[n], values['base'], resamples=200, seed=base.seed) for n in tested
    ]
    for (name, row), raw, adjusted in zip(tested.items(), p, holm(p)):
        assert row['difference'] == pytest.approx((values[name] - values['base']).mean())
        assert (row['p_value'], row['p_adjusted']) == (raw, adjusted)
        assert row['detectable'] == pytest.approx(smallest_detectable(values[name], values['base']))


@pytest.mark.slow
def test_the_page_has_a_row_a_system_the_changes_and_both_pictures(finished):
    workdir, found = finished
    text = (workdir / 'report' / 'study.md').read_text()
    assert text.count('prompts.profile: counts → none') == 4
    assert '| no_profile |' in text
    for name in ('metrics.png', 'cost.png'):
        assert f']({name})' in text
        assert (workdir / 'report' / name).read_bytes().startswith(b'\x89PNG')
    page = (workdir / 'report' / 'report.html').read_text()
    assert page.count('>no profile</a>') == 4
    assert '<code>prompts.profile</code></th><td class="left">counts</td>' in page
    assert found['missing'] == []
    assert max(map(len, study_text.table(found).splitlines())) <= 100


def outcome(name, greater, users=None):
    """A made-up variant whose LLM puts the targets behind so many items."""
    greater = np.array(greater, np.int32)
    users = np.arange(len(greater)) if users is None else users
    ranks = TargetRanks(greater, np.zeros_like(greater), np.ones(len(greater), bool))
    costs = {'prompt_tokens': 100.0, 'finetune_seconds': None, 'ranking_seconds': 3.0}
    return report.Outcome(name, {'llm': Run('llm', users, ranks)}, costs, {'ranking': 'r'})


def build(outcomes, **more):
    names = [o.name for o in outcomes]
    settings = {
        'name': 'made_up',
        'base': {'ranking.candidates': 20, 'seed': 0},
        'outcomes': outcomes,
        'missing': [],
        'failed': {},
        'order': names,
        'changes': {n: {} if n == 'base' else {'seed': 1} for n in names},
        'dataset': {'name': 'ml100k'},
        'seed': 0,
        'resamples': 500,
        'versions': {'jax': '1'},
    }
    return report.build(**settings | more)


def test_every_variant_is_tested_against_the_base_and_corrected_for_their_number():
    users = 60
    better, worse = np.zeros(users, int), np.full(users, 9)
    better[:5] = 3
    found = build([outcome('base', [4] * users), outcome('up', better), outcome('down', worse)])
    rows = [of_name(found, name)['systems']['llm'] for name in ('up', 'down')]
    expected = (55 + 5 / np.log2(5)) / 60 - 1 / np.log2(6)
    assert rows[0]['difference']['NDCG@10']['difference'] == pytest.approx(expected)
    for row in rows:
        compared = row['difference']['NDCG@10']
        assert compared['p_value'] == pytest.approx(1 / 501)
        assert compared['p_adjusted'] == pytest.approx(2 / 501)
    assert of_name(found, 'base')['systems']['llm']['difference'] == {}
    mean = ndcg(outcome('up', better).runs['llm'].ranks, 10).mean()
    assert rows[0]['NDCG@10'] == pytest.approx(mean)


def test_a_system_that_ranks_as_the_base_does_is_not_tested():
    found = build([outcome('base', [1, 2]), outcome('same', [1, 2]), outcome('other', [1, 0])])
    assert of_name(found, 'same')['systems']['llm']['difference'] == {}
    other = of_name(found, 'other')['systems']['llm']['difference']['NDCG@10']
    assert other['p_adjusted'] == other['p_value']  # it is the only test


def test_other_users_are_refused():
    with pytest.raises(InputError) as error:
        build([outcome('base', [1, 2]), outcome('few', [1, 2], users=np.array([5, 6]))])
    assert str(error.value) == (
        'variant few: its 2 users are not the 2 of base; only variants with the same users can be '
        'compared.'
    )


def test_missing_and_failed_variants_have_a_row_of_their_own():
    found = build(
        [outcome('base', [1, 2]), outcome('a', [0, 2])],
        order=['base', 'a', 'b', 'c'],
        changes={n: {'seed': 1} for n in ('base', 'a', 'b', 'c')},
        missing=['b'],
        failed={'c': 'It broke.'},
    )
    text = study_text.markdown(found)
    assert '- c failed: It broke.\n- Not finished: b.' in text
    assert f'| b | seed: 0 → 1 | missing | {render.UNKNOWN} |' in text
    assert study_text.table(found).splitlines()[-2:] == [f'{"b":<22}missing', f'{"c":<22}failed']


# --- what is refused --------------------------------------------------------------------------


@functools.cache
def ready(path):
    """(docstring, study) of a config file."""
    module = runpy.run_path(str(path))
    return module['__doc__'], study.open_study(module['get_config']())


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.stem)
def test_every_study_is_allowed_and_says_how_to_run_it(path):
    name = path.relative_to(ROOT).as_posix()
    doc, opened = ready(path)
    assert opened.name == path.stem
    assert len(opened.variants) >= 3
    assert f'\nCommand: python -m palr_jax.ablate --config={name} --workdir=runs/' in doc


def test_the_docs_tell_every_study_and_their_commands_are_real(tmp_path):
    """The table's rows and counts; files, variants, fields and flags of each command."""
    text = (ROOT / 'docs' / 'ablations.md').read_text()
    table = dict(re.findall(r'^\| `(\w+)\.py` \| (\d+) \|', text, re.M))
    opened = {path.stem: ready(path)[1] for path in STUDIES}
    assert table == {name: str(len(found.variants) - 1) for name, found in opened.items()}
    lines = text.replace('\\\n', ' ').splitlines()
    commands = [shlex.split(x) for x in lines if x.startswith('python -m palr_jax.ablate')]
    assert len(commands) >= 5
    for words in commands:
        given = dict(word.removeprefix('--').split('=') for word in words if '=' in word)
        flags = {word.split('=')[0].removeprefix('--') for word in words if word.startswith('--')}
        found = opened[pathlib.Path(given['config']).stem]
        for name in flags - {'config', 'workdir', 'variant', 'report'}:
            check_name(name.removeprefix('config.'), 'base.')
        study.find(found, given.get('variant', 'base'))
    for name in re.search(r'for name in (.*); do', text)[1].split():
        study.find(opened['prompt_components'], name)
    example = re.search(r'```python\n(.*?)```', text, re.S)[1]
    (tmp_path / 'short_prompts.py').write_text(example)
    names = [variant.name for variant in ready(tmp_path / 'short_prompts.py')[1].variants]
    assert names == ['base', 'no_profile', 'latest_4']


def defined(*variants):
    return study.define('some', default_config(), *variants)


BAD = {
    'nothing': ((('same', {'prompts.history': 20}),), 'variant same: it gives the same config as'),
    'layout alone': (
        (('same', {'model.remat': 'full'}),),
        'variant same: it gives the same config as base; allowed: a variant that changes some',
    ),
    'twice the same': (
        (('a', {'seed': 1}), ('b', {'seed': 1})),
        'variant b: it gives the same config as a;',
    ),
    'two of one name': (
        (('a', {'seed': 1}), ('a', {'seed': 2})),
        'variant a: there are two of this name; allowed: one.',
    ),
    'base': ((('base', {'seed': 1}),), 'variant base: this is the name of the base'),
    'name': ((('No/Profile', {'seed': 1}),), "variant 'No/Profile': allowed in a name:"),
    'field': (
        (('a', {'prompts.profil': 'none'}),),
        'variant a: config.prompts.profil is not a field; did you mean config.prompts.profile?',
    ),
    'type': (
        (('a', {'prompts.history': 'long'}),),
        "variant a: config.prompts.history is 'long'; allowed: a value of type int.",
    ),
    'value': (
        (('a', {'prompts.profile': 'some'}),),
        "variant a: config.prompts.profile is 'some'; allowed:",
    ),
    'together': (
        (('a', {'prompts.candidates': False}),),
        'variant a: config.prompts.candidates is False and config.tasks.recommend_retrieval',
    ),
    'users': (
        (('a', {'ranking.users': 5}),),
        'variant a: config.ranking.users must be the same in all variants',
    ),
    'data': ((('a', {'data.k_core': 3}),), 'variant a: config.data.k_core must be the same'),
    'none': ((), 'The study some has no variants; allowed: one or more.'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_bad_study_is_refused_in_one_sentence(case):
    variants, named = BAD[case]
    with pytest.raises(InputError) as error:
        study.open_study(defined(*variants))
    assert str(error.value).startswith(named)


def test_the_config_of_a_single_run_is_refused():
    with pytest.raises(InputError, match=r'started by palr_jax\.main'):
        study.open_study(ConfigDict(default_config()))


def test_the_workdir_of_something_else_is_refused(tmp_path):
    opened = study.open_study(defined(('a', {'seed': 1})))
    study.open_workdir(opened, tmp_path)
    study.open_workdir(opened, tmp_path)
    other = study.define('other', default_config(), ('a', {'seed': 1}))
    with pytest.raises(InputError, match='is of the study some, and this one is other'):
        study.open_workdir(study.open_study(other), tmp_path)
    changed = default_config()
    changed.prompts.history = 5
    changed = study.open_study(study.define('some', changed, ('a', {'seed': 1})))
    with pytest.raises(
        InputError, match=r'config\.prompts\.history of base was 20 there and is 5 now'
    ):
        study.open_workdir(changed, tmp_path)
    shown = default_config()
    shown.evaluation.resamples = 5
    shown = study.open_study(study.define('some', shown, ('a', {'seed': 1}), ('b', {'seed': 2})))
    study.open_workdir(shown, tmp_path)

    stored = flatten(opened.variants[1].config)
    storage.write_json(tmp_path / 'variants' / 'a' / 'config.json', stored)
    again = study.open_study(defined(('a', {'seed': 3})))
    with pytest.raises(InputError, match=r'config\.seed of a was 1 there and is 3 now; .* name'):
        study.open_workdir(again, tmp_path)

    single = tmp_path / 'single'
    storage.write_json(single / 'config.json', {})
    with pytest.raises(InputError, match='is of a single run'):
        study.open_workdir(opened, single)


def test_a_report_on_an_unfinished_study_names_what_is_missing(tmp_path):
    opened = study.open_study(defined(('a', {'seed': 1}), ('b', {'seed': 2})))
    storage.write_json(tmp_path / 'variants' / 'b' / 'error.json', {'error': 'It broke.'})
    with pytest.raises(InputError) as error:
        study_report.write(opened, tmp_path)
    assert str(error.value) == (
        f'--workdir={tmp_path}: a report needs the base and one more variant, and these are not '
        'finished: base, a, b (failed: It broke.); run them first.'
    )
    assert not (tmp_path / 'study.json').exists()


def test_an_unknown_variant_is_named_with_those_that_there_are(tmp_path):
    opened = study.open_study(defined(('a', {'seed': 1})))
    with pytest.raises(InputError, match=r'--variant=c: .* allowed: base, a'):
        study.run(opened, tmp_path, 'c')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_refuses_in_one_sentence(tmp_path):
    """A field that stands outside the base, and a wrong type."""
    config = '--config=configs/ablations/tasks.py'
    for argument, told in (
        (
            'ranking.users=5',
            'config.ranking.users is not a field; did you mean config.base.ranking.users?',
        ),
        ('base.seed=some', 'config.base.seed=some; allowed: a value of type int.'),
    ):
        status, out, errors = command(config, f'--workdir={tmp_path}', f'--config.{argument}')
        assert (status, out, errors) == (2, '', [f'error: {told}'])
    assert not list(tmp_path.iterdir())


def test_a_misspelt_field_of_the_base_gets_its_name():
    with pytest.raises(InputError) as error:
        check_name('base.ranking.user', 'base.')
    assert str(error.value) == (
        'config.base.ranking.user is not a field; did you mean config.base.ranking.users?'
    )


def test_runs_of_several_seeds_rank_the_same_users():
    config = default_config()
    config.ranking.users = 10
    split = types.SimpleNamespace(users=lambda part: np.arange(100))
    projects = []
    for seed, users_seed in ((0, 0), (5, 0), (0, 5)):
        config.seed, config.ranking.users_seed = seed, users_seed
        project = Project(ConfigDict(config), None)
        project.dataset = types.SimpleNamespace(split=split)
        projects.append(ranked_users(project, 'test').tolist())
    assert projects[0] == projects[1]
    assert projects[0] != projects[2]
