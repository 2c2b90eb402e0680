"""What a run found, as one JSON-able dict and as the files made from it.

`build` computes the dict whose form `report/metrics.json` promises. Everything else (Markdown,
terminal table, chart) derives from that dict alone, so a stored report can be rendered again; the
page (`run_page.py`) derives from it and from `details.json`.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from etils import epath

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.evaluation import chart, metrics, render, run_page, statistics
from palr_jax.evaluation.lists import LENGTH, ItemFacts, coverage, diversity, novelty
from palr_jax.evaluation.metrics import TargetRanks

SCHEMA = 1
KS = (1, 5, 10)  # of the metrics that every report holds


@dataclass(frozen=True, eq=False)  # rows are told apart by identity
class Run:
    """One system, ranked for one set of users: a row of the report."""

    system: str  # popularity | retriever | llm_zero_shot | llm | fused | …
    users: np.ndarray  # [U'] dense ids, each once
    ranks: TargetRanks  # of the same users, in the same order
    split: str = 'test'  # valid | test
    user_set: str | Mapping[str, Any] = 'all'  # or what `sampled` returns
    variant: str | None = None  # of the prompt or the training, where several are compared
    mode: str | None = None  # how the LLM ranks
    objective: str | None = None  # what the LLM was trained on
    group: str | None = None  # which of the users, where not all of them
    lists: np.ndarray | None = None  # [U', 10] what is recommended, as `top_items` returns it


@dataclass(frozen=True)
class Comparison:
    """Asks for the paired difference a - b of one metric, over the same users."""

    a: Run
    b: Run
    metric: str


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss of held-out examples before and after fine-tuning."""

    of: str  # answer: nats a token of it | list: nats a list of candidates
    users: np.ndarray  # [E] the user of each example
    before: np.ndarray  # [E] nats
    after: np.ndarray  # [E] nats


def sampled(users: np.ndarray, seed: int) -> dict[str, Any]:
    """The `user_set` of a seeded sample; the hash is of the sorted dense ids, one a line."""
    lines = ''.join(f'{user}\n' for user in sorted(int(user) for user in users))
    return {'seed': seed, 'n': len(users), 'sha256': hashlib.sha256(lines.encode()).hexdigest()}


def by_group(run: Run, groups: Mapping[str, np.ndarray]) -> list[Run]:
    """The rows of groups of a run's users; `groups` gives a mask [U'] for each group's name."""
    return [
        replace(
            run,
            users=run.users[mask],
            ranks=run.ranks.take(mask),
            lists=None if run.lists is None else run.lists[mask],
            group=name,
        )
        for name, mask in groups.items()
    ]


def build(
    *,
    dataset: Mapping[str, Any],
    retrieval: Mapping[str, Any],
    runs: Sequence[Run],
    comparisons: Sequence[Comparison] = (),
    timing: Mapping[str, Any],
    versions: Mapping[str, str],
    seed: int,
    candidates: int,
    resamples: int,
    ks: Iterable[int] = KS,
    notes: Sequence[str] = (),
    held_out: HeldOutLoss | None = None,
    items: ItemFacts | None = None,
) -> dict[str, Any]:
    """Computes `report/metrics.json`.

    Args:
      dataset: the data stage's record (name, users, items, interactions, tie_rule, sha256, …).
      retrieval: backend, recall_vs_exact, recall@20, recall@50.
      runs: at least one; a row each, in this order.
      comparisons: between members of `runs`; Holm's correction is over all of them.
      timing: seconds a stage, users a second, tokens a second.
      versions: of the libraries that the numbers depend on.
      seed: of the bootstrap and the randomisation test.
      candidates: items ranked for a user; MRR is cut there for every system.
      resamples: draws of each interval and each test.
      ks: further cutoffs of HR@K and NDCG@K beside 1, 5 and 10.
      notes: sentences for the reader (how prompts were shortened, what is special in this run).
      held_out: None where nothing was fine-tuned.
      items: of the catalogue; needed where a run has lists.

    Returns:
      The dict; plain JSON values only, unknown values None.
    """
    if not runs:
        raise ValueError('a report needs at least one run')
    ks = set(KS) | set(ks)
    values = {run: _user_values(run, ks, candidates) for run in runs}
    rows = [_row(run, values[run], items, resamples, seed) for run in runs]
    names = dict(zip(runs, render.labels(rows)))
    if len({(names[run], *_set_of_users(run)) for run in runs}) < len(runs):
        raise ValueError('two rows of a report need a system, detail, split or set of users apart')
    compared = [_compare(pair, values, names, resamples, seed) for pair in comparisons]
    known = [row for row in compared if row['p_value'] is not None]
    for row, p_adjusted in zip(known, statistics.holm([row['p_value'] for row in known])):
        row['p_adjusted'] = p_adjusted
    report = {
        'schema': SCHEMA,
        'dataset': dataset,
        'retrieval': retrieval,
        'runs': rows,
        'comparisons': compared,
        'timing': timing,
        'versions': versions,
        'seed': seed,
        'evaluation': {'resamples': resamples, 'candidates': candidates},
        'finetune': held_out and _held_out_loss(held_out, resamples, seed),
        'notes': notes,
    }
    return _plain(report)


def write(report: Mapping[str, Any], details: Mapping[str, Any], folder: epath.PathLike) -> None:
    """Writes report.md, comparison.png, details.json, report.html and, last, metrics.json.

    Args:
      report: from `build`.
      details: what only the page shows, as `palr_jax.details.build` returns it.
      folder: of the files.

    Raises:
      InputError: the report was written by another version of this code, or cannot be stored.
    """
    pairs = ('the report', report, SCHEMA), ('details.json', details, run_page.SCHEMA)
    for name, stored, reads in pairs:
        if (found := stored.get('schema')) != reads:
            raise InputError(f'{folder}: {name} has schema {found}; this version reads {reads}.')
    folder = epath.Path(folder)
    storage.write_text(folder / 'report.md', render.markdown(report))
    storage.write_bytes(folder / 'comparison.png', chart.comparison(report))
    storage.write_json(folder / 'details.json', details)
    storage.write_text(folder / 'report.html', run_page.build(report, details))
    storage.write_json(folder / 'metrics.json', report)


def _user_values(run: Run, ks: Iterable[int], cutoff: int) -> dict[str, np.ndarray]:
    """Metric name -> [U'], users in ascending order: their order of arrival changes nothing."""
    if run.users.ndim != 1 or len(run.users) != len(run.ranks):
        raise ValueError(f'{run.system}: {run.users.shape} users and {len(run.ranks)} ranks')
    order = np.argsort(run.users)
    if (np.diff(run.users[order]) == 0).any():
        raise ValueError(f'{run.system}: a user counts twice')
    return metrics.per_user(run.ranks.take(order), ks, cutoff)


def _row(
    run: Run,
    values: Mapping[str, np.ndarray],
    items: ItemFacts | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    row = {
        'system': run.system,
        'variant': run.variant,
        'mode': run.mode,
        'objective': run.objective,
        'split': run.split,
        'user_set': run.user_set,
        'users': len(run.users),
    }
    if run.group is not None:
        row['group'] = run.group
    means, intervals = _means(np.stack(list(values.values()), 1), resamples, seed)
    row |= dict(zip(values, means)) | {'ci95': dict(zip(values, intervals))}
    return row | dict(zip(render.LISTS, _list_measures(run, items)))


def _list_measures(run: Run, items: ItemFacts | None) -> tuple[float | None, ...]:
    """Coverage, novelty and diversity; None without lists. Who is shown nothing does not count."""
    if run.lists is None:
        return None, None, None
    if items is None or run.lists.shape != (len(run.users), LENGTH):
        raise ValueError(
            f"{run.system}: lists must be [U', {LENGTH}] and `items` given, found "
            f'{run.lists.shape}, {len(run.users)} users and items {type(items).__name__}'
        )
    lists = run.lists[np.argsort(run.users)]  # sums in one order of the users
    lists = lists[(lists > 0).any(axis=1)]
    if not len(lists):
        return None, None, None
    return (
        coverage(lists, items.items),
        novelty(lists, items).mean(),
        diversity(lists, items.keywords).mean(),
    )


def _set_of_users(run: Run) -> tuple[str, str, str | None]:
    """What makes two rows comparable."""
    return run.split, str(run.user_set), run.group


def _compare(
    pair: Comparison,
    values: Mapping[Run, Mapping[str, np.ndarray]],
    names: Mapping[Run, str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    a, b = pair.a, pair.b
    if a not in values or b not in values:
        raise ValueError(f'{a.system} and {b.system}: only rows of the report can be compared')
    same_users = np.array_equal(np.sort(a.users), np.sort(b.users))
    if _set_of_users(a) != _set_of_users(b) or not same_users:
        raise ValueError(f'{a.system} and {b.system} are compared on different users')
    if pair.metric not in values[a]:
        raise ValueError(f'unknown metric {pair.metric}; a row has {", ".join(values[a])}')
    a_values, b_values = values[a][pair.metric], values[b][pair.metric]
    p_value = detectable = None
    if len(a_values):
        p_value = statistics.randomisation_test(a_values, b_values, resamples=resamples, seed=seed)
        detectable = statistics.smallest_detectable(a_values, b_values)
    (difference,), (interval,) = _means((a_values - b_values)[:, None], resamples, seed)
    row = {
        'a': names[a],
        'b': names[b],
        'metric': pair.metric,
        'users': len(a_values),
        'difference': difference,
        'ci95': interval,
        'p_value': p_value,
        'p_adjusted': None,
        'detectable': detectable,
    }
    return row if a.group is None else row | {'group': a.group}


def _held_out_loss(loss: HeldOutLoss, resamples: int, seed: int) -> dict[str, Any]:
    """Means over users of their examples' mean: a user with many examples weighs no more."""
    users, user_of = np.unique(loss.users, return_inverse=True)
    examples = np.stack([loss.before, loss.after, np.subtract(loss.after, loss.before)], 1)
    sums = np.zeros((len(users), 3))
    np.add.at(sums, user_of, examples)
    by_user = sums / np.bincount(user_of, minlength=len(users))[:, None]
    names = ('before', 'after', 'difference')
    means, intervals = _means(by_user, resamples, seed)
    return {'users': len(users), 'examples': len(loss.users), 'of': loss.of} | {
        'loss': dict(zip(names, means)) | {'ci95': dict(zip(names, intervals))}
    }


def _means(
    values: np.ndarray, resamples: int, seed: int
) -> tuple[list[float | None], list[list[float] | None]]:
    """Means and intervals of the columns of `values` [U', M]; None where they are unknown."""
    means: list[float | None] = [None] * values.shape[1]
    intervals: list[list[float] | None] = [None] * values.shape[1]
    known = np.flatnonzero(np.isfinite(values).all(0)) if len(values) else ()
    if len(known):
        kept = values[:, known]
        bounds = statistics.bootstrap_interval(kept, resamples=resamples, seed=seed)
        for column, mean, bound in zip(known, kept.mean(0), bounds):
            means[column], intervals[column] = float(mean), bound.tolist()
    return means, intervals


def _plain(value: Any) -> Any:
    """The same value as JSON gives it back; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
