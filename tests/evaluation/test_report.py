"""The contract of metrics.json, and that every rendering derives from it."""

import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import image

from palr_jax.errors import InputError
from palr_jax.evaluation import (
    Comparison,
    HeldOutLoss,
    ItemFacts,
    Run,
    build,
    by_group,
    hit_rate,
    rank_targets,
    sampled,
    table,
    write,
)
from palr_jax.evaluation.render import markdown

LISTS = ['coverage@10', 'novelty@10', 'diversity@10']
METRICS = ['HR@1', 'HR@5', 'HR@10', 'NDCG@5', 'NDCG@10', 'MRR']
ROW = {
    *('system', 'variant', 'mode', 'objective', 'split', 'user_set', 'users', 'ci95'),
    *METRICS,
    *LISTS,
}
DATASET = {
    'name': 'ml100k',
    'users': 60,
    'items': 40,
    'interactions': 999,
    'tie_rule': 'file order',
    'sha256': {'u.data': 'ab' * 32},
}


def ranked(users, skill, seed):
    """A system that knows the targets better the higher its `skill` is."""
    rng = np.random.default_rng(seed)
    items = np.tile(np.arange(1, 21), (len(users), 1))
    targets = 1 + users % 25  # items 21 … 25 are never retrieved
    scores = rng.normal(size=items.shape) + skill * (items == targets[:, None])
    return rank_targets(items, scores, targets)


def make_runs(order=None):
    """All 60 users for the two cheap systems, 24 of them for every system; users in `order`."""
    order = np.arange(60) if order is None else order
    sample = order[order % 5 < 2]
    user_set = sampled(sample, seed=3)
    everyone, some = np.arange(60), np.arange(60)[np.arange(60) % 5 < 2]
    runs = []
    for place, (system, skill) in enumerate({'popularity': 0.3, 'retriever': 1.5}.items()):
        run = Run(system, everyone, ranked(everyone, skill, place))
        runs.append(Run(system, order, run.ranks.take(order)))
    skills = {'popularity': 0.3, 'retriever': 1.5, 'llm_zero_shot': 0.1, 'llm': 1.0, 'fused': 2.5}
    for place, (system, skill) in enumerate(skills.items()):
        ranks = ranked(some, skill, place).take(np.searchsorted(some, sample))
        mode = 'title' if place > 1 else None
        runs.append(Run(system, sample, ranks, user_set=user_set, mode=mode))
    groups = {'short history': order < 30, 'long history': order >= 30, 'nobody': order < 0}
    return runs + by_group(runs[1], groups)


def make_report(runs=None, **changes):
    comparisons = ()
    if runs is None:
        runs = make_runs()
        comparisons = [
            Comparison(runs[6], runs[3], 'NDCG@10'),
            Comparison(runs[6], runs[3], 'HR@10'),
            Comparison(runs[1], runs[0], 'NDCG@10'),
        ]
    settings = {
        'dataset': DATASET,
        'retrieval': {
            'backend': 'exact',
            'recall_vs_exact': np.float32(1),
            'recall@20': 0.8,
            'recall@50': float('nan'),
        },
        'runs': runs,
        'comparisons': comparisons,
        'timing': {'ranking': 12.5, 'users_per_second': 1.9},
        'versions': {'jax': '0.10.2'},
        'seed': 7,
        'candidates': 20,
        'resamples': 200,
        'notes': ('Three prompts were | shortened.',),
        'held_out': HeldOutLoss(
            'answer', np.array([1, 1, 2]), np.array([3.0, 1, 4]), np.array([1.0, 1, 1])
        ),
    }
    return build(**settings | changes)


@pytest.fixture(scope='module')
def report():
    return make_report()


def test_metrics_json_has_the_keys_of_the_contract(report):
    assert list(report) == [
        *('schema', 'dataset', 'retrieval', 'runs', 'comparisons', 'timing', 'versions', 'seed'),
        *('evaluation', 'finetune', 'notes'),
    ]
    assert (report['schema'], report['seed'], report['dataset']) == (1, 7, DATASET)
    for row in report['runs']:
        assert set(row) - {'group'} == ROW
        assert list(row['ci95']) == METRICS
        if row['users']:
            for name in METRICS:
                low, high = row['ci95'][name]
                assert 0 <= low <= row[name] <= high <= 1
    assert [row.get('group') for row in report['runs']][-3:] == [
        'short history',
        'long history',
        'nobody',
    ]
    for row in report['comparisons']:
        assert set(row) == {
            *('a', 'b', 'metric', 'users', 'difference', 'ci95', 'p_value', 'p_adjusted'),
            'detectable',
        }
        assert row['p_value'] <= row['p_adjusted'] <= 1


def test_unknown_is_null_never_nan(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report['retrieval']['recall@50'] is None
    nobody = report['runs'][-1]
    assert nobody['users'] == 0
    assert [nobody[name] for name in METRICS] == [None] * 6
    assert nobody['ci95'] == dict.fromkeys(METRICS)


def test_the_numbers_are_means_over_all_users(report):
    runs = make_runs()
    for row, run in zip(report['runs'][:7], runs):
        assert row['users'] == len(run.users)
        assert row['HR@10'] == pytest.approx(hit_rate(run.ranks, 10).sum() / len(run.users))
    missed = np.isin(runs[0].users % 25, range(20, 25))
    assert report['runs'][0]['HR@10'] <= 1 - missed.mean()


def test_user_set_names_the_sample(report):
    """E07: everybody by default, and a sample's hash in the report."""
    assert report['runs'][0]['user_set'] == 'all'
    lines = ''.join(f'{user}\n' for user in range(60) if user % 5 < 2)
    assert report['runs'][2]['user_set'] == {
        'seed': 3,
        'n': 24,
        'sha256': hashlib.sha256(lines.encode()).hexdigest(),
    }


def test_e09_the_order_of_the_users_changes_nothing(report):
    shuffled = make_runs(np.random.default_rng(0).permutation(60))
    assert make_report(shuffled)['runs'] == report['runs']
    pair = Comparison(shuffled[6], make_runs()[3], 'NDCG@10')
    mixed = [*shuffled[:3], pair.b, *shuffled[4:]]
    again = make_report(mixed, comparisons=[pair])['comparisons'][0]
    for key in ('difference', 'ci95', 'p_value'):
        assert again[key] == report['comparisons'][0][key]


def test_comparisons_are_paired_and_corrected(report):
    fused, retriever = report['runs'][6], report['runs'][3]
    row = report['comparisons'][0]
    assert (row['a'], row['b'], row['metric']) == ('fused', 'retriever', 'NDCG@10')
    assert row['difference'] == pytest.approx(fused['NDCG@10'] - retriever['NDCG@10'])
    assert row['ci95'][0] <= row['difference'] <= row['ci95'][1]
    assert min(row['p_adjusted'] for row in report['comparisons']) == pytest.approx(
        3 * min(row['p_value'] for row in report['comparisons'])
    )


def test_mrr_is_cut_at_one_rank_for_every_system():
    """A target at rank 3 counts 1/3 under a cut at 3 and nothing under one at 2."""
    items, scores = np.array([[1, 2, 3, 4]]), np.array([[4.0, 3, 2, 1]])
    runs = [Run('popularity', np.array([0]), rank_targets(items, scores, np.array([3])))]
    assert make_report(runs, candidates=3)['runs'][0]['MRR'] == pytest.approx(1 / 3)
    assert make_report(runs, candidates=2)['runs'][0]['MRR'] == 0


def test_further_cutoffs_are_added():
    row = make_report(make_runs()[:1], ks=(20,))['runs'][0]
    assert list(row['ci95']) == [
        *('HR@1', 'HR@5', 'HR@10', 'HR@20', 'NDCG@5', 'NDCG@10', 'NDCG@20', 'MRR')
    ]


def test_held_out_loss_weighs_users_alike(report):
    """User 1 has examples 3 and 1, user 2 has 4: (2 + 4) / 2 = 3, afterwards 1."""
    finetune = report['finetune']
    assert (finetune['users'], finetune['examples']) == (2, 3)
    loss = finetune['loss']
    assert (loss['before'], loss['after'], loss['difference']) == (3, 1, -2)
    assert loss['ci95'] == {'before': [2, 4], 'after': [1, 1], 'difference': [-3, -1]}
    assert make_report(held_out=None)['finetune'] is None
    diverged = HeldOutLoss(
        'answer', np.array([1, 2]), np.array([2.0, 4.0]), np.array([np.nan, 1.0])
    )
    loss = make_report(held_out=diverged)['finetune']['loss']
    assert (loss['before'], loss['after'], loss['difference']) == (3, None, None)


def test_rows_of_one_system_are_told_apart_by_what_differs():
    users = np.arange(60)
    base = {'users': users, 'mode': 'title', 'objective': 'title'}
    runs = [
        Run('llm', ranks=ranked(users, 1, 0), variant='no_profile', **base),
        Run('llm', ranks=ranked(users, 1, 1), **base),
        Run('fused', ranks=ranked(users, 2, 2), variant='no_profile', **base),
    ]
    report = make_report(runs, comparisons=[Comparison(runs[0], runs[1], 'HR@1')])
    assert (report['comparisons'][0]['a'], report['comparisons'][0]['b']) == (
        'llm/no_profile',
        'llm',
    )
    assert 'LLM fine-tuned (no profile)' in table(report)
    assert 'Fused (' not in table(report)


def test_misuse_is_refused():
    runs = make_runs()
    for pair, message in (
        ((runs[0], runs[3]), 'different users'),
        ((runs[0], Run('x', runs[0].users, runs[0].ranks)), 'only rows of the report'),
    ):
        with pytest.raises(ValueError, match=message):
            make_report(runs, comparisons=[Comparison(*pair, 'HR@10')])
    with pytest.raises(ValueError, match=r'unknown metric HR@7; a row has HR@1, HR@5'):
        make_report(runs, comparisons=[Comparison(runs[1], runs[0], 'HR@7')])
    valid = Run('fused', runs[0].users, runs[0].ranks, split='valid')
    with pytest.raises(ValueError, match='different users'):
        make_report([*runs, valid], comparisons=[Comparison(runs[0], valid, 'HR@10')])
    with pytest.raises(ValueError, match='need a system, detail, split'):
        make_report([*runs, Run('popularity', runs[0].users, runs[0].ranks)])
    with pytest.raises(ValueError, match='a user counts twice'):
        make_report([Run('x', np.zeros(60, int), runs[0].ranks)])
    with pytest.raises(ValueError, match='59'):
        make_report([Run('x', np.arange(59), runs[0].ranks)])
    with pytest.raises(ValueError, match='at least one run'):
        make_report([])


def test_a_stored_report_renders_the_same_again(report, details, tmp_path):
    write(report, details, tmp_path / 'report')
    stored, more = (
        json.loads((tmp_path / 'report' / name).read_text())
        for name in ('metrics.json', 'details.json')
    )
    assert stored == report
    assert more == details
    write(stored, more, tmp_path / 'again')
    assert table(stored) == table(report)
    for name in ('metrics.json', 'details.json', 'report.md', 'report.html', 'comparison.png'):
        first, again = ((tmp_path / folder / name).read_bytes() for folder in ('report', 'again'))
        assert first == again
    assert sorted(path.name for path in (tmp_path / 'report').iterdir()) == [
        'comparison.png',
        'details.json',
        'metrics.json',
        'report.html',
        'report.md',
    ]


def test_another_schema_is_refused(report, details, tmp_path):
    with pytest.raises(InputError, match='the report has schema 9; this version reads 1'):
        write(report | {'schema': 9}, details, tmp_path)
    with pytest.raises(InputError, match=r'details\.json has schema 9; this version reads 1'):
        write(report, details | {'schema': 9}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_markdown_holds_every_row_and_what_the_numbers_mean(report, details, tmp_path):
    write(report, details, tmp_path)
    text = (tmp_path / 'report.md').read_text()
    assert '### Test, all 60 users' in text
    assert '### Test, sample of 24 users (seed 3)' in text
    fused = report['runs'][6]
    low, high = fused['ci95']['NDCG@10']
    assert f'{fused["NDCG@10"]:.4f} | [{low:.4f}, {high:.4f}]' in text
    lines = text.splitlines()
    assert [line.split('|')[3].strip() for line in lines if line.startswith('| Fused − ')] == [
        '24',
        '24',
    ]
    assert [line.split('|')[3].strip() for line in lines if line.startswith('| Retriever − ')] == [
        '60'
    ]
    assert '| nobody | Retriever | 0 | – | – |' in text
    assert 'MRR is cut at rank 20' in text
    assert '200 resamples, seed 7' in text
    assert 'file order' in text
    assert '| recall@50 | – |' in text
    assert '- Three prompts were | shortened.' in text
    rows = [line for line in lines if line.startswith('|')]
    assert all(line.endswith('|') for line in rows)


def test_cells_cannot_break_a_table(details, tmp_path):
    users = np.arange(60)
    runs = [Run('my|system', users, ranked(users, 1, 0))]
    write(make_report(runs), details, tmp_path)
    assert '| My&#124;system | 60 |' in (tmp_path / 'report.md').read_text()


def test_terminal_table_fits_100_columns(report):
    users = np.arange(60)
    long = Run('retriever_with_popularity_fused_the_same_way', users, ranked(users, 1, 5))
    runs = [*make_runs(), long]
    wide = make_report(runs, comparisons=[Comparison(long, runs[0], 'NDCG@10')])
    for text in (table(report), table(wide)):
        assert max(map(len, text.splitlines())) <= 100
    head = table(report).splitlines()[3].split()
    assert head == ['system', 'users', 'HR@1', 'HR@10', 'NDCG@10', '95', '%', 'interval', 'MRR']
    assert '…' in table(wide)


@pytest.mark.parametrize('name', ['ml100k', 'prices in $ and _{x', None])
def test_chart_is_a_picture_that_grows_with_the_rows(name, details, tmp_path):
    runs = make_runs()
    sizes = []
    for some in (runs[:2], runs):
        write(make_report(some, dataset={'name': name}), details, tmp_path)
        pixels = image.imread(io.BytesIO((tmp_path / 'comparison.png').read_bytes()))
        sizes.append(pixels.shape)
    assert sizes[0][1] == sizes[1][1] == 1440
    assert 200 < sizes[0][0] < sizes[1][0] < 1000
    colours = {tuple(colour) for colour in np.rint(pixels[::2, ::2, :3] * 255).reshape(-1, 3)}
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115)} <= colours  # retriever, LLM, fused


def test_a_report_of_groups_alone_still_has_a_chart(details, tmp_path):
    users = np.arange(60)
    run = Run('llm', users, ranked(users, 1, 0), split='valid')
    for runs in ([run], by_group(run, {'odd': users % 2 == 1, 'none': users < 0})):
        write(make_report(runs), details, tmp_path)
        assert (tmp_path / 'comparison.png').read_bytes().startswith(b'\x89PNG')


FACTS = ItemFacts(
    holders=np.array([0, 32, 16, 8, *[1] * 37]), users=64, keywords=[(), *[('a',), ('b',)] * 20]
)


def with_lists(system='retriever'):
    """Users 0 … 59; an even one is shown the items 1 and 2, an odd one 3."""
    users, lists = np.arange(60), np.full((60, 10), -1)
    lists[::2, :2] = [1, 2]
    lists[1::2, 0] = 3
    return Run(system, users, ranked(users, 1, 0), lists=lists)


def test_lists_are_measured_in_every_row_that_has_them():
    """By hand: bits (1 + 2) / 2 and 3; keywords a and b have nothing in common."""
    run = with_lists()
    groups = {
        'parity: even': run.users % 2 == 0,
        'parity: odd': run.users % 2 == 1,
        'nobody': run.users < 0,
    }
    plain = Run('popularity', run.users, run.ranks)
    rows = make_report([run, plain, *by_group(run, groups)], items=FACTS)['runs']
    found = [[row[name] for name in LISTS] for row in rows]
    assert found == [
        [3 / 40, (1.5 + 3) / 2, 0.5],
        [None] * 3,
        [2 / 40, 1.5, 1.0],
        [1 / 40, 3.0, 0.0],
        [None] * 3,
    ]


def test_users_who_are_shown_nothing_count_in_no_list_measure():
    """As those whose target was not retrieved and who were not scored."""
    run = with_lists()
    odd = (run.users % 2 == 1)[:, None]
    some = replace(run, lists=np.where(odd, -1, run.lists))
    nobody = replace(run, variant='nobody', lists=np.full_like(run.lists, -1))
    rows = make_report([some, nobody], items=FACTS)['runs']
    assert [[row[name] for name in LISTS] for row in rows] == [[2 / 40, 1.5, 1.0], [None] * 3]


def test_e09_the_order_of_the_users_changes_no_list_measure():
    rng = np.random.default_rng(0)
    run = with_lists()
    run = replace(run, lists=np.stack([rng.permutation(40)[:10] + 1 for _ in run.users]))
    facts = replace(FACTS, holders=rng.integers(0, 60, 41))
    report = make_report([run], items=facts)
    for _ in range(5):
        order = rng.permutation(60)
        again = Run('retriever', order, run.ranks.take(order), lists=run.lists[order])
        assert make_report([again], items=facts) == report


def test_lists_of_another_form_are_refused():
    run = with_lists()
    short = Run('x', run.users, run.ranks, lists=run.lists[:, :5])
    with pytest.raises(ValueError, match=r"lists must be \[U', 10\].*\(60, 5\)"):
        make_report([short], items=FACTS)
    with pytest.raises(ValueError, match='and items NoneType'):
        make_report([run])


def test_what_is_recommended_has_a_table_of_its_own(report):
    runs = [with_lists(), with_lists('popularity')]
    text = markdown(make_report(runs, items=FACTS))
    assert text.index('## What is recommended') < text.index(
        '| Retriever | 0.075 | 2.250 | 0.500 |'
    )
    assert 'What is recommended' not in markdown(report)


def test_groups_stand_by_grouping_and_the_systems_of_a_group_together():
    run, other = with_lists(), with_lists('popularity')
    groups = {f'parity: {name}': run.users % 2 == odd for name, odd in (('even', 0), ('odd', 1))}
    groups['size: 1'] = run.users < 60
    runs = [run, other, *by_group(run, groups), *by_group(other, groups)]
    report = make_report(runs, items=FACTS)
    lines = markdown(report).split('## Groups of users')[1].splitlines()
    heads = [line for line in lines if line.startswith('### Test')]
    assert heads == ['### Test, all users: by parity', '### Test, all users: by size']
    cells = [line.split(' | ')[:3] for line in lines if line.startswith(('| even', '| odd', '| 1'))]
    assert cells == [
        ['| even', 'Retriever', '30'],
        ['| even', 'Popularity', '30'],
        ['| odd', 'Retriever', '30'],
        ['| odd', 'Popularity', '30'],
        ['| 1', 'Retriever', '60'],
        ['| 1', 'Popularity', '60'],
    ]
    assert max(map(len, table(report).splitlines())) <= 100


def test_comparisons_within_a_group_say_so():
    run, other = with_lists(), Run('popularity', np.arange(60), ranked(np.arange(60), 0, 3))
    odd = {'parity: odd': run.users % 2 == 1}
    pair = [by_group(each, odd)[0] for each in (run, other)]
    everyone = Comparison(run, other, 'HR@10')
    comparisons = [everyone, Comparison(*pair, 'HR@10')]
    report = make_report([run, other, *pair], items=FACTS, comparisons=comparisons)
    assert [row.get('group') for row in report['comparisons']] == [None, 'parity: odd']
    text = markdown(report)
    assert '| Retriever − Popularity | HR@10 | 60 |' in text
    assert '| Retriever − Popularity (parity: odd) | HR@10 | 30 |' in text
    with pytest.raises(ValueError, match='different users'):
        make_report([run, *pair], comparisons=[Comparison(run, pair[1], 'HR@10')], items=FACTS)


def test_comparisons_say_what_they_could_have_found(report):
    """2.80 standard errors; here that of the difference between two rows' users."""
    runs = make_runs()
    difference = hit_rate(runs[6].ranks, 10) - hit_rate(runs[3].ranks, 10)
    expected = 2.8016 * difference.std(ddof=1) / np.sqrt(24)
    row = report['comparisons'][1]
    assert row['detectable'] == pytest.approx(expected, rel=1e-4)
    assert f'| {row["detectable"]:.4f} |' in markdown(report)
    same = make_report(runs, comparisons=[Comparison(runs[1], runs[1], 'HR@10')])
    assert same['comparisons'][0]['detectable'] is None


def test_a_report_of_an_earlier_version_still_renders(report):
    old = json.loads(json.dumps(report))
    for row in old['runs']:
        for name in LISTS:
            del row[name]
    for row in old['comparisons']:
        del row['detectable'], row['users']
    assert '| Fused − Retriever | NDCG@10 | – |' in markdown(old)
    assert len(table(old)) == len(table(report))


def test_comparisons_have_the_number_of_their_users_whatever_the_difference():
    """Rows of all 60 users and of 24 of them, all with the difference 0."""
    runs = make_runs()
    user_set = runs[3].user_set
    everyone, some = runs[1], runs[3]
    same = [replace(everyone, system='popularity'), replace(some, system='popularity')]
    comparisons = [Comparison(some, same[1], 'HR@10'), Comparison(everyone, same[0], 'HR@10')]
    report = make_report([everyone, some, *same], comparisons=comparisons)
    assert user_set['n'] == 24
    assert [row['users'] for row in report['comparisons']] == [24, 60]
    assert '| Retriever − Popularity | HR@10 | 24 |' in markdown(report)
