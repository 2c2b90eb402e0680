"""PALR from raw files to the report: the stages in reading order.

    raw files ── data ──▶ Dataset ──▶ retrieval ──▶ Candidates ──▶ ranking ──▶ Scores ──▶ report
                             └──────▶ finetune ──▶ adapter ───────────┘

What is resumed, and why: a stage that finished is not run again (`stages.py` says when that holds).
An interrupted stage continues where its own files say: the retriever from its last validation,
fine-tuning from its newest checkpoint, ranking from the users scored so far.
"""

import contextlib
import functools
import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from palr_jax import data, evaluation, retrieval, storage
from palr_jax.config import validate
from palr_jax.details import write_prompts
from palr_jax.errors import InputError
from palr_jax.evaluation import TargetRanks, rank_targets
from palr_jax.finetune.train import Program, answer_losses, choice_losses, train
from palr_jax.fusion import choose_fusion
from palr_jax.llama import export, hf, lora, peft
from palr_jax.llm_input import (
    encode_examples,
    less_untuned,
    make_lessons,
    make_queries,
    queries_of,
)
from palr_jax.parallel import distributed, rules
from palr_jax.project import (
    Project,
    load_data,
    lora_spec,
    read_candidates,
)
from palr_jax.ranking.generate_users import answer_users, generate_users
from palr_jax.ranking.score import Query
from palr_jax.ranking.users import score_users
from palr_jax.stages import STAGES, Ledger, flatten, retrieval_reads_texts
from palr_jax.summary import alone, write_report

SHARED = ('finetune', 'ranking')  # stages of all processes; process 0 does the others alone


def run(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    overwrite: bool = False,
    shared: bool = False,
) -> dict | None:
    """Runs the stages that `config.stages` names and that are not finished in `workdir`.

    Args:
      config: see `palr_jax/config.py`.
      workdir: where everything is written; the same one continues the run.
      overwrite: redo the stages that a changed config affects, instead of refusing.
      shared: `workdir` is STUDY/variants/NAME, and the stages are shared with other variants (see
        `stages.py`); another process that works on the same is waited for.

    Returns:
      The report as in report/metrics.json, if that stage was asked for.

    Raises:
      InputError: bad input of any kind.
    """
    validate(config)
    with contextlib.ExitStack() as stack:
        distributed.by_one(lambda: stack.enter_context(storage.locked(workdir, wait=shared)))
        return _run(config, workdir, overwrite, shared)


def _run(config: ConfigDict, workdir: epath.PathLike, overwrite: bool, shared: bool) -> dict | None:
    ledger = distributed.in_turn(lambda: Ledger(config, workdir, overwrite, shared))
    project = Project(config, workdir, ledger.folders)
    if not set(SHARED).isdisjoint(config.stages):
        project.check_layout()
    project.check_processes()
    storage.write_json(project.workdir / 'config.json', flatten(config))
    run_stage = {
        'data': prepare_data,
        'retrieval': retrieve_candidates,
        'finetune': finetune,
        'ranking': rank_users,
        'report': functools.partial(write_report, ledger=ledger),
    }
    with jax.default_matmul_precision(config.model.matmul_precision):
        for stage in STAGES:
            if stage not in config.stages:
                continue
            reads_model = stage in ('finetune', 'ranking') or (
                stage == 'retrieval' and retrieval_reads_texts(config)
            )
            weights = project.checkpoint.fingerprint if reads_model else None
            distributed.barrier(stage)  # what the stage before wrote is there for all
            inputs = ledger.inputs(stage, weights)
            work = functools.partial(run_stage[stage], project)
            with contextlib.ExitStack() as stack:
                claim = functools.partial(stack.enter_context, ledger.claimed(stage))
                distributed.by_one(claim)
                _run_stage(project, ledger, stage, inputs, work)
    ledger.record()
    distributed.barrier('end')
    if 'report' not in config.stages:
        return None
    return storage.read_json(project.folder('report') / 'metrics.json')


def _run_stage(
    project: Project,
    ledger: Ledger,
    stage: str,
    inputs: Mapping[str, str],
    work: Callable[[], None],
) -> None:
    """Does the `work` of a stage, unless it was done before."""
    if distributed.agree(ledger.complete(stage, inputs)):
        logging.info('%s: finished before', stage)
        return
    if stage == 'retrieval' and not set(SHARED).isdisjoint(project.config.stages):
        _ = project.encoder  # a wrong model or template is told now, not after training
    logging.info('%s: begins', stage)
    began = ledger.begin(stage, inputs)
    try:
        work() if stage in SHARED else distributed.by_one(work)
    except InputError:
        ledger.abandon(stage)
        raise
    ledger.finish(stage, inputs, began)


# --- data -------------------------------------------------------------------------------------


def prepare_data(project: Project) -> None:
    """Raw files -> `data/`: interactions after the k-core, catalogue, split, counts."""
    data.save(*load_data(project.config.data), project.folder('data'))
    started = {'schema': evaluation.SCHEMA, 'dataset': project.dataset.record, 'runs': []}
    storage.write_json(project.folder('report') / 'metrics.json', started)


# --- retrieval --------------------------------------------------------------------------------


def retrieve_candidates(project: Project) -> None:
    """`data/` -> `retrieval/`: the retrievers, and what they and popularity say of every user."""
    config, dataset = project.config.retrieval, project.dataset
    split, catalogue = dataset.split, dataset.catalogue
    folder = project.folder('retrieval')
    seed, exclude = project.config.seed, config.exclude_history
    tuning, _ = data.validation_halves(split, seed)
    seen = split.validating(tuning)
    fitted = retrieval.fit_systems(
        retrieval.Material(seen, catalogue, config, seed, folder, project.texts)
    )
    mixed = retrieval.mix_systems(fitted, seen, exclude, folder)
    some = [split.history(user, 'valid') for user in tuning[:256]]
    index = retrieval.build_index(
        mixed.item_vectors, config.index, queries=mixed.user_vectors(some) if some else None
    )
    retrieval.save_index(index, folder, retrieval.hash_items(catalogue.raw_ids))
    popularity = retrieval.fit_popularity(split, catalogue.items)
    popular = retrieval.build_index(popularity.item_vectors, 'exact')

    for part in ('valid', 'test'):
        users = split.users(part)
        histories = [split.history(user, part) for user in users]
        targets = split.targets(part)[users]
        ranked = {'popularity': popularity, 'retriever': mixed} | alone(fitted)
        for system, retriever in ranked.items():
            queries = retriever.user_vectors(histories)
            ranks = retrieval.target_ranks(
                queries, retriever.item_vectors, targets, histories, exclude
            )
            retrieval.save_ranks(folder, system, part, users, ranks)
        for system, searched in (('popularity', popular), ('retriever', index)):
            queries = ranked[system].user_vectors(histories)
            found = retrieval.retrieve(
                searched, queries, histories, config.candidates, exclude, users
            )
            retrieval.save_candidates(folder, system, part, found)
    test_queries = queries  # the test part and the retriever came last
    test = read_candidates(project, 'test')
    ranks = rank_targets(test.items, test.scores, split.targets('test')[test.users])

    def of_lists(metric: Callable[[TargetRanks, int], np.ndarray], k: int) -> float | None:
        return float(metric(ranks, k).mean()) if k <= config.candidates else None

    storage.write_json(
        folder / 'retrieval.json',
        {
            'backend': index.backend,
            'recall_vs_exact': retrieval.recall_against_exact(
                index, test_queries, config.candidates
            ),
            # Of the lists that the index gave, not of all scores as the report's rows.
            **{f'recall@{k}': of_lists(evaluation.recall, k) for k in (20, 50)},
            'HR@10': of_lists(evaluation.hit_rate, 10),
            'NDCG@10': of_lists(evaluation.ndcg, 10),
        },
    )


# --- fine-tuning ------------------------------------------------------------------------------


def finetune(project: Project) -> None:
    """`data/` and the base model -> `finetune/`: an adapter in PEFT format, the loss it reaches.

    Or a whole model in the format of Hugging Face, where `finetune.full` trains all weights.
    """
    config, mesh = project.config, project.mesh
    lessons = make_lessons(project)
    examples, held_out = (encode_examples(project, e) for e in (lessons.examples, lessons.held_out))
    if config.finetune.less_untuned:
        examples = less_untuned(project, 'training', lessons.examples, examples)
        held_out = less_untuned(project, 'held_out', lessons.held_out, held_out)
    tuned = np.unique([example.user for example in lessons.examples]).astype(np.int64)
    logging.info('finetune: %d examples of %d users', len(examples), len(tuned))

    model, spec = project.checkpoint.config, lora_spec(config)
    program = Program(
        model,
        None if config.finetune.full else spec,
        jnp.dtype(config.model.dtype),
        config.model.remat,
        config.finetune.accumulate,
        config.finetune.objective,
        config.finetune.temperature,
    )

    def losses(params: Any) -> np.ndarray:
        """Whether what was learned carries over to users who gave no example."""
        if program.objective == 'sft':
            return answer_losses(params, program, held_out, config.finetune.length, mesh)
        return choice_losses(params, program, held_out, mesh)

    settings = {'seed': config.seed, 'workdir': project.curves_folder, 'mesh': mesh}
    if config.finetune.full:
        base = project.load_base('float32')
        before = losses(base)  # now: training takes the memory of the base
        trained = train(base, program, examples, config.finetune, **settings)
        after = losses(trained)
        save_model(project, trained)
    else:
        adapter = train(project.base, program, examples, config.finetune, **settings)
        whole = distributed.whole(adapter)
        peft.save_adapter(project.adapter_folder, whole, spec, config.model.path)
        fresh = lora.init_adapter(model, spec, config.seed)  # changes nothing: B is zero
        before, after = (
            losses(lora.join(leaves, project.base))
            for leaves in (rules.shard(fresh, mesh, model), adapter)
        )
    storage.write_arrays(
        project.folder('finetune') / 'held_out_loss.npz',
        users=np.array([example.user for example in lessons.held_out]),
        before=before,
        after=after,
        tuned=tuned,
    )


def save_model(project: Project, params: Any) -> None:
    """Writes all weights to `finetune/model`, in the type of `model.dtype`."""
    params = distributed.whole(params)
    if not distributed.is_writer():
        return
    out = Path(project.model_folder)
    shutil.rmtree(out, ignore_errors=True)  # of a shorter run that goes on
    path = Path(data.resolve(project.config.model.path))
    tensors = hf.to_hf(params, project.checkpoint.config)
    export.write_folder(out, path, project.checkpoint, tensors, project.config.model.dtype)


# --- ranking ----------------------------------------------------------------------------------


def rank_users(project: Project) -> None:
    """Candidates, base model and adapter -> `ranking/`: the LLM's scores before and after tuning.

    Both score the test users; the validation users, on whom the fusion weight is chosen, are scored
    by the one that is fused: the tuned model, or the base where nothing was tuned. And by both
    where the one is taken off the other.
    """
    both = project.config.ranking.normalize == 'untuned'
    tuned = []
    full = project.config.finetune.full
    folder = project.model_folder if full else project.adapter_folder
    if folder.exists():
        identity = export.hash_weights(folder)
        tuned = [Llm('llm', *project.adapted(), identity)]  # before the base, which may not fit
    systems = [Llm('llm_zero_shot', project.base, None, ''), *tuned]
    for part in ('valid', 'test'):
        users, items, queries = make_queries(project, part)
        tokens = [len(query.prompt) for query in queries]
        path = project.folder('ranking') / f'prompts_{part}.npz'
        storage.write_arrays(path, users=users, tokens=np.array(tokens, np.int32))
        if part == 'test':
            write_prompts(project, users, items)
        for llm in systems if part == 'test' or both else systems[-1:]:
            with contextlib.ExitStack() as stack:
                claim = functools.partial(stack.enter_context, project.claimed(llm.system))
                distributed.by_one(claim)
                rank_by(project, llm, part, users, items, queries)
    distributed.by_one(lambda: choose_fusion(project, systems[-1].system))


class Llm(NamedTuple):
    """A model that ranks."""

    system: str  # its name in the report
    params: dict[str, Any]
    adapter: lora.LoraSpec | None
    identity: str  # of its weights, beside those of the base


def rank_by(
    project: Project,
    llm: Llm,
    part: str,
    users: np.ndarray,
    items: np.ndarray,
    queries: list[Query],
) -> None:
    """Ranks the users [U'] and their candidates [U', C] as `ranking.mode` says -> `ranking/`."""
    config, model = project.config.ranking, project.checkpoint.config
    name, path = f'{llm.system} ({part})', project.scores_path(llm.system, part)
    written = {
        'model': model,
        'lora': llm.adapter,
        'dtype': jnp.dtype(project.config.model.dtype),
        'mesh': project.mesh,
        'path': path,
        'identity': llm.identity,
    }
    if project.writes_freely:
        histories = [set(project.dataset.split.history(user, part).tolist()) for user in users]
        answer_users(
            name,
            users,
            queries,
            histories,
            project.encoder,
            llm.params,
            config,
            most=config.answer_tokens,
            **written,
        )
        return
    if config.mode == 'generate':
        generate_users(name, users, items, queries, project.encoder, llm.params, config, **written)
        return
    # What is said with the user in the prompt, and without where that is taken off.
    systems = {llm.system: True}
    if config.normalize == 'prior':
        systems[f'{llm.system}_prior'] = False
    for (system, of_user), order in itertools.product(systems.items(), range(config.orders)):
        asked = queries
        if order or not of_user:
            asked, _ = queries_of(project, part, users, items, order=order, of_user=of_user)
        score_users(
            f'{system} ({part})' + (f', order {order + 1} of {config.orders}' if order else ''),
            users,
            items,
            asked,
            project.encoder,
            project.scorer(llm.adapter),
            llm.params,
            config,
            max_positions=model.max_positions,
            path=project.scores_path(system, part, order),
            identity=llm.identity,
        )
