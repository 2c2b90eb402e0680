"""The page of a study: whole, escaped, by itself; in a browser readable and usable by keyboard."""

import numpy as np
import pytest

from palr_jax.evaluation import Run, TargetRanks, study, study_page, svg

USERS = 40
ODD = 'The prompt of <script>alert(1)</script> & "others" is too long.'


def outcome(name, shift):
    """A made-up variant: the LLM puts the targets behind so many items more than the base does."""

    def run(system, behind):
        greater = np.arange(USERS, dtype=np.int32) % 8 + behind
        ranks = TargetRanks(greater, np.zeros_like(greater), np.ones(USERS, bool))
        return Run(system, np.arange(USERS), ranks)

    runs = {
        'llm': run('llm', shift),
        'fused': run('fused', shift // 2),
        'zero_shot': run('llm_zero_shot', 4),
        'retriever': run('retriever', 2),
    }
    costs = {'prompt_tokens': 100.0 * (1 + shift), 'finetune_seconds': 60.0, 'ranking_seconds': 9.0}
    folders = {'data': 'data-1', 'finetune': f'finetune-{shift}', 'ranking': f'ranking-{shift}'}
    return study.Outcome(name, runs, costs, folders)


def made_up():
    base = {'ranking.candidates': 20, 'seed': 0, 'prompts.history': 20, 'model.path': '<a&b>'}
    changes = {
        'base': {},
        'latest_2': {'prompts.history': 2},
        'same': {'prompts.history': 19},
        'broken': {'model.path': '"c" <d>'},
        'later': {'seed': 1},
    }
    return study.build(
        name='a<b_&_c',
        base=base,
        outcomes=[outcome('base', 0), outcome('latest_2', 3), outcome('same', 0)],
        missing=['later'],
        failed={'broken': ODD},
        order=list(changes),
        changes=changes,
        dataset={'name': 'ml<100k', 'sha256': {'u.data': 'ab'}, 'tie_rule': None},
        seed=0,
        resamples=200,
        versions={'jax': '1'},
    )


@pytest.fixture(scope='module')
def text():
    return study_page.build(made_up())


def test_every_tag_is_closed_and_every_link_leads_to_a_part_of_the_page(text, parse):
    links = parse(text).check_links()
    assert {'#results', '#cost', '#variants', '#numbers', '#variant-latest_2'} <= links


def test_the_page_loads_nothing(text, parse):
    parse(text).check_loads_nothing()
    assert 'url(' not in text
    assert '@import' not in text
    assert "default-src 'none'" in text


def test_all_text_is_escaped(text, parse):
    assert '<script' not in text
    parsed = parse(text)
    assert 'Study: a<b & c' in parsed.words
    assert 'ml<100k' in parsed.words
    assert parsed.words.count(ODD) == 2  # above, and with the variant
    assert ['model.path', '<a&b>', '"c" <d>'] in parsed.rows
    assert ['model.path', '<a&b>'] in parsed.rows
    assert ['sha256.u.data', 'ab'] in parsed.rows
    assert ['tie_rule', '–'] in parsed.rows


def test_every_variant_has_its_rows_and_what_the_test_says(text, parse):
    """NDCG@10 by hand: latest_2 puts each target three places lower than the base."""
    report, rows = made_up(), parse(text).rows
    places = np.arange(USERS) % 8
    gains = np.append(1 / np.log2(np.arange(2, 12)), [0.0] * 10)
    base, few = gains[places].mean(), gains[places + 3].mean()
    first = next(row for row in rows if row[0] == 'latest 2')
    assert first[2].startswith(f'{few:.4f} [')
    assert first[3].startswith(f'{few - base:+.4f} [')
    found = report['variants'][1]['systems']['llm']['difference']['NDCG@10']
    assert first[4] == f'worse (p {found["p_adjusted"]:.4f})'
    assert sum(row[0] == 'latest 2' for row in rows) == len(study.ROLES)
    assert next(row for row in rows if row[0] == 'base')[4] == 'the base'
    assert next(row for row in rows if row[0] == 'same')[4] == 'ranks every target as the base does'
    numbers = [row for row in rows if row[0] in ('broken', 'later') and len(row) > 10]
    assert [row[:3] for row in numbers] == [['broken', 'failed', '–'], ['later', 'missing', '–']]
    assert ['2', 'latest 2', '400', '60', '9', f'{gains[places + 1].mean():.4f}'] in rows
    assert ['prompts.history', '20', '2'] in rows


def test_what_is_not_significant_stands_with_what_could_have_been_found(parse):
    found = {'p_adjusted': 0.25, 'difference': 0.01, 'detectable': 0.034}
    told = study_page._verdict(False, True, found)
    assert parse(told).words == 'not significant (p 0.2500)detectable: 0.0340'
    better = found | {'p_adjusted': 0.05}
    assert study_page._verdict(False, True, better) == 'better (p 0.0500)'
    assert study_page._verdict(False, False, {}) == 'the base has no such system'


def test_a_page_of_retrievers_alone_has_no_chart_of_costs(parse):
    def alone(name, behind):
        run = outcome(name, behind).runs['llm']
        return study.Outcome(name, {'retriever': run}, dict.fromkeys(study.COSTS), {'data': 'd'})

    report = made_up()
    report = study.build(
        name='retrievers',
        base=report['base'],
        outcomes=[alone('base', 0), alone('other', 1)],
        missing=[],
        failed={},
        order=['base', 'other'],
        changes={'base': {}, 'other': {'seed': 1}},
        dataset={'name': 'ml100k'},
        seed=0,
        resamples=50,
        versions={},
    )
    parsed = parse(study_page.build(report))
    assert 'Nothing was tuned.' in parsed.words
    assert 'figure' not in {tag for tag, _ in parsed.tags}
    assert ['2', 'other', '–', '–', '–'] in [row[:5] for row in parsed.rows]


def test_marks_stand_where_their_values_are():
    drawn = svg.bar(0.2, (0.1, 0.35), (0.0, 0.4), 'llm', mark=0.3)
    assert 'x1="25.00%" x2="87.50%"' in drawn
    assert '<svg x="50.00%"' in drawn
    assert 'class="mark" x1="75.00%" x2="75.00%"' in drawn
    assert 'mark' not in svg.bar(-0.1, (-0.2, 0.0), (-0.2, 0.2), 'fused')
    # From 52 to 384 for 0 to 200, from 254 down to 10 for 0 to 0.4.
    points = [svg.Point(1, 100.0, 0.2, (0.1, 0.4)), svg.Point(2, 200.0, 0.1, (0.0, 0.2))]
    chart = svg.scatter(points, 'tokens', 'quality', 'llm')
    assert '<circle cx="218.0" cy="132.0" r="9"/>' in chart
    assert '<line x1="384.0" x2="384.0" y1="254.0" y2="132.0"/>' in chart


@pytest.mark.parametrize(
    ('highest', 'expected'),
    [
        (0.25, [0, 0.05, 0.1, 0.15, 0.2, 0.25]),
        (0.4, [0, 0.1, 0.2, 0.3, 0.4]),
        (412, [0, 100, 200, 300, 400, 500]),
        (8, [0, 2, 4, 6, 8]),
        (1000, [0, 200, 400, 600, 800, 1000]),
        (0, [0, 1]),
    ],
)
def test_ticks_are_round_and_reach_the_highest_value(highest, expected):
    assert svg.ticks(highest) == expected


# --- in a browser -----------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [400, 1400])
def test_the_page_is_readable(width, scheme, check_readable):
    opened = check_readable(width, scheme)
    assert opened.title() == 'Study: a<b & c'


@pytest.mark.browser
def test_the_keyboard_alone_reaches_and_opens_everything(shown, press_tab):
    opened = shown(400, 'light')
    reached = []
    for place in press_tab(opened):
        reached.append(place)
        if place['tag'] == 'SUMMARY' and place['text'].startswith('latest'):
            opened.keyboard.press('Enter')
            assert opened.get_by_role('cell', name='20', exact=True).is_visible()
            opened.keyboard.press('Enter')  # its tables would be more to reach
    assert reached[0]['text'] == 'To the results'
    summaries = [place['text'].split()[0] for place in reached if place['tag'] == 'SUMMARY']
    assert summaries[:5] == ['base', 'latest', 'same', 'broken', 'later']

    numbers = opened.get_by_role('region', name='Every metric, test and cost')
    numbers.focus()
    opened.keyboard.press('ArrowRight')
    for _ in range(100):  # scrolling is smooth, and the page's policy lets no function wait
        if opened.evaluate('document.activeElement.scrollLeft') > 0:
            break
        opened.wait_for_timeout(20)
    else:
        pytest.fail('The table does not scroll.')

    skipping = shown(1400, 'light')
    skipping.keyboard.press('Tab')
    skipping.keyboard.press('Enter')
    assert skipping.evaluate('document.activeElement.id') == 'main'
