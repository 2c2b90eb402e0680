"""What is fused with the retriever, and how: the LLM's scores, and the controls of them.

A gain of the fused system may come from the fusion and not from the LLM. So two others are fused in
the same way, with weights of their own from the same validation users: popularity, and the LLM's
scores of somebody else.
"""

from typing import Any, NamedTuple

import numpy as np

from palr_jax import retrieval, storage
from palr_jax.project import Project, ranked_users, retriever_scores
from palr_jax.ranking.fuse import choose_weight, fuse, shuffle_users
from palr_jax.ranking.users import Scores

LLM = 'fused'
PARTNERS = (LLM, 'fused_popularity', 'fused_shuffled')


def partner_scores(project: Project, llm: Scores) -> dict[str, np.ndarray]:
    """What each system adds to the retriever's scores: [U', C] by the name of the system."""
    config = project.config
    scores = llm.normalized(config.ranking.normalize)
    return {
        LLM: scores,
        'fused_popularity': popularity_scores(project, llm.items),
        'fused_shuffled': shuffle_users(scores, config.seed),
    }


def popularity_scores(project: Project, items: np.ndarray) -> np.ndarray:
    """[U', C] logarithms of the items' training events, and one more; -inf in unfilled slots."""
    dataset = project.dataset
    counts = retrieval.fit_popularity(dataset.split, dataset.catalogue.items).counts
    return np.where(items > 0, np.log1p(counts)[np.maximum(items, 1) - 1], -np.inf)


def choose_fusion(project: Project, system: str) -> None:
    """Weighs the retriever against `system` and the controls -> `ranking/fusion.json`.

    The LLM that writes freely gives no scores of the candidates: there nothing is fused.
    """
    chosen: dict[str, Any] = {'system': system}
    if not project.writes_freely:
        valid = project.llm_scores(system, 'valid')
        users = ranked_users(project, 'valid')
        base = retriever_scores(project, valid, 'valid')
        targets = project.dataset.split.targets('valid')[valid.users]
        grid = project.config.ranking.fusion_weights
        chosen['valid_users'] = len(users)
        for name, partner in partner_scores(project, valid).items():
            weight, ndcg = choose_weight(valid.items, base, partner, targets, grid, len(users))
            tried = [[w, value] for w, value in ndcg.items()]
            chosen[name] = {'weight': weight, 'valid_ndcg@10': tried}
    storage.write_json(project.folder('ranking') / 'fusion.json', chosen)


class Scored(NamedTuple):
    """What a system said of its candidates."""

    users: np.ndarray  # [U']
    items: np.ndarray  # [U', C]
    scores: np.ndarray  # [U', C]
    mode: str | None = None  # how the LLM in it ranks
    objective: str | None = None  # what that LLM was trained on


def scored_systems(project: Project, fusion: dict[str, Any]) -> dict[str, Scored]:
    """All systems that rank the test users' candidates, controls first."""
    config = project.config
    mode, objective = config.ranking.mode, {'llm': config.finetune.objective}
    names = dict.fromkeys(('llm_zero_shot', fusion['system']))
    found = {name: project.llm_scores(name, 'test') for name in names}
    alone = {
        name: Scored(
            scores.users,
            scores.items,
            scores.normalized(config.ranking.normalize),
            mode,
            objective.get(name),
        )
        for name, scores in found.items()
    }
    if project.writes_freely:
        return alone
    llm = found[fusion['system']]
    users, items = llm.users, llm.items
    constant = np.where(items >= 0, 0.0, -np.inf)
    systems = {
        'random': Scored(users, items, constant),
        'popularity_reranked': Scored(users, items, popularity_scores(project, items)),
    }
    base = retriever_scores(project, llm, 'test')
    fused = {
        name: Scored(users, items, fuse(base, partner, fusion[name]['weight']))
        for name, partner in partner_scores(project, llm).items()
    }
    fused[LLM] = fused[LLM]._replace(mode=mode, objective=objective.get(fusion['system']))
    return systems | alone | fused
