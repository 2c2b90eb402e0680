"""SmolLM2 untuned, tuned to write and tuned to rank, in every way of ranking, alone and fused.

    python benchmarks/ranking_study.py --data=ml100k --workdir=runs/ranking_ml100k \\
        --out=docs/results/ranking_ml100k.json

Every variant is a run of the pipeline in a folder of its own; data, retriever and the scores of the
untuned model are shared. A run of configs/ml1m.py or configs/beauty.py has the retriever of those
data already: its folders data/ and retrieval/ can be copied to WORKDIR/base. The same command
continues after an interruption. All variants rank the same candidates of the same users; users
whose target was not retrieved count as misses unscored. The JSON holds each variant's report, and
the rows of the four normalisations of a title's score, each with a fusion weight of its own from
the validation users.
"""

import argparse
import functools
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from palr_jax import evaluation, pipeline, retrieval, storage
from palr_jax.config import default_config
from palr_jax.evaluation import Comparison, Run, rank_targets
from palr_jax.project import Project, ranked_users, retriever_scores
from palr_jax.ranking.fuse import choose_weight, fuse
from palr_jax.ranking.users import Scores, read_scores

CONFIGS = Path(__file__).parents[1] / 'configs'
NORMALIZATIONS = ('sum', 'token', 'byte', 'prior')
BASE = ('data', 'retrieval')


def ml100k() -> ConfigDict:
    config = default_config()
    config.retrieval.systems = ('sequence', 'covisitation')
    config.tasks.users = 0.5
    config.tasks.candidates_from = 'retriever'
    config.tasks.folds = 2
    config.finetune.decay_steps = config.finetune.steps = 120
    config.ranking.users = 400
    config.ranking.valid_users = 300
    return config


def strong(name: str) -> ConfigDict:
    """The data set's strong retriever, lists of co-visitation, and a history of ten items."""
    config = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config']('strong')
    config.tasks.candidates_from = 'covisitation'
    config.tasks.users = 0.1
    config.finetune.decay_steps = config.finetune.steps = 240
    config.ranking.users = 1000
    config.ranking.valid_users = 600
    return config


DATA = {
    'ml100k': ml100k,
    'ml1m': functools.partial(strong, 'ml1m'),
    'beauty': functools.partial(strong, 'beauty'),
}
# Name: (what is learned, how it ranks, how an answer reads)
VARIANTS = {
    'zero-title': (None, 'title', 'title'),
    'zero-index': (None, 'index', 'index'),
    'zero-generate': (None, 'generate', 'title'),
    'sft-title': ('sft', 'title', 'title'),
    'listwise-title': ('listwise', 'title', 'title'),
    'listwise-index': ('listwise', 'index', 'index'),
    'sft-index': ('sft', 'index', 'index'),
    'sft-generate': ('sft', 'generate', 'title'),
    'listwise-generate': ('listwise', 'generate', 'title'),
}


def configure(base: ConfigDict, learned: str | None, mode: str, answer: str) -> ConfigDict:
    config = base.copy_and_resolve_references()
    config.prompts.update({'history': 10, 'answer': answer})
    # One pass keeps two cores busy with one user; writing reads all weights for every token.
    batch_size = 8 if mode == 'generate' else 1
    config.ranking.update({'candidates': 20, 'mode': mode, 'skip_misses': True})
    config.ranking.batch_size = batch_size
    config.ranking.normalize = 'sum' if mode == 'index' else 'prior'
    config.lora.update({'rank': 16, 'alpha': 32.0})
    config.lora.targets = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
    config.finetune.held_out = 32
    config.finetune.checkpoint_every = 10
    if learned is None:
        config.stages = (*BASE, 'ranking', 'report')
    elif learned == 'sft':  # the paper's examples, a row each: about four a batch
        config.finetune.update({'batch_size': 2, 'pack': False})
        config.tasks.recommend_retrieval = 1.0 if mode == 'index' else 0.5
    else:
        config.finetune.batch_size = 4
        config.finetune.objective = learned
        config.tasks.recommend_retrieval = 1.0
    if config.finetune.objective == 'sft':
        config.tasks.candidates_from = 'similar'
    return config


def run_variant(name: str, base: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs a variant in `workdir/NAME`, with what others have done already."""
    learned, mode, answer = VARIANTS[name]
    folder = workdir / name
    for stage in BASE:
        copy(workdir / 'base' / stage, folder / stage)
    if learned:
        untuned = workdir / f'zero-{mode}' / 'ranking'
        for path in untuned.glob('llm_zero_shot*_test.npz'):
            copy(path, folder / 'ranking' / path.name)
        if mode == 'generate':  # the same model writes that was asked for likelihoods
            copy(workdir / f'{learned}-title' / 'finetune', folder / 'finetune')
    return pipeline.run(configure(base, learned, mode, answer), folder)


def copy(source: Path, target: Path) -> None:
    """Copies a file or a folder unless it is there."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f'.{target.name}.tmp')
    if source.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
    else:
        shutil.copy(source, partial)
    partial.rename(target)


def normalizations(name: str, base: ConfigDict, workdir: Path) -> list[Run]:
    """The rows of a title variant, alone and fused, for every normalisation."""
    learned, mode, answer = VARIANTS[name]
    project = Project(configure(base, learned, mode, answer), workdir / name)
    system = 'llm' if learned else 'llm_zero_shot'
    parts = {part: sums_and_prior(project, system, part) for part in ('valid', 'test')}
    users = ranked_users(project, 'test')
    about = {
        'user_set': evaluation.sampled(users, project.config.seed),
        'mode': mode,
        'objective': learned,
    }
    rows = []
    for how in NORMALIZATIONS:
        scores = {
            part: (s.less(prior) if how == 'prior' else s).normalized(how)
            for part, (s, prior) in parts.items()
        }
        weight, _ = weigh(project, parts['valid'][0], scores['valid'])
        test = parts['test'][0]
        fused = fuse(retriever_scores(project, test, 'test'), scores['test'], weight)
        for kind, found in ((system, scores['test']), ('fused', fused)):
            targets = project.dataset.split.targets('test')[test.users]
            ranks = rank_targets(test.items, found, targets, test.users)
            ranks = ranks.spread(np.searchsorted(users, test.users), len(users))
            variant = how if kind == system else f'{how}, weight {weight:g}'
            rows.append(Run(kind, users, ranks, variant=variant, **about))
    return rows


def sums_and_prior(project: Project, system: str, part: str) -> tuple[Scores, Scores]:
    paths = project.scores_path(system, part), project.prior_path(system, part)
    return read_scores(paths[0]), read_scores(paths[1])


def weigh(project: Project, valid: Scores, scores: np.ndarray) -> tuple[float, dict]:
    return choose_weight(
        valid.items,
        retriever_scores(project, valid, 'valid'),
        scores,
        project.dataset.split.targets('valid')[valid.users],
        project.config.ranking.fusion_weights,
        len(ranked_users(project, 'valid')),
    )


def title_report(name: str, base: ConfigDict, workdir: Path) -> dict[str, Any]:
    """The rows of all normalisations, and their comparisons with the retriever."""
    project = Project(configure(base, *VARIANTS[name]), workdir / name)
    users = ranked_users(project, 'test')
    everyone, ranks = retrieval.read_ranks(project.workdir / 'retrieval', 'retriever', 'test')
    set_of = evaluation.sampled(users, project.config.seed)
    retriever = Run(
        'retriever', users, ranks.take(np.searchsorted(everyone, users)), user_set=set_of
    )
    rows = normalizations(name, base, workdir)
    fused = [row for row in rows if row.system == 'fused']
    return evaluation.build(
        dataset=project.dataset.record,
        retrieval={},
        runs=[retriever, *rows],
        comparisons=[Comparison(row, retriever, 'NDCG@10') for row in fused],
        timing={},
        versions={},
        seed=project.config.seed,
        candidates=project.config.ranking.candidates,
        resamples=project.config.evaluation.resamples,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', choices=DATA, required=True)
    parser.add_argument('--workdir', type=Path, required=True, help='of all runs')
    parser.add_argument('--out', type=Path, required=True, help='JSON file of the result')
    parser.add_argument('--variants', default=','.join(VARIANTS), help='which, in this order')
    arguments = parser.parse_args()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)

    base = DATA[arguments.data]()
    first = base.copy_and_resolve_references()
    first.stages = BASE
    pipeline.run(first, arguments.workdir / 'base')
    results = storage.read_json(arguments.out) if arguments.out.exists() else {}
    for name in arguments.variants.split(','):
        found = {'report': run_variant(name, base, arguments.workdir)}
        if VARIANTS[name][1] == 'title':
            found['normalizations'] = title_report(name, base, arguments.workdir)
        results[name] = found
        storage.write_json(arguments.out, results)
        print(name, evaluation.table(found['report']), sep='\n', flush=True)


if __name__ == '__main__':
    main()
