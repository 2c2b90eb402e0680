"""One user's exact prompt as text, with all that a reader may ask about it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from palr_jax import data, storage
from palr_jax.errors import InputError
from palr_jax.finetune.input import example_prompt
from palr_jax.llm_input import drawn_examples, example_profiles, training_examples
from palr_jax.project import Project, load_data, order_seed, read_candidates
from palr_jax.prompts.encode import Prompt
from palr_jax.prompts.tasks import split_users
from palr_jax.ranking.users import ranking_prompt
from palr_jax.stages import config_part, has_stage

PARTS = ('test', 'valid', 'train')
NOT_LISTED = 'this task lists none'
# Of an example's candidates, by `tasks.candidates_from`.
ORIGINS = {
    'similar': 'the targets and negatives like them',
    'retriever': 'retrieved without the user',
    'covisitation': 'retrieved without the user, by co-visitation',
}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A prompt and its answer.

    Attributes:
      heading: whose prompt it is.
      prompt: encoded.
      answer: [A] int32 tokens that are scored or learned.
      history: all items that the user has before the answer, oldest first.
      most: of the history, the prompt shows at most so many.
      profile: its keywords.
      candidates: as listed.
      origin: where the candidates come from.
      targets: the items of the answer.
    """

    heading: str
    prompt: Prompt
    answer: np.ndarray
    history: Sequence[int]
    most: int
    profile: tuple[str, ...]
    candidates: Sequence[int]
    origin: str
    targets: Sequence[int]


def open_project(config: ConfigDict, workdir: epath.PathLike | None) -> Project:
    """The project of a run; without a workdir, or before its data stage, the data is made here.

    Raises:
      InputError: the run in `workdir` was made from other data or with another retriever.
    """
    project = Project(config, workdir)
    if not _finished(project, 'data'):
        source, split = load_data(config.data)
        project.dataset = data.Dataset(
            source.catalogue, split, source.interactions.user_ids, source.record
        )
    return project


def find_user(user_ids: Sequence[str], raw: str) -> int:
    """The dense user of a raw id.

    Raises:
      InputError: there is none.
    """
    if raw not in user_ids:
        raise InputError(
            f'--user={raw} is not among the {len(user_ids):,} users of the data set; '
            f'allowed are {", ".join(user_ids[:3])}, …'
        )
    return user_ids.index(raw)


def show_example(project: Project, user: int, task: str | None, number: int) -> Shown:
    """A fine-tuning example of a user, the `number`-th (from 1) of those with this task.

    Raises:
      InputError: there is no such example, or its candidates are not retrieved yet.
    """
    config, split = project.config, project.dataset.split
    name = project.dataset.user_ids[user]
    ours, others = split_users(split, config.tasks.users, config.seed)
    examples = []
    if user in ours or user in others:
        examples = training_examples(project, [user])
    chosen = [e for e in examples if task in (None, e.task)]
    if number > len(chosen):
        of_task = f' of the task {task}' if task else ''
        raise InputError(
            f'--example={number}: user {name} has {len(chosen)} fine-tuning examples{of_task}, '
            f'from {split.train_end[user]} training items.'
        )
    example = chosen[number - 1]
    (profile,) = example_profiles(project, [example])
    prompt, answer = example_prompt(example, project.encoder, profile, config.finetune.length)
    gives = 'is' if user in ours else 'is not'
    return Shown(
        f'user {name}, train, {example.task}, example {number} of {len(chosen)}; the user {gives} '
        f'among the {len(ours):,} drawn to give examples',
        prompt,
        answer,
        example.past,
        config.prompts.history,
        profile,
        example.candidates,
        ORIGINS[config.tasks.candidates_from] if example.candidates else NOT_LISTED,
        example.targets,
    )


def show_query(project: Project, user: int, part: str, task: str | None) -> Shown:
    """What the LLM ranks for a user, and the target as it would be answered.

    Args:
      project: without a finished retrieval, a training example's candidates stand in.
      user: dense user.
      part: 'valid' or 'test'.
      task: 'recommend' leaves the candidates out; None does as the config says.

    Raises:
      InputError: the user has no target.
    """
    split, prompts = project.dataset.split, project.config.prompts
    name, target = project.dataset.user_ids[user], split.target(user, part)
    if not target:
        raise InputError(f'--part={part}: user {name} has no {part} target; allowed: train.')
    if task is not None:
        prompts = prompts.copy_and_resolve_references()
        prompts.candidates = task == 'recommend_retrieval'
    history = split.history(user, part)
    (profile,) = project.profiles([history.tolist()])
    items, origin = np.zeros(0, np.int32), NOT_LISTED
    if prompts.candidates:
        items, origin = _candidates(project, user, part, history)
    seed = order_seed(project.config, user)
    prompt, listed = ranking_prompt(project.encoder, prompts, history, profile, items, seed)
    answer = np.zeros(0, np.int32)  # a target that is not listed has no number
    if target in listed or not project.encoder.numbered:
        (answer,) = project.encoder.replies([target], listed)
    return Shown(
        f'user {name}, {part}, {"recommend_retrieval" if prompts.candidates else "recommend"}',
        prompt,
        answer,
        history.tolist(),
        prompts.history,
        profile,
        listed,
        origin,
        (target,),
    )


def render(shown: Shown, project: Project) -> str:
    """Prompt, answer, token counts, what was cut, and where the targets stand."""
    decode = project.checkpoint.tokenizer.decode
    spans = {name: end - start for name, (start, end) in shown.prompt.spans.items()}
    total = len(shown.prompt.tokens)
    kept = min(len(shown.history), shown.most) - shown.prompt.history_cut
    older = len(shown.history) - kept - shown.prompt.history_cut
    rows = [
        ('wording', total - sum(spans.values()), ''),
        (
            'history',
            spans.get('history', 0),
            f'the last {kept} of {_items(shown.history)}: {older} are beyond prompts.history, '
            f'{shown.prompt.history_cut} were cut to keep to the length',
        ),
        ('profile', spans.get('profile', 0), ', '.join(shown.profile)),
        (
            'candidates',
            spans.get('candidates', 0),
            f'{_items(shown.candidates)}: {shown.origin}',
        ),
        ('prompt', total, 'all of the above'),
        ('answer', len(shown.answer), _items(shown.targets)),
    ]
    return '\n'.join(
        [
            decode(shown.prompt.tokens) + decode(shown.answer),
            '',
            f'--- {shown.heading}',
            f'{"part":<11}{"tokens":>7}',
            *(f'{name:<11}{count:>7,}  {note}'.rstrip() for name, count, note in rows),
            *(_place(shown, target, kept, project) for target in shown.targets),
        ]
    )


def _place(shown: Shown, target: int, kept: int, project: Project) -> str:
    """Where a target stands, by its id: titles repeat."""
    where = []
    if target in shown.history[len(shown.history) - kept :]:
        where.append('in the history')
    if target in shown.candidates:
        place = list(shown.candidates).index(target) + 1
        where.append(f'{place} of {len(shown.candidates)} candidates')
    raw = project.dataset.catalogue.raw_ids[target]
    return (
        f'target {project.encoder.item_text(target)}, item {raw}: '
        f'{" and ".join(where) or "nowhere in the prompt"}'
    )


def _items(items: Sequence[int]) -> str:
    return f'{len(items)} item' + ('' if len(items) == 1 else 's')


def _candidates(
    project: Project, user: int, part: str, history: np.ndarray
) -> tuple[np.ndarray, str]:
    if _finished(project, 'retrieval'):
        found = read_candidates(project, part)
        items = found.items[np.searchsorted(found.users, user)][: project.config.ranking.candidates]
        return items[items >= 0], 'retrieved'
    if project.dataset.split.train_end[user] < 2:
        return np.zeros(0, np.int32), 'nothing is retrieved yet'
    config = project.config.copy_and_resolve_references()
    tasks = config.tasks
    tasks.update({'recommend_retrieval': 1.0, 'candidates_from': 'similar'})
    tasks.candidates = max(tasks.candidates, tasks.targets + 1)  # lists of targets are refused
    other = Project(config, None)
    other.dataset = project.dataset
    listed = drawn_examples(other, [user])[0].candidates
    items = np.array([item for item in listed if item not in history], np.int32)
    return items, 'of a training example, as nothing is retrieved yet'


def _finished(project: Project, stage: str) -> bool:
    """Whether the run has this stage, from the same fields."""
    if project.workdir is None or not has_stage(project.workdir, stage):
        return False
    stored = storage.read_json(project.folder(stage) / 'stage.json')['config']
    if stored != config_part(project.config, stage):
        raise InputError(
            f'--workdir={project.workdir}: the stage {stage} was run with another config.{stage}; '
            'allowed: the same, or no --workdir.'
        )
    return True
