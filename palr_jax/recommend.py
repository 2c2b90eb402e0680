"""Ten titles for a history, from a finished run.

    python -m palr_jax.recommend --workdir=runs/demo --history="Toy Story (1995)|Aladdin (1992)"

Nothing is trained again: the history goes through the run's retriever, the LLM with the run's
adapter scores what was retrieved, and both are fused with the run's weight.
"""

import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from palr_jax import cli, retrieval, storage
from palr_jax.config import restore
from palr_jax.data import Catalogue
from palr_jax.errors import InputError
from palr_jax.llama.lora import LoraSpec
from palr_jax.project import Project, order_seed
from palr_jax.ranking.answers import LINES, score_places
from palr_jax.ranking.constrained import make_writer, place_queries
from palr_jax.ranking.fuse import fuse
from palr_jax.ranking.score import Query, score_queries
from palr_jax.ranking.users import Scores, make_query, mean_scores
from palr_jax.stages import has_stage

WORKDIR = flags.DEFINE_string('workdir', None, 'Of a finished run.')
HISTORY = flags.DEFINE_string(
    'history', None, 'Titles or raw ids of items, oldest first, with | between them.'
)
NUMBER = flags.DEFINE_integer('number', 10, 'How many titles to print.', lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
      title: as in the catalogue.
      score: fused, higher is better.
      retriever: the retriever's score.
      llm: what the LLM says of it, as `ranking.mode` and `ranking.normalize` have it.
    """

    title: str
    score: float
    retriever: float
    llm: float


def recommend(workdir: epath.PathLike, names: list[str], number: int) -> list[Recommendation]:
    """The `number` best items for a history, best first.

    Args:
      workdir: of a run whose ranking is finished.
      names: titles or raw ids, oldest first; see `find_items`.
      number: of recommendations; fewer where the run ranks fewer candidates.

    Raises:
      InputError: a name is unknown, the run is not finished, or its LLM ranks no candidates.
    """
    workdir = epath.Path(workdir)
    if not has_stage(workdir, 'ranking'):
        raise InputError(f'--workdir={workdir} holds no finished run; allowed: one that is ranked.')
    config = restore(storage.read_json(workdir / 'config.json'))
    config.mesh.update({'data': 1, 'fsdp': 1, 'tensor': 1, 'slices': 1})  # one user, one device
    project = Project(config, workdir)
    if project.writes_freely:
        raise InputError(
            f'--workdir={workdir}: the LLM of this run writes freely and ranks no candidates; '
            'allowed: a run with config.prompts.candidates=True.'
        )
    history = find_items(names, project.dataset.catalogue)
    items, base_scores = retrieve_for(project, history)
    fusion = storage.read_json(project.folder('ranking') / 'fusion.json')

    params, spec = project.adapted() if fusion['system'] == 'llm' else (project.base, None)
    with jax.default_matmul_precision(config.model.matmul_precision):
        llm = rank_candidates(project, params, spec, history, items)
    fused = fuse(base_scores[None], llm, fusion['fused']['weight'])[0]
    return [
        Recommendation(
            project.dataset.catalogue.titles[items[i]],
            float(fused[i]),
            float(base_scores[i]),
            float(llm[0, i]),
        )
        for i in np.argsort(-fused, kind='stable')[:number]
    ]


def rank_candidates(
    project: Project,
    params: dict[str, Any],
    spec: LoraSpec | None,
    history: np.ndarray,
    items: np.ndarray,
) -> np.ndarray:
    """[1, C] what the LLM says of the `items` [C] for a history."""
    config, encoder = project.config, project.encoder
    ranking, model = config.ranking, project.checkpoint.config
    seeds = [order_seed(config, None, order) for order in range(ranking.orders)]

    def ask(of: np.ndarray) -> list[Query]:
        (profile,) = project.profiles([of.tolist()])
        return [
            make_query(encoder, config.prompts, of, profile, items, seed, name='--history')[0]
            for seed in seeds
        ]

    if ranking.mode == 'generate':
        writer = make_writer(model, spec, jnp.dtype(config.model.dtype), None, number=LINES)
        ((_, places, _),) = place_queries(
            writer,
            params,
            ask(history),
            encoder.line_break,
            number=LINES,
            batch_size=1,
            max_shapes=1,
            max_positions=model.max_positions,
        )
        return score_places(places, np.ones(places.shape, bool))

    def score(queries: list[Query], params: dict[str, Any], spec: LoraSpec | None) -> Scores:
        found = score_queries(
            project.scorer(spec),
            params,
            queries,
            batch_size=1,
            row_length=ranking.row_length,
            max_shapes=1,
            max_positions=model.max_positions,
        )
        return mean_scores(
            [Scores.of_queries(items[None], [queries[i]], encoder, sums) for (i,), sums in found]
        )

    queries = ask(history)
    scores = score(queries, params, spec)
    if ranking.normalize == 'prior':
        scores = scores.less(score(ask(history[:0]), params, spec))
    if ranking.normalize == 'untuned' and params is not project.base:
        scores = scores.less(score(queries, project.base, None))
    return scores.normalized(ranking.normalize)


def retrieve_for(project: Project, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[C] items for a history from the run's index, best first, and their [C] scores."""
    folder, config = project.folder('retrieval'), project.config
    of_items = retrieval.hash_items(project.dataset.catalogue.raw_ids)
    found = retrieval.retrieve(
        retrieval.load_index(folder, of_items),
        retrieval.load_mix(folder, project.texts).user_vectors([history]),
        [history],
        config.ranking.candidates,
        config.retrieval.exclude_history,
    )
    filled = found.items[0] >= 0
    return found.items[0][filled], found.scores[0][filled]


def find_items(names: list[str], catalogue: Catalogue) -> np.ndarray:
    """[n] int32 items of titles, whatever their case and blanks, or else of raw ids.

    Where several items share a title, the first of the catalogue is taken; the raw ids name the
    others.

    Raises:
      InputError: a name is not in the catalogue; tells the nearest titles.
    """
    by_title: dict[str, int] = {}
    for item in range(1, catalogue.items + 1):
        by_title.setdefault(_plain(catalogue.titles[item]), item)
    by_id = {raw_id: item for item, raw_id in enumerate(catalogue.raw_ids) if item}
    items = []
    for name in names:
        item = by_title.get(_plain(name)) or by_id.get(name.strip())
        if item is None:
            near = difflib.get_close_matches(_plain(name), by_title, n=3, cutoff=0.4)
            titles = ', '.join(f'"{catalogue.titles[by_title[t]]}"' for t in near)
            raise InputError(
                f'--history: "{name}" is not in the catalogue; allowed are titles and raw ids; '
                + (f'the nearest titles are {titles}.' if near else 'no title comes near it.')
            )
        items.append(item)
    return np.array(items, np.int32)


def _plain(title: str) -> str:
    return ' '.join(title.casefold().split())


def main(_: list[str]) -> None:
    names = [name.strip() for name in HISTORY.value.split('|') if name.strip()]
    if not names:
        raise InputError('--history names no item; allowed: titles or raw ids with | between them.')
    print(f'{"":>3}  {"score":>7}  {"retriever":>9}  {"LLM":>7}  title')
    for place, found in enumerate(recommend(WORKDIR.value, names, NUMBER.value), start=1):
        print(
            f'{place:>3}  {found.score:>7.3f}  {found.retriever:>9.3f}  {found.llm:>7.3f}  '
            f'{found.title}'
        )


if __name__ == '__main__':
    flags.mark_flags_as_required(['workdir', 'history'])
    cli.run(main)
