"""The metrics against NIST's trec_eval, which knows no ties: it judges one order at a time."""

import itertools

import numpy as np
import pytest
import pytrec_eval

from palr_jax.evaluation.metrics import per_user, rank_targets

KS = (1, 3, 5, 10)
THEIRS = {f'HR@{k}': f'success_{k}' for k in KS} | {f'NDCG@{k}': f'ndcg_cut_{k}' for k in KS}


def judged(rankings, targets, cutoff):
    """Our names -> trec_eval's values [N] of N rankings, lists of distinct ids with the best first.

    trec_eval cuts no reciprocal rank, so the rankings are cut for it.
    """
    cuts = ','.join(map(str, KS))
    relevant = {str(n): {str(target): 1} for n, target in enumerate(targets)}
    runs = {
        str(n): {str(item): float(-place) for place, item in enumerate(ranking)}
        for n, ranking in enumerate(rankings)
    }
    cut = {n: dict(list(run.items())[:cutoff]) for n, run in runs.items()}
    measures = {f'success_{cuts}', f'ndcg_cut_{cuts}', 'recip_rank'}
    evaluator = pytrec_eval.RelevanceEvaluator(relevant, measures)
    found, found_cut = evaluator.evaluate(runs), evaluator.evaluate(cut)
    order = list(map(str, range(len(rankings))))
    values = {ours: np.array([found[n][theirs] for n in order]) for ours, theirs in THEIRS.items()}
    return values | {'MRR': np.array([found_cut[n]['recip_rank'] for n in order])}


def assert_equal(ours, theirs):
    assert set(theirs) - set(ours) == {'NDCG@1'}  # which is HR@1
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize('cutoff', [4, 20])
def test_equals_trec_eval_without_ties(cutoff):
    """E02, E03: in shuffled slots, some unfilled, and with targets that were not retrieved."""
    rng = np.random.default_rng(cutoff)
    items = np.stack([rng.permutation(30)[:20] + 1 for _ in range(300)])
    scores = np.stack([rng.permutation(20) for _ in range(300)]).astype(np.float32)
    items[:, 0] = -1
    targets = rng.integers(1, 31, 300)
    rankings = [
        [item for item in row[np.argsort(-of_row)] if item > 0]
        for row, of_row in zip(items, scores)
    ]
    ranks = rank_targets(items, scores, targets)
    assert 100 < ranks.found.sum() < 250
    assert_equal(per_user(ranks, KS, cutoff), judged(rankings, targets, cutoff))


def test_equals_the_mean_of_trec_eval_over_all_orders_of_the_ties():
    """E01: every order of the items that the scores allow, each judged by trec_eval."""
    rng = np.random.default_rng(0)
    users, slots = 60, 6
    items = np.stack([rng.permutation(8)[:slots] + 1 for _ in range(users)])
    scores = rng.integers(0, 3, items.shape).astype(np.float32)
    scores[0] = 1  # a constant scorer
    targets = rng.integers(1, 9, users)
    rankings, of_user = [], []
    for user in range(users):
        tied = [items[user][scores[user] == score] for score in sorted(set(scores[user]))[::-1]]
        for parts in itertools.product(*map(itertools.permutations, tied)):
            rankings.append(list(itertools.chain(*parts)))
            of_user.append(user)
    assert len(rankings) > 720
    number = np.bincount(of_user)
    theirs = {
        name: np.bincount(of_user, values) / number
        for name, values in judged(rankings, targets[of_user], 4).items()
    }
    ranks = rank_targets(items, scores, targets)
    assert (ranks.ties > 0).sum() > 20
    assert_equal(per_user(ranks, KS, 4), theirs)
