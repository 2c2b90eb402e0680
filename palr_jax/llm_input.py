"""What the LLM reads: the examples of fine-tuning and the queries of the ranking."""

from collections.abc import Sequence

import numpy as np
from absl import logging

from palr_jax.finetune.input import Tokens, encode_example
from palr_jax.project import Project, order_seed, ranked_users, read_candidates
from palr_jax.prompts.tasks import Example, affinity, make_examples
from palr_jax.ranking.score import Query
from palr_jax.ranking.users import make_query


def encode_examples(project: Project, users: np.ndarray) -> tuple[list[Tokens], np.ndarray]:
    """The users' examples as tokens, and the user of each."""
    examples = training_examples(project, users)
    length = project.config.finetune.length
    tokens = [
        encode_example(example, project.encoder, profile, length)
        for example, profile in zip(examples, example_profiles(project, examples))
    ]
    return tokens, np.array([example.user for example in examples], np.int64)


def training_examples(project: Project, users: Sequence[int]) -> list[Example]:
    """The instruction examples of these users, in item ids."""
    config, dataset = project.config, project.dataset
    return make_examples(
        dataset.split,
        dataset.catalogue,
        affinity(dataset.split, dataset.catalogue),
        users,
        config.tasks,
        history=config.prompts.history,
        seed=config.seed,
    )


def example_profiles(project: Project, examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """The keywords that each example shows: of everything before its cut, or none."""
    if not project.config.tasks.profile:
        return [()] * len(examples)
    return project.profiles([example.past for example in examples])


def make_queries(project: Project, part: str) -> tuple[np.ndarray, np.ndarray, list[Query]]:
    """(users [U'], their candidates [U', C], their prompts) for a seeded sample of a split part."""
    config = project.config
    found = read_candidates(project, part)
    users = ranked_users(project, part)
    rows = np.searchsorted(found.users, users)
    items = found.items[rows, : config.ranking.candidates]
    histories = [project.dataset.split.history(user, part) for user in users]
    profiles = project.profiles([history.tolist() for history in histories])
    queries, cut = [], 0
    for user, history, profile, candidates in zip(users, histories, profiles, items):
        query, dropped = make_query(
            project.encoder,
            config.prompts,
            history,
            profile,
            candidates[candidates >= 0],
            seed=order_seed(config, user),
        )
        queries.append(query)
        cut += dropped
    logging.info(
        'ranking: %d %s users, %.0f prompt tokens and %.1f tokens an item on average; %d history '
        'items cut to keep to %d tokens',
        len(users),
        part,
        np.mean([len(query.prompt) for query in queries]),
        np.mean([len(answer) for query in queries for answer in query.candidates]),
        cut,
        config.prompts.length,
    )
    return users, items, queries
