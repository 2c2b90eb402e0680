"""A run: its config, its workdir, and what several stages read of them."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from palr_jax import data, retrieval, storage
from palr_jax.errors import InputError
from palr_jax.llama import lora, peft
from palr_jax.llama.load import Checkpoint, open_checkpoint
from palr_jax.llama.weights import Shardings
from palr_jax.parallel import distributed, rules
from palr_jax.parallel.mesh import check_rows, make_mesh
from palr_jax.prompts.encode import Encoder
from palr_jax.prompts.llm_profile import llm_profiles
from palr_jax.prompts.profile import count_profile
from palr_jax.prompts.template import load_template
from palr_jax.ranking.generate_users import Answers, read_answers
from palr_jax.ranking.score import Batch, Query, make_scorer, score_queries
from palr_jax.ranking.users import Scores, mean_scores, read_scores
from palr_jax.retrieval import Candidates
from palr_jax.stages import (
    UNTUNED,
    flatten,
    retrieval_reads_texts,
    shared_root,
    stage_folders,
    training_retrieval,
)


def lora_spec(config: ConfigDict) -> lora.LoraSpec:
    """The adapter's shape that a config asks for."""
    config = config.lora
    return lora.LoraSpec(
        config.rank, config.alpha, tuple(config.targets), config.rslora, config.dropout
    )


def order_seed(config: ConfigDict, user: int | None, order: int = 0) -> list[int]:
    """Of the order in which a user's prompt lists the candidates, the first or a further one.

    `user` is None for the history of somebody who is not in the data.
    """
    whose = [] if user is None else [int(user)]
    return [config.seed, 5, *whose, *([order] if order else [])]


def ranked_users(project: 'Project', part: str) -> np.ndarray:
    """The users of a split part whose candidates the LLM ranks, ascending; a seeded sample.

    Of the validation users, those on whom no setting of the retriever was chosen.
    """
    config, split = project.config, project.dataset.split
    if part == 'test':
        ranking = config.ranking
        return sample_users(split.users(part), ranking.users, ranking.users_seed)
    _, free = data.validation_halves(split, config.seed)
    return np.sort(free[: config.ranking.valid_users or None])


def sample_users(users: np.ndarray, number: int, seed: int) -> np.ndarray:
    """`number` of the users (0 is all), ascending, chosen by the seed."""
    if number == 0 or number >= len(users):
        return users
    return np.sort(np.random.default_rng([seed, 6]).permutation(users)[:number])


def load_data(config: ConfigDict) -> tuple[data.Source, data.Split]:
    """What `config.data` names, parsed, filtered and split."""
    source = data.load(config)
    shares = config.valid_share, config.test_share
    return source, data.make_split(source.interactions, config.split, *shares)


class Project:
    """A config, its workdir, and what several stages read; each thing is read once, when needed."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.PathLike | None,
        folders: Mapping[str, epath.Path] | None = None,
    ):
        """A run.

        Args:
          config: of the run.
          workdir: None: nothing can be read from it or written; `dataset` may be assigned.
          folders: of the stages, as `Ledger.folders`; None: as the workdir says.
        """
        self.config = config
        self.workdir = None if workdir is None else epath.Path(workdir)
        if folders is None and workdir is not None:
            folders = stage_folders(workdir)
        self._folders = folders
        self._scorers: dict[lora.LoraSpec | None, Callable[[Any, Batch], jax.Array]] = {}

    def folder(self, stage: str) -> epath.Path:
        """Where a stage is written; where there is none of it, a folder that does not exist."""
        return self._folders.get(stage, self.workdir / stage)

    @property
    def in_study(self) -> bool:
        """Whether the run is a variant that shares its stages with others."""
        return self.folder('data') != self.workdir / 'data'

    @property
    def curves_folder(self) -> epath.Path:
        """Where fine-tuning keeps its checkpoints and its curves."""
        return self.folder('finetune') if self.in_study else self.workdir

    @property
    def profiles_path(self) -> epath.Path | None:
        """What the LLM said of histories; it serves all variants of a study."""
        if self.workdir is None:
            return None
        return (shared_root(self.workdir) if self.in_study else self.workdir) / 'profiles.json'

    @functools.cached_property
    def dataset(self) -> data.Dataset:
        return data.read(self.folder('data'))

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
        retrieves = 'retrieval' in self.config.stages or (
            'finetune' in self.config.stages and training_retrieval(self.config) is not None
        )
        if retrieves and retrieval_reads_texts(self.config):
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
            prompts.history_order,
            self.config.seed,
            prompts.title_words,
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
                self.base_scores,
                path=self.profiles_path,
                identity=f'{self.checkpoint.fingerprint} {model.dtype} {model.quantize} '
                f'{model.matmul_precision}',
            )
        return [()] * len(histories)

    def base_scores(self, queries: Sequence[Query]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`score_queries` by the base model, which is the same before and after tuning."""
        config = self.config.ranking
        with jax.default_matmul_precision(self.config.model.matmul_precision):
            yield from score_queries(
                self.scorer(None),
                self.base,
                queries,
                batch_size=config.batch_size,
                row_length=config.row_length,
                max_shapes=config.max_shapes,
                max_positions=self.checkpoint.config.max_positions,
            )

    def scorer(self, spec: lora.LoraSpec | None) -> Callable[[Any, Batch], jax.Array]:
        """The ranking program of the model, with an adapter of this shape; compiled once."""
        if spec not in self._scorers:
            dtype = jnp.dtype(self.config.model.dtype)
            self._scorers[spec] = make_scorer(self.checkpoint.config, spec, dtype, self.mesh)
        return self._scorers[spec]

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
        path = self.folder('retrieval') / 'texts.npz'
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
        return self.folder('finetune') / 'adapter'

    @property
    def model_folder(self) -> epath.Path:
        """What full fine-tuning writes in place of an adapter."""
        return self.folder('finetune') / 'model'

    @property
    def writes_freely(self) -> bool:
        """Whether the LLM writes titles of its own choice, and does not score candidates."""
        return self.config.ranking.mode == 'generate' and not self.config.prompts.candidates

    def llm_scores(self, system: str, part: str) -> Scores | Answers:
        """What `ranking` holds of a system, less what `ranking.normalize` takes off."""
        if self.writes_freely:
            return read_answers(self.scores_path(system, part))
        scores = self.sums(system, part)
        other = {'prior': f'{system}_prior', 'untuned': 'llm_zero_shot'}.get(
            self.config.ranking.normalize
        )
        # Nothing is taken off the places of written titles, nor of the untuned model what it says.
        if not other or self.config.ranking.mode == 'generate' or other == system:
            return scores
        return scores.less(self.sums(other, part))

    def sums(self, system: str, part: str) -> Scores:
        """What a system said of the candidates: the mean over all orders of their list."""
        orders = range(self.config.ranking.orders)
        return mean_scores([read_scores(self.scores_path(system, part, k)) for k in orders])

    def claimed(self, system: str) -> contextlib.AbstractContextManager:
        """Keeps what `system` says for this process; other variants of a study wait for it.

        The untuned model's part is no stage of its own and is shared more widely than the ranking.
        """
        if system != 'llm_zero_shot' or UNTUNED not in self._folders:
            return contextlib.nullcontext()
        return storage.locked(self._folders[UNTUNED], wait=True)

    def scores_path(self, system: str, part: str, order: int = 0) -> epath.Path:
        """Of what a system says under the first or a further order of the list in the prompt.

        `system` may be what is taken off another: 'llm_prior' is off 'llm'.
        """
        folder = self.folder('ranking')
        if system.startswith('llm_zero_shot'):
            folder = self._folders.get(UNTUNED, folder)
        return folder / (f'{system}_order{order}_{part}.npz' if order else f'{system}_{part}.npz')


def read_candidates(project: Project, part: str) -> Candidates:
    """The retriever's candidates for the users of a split part."""
    return retrieval.read_candidates(project.folder('retrieval'), 'retriever', part)


def retriever_scores(project: Project, scores: Scores, part: str) -> np.ndarray:
    """[U', C] what the retriever said of the items that the LLM scored."""
    found = read_candidates(project, part)
    rows = np.searchsorted(found.users, scores.users)
    return found.scores[rows, : scores.items.shape[1]]
