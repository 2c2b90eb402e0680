"""The report of a study: what its finished variants have stored, read again and compared."""

from typing import Any

import numpy as np
from etils import epath

from palr_jax import storage
from palr_jax.errors import InputError
from palr_jax.evaluation import Run, item_facts, study_chart, study_page, study_text
from palr_jax.evaluation import study as report
from palr_jax.fusion import scored_systems
from palr_jax.project import Project
from palr_jax.stages import flatten
from palr_jax.study import Study, Variant, failure, is_finished, open_workdir, variant_folder
from palr_jax.summary import full_run, ranked_runs


def write(study: Study, workdir: epath.PathLike) -> dict[str, Any]:
    """Everything that is finished in `workdir` -> `report/`.

    Files: report.html, study.md with its pictures metrics.png and cost.png, and, last, study.json.

    Returns:
      The report as in study.json.

    Raises:
      InputError: the base or every other variant is not finished, or the variants are not
        comparable.
    """
    open_workdir(study, workdir, write=False)
    finished = [variant for variant in study.variants if is_finished(variant, workdir)]
    failed = {v.name: failure(v, workdir) for v in study.variants if failure(v, workdir)}
    missing = [v.name for v in study.variants if v not in finished and v.name not in failed]
    if study.base not in finished or len(finished) < 2:
        gone = [*missing, *(f'{name} (failed: {why})' for name, why in failed.items())]
        raise InputError(
            f'--workdir={workdir}: a report needs the base and one more variant, and these are not '
            f'finished: {", ".join(gone)}; run them first.'
        )
    check_weights(finished, workdir)
    dataset = _project(study.base, workdir).dataset
    alone = variant_folder(workdir, study.base.name) / 'report' / 'metrics.json'
    found = report.build(
        name=study.name,
        base=flatten(study.base.config),
        outcomes=[read_outcome(study, variant, workdir) for variant in finished],
        missing=missing,
        failed=failed,
        order=[variant.name for variant in study.variants],
        changes={variant.name: variant.changes for variant in study.variants},
        dataset=dataset.record,
        seed=study.base.config.seed,
        resamples=study.base.config.evaluation.resamples,
        versions=storage.read_json(alone).get('versions', {}) if alone.exists() else {},
        items=item_facts(dataset.split, dataset.catalogue),
    )
    folder = epath.Path(workdir) / 'report'
    storage.write_text(folder / 'report.html', study_page.build(found))
    storage.write_text(folder / 'study.md', study_text.markdown(found))
    storage.write_bytes(folder / 'metrics.png', study_chart.metrics(found))
    storage.write_bytes(folder / 'cost.png', study_chart.cost(found))
    storage.write_json(folder / 'study.json', found)
    return found


def _project(variant: Variant, workdir: epath.PathLike) -> Project:
    return Project(variant.config, variant_folder(workdir, variant.name))


def read_outcome(study: Study, variant: Variant, workdir: epath.PathLike) -> report.Outcome:
    """The rows and the costs of a finished variant."""
    project = _project(variant, workdir)
    stages = [stage for stage in variant.config.stages if stage != 'report']
    folders = {stage: project.folder(stage).name for stage in stages}
    fusion = project.folder('ranking') / 'fusion.json'
    full = [full_run(project, system) for system in ('popularity', 'retriever')]
    if not fusion.exists():
        return report.Outcome(variant.name, {'retriever': full[1]}, _costs(project), folders)
    stored = storage.read_json(fusion)
    ranked = ranked_runs(project, full, scored_systems(project, stored))
    names = {'retriever': 'retriever', 'zero_shot': 'llm_zero_shot', 'llm': stored['system']}
    names['fused'] = 'fused'
    runs: dict[str, Run] = {
        role: ranked[system]
        for role, system in names.items()
        # The zero-shot row would be there twice where nothing was tuned.
        if system in ranked and (role, system) != ('zero_shot', stored['system'])
    }
    return report.Outcome(variant.name, runs, _costs(project), folders)


def _costs(project: Project) -> dict[str, float | None]:
    """Prompt tokens of a test user on average; seconds of fine-tuning and of ranking the users.

    Fine-tuning: the session that finished it, with the losses before and after.
    """
    prompts = project.folder('ranking') / 'prompts_test.npz'
    costs: dict[str, float | None] = dict.fromkeys(report.COSTS)
    if prompts.exists():
        tokens = storage.read_arrays(prompts)['tokens']
        costs['prompt_tokens'] = float(np.mean(tokens)) if len(tokens) else None
        system = storage.read_json(project.folder('ranking') / 'fusion.json')['system']
        costs['ranking_seconds'] = project.llm_scores(system, 'test').seconds
    if 'finetune' in project.config.stages:
        stored = storage.read_json(project.folder('finetune') / 'stage.json')
        costs['finetune_seconds'] = stored['seconds']
    return costs


def check_weights(variants: list[Variant], workdir: epath.PathLike) -> None:
    """Refuses variants that name one model and were made with different weights.

    Raises:
      InputError: see there.
    """
    seen: dict[str, tuple[str, str]] = {}
    for variant in variants:
        path = variant.config.model.path
        for stage in ('finetune', 'ranking'):
            if stage not in variant.config.stages:
                continue
            file = _project(variant, workdir).folder(stage) / 'stage.json'
            weights = storage.read_json(file)['inputs']['weights']
            first, known = seen.setdefault(path, (variant.name, weights))
            if weights != known:
                raise InputError(
                    f'--workdir={workdir}: config.model.path={path} had other weights when '
                    f'{variant.name} was run than for {first}; use another workdir.'
                )
