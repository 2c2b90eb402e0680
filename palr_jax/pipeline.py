"""PALR from raw files to the report: the stages in reading order.

    raw files ── data ──▶ Dataset ──▶ retrieval ──▶ Candidates ──▶ ranking ──▶ Scores ──▶ report
                             └──────▶ finetune ──▶ adapter ───────────┘

What is resumed, and why: a stage that finished is not run again (`stages.py` says when that holds).
An interrupted stage continues where its own files say: the retriever from its last validation,
fine-tuning from its newest checkpoint, ranking from the users scored so far.
"""

import functools
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palr_jax import data, evaluation, retrieval, storage
from palr_jax.config import validate
from palr_jax.errors import InputError
from palr_jax.evaluation import AnswerLoss, Comparison, Run, TargetRanks, rank_targets
from palr_jax.finetune.input import Tokens, encode_example
from palr_jax.finetune.train import Program, answer_losses, train
from palr_jax.llama import export, hf, lora, peft
from palr_jax.llama.load import Checkpoint, open_checkpoint
from palr_jax.llama.weights import Shardings
from palr_jax.parallel import distributed, rules
from palr_jax.parallel.mesh import check_rows, make_mesh
from palr_jax.prompts.encode import Encoder
from palr_jax.prompts.llm_profile import llm_profiles
from palr_jax.prompts.profile import count_profile
from palr_jax.prompts.tasks import Example, affinity, make_examples, split_users
from palr_jax.prompts.template import load_template
from palr_jax.ranking.fuse import choose_weight, fuse
from palr_jax.ranking.score import Batch, Query, make_scorer, score_queries
from palr_jax.ranking.users import Scores, make_query, read_scores, score_users
from palr_jax.retrieval import Candidates
from palr_jax.stages import STAGES, Ledger, flatten, retrieval_reads_texts

BASE = ('popularity', 'retriever')  # rows that need no LLM
SHARED = ('finetune', 'ranking')  # stages of all processes; process 0 does the others alone
VERSIONS = (
    *('palr_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain'),
    *('transformers', 'tokenizers', 'scann', 'numpy'),
)


def run(config: ConfigDict, workdir: epath.PathLike, *, overwrite: bool = False) -> dict | None:
    """Runs the stages that `config.stages` names and that are not finished in `workdir`.

    Args:
      config: see `palr_jax/config.py`.
      workdir: where everything is written; the same one continues the run.
      overwrite: redo the stages that a changed config affects, instead of refusing.

    Returns:
      The report as in report/metrics.json, if that stage was asked for.

    Raises:
      InputError: bad input of any kind.
    """
    validate(config)
    ledger = distributed.in_turn(lambda: Ledger(config, workdir, overwrite))
    project = Project(config, workdir)
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
            if distributed.agree(ledger.complete(stage, inputs)):
                logging.info('%s: finished before', stage)
                continue
            if stage == 'retrieval' and not set(SHARED).isdisjoint(config.stages):
                _ = project.encoder  # a wrong model or template is told now, not after training
            logging.info('%s: begins', stage)
            began = ledger.begin(stage, inputs)
            try:
                work = functools.partial(run_stage[stage], project)
                work() if stage in SHARED else distributed.by_one(work)
            except InputError:
                ledger.abandon(stage)
                raise
            ledger.finish(stage, inputs, began)
    distributed.barrier('end')
    if 'report' not in config.stages:
        return None
    return storage.read_json(project.workdir / 'report' / 'metrics.json')


class Project:
    """A config, its workdir, and what several stages read; each thing is read once, when needed."""

    def __init__(self, config: ConfigDict, workdir: epath.PathLike | None):
        """Without a workdir nothing can be read from it or written; `dataset` may be assigned."""
        self.config = config
        self.workdir = None if workdir is None else epath.Path(workdir)

    @functools.cached_property
    def dataset(self) -> data.Dataset:
        return data.read(self.workdir / 'data')

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The base model's architecture, tokenizer and identity; no weight is read for them."""
        return open_checkpoint(data.resolve(self.config.model.path))

    @functools.cached_property
    def base(self) -> dict[str, Any]:
        """The base model's parameters."""
        return self.load_base(self.config.model.dtype)

    def load_base(self, dtype: str) -> dict[str, Any]:
        """The base model's parameters, read anew."""
        model = self.config.model
        logging.info('loading the weights of %s', model.path)
        return self.checkpoint.params(dtype, model.quantize, self.shardings)

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The devices that share the LLM's work; None where one does it all."""
        mesh = make_mesh(self.config.mesh)
        return mesh if mesh.size > 1 else None

    @property
    def shardings(self) -> Shardings | None:
        return rules.shardings(self.mesh, self.checkpoint.config) if self.mesh else None

    def check_layout(self) -> None:
        """Refuses, before any work, a mesh or batches that the devices cannot share."""
        tuning = self.config.finetune
        check_rows('finetune.batch_size', tuning.batch_size, self.mesh, tuning.accumulate)
        check_rows('ranking.batch_size', self.config.ranking.batch_size, self.mesh)

    def check_processes(self) -> None:
        """Logs who is in this run, and refuses what one process cannot do alone."""
        if jax.process_count() == 1:
            return
        fields = json.dumps(flatten(self.config), sort_keys=True)
        distributed.preflight(hashlib.sha256(fields.encode()).hexdigest())
        if 'retrieval' in self.config.stages and retrieval_reads_texts(self.config):
            raise InputError(
                'config.retrieval asks the base model for texts, and process 0 cannot run a model '
                "that all share; allowed: a run of one process with config.stages=('data', "
                "'retrieval') first, then this one without these two."
            )

    @functools.cached_property
    def encoder(self) -> Encoder:
        prompts = self.config.prompts
        template = load_template(prompts.template)
        return Encoder(
            self.dataset.catalogue,
            self.checkpoint.tokenizer,
            template,
            prompts.style,
            prompts.length,
            prompts.item,
            prompts.answer,
        )

    def profiles(self, histories: Sequence[Sequence[int]]) -> list[tuple[str, ...]]:
        """The keywords of each history, as `prompts.profile` says: every prompt has them from here.

        A history ends before whatever the prompt is to be answered with.
        """
        config = self.config.prompts
        if config.profile == 'counts':
            return [count_profile(h, self.dataset.catalogue.keywords) for h in histories]
        if config.profile == 'llm':
            model = self.config.model
            return llm_profiles(
                histories,
                self.encoder,
                config,
                self._base_scores,
                path=self.workdir and self.workdir / 'profiles.json',
                identity=f'{self.checkpoint.fingerprint} {model.dtype} {model.quantize} '
                f'{model.matmul_precision}',
            )
        return [()] * len(histories)

    def _base_scores(self, queries: Sequence[Query]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`score_queries` by the base model: prompts are the same before and after tuning."""
        config = self.config.ranking
        with jax.default_matmul_precision(self.config.model.matmul_precision):
            yield from score_queries(
                self._base_scorer,
                self.base,
                queries,
                batch_size=config.batch_size,
                row_length=config.row_length,
                max_shapes=config.max_shapes,
                max_positions=self.checkpoint.config.max_positions,
            )

    @functools.cached_property
    def _base_scorer(self) -> Callable[[Any, Batch], jax.Array]:
        return self.scorer(None)

    def scorer(self, spec: lora.LoraSpec | None) -> Callable[[Any, Batch], jax.Array]:
        """The ranking program of the model, with an adapter of this shape."""
        dtype = jnp.dtype(self.config.model.dtype)
        return make_scorer(self.checkpoint.config, spec, dtype, self.mesh)

    @property
    def texts(self) -> retrieval.Texts:
        """What the base model makes of the items' texts and of histories."""
        return retrieval.Texts(
            lambda: self._text_vectors, self.profiles, lambda: self.checkpoint.fingerprint
        )

    @functools.cached_property
    def _text_vectors(self) -> np.ndarray:
        """[I, E], kept in the workdir: a retriever may be trained again, they need not be."""
        model, texts = self.config.model, retrieval.item_texts(self.dataset.catalogue)
        identity = retrieval.hash_items(
            [self.checkpoint.fingerprint, model.dtype, model.quantize, *texts]
        )
        path = self.workdir / 'retrieval' / 'texts.npz'
        if path.exists():
            stored = storage.read_arrays(path)
            if str(stored['identity']) == identity:
                return stored['vectors']
        vectors = retrieval.embed_texts(
            self.base,
            self.checkpoint.config,
            self.checkpoint.tokenizer,
            texts,
            dtype=jnp.dtype(model.dtype),
        )
        storage.write_arrays(path, identity=np.array(identity), vectors=vectors)
        return vectors

    def adapted(self) -> tuple[dict[str, Any], lora.LoraSpec | None]:
        """The tuned model: the base with the run's adapter beside its kernels, and its shape.

        Where all weights were tuned there is no adapter, and no shape.
        """
        if self.config.finetune.full:
            tuned = open_checkpoint(self.model_folder)
            return tuned.params(self.config.model.dtype, 'none', self.shardings), None
        adapter, spec = peft.load_adapter(self.adapter_folder, self.checkpoint.config)
        adapter = jax.tree.map(jnp.asarray, adapter)
        return lora.join(rules.shard(adapter, self.mesh, self.checkpoint.config), self.base), spec

    @property
    def adapter_folder(self) -> epath.Path:
        return self.workdir / 'finetune' / 'adapter'

    @property
    def model_folder(self) -> epath.Path:
        """What full fine-tuning writes in place of an adapter."""
        return self.workdir / 'finetune' / 'model'

    def scores_path(self, system: str, part: str) -> epath.Path:
        return self.workdir / 'ranking' / f'{system}_{part}.npz'


# --- data -------------------------------------------------------------------------------------


def lora_spec(config: ConfigDict) -> lora.LoraSpec:
    """The adapter's shape that a config asks for."""
    config = config.lora
    return lora.LoraSpec(
        config.rank, config.alpha, tuple(config.targets), config.rslora, config.dropout
    )


def prepare_data(project: Project) -> None:
    """Raw files -> `data/`: interactions after the k-core, catalogue, split, counts."""
    data.save(*load_data(project.config.data), project.workdir / 'data')
    started = {'schema': evaluation.SCHEMA, 'dataset': project.dataset.record, 'runs': []}
    storage.write_json(project.workdir / 'report' / 'metrics.json', started)


def load_data(config: ConfigDict) -> tuple[data.Source, data.Split]:
    """What `config.data` names, parsed, filtered and split."""
    source = data.load(config)
    shares = config.valid_share, config.test_share
    return source, data.make_split(source.interactions, config.split, *shares)


# --- retrieval --------------------------------------------------------------------------------


def retrieve_candidates(project: Project) -> None:
    """`data/` -> `retrieval/`: the retrievers, and what they and popularity say of every user."""
    config, dataset = project.config.retrieval, project.dataset
    split, catalogue = dataset.split, dataset.catalogue
    folder = project.workdir / 'retrieval'
    seed, exclude = project.config.seed, config.exclude_history
    fitted = retrieval.fit_systems(
        retrieval.Material(split, catalogue, config, seed, folder, project.texts)
    )
    mixed = retrieval.mix_systems(fitted, split, exclude, seed, folder)
    some = [split.history(user, 'valid') for user in sample_users(split.users('valid'), 256, seed)]
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


def alone(fitted: Mapping[str, Any]) -> dict[str, Any]:
    """The retrievers that have a row of their own: those of a mix, if it is one."""
    return dict(fitted) if len(fitted) > 1 else {}


def read_candidates(project: Project, part: str) -> Candidates:
    """The retriever's candidates for the users of a split part."""
    return retrieval.read_candidates(project.workdir / 'retrieval', 'retriever', part)


def full_run(project: Project, system: str) -> Run:
    """The row of a system that needs no LLM: every test user, ranked over the whole catalogue."""
    return Run(system, *retrieval.read_ranks(project.workdir / 'retrieval', system, 'test'))


# --- fine-tuning ------------------------------------------------------------------------------


def finetune(project: Project) -> None:
    """`data/` and the base model -> `finetune/`: an adapter in PEFT format, the loss it reaches.

    Or a whole model in the format of Hugging Face, where `finetune.full` trains all weights.
    """
    config, split, mesh = project.config, project.dataset.split, project.mesh
    ours, others = split_users(split, config.tasks.users, config.seed)
    tokens, _ = encode_examples(project, ours)
    logging.info('finetune: %d examples of %d users', len(tokens), len(ours))
    # Whether what was learned carries over to users who gave no example; one example each.
    held_out = np.random.default_rng([config.seed, 4]).permutation(others)
    held_tokens, users = encode_examples(project, np.sort(held_out[: config.finetune.held_out]))
    users, first = np.unique(users, return_index=True)
    held_tokens = [held_tokens[i] for i in first]

    model, spec = project.checkpoint.config, lora_spec(config)
    program = Program(
        model,
        None if config.finetune.full else spec,
        jnp.dtype(config.model.dtype),
        config.model.remat,
        config.finetune.accumulate,
    )

    def losses(params: Any) -> np.ndarray:
        return answer_losses(params, program, held_tokens, config.finetune.length, mesh)

    settings = {'seed': config.seed, 'workdir': project.workdir, 'mesh': mesh}
    if config.finetune.full:
        base = project.load_base('float32')
        before = losses(base)  # now: training takes the memory of the base
        trained = train(base, program, tokens, config.finetune, **settings)
        after = losses(trained)
        save_model(project, trained)
    else:
        adapter = train(project.base, program, tokens, config.finetune, **settings)
        whole = distributed.whole(adapter)
        peft.save_adapter(project.adapter_folder, whole, spec, config.model.path)
        fresh = lora.init_adapter(model, spec, config.seed)  # changes nothing: B is zero
        before, after = (
            losses(lora.join(leaves, project.base))
            for leaves in (rules.shard(fresh, mesh, model), adapter)
        )
    storage.write_arrays(
        project.workdir / 'finetune' / 'answer_loss.npz', users=users, before=before, after=after
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


# --- ranking ----------------------------------------------------------------------------------


def rank_users(project: Project) -> None:
    """Candidates, base model and adapter -> `ranking/`: the LLM's scores before and after tuning.

    Both score the test users; the validation users, on whom the fusion weight is chosen, are scored
    by the one that is fused: the tuned model, or the base where nothing was tuned.
    """
    tuned = []
    full = project.config.finetune.full
    folder = project.model_folder if full else project.adapter_folder
    if folder.exists():
        identity = export.hash_weights(folder)
        tuned = [('llm', *project.adapted(), identity)]  # before the base is read: it may not fit
    systems = [('llm_zero_shot', project.base, None, ''), *tuned]
    queries = {part: make_queries(project, part) for part in ('valid', 'test')}
    for system, params, spec, identity in systems:
        scorer = project.scorer(spec)
        for part in ('valid', 'test') if system == systems[-1][0] else ('test',):
            users, items, of_users = queries[part]
            score_users(
                f'{system} ({part})',
                users,
                items,
                of_users,
                project.encoder,
                scorer,
                params,
                project.config.ranking,
                max_positions=project.checkpoint.config.max_positions,
                path=project.scores_path(system, part),
                identity=identity,
            )
    distributed.by_one(lambda: choose_fusion(project, systems[-1][0]))


def choose_fusion(project: Project, system: str) -> None:
    """Weighs the retriever against `system` on the validation users -> `ranking/fusion.json`."""
    config = project.config.ranking
    valid = read_scores(project.scores_path(system, 'valid'))
    weight, ndcg = choose_weight(
        valid.items,
        retriever_scores(project, valid, 'valid'),
        valid.normalized(config.normalize),
        project.dataset.split.targets('valid')[valid.users],
        config.fusion_weights,
    )
    fusion = {
        'system': system,
        'weight': weight,
        'valid_users': len(valid.users),
        'valid_ndcg@10': [[w, value] for w, value in ndcg.items()],
    }
    storage.write_json(project.workdir / 'ranking' / 'fusion.json', fusion)


def make_queries(project: Project, part: str) -> tuple[np.ndarray, np.ndarray, list[Query]]:
    """(users [U'], their candidates [U', C], their prompts) for a seeded sample of a split part."""
    config = project.config
    found = read_candidates(project, part)
    number = config.ranking.users if part == 'test' else config.ranking.valid_users
    users = sample_users(found.users, number, config.seed)
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


def order_seed(config: ConfigDict, user: int) -> list[int]:
    """Of the order in which a user's prompt lists the candidates."""
    return [config.seed, 5, int(user)]


def sample_users(users: np.ndarray, number: int, seed: int) -> np.ndarray:
    """`number` of the users (0 is all), ascending, chosen by the seed."""
    if number == 0 or number >= len(users):
        return users
    return np.sort(np.random.default_rng([seed, 6]).permutation(users)[:number])


# --- report -----------------------------------------------------------------------------------


def write_report(project: Project, *, ledger: Ledger) -> None:
    """Everything before -> `report/`: metrics.json, report.md and the picture."""
    config, dataset = project.config, project.dataset
    runs = [full_run(project, system) for system in BASE]
    comparisons = [Comparison(runs[1], runs[0], 'NDCG@10')]
    parts = [full_run(project, name) for name in alone(dict.fromkeys(config.retrieval.systems))]
    comparisons += [Comparison(runs[1], part, 'NDCG@10') for part in parts]
    notes, answer_loss = [], None
    timing = {'seconds': ledger.seconds()}
    if project.scores_path('llm_zero_shot', 'test').exists():
        sampled, llm, fusion_note = ranked_runs(project, runs)
        parts += sampled.values()
        fused, retriever = sampled['fused'], sampled['retriever']
        comparisons += [Comparison(fused, retriever, m) for m in ('NDCG@10', 'HR@10')]
        if 'llm' in sampled:
            comparisons.append(Comparison(sampled['llm'], sampled['llm_zero_shot'], 'NDCG@10'))
        notes = [*prompt_notes(config), fusion_note]
        timing |= {
            'users_per_second': len(llm.users) / llm.seconds,
            'tokens_per_second': llm.computed / llm.seconds,
        }
    loss_path = project.workdir / 'finetune' / 'answer_loss.npz'
    if loss_path.exists():
        answer_loss = AnswerLoss(**storage.read_arrays(loss_path))
    report = evaluation.build(
        dataset=dataset.record,
        retrieval=storage.read_json(project.workdir / 'retrieval' / 'retrieval.json'),
        runs=runs + parts,
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
        answer_loss=answer_loss,
    )
    evaluation.write(report, project.workdir / 'report')


def ranked_runs(project: Project, full: list[Run]) -> tuple[dict[str, Run], Scores, str]:
    """The rows over the users whom the LLM ranked, its scores, and how the fusion was weighted."""
    config, split = project.config.ranking, project.dataset.split
    fusion = storage.read_json(project.workdir / 'ranking' / 'fusion.json')
    scores = {
        name: read_scores(project.scores_path(name, 'test'))
        for name in dict.fromkeys(('llm_zero_shot', fusion['system']))
    }
    llm = scores[fusion['system']]
    users, targets = llm.users, split.targets('test')[llm.users]
    everyone = len(users) == len(full[0].users)
    user_set = 'all' if everyone else evaluation.sampled(users, project.config.seed)
    ranks = {run.system: run.ranks.take(np.searchsorted(run.users, users)) for run in full}
    for name, found in scores.items():
        ranks[name] = rank_targets(found.items, found.normalized(config.normalize), targets)
    fused = fuse(
        retriever_scores(project, llm, 'test'), llm.normalized(config.normalize), fusion['weight']
    )
    ranks['fused'] = rank_targets(llm.items, fused, targets)
    modes = dict.fromkeys(BASE)  # what ranks without the LLM has none
    runs = {
        name: Run(name, users, of_users, user_set=user_set, mode=modes.get(name, config.mode))
        for name, of_users in ranks.items()
    }
    ndcg = dict(fusion['valid_ndcg@10'])
    note = (
        f"fused: the retriever's standardised score + {fusion['weight']:g} times that of "
        f'{fusion["system"]}; the weight is the best of {len(ndcg)} by NDCG@10 on '
        f'{fusion["valid_users"]} validation users ({ndcg[fusion["weight"]]:.4f}; the retriever '
        f'alone {ndcg[min(ndcg)]:.4f}).'
    )
    return runs, llm, note


def retriever_scores(project: Project, scores: Scores, part: str) -> np.ndarray:
    """[U', C] what the retriever said of the items that the LLM scored."""
    found = read_candidates(project, part)
    rows = np.searchsorted(found.users, scores.users)
    return found.scores[rows, : scores.items.shape[1]]


def prompt_notes(config: ConfigDict) -> list[str]:
    """What the reader of a number must know of the prompts behind it."""
    prompts = config.prompts
    return [
        f"The LLM rows rank the retriever's {config.ranking.candidates} best candidates (the "
        f'paper: 50), from prompts of at most {prompts.history} history items (the paper: 20) and '
        f'{prompts.length} tokens; a target that was not retrieved is a miss.',
        f'User profile: {prompts.profile}; an item is shown by its {prompts.item} and answered by '
        f'its {prompts.answer}.',
        f'The prompt lists the candidates in {prompts.candidate_order} order; the score of a title '
        f'is its log-likelihood, normalised by {config.ranking.normalize}.',
    ]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
