"""The page of a run: whole, escaped, by itself; in a browser readable and usable by keyboard."""

import re

import numpy as np
import pytest

from palr_jax.evaluation import (
    Comparison,
    HeldOutLoss,
    Run,
    TargetRanks,
    build,
    by_group,
    run_page,
    sampled,
    svg,
)

ODD = 'A note with <script>alert(1)</script> & "quotes".'
ALL, SOME = np.arange(60), np.arange(24)


def run(system, users, behind, **details):
    """The target of user u stands behind u % 8 items and `behind` more."""
    greater = (users % 8 + behind).astype(np.int32)
    ranks = TargetRanks(greater, np.zeros_like(greater), np.ones(len(users), bool))
    return Run(system, users, ranks, **details)


def made_up(**changes):
    some = {'user_set': sampled(SOME, seed=3)}
    everyone = [run('popularity', ALL, 5), run('retriever', ALL, 2)]
    ranked = [run('retriever', SOME, 2, **some), run('llm_zero_shot', SOME, 9, **some)]
    groups = {'history length: 2-4': SOME % 2 == 0, 'history length: 5-<9>': SOME % 2 == 1}
    of_groups = [row for base in ranked for row in by_group(base, groups)]
    arguments = {
        'dataset': {'name': 'ml<100k', 'users': 60, 'items': 40, 'tie_rule': 'file order'},
        'retrieval': {'backend': 'exact', 'recall@20': 0.5},
        'runs': [*everyone, *ranked, *of_groups],
        'comparisons': [
            Comparison(everyone[1], everyone[0], 'NDCG@10'),
            Comparison(ranked[1], ranked[0], 'NDCG@10'),
        ],
        'timing': {
            'seconds': {'data': 1.5, 'ranking': 20.0},
            'users_per_second': 2.5,
            'tokens_per_second': 1234.0,
        },
        'versions': {'jax': '1'},
        'seed': 0,
        'candidates': 20,
        'resamples': 200,
        'notes': [ODD],
        'held_out': HeldOutLoss('answer', SOME, np.full(24, 2.0), np.full(24, 1.5)),
    }
    return build(**arguments | changes)


@pytest.fixture
def text(details):
    return run_page.build(made_up(), details)


def test_the_page_is_whole_and_loads_nothing(text, parse):
    parsed = parse(text)
    sections = ('results', 'groups', 'cutoffs', 'retrieval', 'curves', 'recommended', 'users')
    assert {f'#{name}' for name in (*sections, 'timing', 'notes', 'reading', 'run')} < (
        parsed.check_links()
    )
    parsed.check_loads_nothing()
    assert 'url(' not in text
    assert "default-src 'none'" in text


def test_all_text_is_escaped(text, parse):
    assert '<script' not in text
    words = parse(text).words
    for odd in (ODD, 'ml<100k: who ranks better', 'Seen & <liked>', 'First & <last>', 'User <7>'):
        assert odd in words
    assert ['model.path', '<a&b>'] in parse(text).rows
    assert '5-<9>' in words


def test_results_have_means_intervals_and_what_the_tests_say(text, parse):
    """NDCG@10 by hand: 1 / log2(rank + 1) for the ranks 10 … 17, of which one is within ten."""
    report, rows = made_up(), parse(text).rows
    (zero_shot,) = (row for row in rows if row[0] == 'LLM zero-shot' and len(row) == 5)
    assert zero_shot[1] == '24'
    assert zero_shot[2].startswith(f'{1 / 8:.4f} [')
    assert zero_shot[3].startswith(f'{1 / np.log2(11) / 8:.4f} [')
    found = report['comparisons'][1]
    (compared,) = (row for row in rows if row[0] == 'LLM zero-shot − Retriever')
    assert compared[1:3] == ['NDCG@10', '24']
    assert compared[3].startswith(f'{found["difference"]:+.4f} [')
    told = f'worse (p {found["p_adjusted"]:.4f})detectable: {found["detectable"]:.4f}'
    assert compared[4] == told
    groups = [row for row in rows if row[0] in ('2-4', '5-<9>')]
    assert [row[1] for row in groups] == ['12', '12']
    even = np.array([0, 2, 4, 6])  # places behind, of the retriever two more
    assert groups[0][2].startswith(f'{np.mean(1 / np.log2(even + 4)):.4f} [')
    (held,) = (row for row in rows if row[0] == 'Held-out loss')
    assert held[1::2] == ['2.0000', '1.5000', '-0.5000']
    assert ['all of these', '21.5'] in rows


def test_numbers_of_the_charts_stand_in_tables(text, parse):
    rows = parse(text).rows
    ks = (1, 2, 3, 5, 10, 15, 20, 30, 40, 50)
    assert ['LLM zero-shot', 'HR', *(f'{k / 50:.4f}' for k in ks)] in rows
    assert ['Retriever', 'NDCG', *(f'{k / 200:.4f}' for k in ks)] in rows
    assert ['Popularity', '0.0000', '0.1000', '0.3000', '1.0000'] in rows
    assert [r for r in rows if r[0] in '34' and len(r) == 2] == [['3', '2.5000'], ['4', '2.2500']]
    assert ['4', '5.5000', '0.1500'] in rows
    told = re.findall('<desc>(.*?)</desc>', text)
    assert 'LLM zero-shot from 0.02 at 1 to 1 at 50; candidates that the LLM ranks: 20' in told[0]
    charts = [tag for tag, attributes in parse(text).tags if attributes.get('class') == 'chart']
    assert len(told) == len(charts) == 6  # HR, NDCG, recall, three training curves


def test_example_users_with_every_ranking_of_their_candidates(text, parse):
    parsed = parse(text)
    assert '3 users drawn with the seed 3 among the 24 test users that the LLM ranked' in (
        parsed.words
    )
    assert ['Seen & <liked> (the target)', '2', '1'] in parsed.rows
    assert ['Third', '3', '2–4'] in parsed.rows
    assert ['LLM zero-shot', '9–12', 'hits by a chance of 0.50'] in parsed.rows
    assert ['LLM zero-shot', 'not ranked', 'misses'] in parsed.rows
    assert 'The 2 items of 30 that the prompt shows, oldest first.' in parsed.words
    assert 'Drama, Film-Noir' in parsed.words
    assert '6 more that are among the first 10 of no ranking.' in parsed.words
    assert 'how many of them the prompt shows was not recorded' in parsed.words


def test_free_writing_and_unscored_misses_are_told(details, parse):
    details['config'] |= {'ranking.mode': 'generate', 'ranking.skip_misses': True}
    assert (
        'those it does not write share a place' in parse(run_page.build(made_up(), details)).words
    )
    details['config']['prompts.candidates'] = False
    words = parse(run_page.build(made_up(), details)).words
    assert 'A place that no item has is a line that names none' in words
    assert 'whose targets are among the candidates' in words


def test_a_run_without_an_llm(details, parse):
    runs = [run('popularity', ALL, 5), run('retriever', ALL, 2)]
    report = made_up(runs=runs, comparisons=[], notes=[], held_out=None, timing={'seconds': {}})
    details['curves'] = {'finetune': None, 'retriever': None}
    details['examples'] = details['at_k']['candidates'] = details['recall']['candidates'] = None
    words = parse(run_page.build(report, details)).words
    assert 'Nothing was fine-tuned.' in words
    assert words.count('No LLM ranked in this run') == 2
    assert 'candidates that the LLM ranks' not in words


def test_a_long_curve_has_its_mean_over_it(details, parse):
    losses = [float(n % 2) for n in range(40)]
    details['curves']['finetune'] = {'steps': 5, 'step': [5 * n for n in range(40)], 'loss': losses}
    rows = parse(run_page.build(made_up(), details)).rows
    assert ['195', '1.0000', '0.5000'] in rows
    assert ['Step', 'Training loss', 'Mean of the last 20 steps'] in rows


def test_lines_stand_where_their_values_are():
    """From 52 to 384 for 0 to 4, and for 1 to 100 on a logarithmic axis; from 254 up to 10."""
    line = svg.Line('LLM', 'llm', [1, 2, 4], [0.0, 0.2, 0.4])
    drawn = svg.lines([line], 'K', 'HR@K', mark=(3, 'end'))
    assert 'class="line llm" d="M135.0 254.0L218.0 132.0L384.0 10.0"' in drawn
    assert 'class="mark" x1="301.0" x2="301.0"' in drawn
    line = svg.Line('LLM', 'fused', [1, 10, 100], [5.0, 5.5, 6.0])
    drawn = svg.lines([line], 'K', 'loss', log=True, from_zero=False)
    assert 'class="line fused" d="M52.0 254.0L218.0 132.0L384.0 10.0"' in drawn
    assert svg.decades(120) == [1, 2, 5, 10, 20, 50, 100]
    assert svg.ticks_between(5.1, 5.9) == [5.0, 5.2, 5.4, 5.6, 5.8, 6.0]
    assert svg.ticks_between(2, 2)[0] < 2 < svg.ticks_between(2, 2)[-1]


# --- in a browser -----------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [400, 1400])
def test_the_page_is_readable(width, scheme, check_readable):
    opened = check_readable(width, scheme)
    assert opened.title() == 'ml<100k: who ranks better'
    image = opened.get_by_role('img', name='HR@K against K', exact=True)
    assert image.is_visible()


@pytest.mark.browser
def test_the_keyboard_alone_reaches_and_opens_everything(shown, press_tab):
    opened = shown(400, 'light')
    reached = []
    for place in press_tab(opened):
        reached.append(place)
        if place['text'].startswith('User <7>'):
            opened.keyboard.press('Enter')
            assert opened.get_by_role('rowheader', name='Other (1990)').is_visible()
            opened.keyboard.press('Enter')  # its tables would be more to reach
    assert reached[0]['text'] == 'To the results'
    summaries = [place['text'] for place in reached if place['tag'] == 'SUMMARY']
    assert [s.split(':')[0] for s in summaries if s.startswith('User')] == [
        *('User <7>', 'User 11', 'User 12'),
    ]
    assert summaries[-1] == 'Config'
