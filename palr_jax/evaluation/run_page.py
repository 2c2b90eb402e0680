"""The report of a run as one HTML file, from metrics.json and details.json: `report.html`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from palr_jax.evaluation import page, render, run_charts, run_examples
from palr_jax.evaluation.intervals import (
    LEVEL,
    difference_scale,
    interval,
    scale_end,
    verdict,
    with_detectable,
    with_scale,
)
from palr_jax.evaluation.page import Html, Section

SCHEMA = 1  # of details.json
DRAWN = render.WITH_INTERVAL  # the metrics that are drawn
MAIN = 'NDCG@10'
BASE = 'retriever'  # what a system has to beat
Rows = Sequence[tuple[str, Mapping[str, Any]]]


def build(report: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
      report: as in metrics.json.
      details: as in details.json.
    """
    sections = [
        Section('results', 'Results', _results(report)),
        Section('groups', 'For whom it works', _groups(report)),
        Section('cutoffs', 'Metrics at every K', run_charts.cutoffs(details)),
        Section('retrieval', 'What the retrieval finds', _retrieval(report, details)),
        Section('curves', 'Training curves', run_charts.curves(report, details)),
        Section('recommended', 'What is recommended', _recommended(report)),
        Section('users', 'Example users', run_examples.examples(details)),
        Section('timing', 'Timing', _timing(report)),
        Section('notes', 'Notes on this run', _notes(report)),
        Section('reading', 'How to read this', page.items(render.reading(report))),
        Section('run', 'Data, versions and config', _run(report, details)),
    ]
    return page.document(
        f'{render.dataset_title(report)}: who ranks better', _lead(report), sections
    )


def _lead(report: Mapping[str, Any]) -> Html:
    """The data, and the first answer: the fused system, or else the retriever, against its base."""
    text = f'<p>{page.escape(render.summary(report))}.</p>\n'
    compared = [row for row in report['comparisons'] if row['metric'] == MAIN]
    asked = [row for row in compared if row['a'].split('/')[0] == 'fused'] or compared
    if asked:
        row = asked[0]
        difference = render.number(row['difference'], render.SIGNED)
        text += f'<p><strong>{page.escape(render.pair(row))}, {MAIN}: {difference}</strong> '
        text += f'{render.interval(row["ci95"], render.SIGNED)}, {verdict(row)}</p>\n'
    return Html(text)


# --- results ----------------------------------------------------------------------------------


def _results(report: Mapping[str, Any]) -> Html:
    """A table a set of users, a row a system; then what the tests say, then every number."""
    rows = [row for _, block in render.blocks(report) for _, row in block]
    scales = {metric: (0.0, scale_end(row['ci95'][metric] for row in rows)) for metric in DRAWN}
    head = ['System', 'Users', *(with_scale(m, scales[m], '.2f') for m in DRAWN), 'MRR']
    text = (
        '<p class="note">Means over users with 95 % intervals. The dashed line is the retriever, '
        'for the same users.</p>\n'
    )
    for heading, block in render.blocks(report):
        base = next((row for _, row in block if row['system'] == BASE), None)
        body = [
            (
                'base' if row is base else '',
                [
                    render.title(label),
                    f'{row["users"]:,}',
                    *_intervals(row, base, scales),
                    _with_bounds(row, 'MRR'),
                ],
            )
            for label, row in block
        ]
        shown = page.cards(head, body, label=heading, narrow=[1])
        text += f'<h3>{page.escape(heading)}</h3>\n{shown}\n'
    return Html(text + _comparisons(report) + _every_number(report))


def _intervals(
    row: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    scales: Mapping[str, tuple[float, float]],
) -> list[str]:
    kind = run_charts.kind(row['system'])
    return [
        interval(row[m], row['ci95'][m], scale, kind, base and base[m])
        for m, scale in scales.items()
    ]


def _with_bounds(row: Mapping[str, Any], metric: str) -> str:
    bounds = render.interval(row['ci95'][metric])
    return Html(f'{render.number(row[metric])} <small>{bounds}</small>')


def _comparisons(report: Mapping[str, Any]) -> str:
    compared = report['comparisons']
    if not compared:
        return ''
    scale = difference_scale(row['ci95'] for row in compared)
    head = ['A − B', 'Metric', 'Users', with_scale('Difference', scale, '+.2f'), 'A against B']
    body = [
        (
            '',
            [
                render.pair(row),
                row['metric'],
                render.number(row.get('users'), ','),
                interval(
                    row['difference'],
                    row['ci95'],
                    scale,
                    run_charts.kind(row['a'].split('/')[0]),
                    0.0,
                ),
                _tested(row),
            ],
        )
        for row in compared
    ]
    return (
        '<h3>Comparisons</h3>\n<p class="note">Paired differences on the same users. A p after '
        f'Holm of at most {LEVEL} tells A from B. Detectable: the true difference that an '
        'uncorrected test of so many users finds 8 times in 10; a smaller one may be there.</p>\n'
        f'{page.cards(head, body, label="Comparisons", narrow=[1, 2])}\n'
    )


def _tested(row: Mapping[str, Any]) -> str:
    told, p = verdict(row), row['p_adjusted']
    return with_detectable(told, row) if p is not None and p <= LEVEL else told


def _every_number(report: Mapping[str, Any]) -> str:
    names = render.metric_names(report)
    lines = [
        [render.title(label), *_numbers(row, names), heading]
        for groups in (False, True)
        for heading, block in render.blocks(report, groups=groups)
        for label, row in block
    ]
    head = ['System', 'Group', 'Users', *(cell for n in names for cell in (n, '95 %')), 'Rows']
    table = page.table(head, lines, left=2, label='Every metric of every row')
    return page.details('', 'Every metric of every row', table)


def _numbers(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Group, users, and each metric with its interval."""
    cells = [row.get('group', ''), f'{row["users"]:,}']
    for name in names:
        cells += [render.number(row[name]), render.interval(row['ci95'][name])]
    return cells


# --- groups -----------------------------------------------------------------------------------


def _groups(report: Mapping[str, Any]) -> Html:
    """A table a grouping: a row a group, a column a system."""
    blocks = render.blocks(report, groups=True)
    if not blocks:
        return Html('<p>No LLM ranked in this run; groups of users are those that it ranked.</p>')
    rows = [row for _, block in blocks for _, row in block]
    scale = (0.0, scale_end(row['ci95'][MAIN] for row in rows))
    text = (
        f'<p class="note">{MAIN} with 95 % intervals. The dashed line is the retriever, for the '
        'same users. Of many groups some look different by chance.</p>\n'
    )
    for heading, block in blocks:
        for grouping, groups in render.groupings(block).items():
            name = f'{heading}: by {grouping}' if grouping else heading
            text += f'<h3>{page.escape(name)}</h3>\n{_group_cards(groups, scale, name)}\n'
    return Html(text)


def _group_cards(groups: Mapping[str, Rows], scale: tuple[float, float], name: str) -> Html:
    labels = list(dict.fromkeys(label for block in groups.values() for label, _ in block))
    head = ['Group', 'Users', *(with_scale(render.title(label), scale, '.2f') for label in labels)]
    body = []
    for group, block in groups.items():
        found = dict(block)
        base = next((row for _, row in block if row['system'] == BASE), None)
        cells = [
            _intervals(found[label], base, {MAIN: scale})[0] if label in found else render.UNKNOWN
            for label in labels
        ]
        body.append(('', [group, f'{block[0][1]["users"]:,}', *cells]))
    return page.cards(head, body, label=name, narrow=[1])


# --- the rest ---------------------------------------------------------------------------------


def _retrieval(report: Mapping[str, Any], details: Mapping[str, Any]) -> Html:
    label = 'The index'
    stored = _properties(report['retrieval'], label)
    return Html(f'{run_charts.recall(details)}\n{page.details("", label, stored)}')


def _recommended(report: Mapping[str, Any]) -> Html:
    text = f'<p class="note">{page.escape(render.LISTS_MEANING)}</p>\n'
    for heading, block in render.blocks(report):
        if body := render.list_rows(block):
            table = page.table(render.LIST_HEAD, body, left=1, label=f'Lists: {heading}')
            text += f'<h3>{page.escape(heading)}</h3>\n{table}\n'
    return Html(text)


def _notes(report: Mapping[str, Any]) -> Html:
    return page.items(report['notes']) if report['notes'] else Html('<p>There are none.</p>')


def _timing(report: Mapping[str, Any]) -> Html:
    timing = report['timing']
    seconds = timing.get('seconds', {})
    body = [[stage, f'{value:,.1f}'] for stage, value in seconds.items()]
    if seconds:
        body.append(['all of these', f'{sum(seconds.values()):,.1f}'])
    text: str = page.table(['Stage', 'Seconds'], body, left=1, label='Seconds of each stage')
    note = '<p class="note">Of the session that finished the stage.</p>\n'
    rates = [timing.get('users_per_second'), timing.get('tokens_per_second')]
    if None not in rates:
        users, tokens = (f'{rate:,.4g}' for rate in rates)
        text += f'\n<p>The LLM ranks {users} users a second and computes {tokens} tokens a second, '
        text += 'padding and compilation included.</p>'
    return Html(note + text)


def _run(report: Mapping[str, Any], details: Mapping[str, Any]) -> Html:
    parts = {
        'The data': report['dataset'],
        'Versions': report['versions'],
        'Config': details['config'],
    }
    return Html(
        '\n'.join(page.details('', name, _properties(of, name)) for name, of in parts.items())
    )


def _properties(values: Mapping[str, Any], label: str) -> Html:
    body = render.properties(values)
    return page.table(['Name', 'Value'], body, left=2, label=label, wide=1)
