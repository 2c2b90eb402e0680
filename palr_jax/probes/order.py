"""Candidate-position bias: how much of a ranking is the order in which the prompt lists the items.

The same users are scored under K seeded orders of the same candidates, the first of them the run's
own where it shuffles. An LLM that reads a list should not care for its order; known ones do (Hou et
al. 2024, 'Large Language Models are Zero-Shot Rankers for Recommender Systems').

With random orders, a winner that does not depend on the order stands in each listed slot equally
often: that is what the chi-square test asks. Where it does not, some slots are favoured.

Axis letters: U' users, K orders, C candidates, n_u filled candidates of a user.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from palr_jax.errors import InputError
from palr_jax.evaluation.metrics import ndcg, rank_targets
from palr_jax.evaluation.statistics import bootstrap_interval
from palr_jax.probes.finished import Finished
from palr_jax.project import order_seed
from palr_jax.ranking.score import Query
from palr_jax.ranking.users import Scores, ranking_prompt

USERS = 50
THIRDS = ('first', 'middle', 'last')


@dataclass(frozen=True)
class Orders:
    """What candidates scored under K orders of the list that their prompt shows.

    Unfilled slots are the last ones of a user.
    """

    items: np.ndarray  # [U', C] in the retriever's order, -1 unfilled
    slots: np.ndarray  # [U', K, C] where each candidate was listed, from 0; -1 unfilled
    scores: np.ndarray  # [U', K, C] higher is better, -inf unfilled
    targets: np.ndarray  # [U']


def probe(run: Finished, number: int | None, shuffles: int) -> dict[str, Any]:
    """Scores a sample of the run's test users under `shuffles` orders; see `measure`.

    Args:
      run: the finished run.
      number: of users; None is USERS, or all where there are fewer.
      shuffles: K, 2 or more.

    Raises:
      InputError: the run scores nothing, its prompts list no candidates or only one, or there are
        fewer users.
    """
    config = run.project.config
    users, items = run.sample(number, USERS)
    if not config.prompts.candidates:
        raise InputError(
            'config.prompts.candidates of the run is False: its prompts list no candidates; '
            'allowed for --what=order: a run whose prompts do.'
        )
    if (items >= 0).sum(axis=1).min() < 2:
        raise InputError('A user of the run has fewer than 2 candidates; allowed: 2 or more.')
    orders = score_orders(run, users, items, shuffles)
    settings = {'resamples': config.evaluation.resamples, 'seed': config.seed}
    asked = {
        'normalize': config.ranking.normalize,
        'candidate_order': config.prompts.candidate_order,
    }
    return run.record | asked | measure(orders, **settings)


def score_orders(run: Finished, users: np.ndarray, items: np.ndarray, shuffles: int) -> Orders:
    """Scores [U', C] candidates of users [U'] under `shuffles` orders of the list in the prompt."""
    project = run.project
    config, split, encoder = project.config, project.dataset.split, project.encoder
    prompts = copy.deepcopy(config.prompts)
    prompts.candidate_order = 'shuffled'
    histories = [split.history(user, 'test') for user in users]
    profiles = project.profiles([history.tolist() for history in histories])
    how = config.ranking.normalize
    nobody = project.profiles([[]])[0] if how == 'prior' else ()
    queries, priors = [], []
    slots = np.full((len(users), shuffles, items.shape[1]), -1)
    for u, (user, history, profile) in enumerate(zip(users, histories, profiles)):
        filled = items[u][items[u] >= 0]
        name = f'User {project.dataset.user_ids[user]}'
        for k in range(shuffles):
            seed = order_seed(config, user, k)
            prompt, listed = ranking_prompt(encoder, prompts, history, profile, filled, seed)
            answers = tuple(encoder.replies(filled.tolist(), listed))
            queries.append(Query(prompt.tokens, answers, name))
            prior, _ = ranking_prompt(encoder, prompts, history[:0], nobody, filled, seed)
            priors.append(Query(prior.tokens, answers, name))
            slots[u, k, : len(filled)] = [listed.index(item) for item in filled]
    repeated = np.repeat(items, shuffles, axis=0)

    def ask(name: str, run: Finished, queries: list[Query]) -> Scores:
        sums = np.full(repeated.shape, -np.inf, np.float32)
        scored = run.score(name, queries)
        sums[:, : scored.shape[1]] = scored
        return Scores.of_queries(repeated, queries, encoder, sums)

    scores = ask('orders', run, queries)
    if how == 'prior':
        scores = scores.less(ask('orders, prior', run, priors))
    if how == 'untuned' and run.system == 'llm':
        scores = scores.less(ask('orders, untuned', Finished(project, 'llm_zero_shot'), queries))
    ranked = scores.normalized(how).reshape(slots.shape)
    return Orders(items, slots, ranked, split.targets('test')[users])


def measure(orders: Orders, *, resamples: int, seed: int) -> dict[str, Any]:
    """What the order of the list changes.

    Of candidates with the same best score, the one that comes first in the retriever's order wins,
    wherever it was listed.

    Args:
      orders: with K and every n_u at least 2.
      resamples: of the bootstrap over users.
      seed: of it.

    Returns:
      'top1_differs': share of the orders 2 … K whose winner is not that of the first, with what
      random scores would give; 'kendall_tau': tau-b, mean over all pairs of orders; 'slots': how
      often the winner stood in each slot, against uniform; 'thirds' of the list in which it stood;
      'ndcg@10' of each order, their mean and (sample) standard deviation, and of the scores' mean
      over the orders, with its gain over that mean. Shares, tau, thirds and the gain are means over
      users with 95 % intervals.
    """
    counts = (orders.items >= 0).sum(axis=1)  # [U'] n_u
    winners = np.argmax(orders.scores, axis=2)  # [U', K]
    won = np.take_along_axis(orders.slots, winners[..., None], axis=2)[..., 0]  # [U', K]

    def mean(values: np.ndarray) -> dict[str, Any]:
        ends = bootstrap_interval(values, resamples=resamples, seed=seed)
        return {'mean': float(values.mean()), 'ci95': ends.tolist()}

    tau = np.array([kendall_tau(of_user[:, :n]) for of_user, n in zip(orders.scores, counts)])
    tau = tau[np.isfinite(tau)]
    third_of_winner = won * 3 // counts[:, None]
    thirds = {}
    for i, third in enumerate(THIRDS):
        uniform = np.mean([np.mean(np.arange(n) * 3 // n == i) for n in counts])
        thirds[third] = mean(np.mean(third_of_winner == i, axis=1)) | {'uniform': float(uniform)}

    def of_users(scores: np.ndarray) -> np.ndarray:
        return ndcg(rank_targets(orders.items, scores, orders.targets), 10)

    metrics = np.array([of_users(scores) for scores in orders.scores.swapaxes(0, 1)])  # [K, U']
    metric = metrics.mean(axis=1)
    averaged = of_users(orders.scores.mean(axis=1))
    return {
        'users': len(counts),
        'orders': won.shape[1],
        'candidates': int(counts.max()),
        'targets_listed': float((orders.items == orders.targets[:, None]).any(axis=1).mean()),
        'top1_differs': mean(np.mean(winners[:, 1:] != winners[:, :1], axis=1))
        | {'by_chance': float(np.mean(1 - 1 / counts))},
        'kendall_tau': mean(tau) if len(tau) else None,
        'slots': winning_slots(won, counts),
        'thirds': thirds,
        'ndcg@10': {
            'of_orders': metric.tolist(),
            'mean': float(metric.mean()),
            'deviation': float(metric.std(ddof=1)),
            'of_mean_scores': float(averaged.mean()),
            'gain': mean(averaged - metrics.mean(axis=0)),
        },
    }


def kendall_tau(scores: np.ndarray) -> float:
    """Kendall's tau-b (1945), mean over the pairs of K rankings of the same n items.

    Args:
      scores: [K, n], K at least 2.

    Returns:
      NaN where a ranking ties everything: it orders nothing.
    """
    K, n = scores.shape
    left, right = np.triu_indices(n, k=1)
    signs = np.sign(scores[:, left] - scores[:, right])  # [K, n (n - 1) / 2]
    agreement = signs @ signs.T
    untied = np.diag(agreement)
    if not untied.all():
        return float('nan')
    tau = agreement / np.sqrt(np.outer(untied, untied))
    return float(tau[np.triu_indices(K, k=1)].mean())


def winning_slots(won: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """How often the winner stood in each listed slot, and Pearson's chi-square test of uniformity.

    Args:
      won: [U', K] the winner's slot, from 0.
      counts: [U'] candidates that were listed.

    Returns:
      'counts' [C] and 'uniform' [C], what a winner that ignores the order would give; 'chi2' and
      its 'p_value', which needs about 5 or more expected in a slot to be trusted.
    """
    slots = np.arange(counts.max())
    found = np.bincount(won.ravel(), minlength=len(slots))
    expected = won.shape[1] * np.sum((slots < counts[:, None]) / counts[:, None], axis=0)
    test = stats.chisquare(found, expected)
    return {
        'counts': found.tolist(),
        'uniform': expected.tolist(),
        'chi2': float(test.statistic),
        'p_value': float(test.pvalue),
    }


def table(found: dict[str, Any]) -> str:
    """The result as text, at most 80 columns wide."""
    flips, tau, slots, metric = (
        found[key] for key in ('top1_differs', 'kendall_tau', 'slots', 'ndcg@10')
    )
    most = int(np.argmax(slots['counts']))
    total = sum(slots['counts'])

    def line(name: str, entry: dict[str, Any], note: str = '') -> str:
        low, high = entry['ci95']
        return f'{name:<34}{entry["mean"]:>7.3f}  [{low:6.3f}, {high:6.3f}]  {note}'.rstrip()

    lines = [
        f'{found["system"]}: {found["users"]} users, {found["orders"]} orders of '
        f'{found["candidates"]} candidates; {found["targets_listed"]:.0%} of targets listed',
        line('top-1 is not that of order 1', flips, f'by chance {flips["by_chance"]:.3f}'),
        line("Kendall's tau between orders", tau) if tau else "Kendall's tau: all scores tie",
        *(
            line(f'winner in the {third} third', entry, f'uniform {entry["uniform"]:.3f}')
            for third, entry in found['thirds'].items()
        ),
        f'winners that stood in slot {most + 1:<7}{slots["counts"][most] / total:>7.3f}  '
        f'{"the most of all":<16}  uniform {slots["uniform"][most] / total:.3f}',
        f'{"chi-square of the slots":<34}{slots["chi2"]:>7.1f}  p = {slots["p_value"]:.2g}, '
        f'{min(slots["uniform"]):.1f} expected a slot',
        f'{"NDCG@10, mean over orders":<34}{metric["mean"]:>7.4f}  '
        f'{min(metric["of_orders"]):.4f} to {max(metric["of_orders"]):.4f}, deviation '
        f'{metric["deviation"]:.4f}',
        f'{"NDCG@10 of the mean scores":<34}{metric["of_mean_scores"]:>7.4f}  '
        'gain {mean:+.4f} [{ci95[0]:+.4f}, {ci95[1]:+.4f}]'.format(**metric['gain']),
    ]
    return '\n'.join(lines)
