"""A finished run: its project, its LLM, and the users whom it ranked."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from palr_jax import storage
from palr_jax.config import restore
from palr_jax.errors import InputError
from palr_jax.evaluation.statistics import bootstrap_interval
from palr_jax.llama.lora import LoraSpec
from palr_jax.progress import Progress
from palr_jax.project import Project, sample_users
from palr_jax.ranking.score import Batch, Query, score_queries
from palr_jax.ranking.users import read_scores
from palr_jax.stages import has_stage

SYSTEMS = ('llm', 'llm_zero_shot')  # the tuned model, and the base as it came


class Finished:
    """What the probes read of a run; weights are read when they are needed."""

    def __init__(self, project: Project, system: str):
        """`system` is one of SYSTEMS, and the run has it."""
        self.project = project
        self.system = system

    @functools.cached_property
    def ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """The run's test users [U], ascending, and their candidates [U, C], unfilled slots last.

        Candidates stand in the retriever's order; -1 is an unfilled slot.
        """
        scores = read_scores(self.project.scores_path(self.system, 'test'))
        order = np.argsort(scores.items < 0, axis=1, kind='stable')
        return scores.users, np.take_along_axis(scores.items, order, axis=1)

    def sample(self, number: int | None, default: int) -> tuple[np.ndarray, np.ndarray]:
        """(users [U'], items [U', C]) of a seeded sample of the ranked users.

        Args:
          number: of users; None is `default`, or all where there are fewer.
          default: see there.

        Raises:
          InputError: the run scores nothing, or more are asked for than it has ranked.
        """
        if self.project.config.ranking.mode == 'generate':
            raise InputError(
                "config.ranking.mode of the run is 'generate': it writes titles and scores none; "
                "allowed for this probe: a run with 'title' or 'index'."
            )
        users, items = self.ranked
        check_number('--users', number, len(users), 'test users that the run has ranked')
        chosen = sample_users(users, number or default, self.project.config.seed)
        return chosen, items[np.searchsorted(users, chosen)]

    @functools.cached_property
    def model(self) -> tuple[dict[str, Any], LoraSpec | None]:
        """The parameters of the system, and the shape of its adapter, if it has one."""
        return self.project.adapted() if self.system == 'llm' else (self.project.base, None)

    @functools.cached_property
    def scorer(self) -> Callable[[Any, Batch], jax.Array]:
        """The ranking program of the system."""
        return self.project.scorer(self.model[1])

    def score(self, name: str, queries: Sequence[Query], **changes: int) -> np.ndarray:
        """[Q, C] sums of the queries' answers, -inf in unfilled slots.

        Args:
          name: shown with the progress.
          queries: at least one.
          changes: of the run's `batch_size`, `row_length` and `max_shapes`.
        """
        config = self.project.config
        fields = ('batch_size', 'row_length', 'max_shapes')
        settings = {field: config.ranking[field] for field in fields} | changes
        most = max(len(query.candidates) for query in queries)
        sums = np.full((len(queries), most), -np.inf, np.float32)
        with (
            Progress(name, len(queries), 'prompts') as progress,
            jax.default_matmul_precision(config.model.matmul_precision),
        ):
            for indices, values in score_queries(
                self.scorer,
                self.model[0],
                queries,
                max_positions=self.project.checkpoint.config.max_positions,
                **settings,
            ):
                sums[indices] = values
                progress.update(len(indices))
        return sums

    def interval(self, values: np.ndarray) -> list[float]:
        """The 95 % bootstrap interval of the mean of [n] values, with the run's resamples."""
        config = self.project.config
        settings = {'resamples': config.evaluation.resamples, 'seed': config.seed}
        return bootstrap_interval(values, **settings).tolist()

    @property
    def record(self) -> dict[str, Any]:
        """What every probe's file says of where it was measured."""
        config = self.project.config
        return {
            'system': self.system,
            'model': config.model.path,
            'dtype': config.model.dtype,
            'matmul_precision': config.model.matmul_precision,
            'device': jax.devices()[0].device_kind,
            'seed': config.seed,
        }


def open_run(workdir: epath.PathLike, system: str | None) -> Finished:
    """Opens a run whose ranking is finished, on one device.

    Args:
      workdir: of the run.
      system: one of SYSTEMS; None is the tuned model where the run has one.

    Raises:
      InputError: the run is not finished, or has no tuned model to ask.
    """
    workdir = epath.Path(workdir)
    if not has_stage(workdir, 'ranking'):
        raise InputError(f'--workdir={workdir} holds no finished run; allowed: one that is ranked.')
    config = restore(storage.read_json(workdir / 'config.json'))
    config.mesh.update({'data': 1, 'fsdp': 1, 'tensor': 1, 'slices': 1})
    project = Project(config, workdir)
    last = storage.read_json(project.folder('ranking') / 'fusion.json')['system']
    if system == 'llm' and last != 'llm':
        raise InputError(
            f'--system=llm: the run in {workdir} tuned no model; allowed: llm_zero_shot.'
        )
    return Finished(project, system or last)


def check_number(flag: str, number: int | None, most: int, of_what: str) -> None:
    """Raises InputError unless `number` is None or 1 to `most`."""
    if number is not None and not 1 <= number <= most:
        raise InputError(f'{flag}={number}; allowed: 1 to {most}, the {of_what}.')
