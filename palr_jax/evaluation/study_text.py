"""The report of a study as text: Markdown, the terminal's table, and the words of both pages."""

from collections.abc import Mapping
from typing import Any

from palr_jax.evaluation import render
from palr_jax.evaluation.study import COSTS, METRICS, ROLES, finished

CURVES = '`tensorboard --logdir` of the study shows all of them under the name of their folder.'


def markdown(report: Mapping[str, Any]) -> str:
    """The study as a page: one table, the pictures, how to read them."""
    parts = [
        f'# {title(report)}',
        f'{render.dataset_title(report)}, {users(report):,} test users.',
    ]
    if problems(report):
        parts.append('\n'.join(f'- {line}' for line in problems(report)))
    parts += ['## Variants', render.table_of(*rows(report), left=3)]
    parts += ['![HR@10 and NDCG@10 of the variants](metrics.png)']
    parts += ['![NDCG@10 against tokens and seconds](cost.png)']
    parts += ['## How to read this', '\n'.join(f'- {line}' for line in reading(report))]
    parts += ['## Training curves', CURVES if curves(report) else 'Nothing was tuned.']
    if curves(report):
        parts.append(render.table_of(['Variant', 'Folder'], curves(report), left=2))
    return '\n\n'.join(parts) + '\n'


def table(report: Mapping[str, Any]) -> str:
    """The main numbers for the terminal, at most 100 columns wide."""
    lines = [
        f'{"variant":<22}{"system":<19}{"HR@10":>7}{"NDCG@10":>9}  {"95 % interval":<18}'
        f'{"diff":>8}{"p, Holm":>9}'
    ]
    for variant in report['variants']:
        if variant['status'] != 'finished':
            lines.append(f'{variant["name"][:21]:<22}{variant["status"]}')
            continue
        for role, row in variant['systems'].items():
            found = row['difference'].get('NDCG@10', {})
            lines.append(
                f'{variant["name"][:21]:<22}{ROLES[role]:<19}{render.number(row["HR@10"]):>7}'
                f'{render.number(row["NDCG@10"]):>9}  '
                f'{render.interval(row["ci95"]["NDCG@10"]):<18}'
                f'{render.number(found.get("difference"), render.SIGNED):>8}'
                f'{render.number(found.get("p_adjusted")):>9}'
            )
    return '\n'.join(lines) + '\n'


def title(report: Mapping[str, Any]) -> str:
    return f'Study: {plain(report["study"])}'


def plain(name: str) -> str:
    """A name as people write it."""
    return name.replace('_', ' ')


def users(report: Mapping[str, Any]) -> int:
    """How many users every row is over."""
    return next(iter(finished(report)[0]['systems'].values()))['users']


def problems(report: Mapping[str, Any]) -> list[str]:
    """Why there are variants without numbers."""
    failed = [v for v in report['variants'] if v['status'] == 'failed']
    lines = [f'{variant["name"]} failed: {variant["error"]}' for variant in failed]
    if report['missing']:
        lines.append(f'Not finished: {", ".join(report["missing"])}.')
    return lines


def rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The whole table: its head, and a line a variant and system; three columns are flush left."""
    head = ['Variant', 'Change', 'System']
    head += [cell for metric in METRICS for cell in (metric, '95 %')]
    head += ['Δ NDCG@10', '95 %', 'p', 'p (Holm)', 'Detectable', *COSTS.values()]
    body = []
    for variant in report['variants']:
        changes = change_text(variant)
        if variant['status'] != 'finished':
            blank = [render.UNKNOWN] * (len(head) - 3)
            body.append([variant['name'], changes, variant['status'], *blank])
            continue
        costs = [render.number(variant['costs'][key], ',.0f') for key in COSTS]
        for role, row in variant['systems'].items():
            found = row['difference'].get('NDCG@10', {})
            cells = [variant['name'], changes, ROLES[role]]
            for metric in METRICS:
                cells += [render.number(row[metric]), render.interval(row['ci95'][metric])]
            cells += [
                render.number(found.get('difference'), render.SIGNED),
                render.interval(found.get('ci95'), render.SIGNED),
                *(render.number(found.get(key)) for key in ('p_value', 'p_adjusted', 'detectable')),
            ]
            body.append([*cells, *costs])
    return head, body


def change_text(variant: Mapping[str, Any]) -> str:
    """'prompts.profile: counts → none'."""
    changes = variant['changes'].items()
    shown = (f'{field}: {value_text(a)} → {value_text(b)}' for field, (a, b) in changes)
    return '; '.join(shown) or 'the base'


def value_text(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def reading(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know."""
    draws = f'{report["evaluation"]["resamples"]:,}'
    return [
        'Every row is over the same users; a user whose target is not among the ranked items is a '
        'miss for every metric.',
        'LLM: after tuning, where the variant tunes it. Fused: the retriever and the LLM, with a '
        'weight chosen on validation users for each variant.',
        f'Intervals: 95 % percentile bootstrap over users, {draws} resamples, seed '
        f'{report["seed"]}. They cover the choice of the users, not that of the training seed.',
        f'Δ: paired difference to the base on the same users. p: two-sided randomisation test, '
        f'{draws} draws; corrected after Holm over the variants of a system. No number: the '
        'variant ranks every target as the base does, or is the base.',
        'Detectable: the true difference that an uncorrected test at 5 % of as many such users '
        'would find 8 times in 10. What is not significant may still be a smaller difference than '
        'this.',
        'Ranking: seconds in which the LLM of the row scored the test users, compilation included. '
        'Fine-tuning: seconds of the session that finished it, with the held-out loss before and '
        'after. What variants share was made once.',
    ]


def curves(report: Mapping[str, Any]) -> list[list[str]]:
    """[name, folder] of the variants that were tuned."""
    folders = [(v['name'], v['folders'].get('finetune')) for v in finished(report)]
    return [[name, f'stages/{folder}'] for name, folder in folders if folder]
