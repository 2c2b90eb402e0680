"""The report of a study as one HTML file: `report.html`."""

import operator
from collections.abc import Mapping
from typing import Any

from palr_jax.evaluation import page, render, study_text, svg
from palr_jax.evaluation.intervals import (
    LEVEL,
    difference_scale,
    interval,
    scale_end,
    verdict,
    with_scale,
)
from palr_jax.evaluation.page import Html, Section
from palr_jax.evaluation.study import COSTS, METRICS, ROLES, finished, main_role, total_seconds
from palr_jax.evaluation.study_text import plain

MAIN = 'NDCG@10'  # what is tested in the text, and drawn against the costs


def build(report: Mapping[str, Any]) -> str:
    """The whole page."""
    sections = [
        Section('results', 'The variants against the base', _results(report)),
        Section('cost', 'Quality against cost', _cost(report)),
        Section('variants', 'What each variant changes', _variants(report)),
        Section('numbers', 'All numbers', _numbers(report)),
        Section('reading', 'How to read this', page.items(study_text.reading(report))),
        Section('curves', 'Training curves', _curves(report)),
        Section('base', 'The data and the base', _base(report)),
    ]
    return page.document(study_text.title(report), _lead(report), sections)


def _lead(report: Mapping[str, Any]) -> Html:
    data, users = page.escape(render.dataset_title(report)), study_text.users(report)
    number = len(report['variants']) - 1
    text = f'<p>{data}, {users:,} test users; the base and {number} variants of it.</p>\n'
    problems = study_text.problems(report)
    if problems:
        text += f'<div class="problems">{page.items(problems)}</div>\n'
    return Html(text)


# --- the variants against the base ------------------------------------------------------------


def _results(report: Mapping[str, Any]) -> Html:
    """A table a system, a row a variant: metrics and differences as intervals on one scale."""
    variants = finished(report)
    every = [row for variant in variants for row in variant['systems'].values()]
    scales = {m: (0.0, scale_end([row['ci95'][m] for row in every])) for m in METRICS}
    tested = [row['difference'].get(MAIN) or {} for row in every]
    scales['Δ'] = difference_scale([row.get('ci95') for row in tested])
    head = [
        'Variant',
        *(with_scale(metric, scales[metric], '.2f') for metric in METRICS),
        with_scale(f'Δ {MAIN}', scales['Δ'], '+.2f'),
        f'{MAIN} against the base',
    ]
    text = (
        '<p class="note">Means with 95 % intervals. The dashed line is the base, or no difference.'
        f' A p after Holm of at most {LEVEL} tells a variant from the base.</p>\n'
    )
    for role, name in ROLES.items():
        body = [
            ('base' if variant is variants[0] else '', _row(variant, variants[0], role, scales))
            for variant in variants
            if role in variant['systems']
        ]
        if body:
            text += f'<h3>{name}</h3>\n{page.cards(head, body, label=name)}\n'
    return Html(text)


def _row(
    variant: Mapping[str, Any],
    base: Mapping[str, Any],
    role: str,
    scales: Mapping[str, tuple[float, float]],
) -> list[str]:
    row, of_base = variant['systems'][role], base['systems'].get(role)
    name = page.escape(plain(variant['name']))
    cells: list[str] = [Html(f'<a href="#variant-{variant["name"]}">{name}</a>')]
    for metric in METRICS:
        mark = of_base and of_base[metric]
        cells.append(interval(row[metric], row['ci95'][metric], scales[metric], role, mark))
    found = row['difference'].get(MAIN) or {}
    drawn = interval(found.get('difference'), found.get('ci95'), scales['Δ'], role, 0.0)
    return [*cells, drawn, _verdict(variant is base, of_base is not None, found)]


def _verdict(is_base: bool, in_base: bool, found: Mapping[str, Any]) -> str:
    """What stands in the last column: what the test says, if there is one."""
    if is_base:
        return 'the base'
    if not in_base:
        return 'the base has no such system'
    if not found:
        return 'ranks every target as the base does'
    return verdict(found)


# --- costs ------------------------------------------------------------------------------------


def _cost(report: Mapping[str, Any]) -> Html:
    """The best system that there is against two costs, and a table of them."""
    variants = finished(report)
    role = main_role(variants)
    y_label = f'{MAIN}, {ROLES[role]} (95 % interval)'
    drawn = {
        'Prompt tokens a user': operator.itemgetter('prompt_tokens'),
        'Fine-tuning and ranking (s)': total_seconds,
    }
    charts = ''
    for label, of in drawn.items():
        points = [
            svg.Point(number, cost, row[MAIN], row['ci95'][MAIN])
            for number, variant in enumerate(report['variants'], start=1)
            if variant in variants
            and (cost := of(variant['costs'])) is not None
            and (row := variant['systems'].get(role)) is not None
            and row[MAIN] is not None
        ]
        if points:
            charts += svg.scatter(points, label, y_label, role)
    body = [
        [
            str(number),
            plain(variant['name']),
            *(render.number(variant['costs'][key], ',.0f') for key in COSTS),
            render.number(variant['systems'].get(role, {}).get(MAIN)),
        ]
        for number, variant in enumerate(report['variants'], start=1)
        if variant in variants
    ]
    head = ['Number', 'Variant', *COSTS.values(), f'{MAIN}, {ROLES[role]}']
    costs = page.table(head, body, left=2, label='Costs of the variants')
    return Html(f'<div class="charts">{charts}</div>\n{costs}' if charts else costs)


# --- configs ----------------------------------------------------------------------------------


def _variants(report: Mapping[str, Any]) -> Html:
    """What opens to a diff of the config and the folders of the stages, a variant each."""
    text = ''
    for variant in report['variants']:
        name, status = variant['name'], variant['status']
        told = study_text.change_text(variant)
        told = told if status == 'finished' else f'{told} ({status})'
        summary = Html(f'<strong>{page.escape(plain(name))}</strong> {page.escape(told)}')
        diff = [
            [Html(f'<code>{page.escape(field)}</code>'), *map(study_text.value_text, values)]
            for field, values in variant['changes'].items()
        ]
        body = '<p>The base, with every field as in <a href="#base">the table below</a>.</p>'
        if diff:
            label = f'Fields that {plain(name)} changes'
            body = page.table(['Field', 'Base', 'Here'], diff, left=3, label=label)
        if variant.get('error'):
            body += f'<p>It failed: {page.escape(variant["error"])}</p>'
        if status == 'finished':
            label = f'Folders of {plain(name)}'
            folders = [[stage, f'stages/{folder}'] for stage, folder in variant['folders'].items()]
            body += page.table(['Stage', 'Folder'], folders, left=2, label=label)
        text += page.details(f'variant-{name}', summary, body) + '\n'
    return Html(text)


def _numbers(report: Mapping[str, Any]) -> Html:
    head, body = study_text.rows(report)
    # Without the changes, which stand above.
    (variant, _, *columns), lines = head, [[name, *values] for name, _, *values in body]
    return page.table([variant, *columns], lines, left=2, label='Every metric, test and cost')


def _curves(report: Mapping[str, Any]) -> Html:
    folders = study_text.curves(report)
    if not folders:
        return Html('<p>Nothing was tuned.</p>')
    told = '<p><code>tensorboard --logdir</code> of the study shows all of them.</p>'
    shown = page.table(['Variant', 'Folder'], folders, left=2, label='Folders of the curves')
    return Html(f'{told}\n{shown}')


def _base(report: Mapping[str, Any]) -> Html:
    text = ''
    for name in ('dataset', 'versions', 'base'):
        title = {'dataset': 'The data', 'versions': 'Versions', 'base': 'The config of the base'}
        values = render.properties(report[name])
        body = page.table(['Name', 'Value'], values, left=2, label=title[name], wide=1)
        text += page.details('', title[name], body) + '\n'
    return Html(text)
