"""What the LLM reads: the examples of fine-tuning and the queries of the ranking."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath

from palr_jax import data, retrieval, storage
from palr_jax.errors import InputError
from palr_jax.finetune.input import Tokens, encode_example
from palr_jax.finetune.lists import Choice, encode_choice
from palr_jax.parallel import distributed
from palr_jax.project import Project, order_seed, ranked_users, read_candidates
from palr_jax.prompts.tasks import Example, affinity, make_examples, relist, split_users
from palr_jax.ranking.score import Query
from palr_jax.ranking.users import make_query, score_users
from palr_jax.stages import training_retrieval


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What is learned from, and what tells whether it carries over.

    Attributes:
      examples: of the users who give some.
      held_out: one each of other users.
    """

    examples: list[Example]
    held_out: list[Example]


def make_lessons(project: Project) -> Lessons:
    """The examples of fine-tuning, with the candidates that the config asks for.

    Retrieved candidates are kept in `finetune/candidates.npz`; the users whose examples are held
    out are left out of their retrievers too.
    """
    config = project.config
    ours, others = split_users(project.dataset.split, config.tasks.users, config.seed)
    chosen = np.random.default_rng([config.seed, 4]).permutation(others)
    held = np.sort(chosen[: config.finetune.held_out])
    examples, held_out = (drawn_examples(project, users) for users in (ours, held))
    if training_retrieval(config) is not None:
        distributed.by_one(lambda: retrieve_for_training(project, examples + held_out))
        examples, held_out = (with_retrieved(project, some) for some in (examples, held_out))
    first = {example.user: example for example in reversed(held_out)}
    return Lessons(examples, [first[user] for user in sorted(first)])


def drawn_examples(project: Project, users: Sequence[int]) -> list[Example]:
    """What `make_examples` draws of these users."""
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


def retrieve_for_training(project: Project, examples: Sequence[Example]) -> None:
    """Writes what retrievers without an example's user find after its cut."""
    path = _candidates_path(project)
    if path.exists():
        return
    config, dataset = project.config, project.dataset
    tuning, _ = data.validation_halves(dataset.split, config.seed)
    material = retrieval.Material(
        dataset.split.validating(tuning),
        dataset.catalogue,
        training_retrieval(config),
        config.seed,
        path.parent / 'retrieval',
        project.texts,
    )
    users = np.array([example.user for example in examples])
    pasts = [np.array(example.past) for example in examples]
    found = retrieval.retrieve_out_of_fold(
        material, users, pasts, config.tasks.folds, config.tasks.candidates
    )
    cuts = np.array([len(past) for past in pasts])
    storage.write_arrays(path, users=users, cuts=cuts, items=found.items, scores=found.scores)


def with_retrieved(project: Project, examples: Sequence[Example]) -> list[Example]:
    """The examples with the candidates that `retrieve_for_training` wrote.

    Raises:
      InputError: it has not written theirs.
    """
    config = project.config
    path = None if project.workdir is None else _candidates_path(project)
    if path is None or not path.exists():
        raise InputError(
            f'config.tasks.candidates_from is {config.tasks.candidates_from!r}: fine-tuning '
            'retrieves these lists; allowed: --workdir of a run that has them.'
        )
    stored = storage.read_arrays(path)
    keys = zip(stored['users'].tolist(), stored['cuts'].tolist())
    rows = {key: row for row, key in enumerate(keys)}
    try:
        found = [rows[example.user, len(example.past)] for example in examples]
    except KeyError as error:
        raw_id = project.dataset.user_ids[error.args[0][0]]
        raise InputError(
            f'{path}: the user {raw_id} is not in it; allowed: users who are drawn for fine-tuning.'
        ) from error
    return relist(
        examples,
        stored['items'][found],
        stored['scores'][found],
        project.dataset.split,
        config.tasks,
        order=config.prompts.candidate_order,
        seed=config.seed,
    )


def _candidates_path(project: Project) -> epath.Path:
    return project.folder('finetune') / 'candidates.npz'


def training_examples(project: Project, users: Sequence[int]) -> list[Example]:
    """The examples of these users as fine-tuning has them."""
    examples = drawn_examples(project, users)
    if training_retrieval(project.config) is not None:
        return with_retrieved(project, examples)
    return examples


def encode_examples(project: Project, examples: Sequence[Example]) -> list[Tokens] | list[Choice]:
    """The examples as tokens, or as lists where the objective is one of lists."""
    config = project.config.finetune
    to_choice = functools.partial(encode_choice, retriever_weight=config.retriever_weight)
    encode = encode_example if config.objective == 'sft' else to_choice
    return [
        encode(example, project.encoder, profile, config.length)
        for example, profile in zip(examples, example_profiles(project, examples))
    ]


def less_untuned(
    project: Project, name: str, examples: Sequence[Example], choices: Sequence[Choice]
) -> list[Choice]:
    """The lists of `examples` with what the untuned model says of them taken off as offsets.

    What it says is kept in `finetune/untuned_NAME.npz`, where an interrupted run goes on.
    """
    widest = max((len(example.candidates) for example in examples), default=0)
    items = np.full((len(examples), widest), -1, np.int32)
    for row, example in zip(items, examples):
        row[: len(example.candidates)] = example.candidates
    scores = score_users(
        f'untuned, {name}',
        np.array([example.user for example in examples]),
        items,
        [choice.query for choice in choices],
        project.encoder,
        project.scorer(None),
        project.base,
        project.config.ranking,
        max_positions=project.checkpoint.config.max_positions,
        path=project.folder('finetune') / f'untuned_{name}.npz',
        identity='',  # of this config's base model: a changed one is refused
        unit='lists',
    )
    temperature = project.config.finetune.temperature
    return [
        dataclasses.replace(
            choice, offsets=choice.offsets - said[: len(choice.offsets)] / temperature
        )
        for choice, said in zip(choices, scores.sums)
    ]


def example_profiles(project: Project, examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """The keywords that each example shows: of everything before its cut, or none."""
    if not project.config.tasks.profile:
        return [()] * len(examples)
    return project.profiles([example.past for example in examples])


def make_queries(project: Project, part: str) -> tuple[np.ndarray, np.ndarray, list[Query]]:
    """(users [U'], their candidates [U', C], their prompts) for a seeded sample of a split part.

    With `ranking.skip_misses` without those whose target is no candidate.
    """
    config = project.config
    found = read_candidates(project, part)
    users = ranked_users(project, part)
    items = found.items[np.searchsorted(found.users, users), : config.ranking.candidates]
    if config.ranking.skip_misses:
        hits = (items == project.dataset.split.targets(part)[users, None]).any(axis=1)
        logging.info('ranking: the targets of %d of %d %s users', hits.sum(), len(users), part)
        users, items = users[hits], items[hits]
    queries, cut = queries_of(project, part, users, items)
    logging.info(
        'ranking: %d %s users, %.0f prompt tokens and %.1f tokens an item on average; %d history '
        'items cut to keep to %d tokens',
        len(users),
        part,
        _mean([len(query.prompt) for query in queries]),
        _mean([len(answer) for query in queries for answer in query.candidates]),
        cut,
        config.prompts.length,
    )
    return users, items, queries


def queries_of(
    project: Project,
    part: str,
    users: np.ndarray,
    items: np.ndarray,
    *,
    order: int = 0,
    of_user: bool = True,
) -> tuple[list[Query], int]:
    """(the prompts of users [U'] with candidates [U', C], history items cut from all of them).

    `order` counts the orders in which `ranking.orders` has the candidates listed. Unless `of_user`,
    the prompts say nothing of the user: they have the same candidates in the same order alone.
    """
    config = project.config
    histories = [project.dataset.split.history(user, part) for user in users]
    if not of_user:
        histories = [history[:0] for history in histories]
    profiles = project.profiles([history.tolist() for history in histories])
    made = [
        make_query(
            project.encoder,
            config.prompts,
            history,
            profile,
            candidates[candidates >= 0],
            seed=order_seed(config, user, order),
            name=f'User {project.dataset.user_ids[user]}',
        )
        for user, history, profile, candidates in zip(users, histories, profiles, items)
    ]
    return [query for query, _ in made], sum(cut for _, cut in made)


def _mean(sizes: list[int]) -> float:
    return sum(sizes) / max(1, len(sizes))
