"""What a study found, as one JSON-able dict and as the files made from it.

Every variant is compared with the base on the same users, system by system: the retriever, the LLM
(tuned where the variant tunes it), and both fused. All text and pictures derive from the dict that
`build` returns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from etils import epath

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.evaluation import render, statistics, study_chart
from palr_jax.evaluation import report as single
from palr_jax.evaluation.lists import ItemFacts
from palr_jax.evaluation.report import Comparison, Run

SCHEMA = 1
METRICS = ('HR@10', 'NDCG@10')
ROLES = {
    'llm': 'LLM',
    'fused': 'Fused',
    'zero_shot': 'LLM before tuning',
    'retriever': 'Retriever',
}
COSTS = {
    'prompt_tokens': 'Prompt tokens a user',
    'finetune_seconds': 'Fine-tuning (s)',
    'ranking_seconds': 'Ranking (s)',
}


@dataclass(frozen=True)
class Outcome:
    """What a finished variant came to.

    Attributes:
      name: of the variant.
      runs: by role, a key of ROLES; over the same users for all variants.
      costs: the keys of COSTS; None is not known.
      folders: the folder of each stage, which several variants may share.
    """

    name: str
    runs: Mapping[str, Run]
    costs: Mapping[str, float | None]
    folders: Mapping[str, str]


def build(
    *,
    name: str,
    base: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    missing: Sequence[str],
    failed: Mapping[str, str],
    order: Sequence[str],
    changes: Mapping[str, Mapping[str, Any]],
    dataset: Mapping[str, Any],
    seed: int,
    resamples: int,
    versions: Mapping[str, str],
    items: ItemFacts | None = None,
) -> dict[str, Any]:
    """Computes `report/study.json`.

    Args:
      name: of the study.
      base: every field of the base config.
      outcomes: of the finished variants, the base first.
      missing: variants that are not finished.
      failed: sentences by variant.
      order: all variants, the base first.
      changes: of every variant, the fields that it sets.
      dataset: the data stage's record.
      seed: of the bootstrap and the randomisation test.
      resamples: draws of each interval and each test.
      versions: of the libraries that made the base.
      items: of the catalogue; needed where a run has lists.

    Returns:
      The dict; plain JSON values only, unknown values None.

    Raises:
      InputError: two variants have ranked different users.
    """
    check_users(outcomes)
    runs = {
        (o.name, role): replace(o.runs[role], variant=o.name)
        for o in outcomes
        for role in ROLES
        if role in o.runs
    }
    first = outcomes[0].name
    asked = [
        (key, metric)
        for key, run in runs.items()
        for metric in METRICS
        # What shares its stages with the base has nothing to be tested for.
        if key[0] != first and (first, key[1]) in runs and not _same(run, runs[first, key[1]])
    ]
    built = single.build(
        dataset=dataset,
        retrieval={},
        runs=list(runs.values()),
        comparisons=[Comparison(runs[k], runs[first, k[1]], metric) for k, metric in asked],
        timing={},
        versions=versions,
        seed=seed,
        candidates=base['ranking.candidates'],
        resamples=resamples,
        items=items,
    )
    rows = dict(zip(runs, built['runs']))
    compared = dict(zip(asked, built['comparisons']))
    _correct(compared)
    known = {outcome.name: outcome for outcome in outcomes}

    def describe(variant: str) -> dict[str, Any]:
        entry: dict[str, Any] = {'name': variant, 'changes': _diff(base, changes[variant])}
        if variant not in known:
            return entry | {
                'status': 'failed' if variant in failed else 'missing',
                'error': failed.get(variant),
            }
        return entry | {
            'status': 'finished',
            'costs': dict(known[variant].costs),
            'folders': dict(known[variant].folders),
            'systems': {
                role: rows[variant, role]
                | {
                    'difference': {
                        metric: compared[(variant, role), metric]
                        for metric in METRICS
                        if ((variant, role), metric) in compared
                    }
                }
                for role in ROLES
                if (variant, role) in rows
            },
        }

    return {
        'schema': SCHEMA,
        'study': name,
        'dataset': built['dataset'],
        'base': dict(base),
        'missing': list(missing),
        'variants': [describe(variant) for variant in order],
        'seed': seed,
        'evaluation': {'resamples': resamples},
        'versions': built['versions'],
    }


def check_users(outcomes: Sequence[Outcome]) -> None:
    """Raises InputError unless all variants have ranked the same users."""
    for outcome in outcomes[1:]:
        for role, run in outcome.runs.items():
            other = outcomes[0].runs.get(role)
            if other and not np.array_equal(np.sort(run.users), np.sort(other.users)):
                raise InputError(
                    f'variant {outcome.name}: its {len(run.users)} users are not the '
                    f'{len(other.users)} of {outcomes[0].name}; only variants with the same users '
                    'can be compared.'
                )


def _same(a: Run, b: Run) -> bool:
    """Whether two runs put every target at the same rank."""
    parts = ('greater', 'ties', 'found')
    return all(np.array_equal(getattr(a.ranks, p), getattr(b.ranks, p)) for p in parts)


def _correct(compared: Mapping[tuple[tuple[str, str], str], dict[str, Any]]) -> None:
    """Holm's correction over the variants, for each system and metric by itself."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for ((_, role), metric), row in compared.items():
        families.setdefault((role, metric), []).append(row)
    for rows in families.values():
        for row, p in zip(rows, statistics.holm([row['p_value'] for row in rows])):
            row['p_adjusted'] = p


def _diff(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """{field: [value in the base, value here]} of the fields that differ."""
    return {f: [base[f], value] for f, value in changes.items() if base[f] != value}


def write(report: Mapping[str, Any], folder: epath.PathLike) -> None:
    """Writes study.md, metrics.png, cost.png and, last, study.json."""
    folder = epath.Path(folder)
    storage.write_text(folder / 'study.md', markdown(report))
    storage.write_bytes(folder / 'metrics.png', study_chart.metrics(report))
    storage.write_bytes(folder / 'cost.png', study_chart.cost(report))
    storage.write_json(folder / 'study.json', report)


# --- text -------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The study as a page: one table, the pictures, how to read them."""
    finished = [v for v in report['variants'] if v['status'] == 'finished']
    parts = [
        f'# Study: {report["study"].replace("_", " ")}',
        f'{render.dataset_title(report)}, {_users(finished[0])} test users.',
    ]
    problems = _problems(report)
    if problems:
        parts.append(problems)
    parts += ['## Variants', _table(report)]
    parts += ['![HR@10 and NDCG@10 of the variants](metrics.png)']
    parts += ['![NDCG@10 against tokens and seconds](cost.png)']
    parts += ['## How to read this', _reading(report)]
    parts += ['## Training curves', _curves(finished)]
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


def _users(variant: Mapping[str, Any]) -> str:
    return f'{next(iter(variant["systems"].values()))["users"]:,}'


def _problems(report: Mapping[str, Any]) -> str:
    lines = [
        f'- {v["name"]} failed: {v["error"]}' for v in report['variants'] if v['status'] == 'failed'
    ]
    if report['missing']:
        lines.append(f'- Not finished: {", ".join(report["missing"])}.')
    return '\n'.join(lines)


def _table(report: Mapping[str, Any]) -> str:
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
    return render.table_of(head, body, left=3)


def change_text(variant: Mapping[str, Any]) -> str:
    """'prompts.profile: counts → none'."""
    changes = variant['changes'].items()
    shown = (f'{field}: {_value(a)} → {_value(b)}' for field, (a, b) in changes)
    return '; '.join(shown) or 'the base'


def _value(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def _reading(report: Mapping[str, Any]) -> str:
    draws = f'{report["evaluation"]["resamples"]:,}'
    lines = [
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
    return '\n'.join(f'- {line}' for line in lines)


def _curves(variants: Sequence[Mapping[str, Any]]) -> str:
    tuned = [[v['name'], f'stages/{v["folders"]["finetune"]}'] for v in variants if _tuned(v)]
    if not tuned:
        return 'Nothing was tuned.'
    text = '`tensorboard --logdir` of the study shows all of them under the name of their folder.'
    return f'{text}\n\n{render.table_of(["Variant", "Folder"], tuned, left=2)}'


def _tuned(variant: Mapping[str, Any]) -> bool:
    return 'finetune' in variant['folders']
