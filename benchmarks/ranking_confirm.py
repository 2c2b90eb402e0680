"""Does a fused row of ranking_study.py hold for the users whom the study has not ranked?

    python benchmarks/ranking_confirm.py --data=beauty --path=amazon-beauty \\
        --workdir=runs/ranking_beauty --weight=0.05 --study-users=2000 --users=10000 \\
        --batch-size=1 --out=docs/results/ranking_confirm_beauty.json

A row that was picked out of several because it is significant has to be seen again: with the
weight that it had, and for users who played no part. They are ranked by the untuned model's sums of
the titles.

Fusing brings something even if the second score says nothing of the user: it prefers some titles to
others, and it parts ties. So the same fusion is made with every user's scores dealt to another
user, many times; how many of these deals are at least as good as the users' own scores is a
permutation test of whether the model reads the user.
"""

import numpy as np
from absl import logging
from ranking_study import (
    VARIANTS,
    base_config,
    build_report,
    configure,
    copy_base,
    make_base,
    make_parser,
    retriever_row,
)

from palr_jax import evaluation, pipeline, storage
from palr_jax.evaluation import Run, rank_targets
from palr_jax.evaluation.metrics import TargetRanks, ndcg
from palr_jax.project import Project, ranked_users, retriever_scores, sample_users
from palr_jax.ranking.fuse import fuse, shuffle_users

VARIANT, SYSTEM = 'zero-title', 'llm_zero_shot'


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--weight', type=float, required=True, help='of the LLM, from the study')
    parser.add_argument('--study-users', type=int, required=True, help='--users of the study')
    parser.add_argument('--users', type=int, default=0, help='others, a sample; 0 is all')
    parser.add_argument('--deals', type=int, default=999, help="of other users' scores")
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
    make_base(base, arguments.workdir)
    copy_base(arguments.workdir, folder)
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

    retriever = retriever_row(project, users)
    about = {'user_set': retriever.user_set, 'mode': 'title'}
    alone = Run(SYSTEM, users, ranks(own), **about)
    fused = Run(
        'fused',
        users,
        ranks(fuse(by_retriever, own, arguments.weight)),
        variant=f'weight {arguments.weight:g}',
        **about,
    )
    report = build_report(project, [retriever, alone, fused], [fused])
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
