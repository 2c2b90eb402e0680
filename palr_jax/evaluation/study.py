"""What a study found, as one JSON-able dict, from which all its text and pictures derive.

Every variant is compared with the base on the same users, system by system: the retriever, the LLM
(tuned where the variant tunes it), and both fused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from palr_jax.errors import InputError
from palr_jax.evaluation import report as single
from palr_jax.evaluation import statistics
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


def finished(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The variants that have numbers, the base first."""
    return [v for v in report['variants'] if v['status'] == 'finished']


def main_role(variants: Sequence[Mapping[str, Any]]) -> str:
    """What is drawn against the costs: the fused system, else the LLM, else the retriever."""
    roles = ('fused', 'llm', 'retriever')
    return next(role for role in roles if any(role in v['systems'] for v in variants))


def total_seconds(costs: Mapping[str, float | None]) -> float | None:
    """Of fine-tuning and ranking together; None where nothing was ranked."""
    if costs['ranking_seconds'] is None:
        return None
    return costs['ranking_seconds'] + (costs['finetune_seconds'] or 0)


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
