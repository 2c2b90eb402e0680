"""The last stage: the rows, comparisons and notes of a run's report."""

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from palr_jax import evaluation, retrieval, storage
from palr_jax.evaluation import AnswerLoss, Comparison, Run, rank_targets
from palr_jax.project import Project, retriever_scores
from palr_jax.ranking.fuse import fuse
from palr_jax.ranking.users import Scores, read_scores
from palr_jax.stages import Ledger

BASE = ('popularity', 'retriever')  # rows that need no LLM
VERSIONS = (
    *('palr_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain'),
    *('transformers', 'tokenizers', 'scann', 'numpy'),
)


def alone(fitted: Mapping[str, Any]) -> dict[str, Any]:
    """The retrievers that have a row of their own: those of a mix, if it is one."""
    return dict(fitted) if len(fitted) > 1 else {}


def full_run(project: Project, system: str) -> Run:
    """The row of a system that needs no LLM: every test user, ranked over the whole catalogue."""
    return Run(system, *retrieval.read_ranks(project.workdir / 'retrieval', system, 'test'))


def write_report(project: Project, *, ledger: Ledger) -> None:
    """Everything before -> `report/`: metrics.json, report.md and the picture."""
    config, dataset = project.config, project.dataset
    runs = [full_run(project, system) for system in BASE]
    comparisons = [Comparison(runs[1], runs[0], 'NDCG@10')]
    parts = [full_run(project, name) for name in alone(dict.fromkeys(config.retrieval.systems))]
    comparisons += [Comparison(runs[1], part, 'NDCG@10') for part in parts]
    notes, answer_loss = [], None
    timing = {'seconds': ledger.seconds()}
    if project.scores_path('llm_zero_shot', 'test').exists():
        sampled, llm, fusion_note = ranked_runs(project, runs)
        parts += sampled.values()
        fused, retriever = sampled['fused'], sampled['retriever']
        comparisons += [Comparison(fused, retriever, m) for m in ('NDCG@10', 'HR@10')]
        if 'llm' in sampled:
            comparisons.append(Comparison(sampled['llm'], sampled['llm_zero_shot'], 'NDCG@10'))
        notes = [*prompt_notes(config), fusion_note]
        timing |= {
            'users_per_second': len(llm.users) / llm.seconds,
            'tokens_per_second': llm.computed / llm.seconds,
        }
    loss_path = project.workdir / 'finetune' / 'answer_loss.npz'
    if loss_path.exists():
        answer_loss = AnswerLoss(**storage.read_arrays(loss_path))
    report = evaluation.build(
        dataset=dataset.record,
        retrieval=storage.read_json(project.workdir / 'retrieval' / 'retrieval.json'),
        runs=runs + parts,
        comparisons=comparisons,
        timing=timing,
        versions={
            'python': platform.python_version(),
            'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        }
        | {name: metadata.version(name) for name in VERSIONS if _installed(name)},
        seed=config.seed,
        candidates=config.ranking.candidates,
        resamples=config.evaluation.resamples,
        ks=config.evaluation.ks,
        notes=notes,
        answer_loss=answer_loss,
    )
    evaluation.write(report, project.workdir / 'report')


def ranked_runs(project: Project, full: list[Run]) -> tuple[dict[str, Run], Scores, str]:
    """The rows over the users whom the LLM ranked, its scores, and how the fusion was weighted."""
    config, split = project.config.ranking, project.dataset.split
    fusion = storage.read_json(project.workdir / 'ranking' / 'fusion.json')
    scores = {
        name: read_scores(project.scores_path(name, 'test'))
        for name in dict.fromkeys(('llm_zero_shot', fusion['system']))
    }
    llm = scores[fusion['system']]
    users, targets = llm.users, split.targets('test')[llm.users]
    everyone = len(users) == len(full[0].users)
    user_set = 'all' if everyone else evaluation.sampled(users, project.config.seed)
    ranks = {run.system: run.ranks.take(np.searchsorted(run.users, users)) for run in full}
    for name, found in scores.items():
        ranks[name] = rank_targets(found.items, found.normalized(config.normalize), targets)
    fused = fuse(
        retriever_scores(project, llm, 'test'), llm.normalized(config.normalize), fusion['weight']
    )
    ranks['fused'] = rank_targets(llm.items, fused, targets)
    modes = dict.fromkeys(BASE)  # what ranks without the LLM has none
    runs = {
        name: Run(name, users, of_users, user_set=user_set, mode=modes.get(name, config.mode))
        for name, of_users in ranks.items()
    }
    ndcg = dict(fusion['valid_ndcg@10'])
    note = (
        f"fused: the retriever's standardised score + {fusion['weight']:g} times that of "
        f'{fusion["system"]}; the weight is the best of {len(ndcg)} by NDCG@10 on '
        f'{fusion["valid_users"]} validation users ({ndcg[fusion["weight"]]:.4f}; the retriever '
        f'alone {ndcg[min(ndcg)]:.4f}).'
    )
    return runs, llm, note


def prompt_notes(config: ConfigDict) -> list[str]:
    """What the reader of a number must know of the prompts behind it."""
    prompts = config.prompts
    return [
        f"The LLM rows rank the retriever's {config.ranking.candidates} best candidates (the "
        f'paper: 50), from prompts of at most {prompts.history} history items (the paper: 20) and '
        f'{prompts.length} tokens; a target that was not retrieved is a miss.',
        f'User profile: {prompts.profile}; an item is shown by its {prompts.item} and answered by '
        f'its {prompts.answer}.',
        f'The prompt lists the candidates in {prompts.candidate_order} order; the score of a title '
        f'is its log-likelihood, normalised by {config.ranking.normalize}.',
    ]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
