"""Does a fused row of ranking_study.py hold for the users whom the study has not ranked?

    python benchmarks/ranking_confirm.py --data=beauty --path=amazon-beauty \\
        --workdir=runs/ranking_beauty --weight=0.05 --study-users=2000 --users=10000 \\
        --out=docs/results/ranking_confirm_beauty.json

A row that was picked out of several because it is significant has to be seen again: with the
weight that it had, and for users who played no part. They are ranked by the untuned model's sums of
the titles.

Fusing brings something even if the second score says nothing of the user: it prefers some titles to
others, and it parts ties. So the same fusion is made with every user's scores dealt to another
user, many times; how many of these deals are at least as good as the users' own scores is a
permutation test of whether the model reads the user.
"""

import argparse
from pathlib import Path

import numpy as np
from absl import logging
from ranking_study import DATA, VARIANTS, base_config, configure, copy_base

from palr_jax import evaluation, pipeline, retrieval, storage
from palr_jax.evaluation import Comparison, Run, rank_targets
from palr_jax.evaluation.metrics import TargetRanks, ndcg
from palr_jax.project import Project, ranked_users, retriever_scores, sample_users
from palr_jax.ranking.fuse import fuse, shuffle_users

VARIANT, SYSTEM = 'zero-title', 'llm_zero_shot'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', choices=DATA, required=True)
    parser.add_argument('--path', help='config.data.path, where it is not to be fetched')
    parser.add_argument('--workdir', type=Path, required=True, help='of the study, or a new one')
    parser.add_argument('--weight', type=float, required=True, help='of the LLM, from the study')
    parser.add_argument('--study-users', type=int, required=True, help='--users of the study')
    parser.add_argument('--users', type=int, default=0, help='others, a sample; 0 is all')
    parser.add_argument('--batch-size', type=int, default=1, help='users a call; 1 on a CPU')
    parser.add_argument('--deals', type=int, default=999, help="of other users' scores")
    parser.add_argument('--out', type=Path, required=True, help='JSON file of the result')
    arguments = parser.parse_args()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)

    base = base_config(arguments.data, arguments.path, arguments.batch_size)
    config = configure(base, *VARIANTS[VARIANT])
    config.ranking.update({'normalize': 'sum', 'max_shapes': 8})
    # A sample begins as a smaller one of the same seed does: with the study's users.
    config.ranking.users = arguments.users and arguments.study_users + arguments.users
    config.ranking.valid_users = 200  # the report wants a fusion weight; it is not read here
    folder = arguments.workdir / 'confirm'
    copy_base(base, arguments.workdir, folder)
    pipeline.run(config, folder)

    project = Project(config, folder)
    possible = project.dataset.split.users('test')
    seen = sample_users(possible, arguments.study_users, config.ranking.users_seed)
    users = np.setdiff1d(ranked_users(project, 'test'), seen)
    scores = project.sums(SYSTEM, 'test')
    rows = np.flatnonzero(np.isin(scores.users, users))
    found, items = scores.users[rows], scores.items[rows]
    targets = project.dataset.split.targets('test')[found]
    own = scores.normalized('sum')[rows]
    by_retriever = retriever_scores(project, scores, 'test')[rows]

    def ranks(values: np.ndarray) -> TargetRanks:
        ranked = rank_targets(items, values, targets, found)
        return ranked.spread(np.searchsorted(users, found), len(users))

    listed, of_everyone = retrieval.read_ranks(folder / 'retrieval', 'retriever', 'test')
    about = {'user_set': evaluation.sampled(users, config.seed), 'mode': 'title'}
    retriever = Run(
        'retriever',
        users,
        of_everyone.take(np.searchsorted(listed, users)),
        user_set=about['user_set'],
    )
    alone = Run(SYSTEM, users, ranks(own), **about)
    fused = Run(
        'fused',
        users,
        ranks(fuse(by_retriever, own, arguments.weight)),
        variant=f'weight {arguments.weight:g}',
        **about,
    )
    report = evaluation.build(
        dataset=project.dataset.record,
        retrieval={},
        runs=[retriever, alone, fused],
        comparisons=[Comparison(fused, retriever, 'NDCG@10')],
        timing={},
        versions={},
        seed=config.seed,
        candidates=config.ranking.candidates,
        resamples=config.evaluation.resamples,
    )
    of_others = np.array(
        [
            ndcg(ranks(fuse(by_retriever, shuffle_users(own, seed), arguments.weight)), 10).mean()
            for seed in range(arguments.deals)
        ]
    )
    as_good = int((of_others >= ndcg(fused.ranks, 10).mean()).sum())
    lowest, median, highest = np.quantile(of_others, (0.025, 0.5, 0.975))
    report['other_users_scores'] = {
        'deals': arguments.deals,
        'NDCG@10': {'mean': of_others.mean(), 'median': median, 'middle95': [lowest, highest]},
        'as_good': as_good,
        'p_value': (1 + as_good) / (1 + arguments.deals),
    }
    storage.write_json(arguments.out, report)
    print(evaluation.table(report))
    print(
        f"Fused with another user's scores, {arguments.deals} deals: NDCG@10 "
        f'{of_others.mean():.4f} ({lowest:.4f} to {highest:.4f}); {as_good} as good as the own.'
    )


if __name__ == '__main__':
    main()
