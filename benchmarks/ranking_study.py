"""SmolLM2 untuned, tuned to write and tuned to rank, in every way of ranking, alone and fused.

    python benchmarks/ranking_study.py --data=ml100k --workdir=runs/ranking_ml100k \\
        --out=docs/results/ranking_ml100k.json

Every variant is a run of the pipeline in a folder of its own; data, retriever and the scores of the
untuned model are shared. A run of configs/ml1m.py or configs/beauty.py has the retriever of those
data already: its folders data/ and retrieval/ can be copied to WORKDIR/base (Beauty's, if the base
model read its texts in bfloat16). The same command
continues after an interruption. All variants rank the same candidates of the same users; users
whose target was not retrieved count as misses unscored. The JSON holds each variant's report, and
the rows of the normalisations of a title's score, each with a fusion weight of its own from the
validation users.

The sizes are those of an accelerator, where a variant takes a few minutes; a sample of the users
(--users, --valid-users) is what a CPU can rank.
"""

import argparse
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
from palr_jax.ranking.users import Scores

CONFIGS = Path(__file__).parents[1] / 'configs'
BASE = ('data', 'retrieval')


def ml100k() -> ConfigDict:
    config = default_config()
    config.retrieval.systems = ('sequence', 'covisitation')
    config.tasks.users = 0.8
    config.tasks.folds = 2
    config.tasks.retriever_epochs = 20
    config.tasks.examples_per_user = 40
    config.finetune.decay_steps = config.finetune.steps = 250
    return config


def strong(name: str, retriever_epochs: int, steps: int) -> ConfigDict:
    """The strong retriever, and for the lists of training two of fewer epochs."""
    config = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config']('strong')
    config.tasks.update({'users': 0.5, 'folds': 2, 'examples_per_user': 20})
    config.tasks.retriever_epochs = retriever_epochs
    config.finetune.decay_steps = config.finetune.steps = steps
    return config


def ml1m() -> ConfigDict:
    return strong('ml1m', retriever_epochs=8, steps=500)


def beauty() -> ConfigDict:
    config = strong('beauty', retriever_epochs=12, steps=350)
    config.prompts.item = 'title'  # an id costs as many tokens and says nothing
    config.prompts.title_words = 16
    return config


DATA = {'ml100k': ml100k, 'ml1m': ml1m, 'beauty': beauty}
# How lists are learned: alone, beside the retriever, or beside it and less the untuned model. The
# weight .5 makes the choices in the training lists likeliest (MovieLens-1M).
LISTS = {
    'listwise': {},
    'residual': {'retriever_weight': 0.5},
    'boosted': {'retriever_weight': 0.5, 'less_untuned': True},
}
# Name: (what is learned, how it ranks, how an answer reads). `free` writes titles without a list.
VARIANTS = {
    'zero-title': (None, 'title', 'title'),
    'zero-index': (None, 'index', 'index'),
    'zero-generate': (None, 'generate', 'title'),
    'zero-free': (None, 'free', 'title'),
    'sft-title': ('sft', 'title', 'title'),
    'listwise-title': ('listwise', 'title', 'title'),
    'listwise-index': ('listwise', 'index', 'index'),
    'sft-index': ('sft', 'index', 'index'),
    'sft-generate': ('sft', 'generate', 'title'),
    'listwise-generate': ('listwise', 'generate', 'title'),
    'residual-title': ('residual', 'title', 'title'),
    'residual-index': ('residual', 'index', 'index'),
    'boosted-title': ('boosted', 'title', 'title'),
}


def base_config(data: str, path: str | None, batch_size: int) -> ConfigDict:
    """What all variants have in common."""
    base = DATA[data]()
    base.model.update({'dtype': 'bfloat16', 'matmul_precision': 'default'})
    if path:
        base.data.path = path
    base.ranking.update({'batch_size': batch_size, 'max_shapes': 2})
    return base


def configure(base: ConfigDict, learned: str | None, mode: str, answer: str) -> ConfigDict:
    config = base.copy_and_resolve_references()
    config.prompts.update({'history': 20, 'answer': answer})
    config.ranking.update({'candidates': 20, 'mode': mode, 'skip_misses': True})
    if mode in ('generate', 'free'):
        config.ranking.orders = 1  # what is written has no scores to average
    if mode == 'free':
        config.prompts.candidates = False
        config.ranking.update({'mode': 'generate', 'skip_misses': False})
        config.tasks.recommend_retrieval = 0.0
    # What lists train is the sum itself.
    config.ranking.normalize = 'sum' if mode == 'index' or learned in LISTS else 'prior'
    config.lora.targets = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
    config.finetune.update({'learning_rate': 1e-3, 'warmup': 20, 'checkpoint_every': 100})
    config.finetune.update({'batch_size': 32, 'max_shapes': 2, 'held_out': 64})
    if config.prompts.title_words:  # Beauty's prompts are twice as long
        config.finetune.batch_size = 16
    if learned is None:
        config.stages = (*BASE, 'ranking', 'report')
    elif learned == 'sft':
        config.tasks.recommend_retrieval = 1.0 if mode == 'index' else 0.5
        config.tasks.examples_per_user = 10
        config.finetune.batch_size = 16
    else:
        config.finetune.objective = 'listwise'
        config.finetune.update(LISTS[learned])
        config.finetune.temperature = 1.0 if mode == 'index' else 2.0
        if learned == 'boosted':
            config.finetune.temperature = 1.0
            config.ranking.normalize = 'untuned'
        # The next item alone, as the ranking asks for it.
        config.tasks.update({'recommend_retrieval': 1.0, 'candidates_from': 'retriever'})
        config.tasks.update({'targets': 1, 'enrich': False, 'swap': 0.0})
    return config


def run_variant(name: str, base: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs a variant in `workdir/NAME`, with what others have done already."""
    learned, mode, answer = VARIANTS[name]
    folder = workdir / name
    copy_base(workdir, folder)
    if learned:
        untuned = workdir / f'zero-{mode}' / 'ranking'
        for path in untuned.glob('llm_zero_shot*.npz'):
            copy(path, folder / 'ranking' / path.name)
        if mode == 'generate':  # the same model writes that was asked for likelihoods
            copy(workdir / f'{learned}-title' / 'finetune', folder / 'finetune')
    if learned in LISTS:  # all learn from the same lists
        lists = Path('finetune') / 'candidates.npz'
        for path in (workdir / other / lists for other in VARIANTS):
            if path.exists():
                copy(path, folder / lists)
    return pipeline.run(configure(base, learned, mode, answer), folder)


def make_base(base: ConfigDict, workdir: Path) -> None:
    """Data and retriever, which all variants share -> `workdir/base`."""
    config = base.copy_and_resolve_references()
    config.stages = BASE
    pipeline.run(config, workdir / 'base')


def copy_base(workdir: Path, folder: Path) -> None:
    for stage in BASE:
        copy(workdir / 'base' / stage, folder / stage)


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
    valid, test = (project.sums(system, part) for part in ('valid', 'test'))
    in_valid, in_test = (by_normalization(project, system, part) for part in ('valid', 'test'))
    users = ranked_users(project, 'test')
    about = {
        'user_set': evaluation.sampled(users, project.config.seed),
        'mode': mode,
        'objective': learned,
    }
    rows = []
    for how, alone in in_test.items():
        weight, _ = weigh(project, valid, in_valid[how])
        fused = fuse(retriever_scores(project, test, 'test'), alone, weight)
        for kind, found in ((system, alone), ('fused', fused)):
            targets = project.dataset.split.targets('test')[test.users]
            ranks = rank_targets(test.items, found, targets, test.users)
            ranks = ranks.spread(np.searchsorted(users, test.users), len(users))
            variant = how if kind == system else f'{how}, weight {weight:g}'
            rows.append(Run(kind, users, ranks, variant=variant, **about))
    return rows


def by_normalization(project: Project, system: str, part: str) -> dict[str, np.ndarray]:
    """The scores [U', C] in every normalisation; less others only where these were asked."""
    sums = project.sums(system, part)
    scores = {how: sums.normalized(how) for how in ('sum', 'token', 'byte')}
    less = project.config.ranking.normalize
    if less in ('prior', 'untuned'):
        scores[less] = project.llm_scores(system, part).normalized(less)
    return scores


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
    retriever = retriever_row(project, ranked_users(project, 'test'))
    rows = normalizations(name, base, workdir)
    fused = [row for row in rows if row.system == 'fused']
    return build_report(project, [retriever, *rows], fused)


def retriever_row(project: Project, users: np.ndarray) -> Run:
    everyone, ranks = retrieval.read_ranks(project.workdir / 'retrieval', 'retriever', 'test')
    set_of = evaluation.sampled(users, project.config.seed)
    return Run('retriever', users, ranks.take(np.searchsorted(everyone, users)), user_set=set_of)


def build_report(project: Project, rows: list[Run], fused: list[Run]) -> dict[str, Any]:
    """The report of `rows`; `fused` are compared with the first of them, the retriever's."""
    return evaluation.build(
        dataset=project.dataset.record,
        retrieval={},
        runs=rows,
        comparisons=[Comparison(row, rows[0], 'NDCG@10') for row in fused],
        timing={},
        versions={},
        seed=project.config.seed,
        candidates=project.config.ranking.candidates,
        resamples=project.config.evaluation.resamples,
    )


def make_parser(about: str) -> argparse.ArgumentParser:
    """Of what every command on a study's workdir is told."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument('--data', choices=DATA, required=True)
    parser.add_argument('--path', help='config.data.path, where it is not to be fetched')
    parser.add_argument('--workdir', type=Path, required=True, help='of all runs')
    parser.add_argument('--out', type=Path, required=True, help='JSON file of the result')
    parser.add_argument('--batch-size', type=int, default=32, help='users a call; 1 on a CPU')
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--users', type=int, default=0, help='of test, a sample; 0 is all')
    parser.add_argument('--valid-users', type=int, default=0, help='the same of validation')
    parser.add_argument(
        '--orders', type=int, default=1, help='of each list, whose scores are averaged'
    )
    parser.add_argument('--variants', default=','.join(VARIANTS), help='which, in this order')
    arguments = parser.parse_args()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)

    base = base_config(arguments.data, arguments.path, arguments.batch_size)
    base.ranking.update({'users': arguments.users, 'valid_users': arguments.valid_users})
    base.ranking.orders = arguments.orders
    make_base(base, arguments.workdir)
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
