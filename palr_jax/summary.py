"""The last stage: the rows, comparisons and notes of a run's report."""

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from palr_jax import details, evaluation, retrieval, storage
from palr_jax.evaluation import Comparison, HeldOutLoss, Run, rank_targets
from palr_jax.fusion import LLM, PARTNERS, Scored, scored_systems
from palr_jax.project import Project, ranked_users
from palr_jax.prompts.tasks import split_users
from palr_jax.ranking.generate_users import Answers
from palr_jax.ranking.users import Scores
from palr_jax.stages import Ledger

BASE = ('popularity', 'retriever')  # rows that need no LLM
LISTED = 10  # items of a list whose coverage, novelty and diversity are told
VERSIONS = (
    *('palr_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain'),
    *('transformers', 'tokenizers', 'scann', 'numpy'),
)


def alone(fitted: Mapping[str, Any]) -> dict[str, Any]:
    """The retrievers that have a row of their own: those of a mix, if it is one."""
    return dict(fitted) if len(fitted) > 1 else {}


def write_report(project: Project, *, ledger: Ledger) -> None:
    """Everything before -> `report/`: metrics.json, details.json, report.md and report.html."""
    config, dataset = project.config, project.dataset
    runs = [full_run(project, system) for system in BASE]
    comparisons = [Comparison(runs[1], runs[0], 'NDCG@10')]
    parts = [full_run(project, name) for name in alone(dict.fromkeys(config.retrieval.systems))]
    comparisons += [Comparison(runs[1], part, 'NDCG@10') for part in parts]
    runs += parts
    everyone, ranked, scored = list(runs), {}, {}
    notes, held_out = [], None
    timing = {'seconds': ledger.seconds()}
    loss_path = project.folder('finetune') / 'held_out_loss.npz'
    losses = dict(storage.read_arrays(loss_path)) if loss_path.exists() else {}
    tuned = losses.pop('tuned', None)
    fusion_path = project.folder('ranking') / 'fusion.json'
    if fusion_path.exists():
        fusion = storage.read_json(fusion_path)
        scored = scored_systems(project, fusion)
        ranked = ranked_runs(project, runs, scored)
        runs += [run for run in ranked.values() if run not in runs]  # of all users, some are there
        comparisons += compared(ranked)
        of_groups = grouped_runs(project, ranked, tuned)
        runs += of_groups
        llm = project.llm_scores(fusion['system'], 'test')
        notes = [*prompt_notes(config), *ranking_notes(project, fusion, llm)]
        timing |= {
            'users_per_second': len(llm.users) / llm.seconds if llm.seconds else None,
            'tokens_per_second': llm.computed / llm.seconds if llm.seconds else None,
        }
    if losses:
        what = 'answer' if config.finetune.objective == 'sft' else 'list'
        held_out = HeldOutLoss(what, **losses)
    report = evaluation.build(
        dataset=dataset.record,
        retrieval=storage.read_json(project.folder('retrieval') / 'retrieval.json'),
        runs=runs,
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
        held_out=held_out,
        items=evaluation.item_facts(dataset.split, dataset.catalogue),
    )
    more = details.build(project, everyone, ranked, scored)
    evaluation.write(report, more, project.folder('report'))


def full_run(project: Project, system: str) -> Run:
    """The row of a system that needs no LLM: every test user, ranked over the whole catalogue."""
    folder, seed = project.folder('retrieval'), project.config.seed
    users, ranks = retrieval.read_ranks(folder, system, 'test')
    if system not in BASE:  # the members of a mix have no candidates of their own
        return Run(system, users, ranks)
    found = retrieval.read_candidates(folder, system, 'test')
    lists = evaluation.top_items(found.items, found.scores, users, LISTED, seed=seed)
    return Run(system, users, ranks, lists=lists)


def ranked_runs(project: Project, full: list[Run], scored: Mapping[str, Scored]) -> dict[str, Run]:
    """The rows over the users whose candidates the LLM ranked, by system.

    Beside the LLM alone and fused: the whole catalogue ranked without it, for the same users, and
    the controls. Those rank the same candidates without an LLM (`random`, `popularity_reranked`) or
    fuse the retriever with something else (`fused_…`, see `fusion.py`).

    Args:
      project: of the run.
      full: the rows of popularity and the retriever, over all test users, first.
      scored: from `scored_systems`.
    """
    config = project.config
    users = ranked_users(project, 'test')
    everyone = len(users) == len(full[0].users)
    user_set = 'all' if everyone else evaluation.sampled(users, config.ranking.users_seed)
    runs = {}
    for run in full[: len(BASE)]:
        if everyone:
            runs[run.system] = run  # the same row
            continue
        rows = np.searchsorted(run.users, users)
        ranks, lists = run.ranks.take(rows), run.lists[rows]
        runs[run.system] = Run(run.system, users, ranks, user_set=user_set, lists=lists)
    for system, found in scored.items():
        rows = np.searchsorted(users, found.users)
        targets = project.dataset.split.targets('test')[found.users]
        ranks = rank_targets(found.items, found.scores, targets, found.users)
        lists = None  # of hits alone, who are no sample: nothing to set beside the others' lists
        if not config.ranking.skip_misses:
            lists = evaluation.top_items(
                found.items, found.scores, found.users, LISTED, seed=config.seed
            )
        runs[system] = Run(
            system,
            users,
            ranks.spread(rows, len(users)),
            user_set=user_set,
            mode=found.mode,
            objective=found.objective,
            lists=lists,
        )
    return runs


def compared(ranked: dict[str, Run]) -> list[Comparison]:
    """What a reader of the rows asks first, of those that there are."""
    asked = (
        (LLM, 'retriever', 'NDCG@10'),
        (LLM, 'retriever', 'HR@10'),
        *((LLM, name, 'NDCG@10') for name in PARTNERS if name != LLM),
        ('llm', 'llm_zero_shot', 'NDCG@10'),
        ('llm' if 'llm' in ranked else 'llm_zero_shot', 'random', 'NDCG@10'),
    )
    return [
        Comparison(ranked[a], ranked[b], metric)
        for a, b, metric in asked
        if a in ranked and b in ranked
    ]


def grouped_runs(project: Project, ranked: dict[str, Run], tuned: np.ndarray | None) -> list[Run]:
    """The rows of groups of users: of the retriever, the LLM before and after, and both fused.

    `tuned` are the users who gave an example. None: as many as were drawn to give some; an older
    version did not write who did.
    """
    config, split = project.config, project.dataset.split
    if 'llm' not in ranked:
        tuned = None
    elif tuned is None:
        tuned, _ = split_users(split, config.tasks.users, config.seed)
    users = ranked['retriever'].users
    groups = evaluation.user_groups(split, 'test', users, tuned)
    shown = ('retriever', 'llm_zero_shot', 'llm', LLM)
    return [
        row for name in shown if name in ranked for row in evaluation.by_group(ranked[name], groups)
    ]


def ranking_notes(project: Project, fusion: dict[str, Any], llm: Scores | Answers) -> list[str]:
    """How the fusion was weighed; or what was wrong with what the LLM wrote freely."""
    if project.writes_freely:
        shares = llm.shares()
        return [
            f'Of the lines that {fusion["system"]} wrote, {shares["invalid"]:.1%} name no item, '
            f'{shares["repeated"]:.1%} repeat one and {shares["seen"]:.1%} name one of the '
            f'history; {shares["unanswered"]:.1%} of the users have no valid answer. An invalid '
            'line takes its place.'
        ]
    fused = fusion[LLM]
    ndcg = dict(fused['valid_ndcg@10'])
    others = ', '.join(f'{fusion[name]["weight"]:g} of {name}' for name in PARTNERS if name != LLM)
    notes = [
        f"fused: the retriever's standardised score + {fused['weight']:g} times that of "
        f'{fusion["system"]}; the weight is the best of {len(ndcg)} by NDCG@10 on '
        f'{fusion["valid_users"]} validation users ({ndcg[fused["weight"]]:.4f}; the retriever '
        f'alone {ndcg[min(ndcg)]:.4f}), on whom nothing of the retriever was chosen. Controls in '
        f'the same way: {others}.'
    ]
    if project.config.ranking.skip_misses:
        notes.append(
            'Users whose target was not retrieved count as misses and were not scored. They have '
            'no lists: coverage, novelty and diversity are of popularity and the retriever alone.'
        )
    return notes


def prompt_notes(config: ConfigDict) -> list[str]:
    """What the reader of a number must know of the prompts behind it."""
    prompts, ranking = config.prompts, config.ranking
    shown = (
        f"The LLM rows rank the retriever's {ranking.candidates} best candidates (the paper: 50)"
        if prompts.candidates or ranking.mode != 'generate'
        else 'The LLM names items of the whole catalogue'
    )
    words = f', the first {prompts.title_words} words of it' if prompts.title_words else ''
    notes = [
        f'{shown}, from prompts of at most {prompts.history} history items (the paper: 20) and '
        f'{prompts.length} tokens; a target that is not among them is a miss.',
        f'User profile: {prompts.profile}; an item is shown by its {prompts.item} and answered by '
        f'its {prompts.answer}{words}.',
    ]
    how = {
        'generate': 'The model writes up to ten titles, the best first.',
        'index': 'The score of a candidate is the log-likelihood of its number',
        'title': 'The score of a candidate is the log-likelihood of its title',
    }[ranking.mode]
    if ranking.mode != 'generate':
        less = {
            'sum': '.',
            'prior': ', less that under the same prompt without the user.',
            'untuned': ', for the tuned model less that by the untuned one.',
        }
        how += less.get(ranking.normalize, f' per {ranking.normalize}.')
    if prompts.candidates:
        how += f' The prompt lists the candidates in {prompts.candidate_order} order'
        how += f', scores are means over {ranking.orders} such.' if ranking.orders > 1 else '.'
    notes.append(how)
    weight, less_untuned = config.finetune.retriever_weight, config.finetune.less_untuned
    if weight or less_untuned:
        less = ', less what the untuned model says' if less_untuned else ''
        notes.append(
            f'Lists were learned beside {weight:g} times the standardised scores of the retriever'
            f'{less}: the losses are of both together.'
        )
    return notes


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
