"""The instruction examples of fine-tuning (section 2 of the paper), from training data alone.

An example cuts a user's training history in two: the items before the cut are shown, those after
are the answer. Recommend asks for them outright; Recommend_Retrieval lists candidates that hold
them all and negatives that resemble them.

Nobody's validation and test items are read at all. So such an item can turn up among its user's
negatives, or among the items that enrich an answer, like any other item that the user has not had:
leaving it out would tell the model about it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from palr_jax.data import Catalogue, Split
from palr_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Example:
    """One instruction and its answer, in item ids.

    Attributes:
      user: dense user.
      task: 'recommend' or 'recommend_retrieval'.
      past: everything before the cut, oldest first; the profile is made of it, as it is made of a
        user's whole history when candidates are ranked.
      history: the end of `past`, which is shown.
      candidates: in the order shown; empty for 'recommend'.
      targets: the answer: the user's items in their order, then those that enrich it; all of them
        are among the candidates where there are any.
      scores: what the retriever said of each candidate; empty where none retrieved them.
    """

    user: int
    task: str
    past: tuple[int, ...]
    history: tuple[int, ...]
    candidates: tuple[int, ...]
    targets: tuple[int, ...]
    scores: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Affinity:
    """Which items go together, counted on training data.

    Attributes:
      visitors: [I+1, U] which users have an item, 0 or 1.
      together: [I+1, I+1] number of users who have both items; the diagonal is empty.
      by_keyword: the items of each keyword, ascending.
    """

    visitors: sp.csr_array
    together: sp.csr_array
    by_keyword: dict[str, np.ndarray]


def affinity(split: Split, catalogue: Catalogue) -> Affinity:
    """Counts co-visitation and keywords over every user's training items."""
    users = np.repeat(np.arange(len(split.train_end)), split.train_end)
    items = split.items[split.train_events()]
    visitors = sp.csr_array(
        (np.ones(len(items), np.int32), (items, users)),
        shape=(catalogue.items + 1, len(split.train_end)),
    )
    visitors.data[:] = 1  # a repeated pair counts once
    together = sp.csr_array(visitors @ visitors.T)
    together.setdiag(0)
    together.eliminate_zeros()
    lists: dict[str, list[int]] = {}
    for item in range(1, catalogue.items + 1):
        for keyword in catalogue.keywords[item]:
            lists.setdefault(keyword, []).append(item)
    return Affinity(visitors, together, {k: np.array(v) for k, v in lists.items()})


def split_users(split: Split, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(users who give fine-tuning examples, the other users), each ascending.

    Only users with at least two training items can give one; `share` is of these, rounded, and at
    least one user unless it is 0.
    """
    eligible = np.flatnonzero(split.train_end >= 2)
    rng = np.random.default_rng([seed, 1])
    number = max(1, round(share * len(eligible))) if share else 0
    chosen = rng.permutation(eligible)[:number]
    return np.sort(chosen), np.setdiff1d(eligible, chosen)


def make_examples(
    split: Split,
    catalogue: Catalogue,
    pairs: Affinity,
    users: Sequence[int],
    config,
    *,
    history: int,
    seed: int,
) -> list[Example]:
    """Makes `config.examples_per_user` examples of each user, fewer where there are fewer cuts.

    A user's examples do not depend on who else is in `users`. Where candidates are retrieved they
    have neither these nor targets, which `relist` gives them.

    Args:
      split: the histories.
      catalogue: keywords, for negatives alike in genre.
      pairs: co-visitation, for the other negatives and for enrichment.
      users: dense users, each with at least two training items.
      config: `config.tasks`.
      history: items shown, at most; 0 shows none.
      seed: of the cuts, the tasks, the negatives and their order.

    Raises:
      InputError: the candidate lists have no room for a negative.
    """
    similar = config.candidates_from == 'similar'
    if similar and config.recommend_retrieval > 0 and config.candidates <= config.targets:
        raise InputError(
            f'tasks.candidates is {config.candidates}; allowed: more than tasks.targets, which is '
            f'{config.targets}: a list of targets alone teaches nothing.'
        )
    examples = []
    for user in users:
        rng = np.random.default_rng([seed, 2, int(user)])
        train = split.train(user)
        first_cut = min(config.min_history, len(train) - 1)
        cuts = rng.permutation(np.arange(first_cut, len(train)))[: config.examples_per_user]
        for cut in cuts:
            examples.append(_example(int(user), train, cut, catalogue, pairs, config, history, rng))
    return examples


def relist(
    examples: Sequence[Example],
    retrieved: np.ndarray,
    scores: np.ndarray,
    split: Split,
    config,
    *,
    order: str,
    seed: int,
) -> list[Example]:
    """The examples with retrieved candidates, as the ranking will see them.

    The targets of an example are those of the user's next `config.targets` items that were
    retrieved; an example without any is left out.

    Args:
      examples: from `make_examples`, without candidates.
      retrieved: [examples, k] item ids, best first, -1 in unfilled slots; nothing of the past.
      scores: [examples, k] their scores.
      split: the histories.
      config: `config.tasks`.
      order: of the candidates, as in `prompts.candidate_order`.
      seed: of the shuffled order.
    """
    relisted = []
    for example, row, of_row in zip(examples, retrieved, scores):
        cut = len(example.past)
        candidates, said = row[row >= 0], of_row[row >= 0]
        coming = split.train(example.user)[cut : cut + config.targets]
        targets = coming[np.isin(coming, candidates)]
        if not len(targets):
            continue
        if order == 'shuffled':
            rng = np.random.default_rng([seed, 8, example.user, cut])
            places = rng.permutation(len(candidates))
            candidates, said = candidates[places], said[places]
        relisted.append(
            dataclasses.replace(
                example,
                candidates=tuple(candidates.tolist()),
                targets=tuple(targets.tolist()),
                scores=tuple(said.tolist()),
            )
        )
    return relisted


def _example(user, train, cut, catalogue, pairs, config, history, rng) -> Example:
    past = train[:cut].tolist()
    targets = train[cut : cut + config.targets].tolist()
    shown_from = max(0, cut - history)
    if config.candidates_from != 'similar':
        # No swap: what it moved out of the history could be retrieved, and be listed as a negative.
        return Example(user, 'recommend_retrieval', tuple(past), tuple(past[shown_from:]), (), ())
    if shown_from < cut and rng.random() < config.swap:
        i, j = rng.integers(shown_from, cut), rng.integers(len(targets))
        past[i], targets[j] = targets[j], past[i]
    # After the swap: the history holds the user's own items alone.
    if config.enrich:
        targets += _enrichment(targets, train, pairs, config.targets, config.enrich_min_users)
    task, candidates = 'recommend', []
    if rng.random() < config.recommend_retrieval:
        task = 'recommend_retrieval'
        blocked = [*train.tolist(), *targets]
        number = config.candidates - len(targets)
        negatives = _negatives(targets, number, blocked, catalogue, pairs, config, rng)
        candidates = _arranged(targets, negatives, config.targets_at, rng)
    return Example(
        user, task, tuple(past), tuple(past[shown_from:]), tuple(candidates), tuple(targets)
    )


def _arranged(targets: list[int], negatives: list[int], targets_at: str, rng) -> list[int]:
    if targets_at == 'shuffled':
        return rng.permutation(targets + negatives).tolist()
    targets = rng.permutation(targets).tolist()
    negatives = rng.permutation(negatives).tolist()
    return targets + negatives if targets_at == 'first' else negatives + targets


def _enrichment(targets, train, pairs: Affinity, most: int, min_users: int) -> list[int]:
    """Items that at least `min_users` users share who also share a target, most shared first.

    The three hops: this user -> a target -> another user -> an item. Equal counts go by item id.
    """
    missing = most - len(targets)
    if missing <= 0:
        return []
    shares_target = np.zeros(pairs.visitors.shape[1], np.int32)
    for target in targets:
        shares_target[_row(pairs.visitors, target)[0]] = 1
    # This user is among them, but only adds to items that are ruled out.
    shared = pairs.visitors @ shares_target
    shared[train] = 0
    ranked = np.argsort(-shared, kind='stable')[:missing]
    return ranked[shared[ranked] >= min_users].tolist()


def _negatives(targets, number, blocked, catalogue, pairs: Affinity, config, rng) -> list[int]:
    """`number` items like the targets: in genre, in company, and at random if these run out."""
    free = np.ones(catalogue.items + 1, bool)
    free[[0, *blocked]] = False
    chosen: list[int] = []
    by_genre = round(number * config.negatives_by_genre)
    for size, weights in (
        (by_genre, _same_keyword(targets, catalogue, pairs)),
        (number, _same_company(targets, pairs)),
        (number, np.ones(len(free))),
    ):
        weights = np.where(free, weights, 0.0)
        draws = min(size - len(chosen), np.count_nonzero(weights))
        if draws:
            drawn = rng.choice(len(free), draws, replace=False, p=weights / weights.sum())
            free[drawn] = False
            chosen += drawn.tolist()
    return chosen


def _same_keyword(targets, catalogue, pairs: Affinity) -> np.ndarray:
    """[I+1] weights: each keyword of each target is shared equally by the items that have it."""
    weights = np.zeros(catalogue.items + 1)
    for target in targets:
        for keyword in catalogue.keywords[target]:
            items = pairs.by_keyword[keyword]
            weights[items] += 1.0 / len(items)
    return weights


def _same_company(targets, pairs: Affinity) -> np.ndarray:
    """[I+1] weights: each target is shared by the number of users who have it and the item."""
    weights = np.zeros(pairs.together.shape[0])
    for target in targets:
        items, users = _row(pairs.together, target)
        weights[items] += users / max(1, users.sum())
    return weights


def _row(matrix: sp.csr_array, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns, values) of a row, without the copy that SciPy would make."""
    at = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return matrix.indices[at], matrix.data[at]
