"""What the page of a run shows beyond its numbers: curves, metrics at every K, example users.

`report/details.json` has all of it; with `report/metrics.json` it is what `report.html` is made of.

Axes: U' users, C candidates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from palr_jax import storage
from palr_jax.evaluation import Run, hit_rate, ndcg, recall, run_page
from palr_jax.fusion import Scored
from palr_jax.metric_writer import read_curve
from palr_jax.project import Project, order_seed, read_candidates
from palr_jax.ranking.users import ranking_prompt
from palr_jax.retrieval import retriever
from palr_jax.stages import flatten

HIT = 10  # an example user's ranking hits if the target is among so many
CUTOFF = 50  # the last K of the metrics
RECALL_AT = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)
POINTS = 400  # of a curve; more steps than these are averaged
EXAMPLES = 10  # users
LISTED = 50  # candidates of an example user, if there are no more
# The systems that are shown in full: controls and the fused ones of other partners are not.
SHOWN = ('popularity', 'retriever', 'llm_zero_shot', 'llm', 'fused')


def build(
    project: Project,
    everyone: Sequence[Run],
    ranked: Mapping[str, Run],
    scored: Mapping[str, Scored],
) -> dict[str, Any]:
    """Computes `report/details.json`; plain JSON values only, unknown values None.

    Args:
      project: of the run.
      everyone: the rows over all test users, which need no LLM.
      ranked: those over the users that the LLM ranked, by system; empty where it ranked none.
      scored: what the systems said of these users' candidates.
    """
    config = project.config
    shown = [ranked[name] for name in SHOWN if name in ranked] or everyone
    candidates = config.ranking.candidates if ranked else None
    return {
        'schema': run_page.SCHEMA,
        'config': flatten(config),
        'curves': {
            'finetune': finetune_curve(project),
            'retriever': retriever_curve(project),
        },
        'at_k': metrics_at_k(shown) | {'candidates': candidates},
        'recall': recall_at_k(everyone, project.dataset.catalogue.items)
        | {'candidates': candidates},
        'examples': examples(project, ranked, scored) if ranked else None,
    }


# --- curves -----------------------------------------------------------------------------------


def finetune_curve(project: Project) -> dict[str, Any] | None:
    """The training loss by step, means over `steps` of them; None where nothing was tuned."""
    if not (project.folder('finetune') / 'stage.json').exists():
        return None
    entries = [e for e in read_curve(project.curves_folder, 'finetune') if e['loss'] is not None]
    block = max(1, -(-len(entries) // POINTS))
    blocks = [entries[start : start + block] for start in range(0, len(entries), block)]
    return {
        'steps': block,
        'step': [entries[-1]['step'] for entries in blocks],
        'loss': [float(np.mean([e['loss'] for e in entries])) for entries in blocks],
    }


def retriever_curve(project: Project) -> dict[str, list[float | None]] | None:
    """The sequence model's loss and validation NDCG@10 by epoch; None where there is none."""
    folder = project.folder('retrieval')
    if not (folder / retriever.FILE).exists():
        return None
    log = retriever.load(folder).log
    return {name: [row[name] for row in log] for name in ('epoch', 'loss', 'NDCG@10')}


# --- metrics at every K -----------------------------------------------------------------------


def metrics_at_k(runs: Sequence[Run]) -> dict[str, Any]:
    """HR@K and NDCG@K for K = 1 … CUTOFF, means over the users of the runs."""
    ks = list(range(1, CUTOFF + 1))
    return {
        'users': len(runs[0].users),
        'ks': ks,
        'systems': {
            run.system: {
                'HR': [_mean(hit_rate(run.ranks, k)) for k in ks],
                'NDCG': [_mean(ndcg(run.ranks, k)) for k in ks],
            }
            for run in runs
        },
    }


def recall_at_k(runs: Sequence[Run], items: int) -> dict[str, Any]:
    """How many users' targets are among the first K of the whole catalogue, as a share.

    Args:
      runs: over the same users.
      items: of the catalogue; no K is larger.
    """
    ks = [k for k in RECALL_AT if k < items] + [items] * (items <= RECALL_AT[-1])
    systems = {run.system: [_mean(recall(run.ranks, k)) for k in ks] for run in runs}
    return {'users': len(runs[0].users), 'ks': ks, 'systems': systems}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


# --- example users ----------------------------------------------------------------------------


def draw_examples(users: np.ndarray, seed: int) -> np.ndarray:
    """At most EXAMPLES of the users [U'], ascending; what was made of them plays no part."""
    return np.sort(np.random.default_rng([seed, 10]).permutation(users)[:EXAMPLES])


def write_prompts(project: Project, users: np.ndarray, items: np.ndarray) -> None:
    """What the prompts of the example users say of them -> `ranking/examples.json`.

    The report does not need the model, and only the model's tokenizer knows what a prompt had room
    for; so the ranking writes this.

    Args:
      project: of the run.
      users: [U'] all test users that are ranked.
      items: [U', C] their candidates.
    """
    config, split = project.config, project.dataset.split
    drawn = draw_examples(users, config.seed)
    histories = [split.history(user, 'test') for user in drawn]
    profiles = project.profiles([history.tolist() for history in histories])
    entries = []
    for user, history, profile in zip(drawn, histories, profiles):
        candidates = items[np.searchsorted(users, user)]
        prompt, _ = ranking_prompt(
            project.encoder,
            config.prompts,
            history,
            profile,
            candidates[candidates >= 0],
            seed=order_seed(config, user),
        )
        shown = min(len(history), config.prompts.history) - prompt.history_cut
        entries.append({'user': int(user), 'history': shown, 'profile': list(profile)})
    storage.write_json(project.folder('ranking') / 'examples.json', entries)


def examples(
    project: Project, ranked: Mapping[str, Run], scored: Mapping[str, Scored]
) -> dict[str, Any]:
    """Some users whose candidates the LLM ranked: history, profile, and every ranking of them.

    A place is [first, last], as tied items share several.
    """
    config = project.config
    llm = scored['llm_zero_shot'].users
    names = [name for name in SHOWN[1:] if name in ranked]
    found = read_candidates(project, 'test')
    path, prompts = project.folder('ranking') / 'examples.json', {}
    if path.exists():  # rankings of earlier versions lack it
        prompts = {entry['user']: entry for entry in storage.read_json(path)}
    entries = []
    for user in draw_examples(llm, config.seed).tolist():
        row = np.searchsorted(found.users, user)
        width = slice(config.ranking.candidates)
        lists = {'retriever': (found.items[row, width], found.scores[row, width])}
        for name in names[1:]:
            of = scored[name]
            at = np.searchsorted(of.users, user)
            lists[name] = of.items[at], of.scores[at]
        targets = {name: _target_place(ranked[name], user) for name in names}
        entries.append(_example(project, user, lists, targets, prompts.get(user)))
    return {'seed': config.seed, 'of': len(llm), 'hit': HIT, 'systems': names, 'users': entries}


def _target_place(run: Run, user: int) -> dict[str, Any]:
    """Where the target stands, None where it is not ranked, and what of a hit that is."""
    ranks = run.ranks.take(np.flatnonzero(run.users == user))
    first = int(ranks.greater[0]) + 1
    place = [first, first + int(ranks.ties[0])] if ranks.found[0] else None
    return {'place': place, 'hit': float(hit_rate(ranks, HIT)[0])}


def _example(
    project: Project,
    user: int,
    lists: Mapping[str, tuple[np.ndarray, np.ndarray]],
    targets: Mapping[str, Any],
    prompt: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """One user.

    Args:
      project: of the run.
      user: dense user.
      lists: items and their scores by system, the retriever's first.
      targets: the target's place by system.
      prompt: what the prompt says of the user; None where that is not known.
    """
    split, catalogue = project.dataset.split, project.dataset.catalogue
    history, target = split.history(user, 'test'), split.target(user, 'test')
    shown = prompt['history'] if prompt else min(len(history), project.config.prompts.history)
    places: dict[int, dict[str, list[int]]] = {}
    for name, (items, scores) in lists.items():
        for item, place in zip(items.tolist(), item_places(items, scores)):
            if item > 0:
                places.setdefault(item, {})[name] = place
    listed = {
        item: of_item
        for item, of_item in places.items()
        if len(places) <= LISTED or item == target or min(of_item.values())[0] <= HIT
    }
    return {
        'user': project.dataset.user_ids[user],
        'items': len(history),
        'history': [catalogue.titles[item] for item in history[len(history) - shown :]],
        'history_known': prompt is not None,
        'profile': prompt and prompt['profile'],
        'target': catalogue.titles[target],
        'targets': targets,
        'left_out': len(places) - len(listed),
        'candidates': [
            {'title': catalogue.titles[item], 'target': item == target, 'places': of_item}
            for item, of_item in listed.items()
        ],
    }


def item_places(items: np.ndarray, scores: np.ndarray) -> list[list[int]]:
    """[first, last] place of each item [C] by its score [C]; unfilled slots, of -1, take none."""
    filled = items >= 0
    above = ((scores[None] > scores[:, None]) & filled).sum(1)
    equal = ((scores[None] == scores[:, None]) & filled).sum(1)
    return [[int(a) + 1, int(a + e)] for a, e in zip(above, equal)]
