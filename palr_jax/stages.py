"""Which stages of a run are finished, and what a changed config means for them.

A stage is complete when its `stage.json`, written last, exists. It holds the part of the config
that the stage depends on and the identities of its inputs. `started.json` holds the same from the
start, so a half-finished stage cannot be continued under another config.

The same command again continues. A config change that affects a stage begun before is refused, with
the field and the first such stage; `--overwrite` removes that stage and the later ones and redoes
them. Four things invalidate nothing: which stages are asked for, how results are shown, the devices
and how the work is laid out on them (LAYOUT), and more `finetune.steps`, which continue the same
run.

The variants of a study share their stages. Their workdirs are STUDY/variants/NAME; what can be
shared lies in STUDY/stages/STAGE-HASH, the hash being of that config part and those identities, so
another config is another folder and nothing has to be refused. `stages.json` in the workdir says
which folders are the variant's.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from palr_jax import storage
from palr_jax.errors import InputError

FORMAT = 1  # of stage.json and of what the stages write

# The parts of the config that each stage reads, besides what its inputs read.
DEPENDS = {
    'data': ('data',),
    'retrieval': ('seed', 'retrieval'),
    'finetune': ('seed', 'model', 'lora', 'prompts', 'tasks', 'finetune'),
    # Prompts and model once more: without fine-tuning no other stage notes them.
    'ranking': ('model', 'prompts', 'ranking'),
    'report': ('evaluation',),
}
# The stages whose outputs each stage reads; those after the bar only where they were run.
NEEDS = {
    'data': (),
    'retrieval': ('data',),
    'finetune': ('data',),
    'ranking': ('data', 'retrieval', '|', 'finetune'),
    'report': ('data', 'retrieval', '|', 'finetune', 'ranking'),
}
STAGES = tuple(DEPENDS)
STEPS = 'finetune.steps'
# What the retrieval does not read of prompts where the base model makes profiles of users.
UNREAD = {
    *('prompts.history', 'prompts.history_order', 'prompts.answer'),
    *('prompts.candidates', 'prompts.candidate_order'),
}
# Fields that change where and how fast the same numbers are computed, to rounding.
LAYOUT = {
    *('model.remat', 'finetune.accumulate', 'finetune.profile_at', 'finetune.profile_steps'),
    *('finetune.checkpoint_every', 'ranking.batch_size', 'ranking.row_length'),
    'ranking.max_shapes',
}

# The stage that each variant of a study has for itself: it tells of all the others.
UNSHARED = 'report'
# What the untuned model says; it serves all variants that differ in the tuning alone.
UNTUNED = 'untuned'
FOLDERS = 'stages.json'


def shared_root(workdir: epath.PathLike) -> epath.Path:
    """Where the variants of a study keep what they share; `workdir` is of one of them."""
    return epath.Path(workdir).parent.parent / 'stages'


def stage_folders(workdir: epath.PathLike) -> dict[str, epath.Path]:
    """Where the stages of a run lie; of a variant of a study, those that are finished."""
    workdir = epath.Path(workdir)
    if not (workdir / FOLDERS).exists():
        return {stage: workdir / stage for stage in STAGES}
    names = storage.read_json(workdir / FOLDERS)
    shared = {stage: shared_root(workdir) / name for stage, name in names.items()}
    return shared | {UNSHARED: workdir / UNSHARED}


def has_stage(workdir: epath.PathLike, stage: str) -> bool:
    """Whether the run in `workdir` has finished a stage."""
    folder = stage_folders(workdir).get(stage)
    return folder is not None and (folder / 'stage.json').exists()


class Ledger:
    """The stages of one workdir under one config.

    Attributes:
      workdir: of the run.
      folders: of each stage; of a variant of a study, of those whose inputs are known by now.
    """

    def __init__(
        self, config: ConfigDict, workdir: epath.PathLike, overwrite: bool, shared: bool = False
    ):
        """Checks what `workdir` holds against `config`, and clears what `overwrite` allows.

        Args:
          config: of the run.
          workdir: of the run.
          overwrite: clear what a changed config affects, instead of refusing.
          shared: the run is a variant of a study; then there is nothing to refuse or to clear.

        Raises:
          InputError: a stage begun before depends on a field that has changed, or a variant of a
            study is run by itself.
        """
        self.workdir = epath.Path(workdir)
        self.folders = {stage: self.workdir / stage for stage in STAGES}
        self._config = config
        self._shared = shared
        if shared:
            self.folders = {UNSHARED: self.folders[UNSHARED]}
        else:
            self._check(overwrite)

    def _check(self, overwrite: bool) -> None:
        if (self.workdir / FOLDERS).exists():
            raise InputError(
                f'{self.workdir} is a variant of a study, which palr_jax.ablate runs; allowed: '
                'another workdir.'
            )
        for stage in STAGES:
            stored = self._read(stage, 'stage.json') or self._read(stage, 'started.json')
            if stored is None:
                continue
            change = _first_change(stored, config_part(self._config, stage))
            if change is None:
                continue
            later = STAGES[STAGES.index(stage) :]
            begun = [s for s in later if self.folder(s).exists()]
            if not overwrite:
                raise InputError(
                    f'{self.workdir}: {change}; this affects the stage {stage} first, and '
                    f'--overwrite would redo {", ".join(begun)}.'
                )
            for name in begun:
                logging.info('--overwrite: removing the stage %s (%s)', name, change)
                _remove(self.folder(name))
            break

    def folder(self, stage: str) -> epath.Path:
        return self.folders[stage]

    def inputs(self, stage: str, weights: str | None = None) -> dict[str, str]:
        """What the stage would be made from: the identities of finished stages, and the weights.

        Raises:
          InputError: a stage that it needs is not finished, one that it would read was begun and is
            not, or the weights are not those that the stage was begun with.
        """
        inputs, needed = {}, True
        for name in NEEDS[stage]:
            if name == '|':
                needed = False
            elif (identity := self._identity(name)) is not None:
                inputs[name] = identity
            elif needed:
                raise InputError(
                    f'{self.workdir}: the stage {stage} needs the stage {name}, which is not '
                    'finished here; add it to config.stages.'
                )
            elif self._read(name, 'started.json') is not None:  # what lies there may be older
                raise InputError(
                    f'{self.workdir}: the stage {name} was begun and is not finished; add it to '
                    'config.stages.'
                )
        if weights is not None:
            inputs['weights'] = weights
        if self._shared:
            if stage != UNSHARED:
                self._place(stage, stage, inputs)
            if stage == 'ranking':
                untuned = {name: of for name, of in inputs.items() if name != 'finetune'}
                self._place(UNTUNED, stage, untuned)
        elif weights is not None:
            stored = self._read(stage, 'stage.json') or self._read(stage, 'started.json')
            if stored and stored['inputs'].get('weights') != weights:
                raise InputError(
                    f'config.model.path: these are not the weights that the stage {stage} in '
                    f'{self.workdir} was made with; use another workdir.'
                )
        return inputs

    def _place(self, name: str, stage: str, inputs: Mapping[str, str]) -> None:
        hashed = _hash(config_part(self._config, stage), inputs)[:16]
        self.folders[name] = shared_root(self.workdir) / f'{name}-{hashed}'

    def claimed(self, stage: str) -> contextlib.AbstractContextManager:
        """Keeps a shared stage for this process: one variant makes it, the others wait for it."""
        if not self._shared or stage == UNSHARED:
            return contextlib.nullcontext()
        return storage.locked(self.folder(stage), wait=True)

    def record(self) -> None:
        """Notes which shared folders are this variant's, once all of its stages are finished."""
        if self._shared:
            names = {s: folder.name for s, folder in self.folders.items() if s != UNSHARED}
            storage.write_json(self.workdir / FOLDERS, names)

    def complete(self, stage: str, inputs: Mapping[str, str]) -> bool:
        """Whether the stage is finished, and was made from these inputs and this config."""
        stored = self._read(stage, 'stage.json')
        if stored is None or stored['inputs'] != inputs:
            return False
        return not _changes(stored['config'], config_part(self._config, stage))

    def begin(self, stage: str, inputs: Mapping[str, str]) -> float:
        """Notes that the stage is under way; returns the time for `finish`."""
        self._write(stage, 'started.json', inputs)
        self._unlink(stage, 'stage.json')
        return time.monotonic()

    def abandon(self, stage: str) -> None:
        """Forgets a stage that ended before it wrote anything, so that the config may change."""
        folder = self.folder(stage)
        if self._shared or not storage.writes():
            return  # a shared folder is of this config alone
        if [path.name for path in folder.iterdir()] == ['started.json']:
            _remove(folder)

    def finish(self, stage: str, inputs: Mapping[str, str], began: float) -> None:
        """Notes, last of all, that the stage is complete."""
        self._write(stage, 'stage.json', inputs, seconds=round(time.monotonic() - began, 1))
        self._unlink(stage, 'started.json')

    def seconds(self) -> dict[str, float]:
        """How long each finished stage took in the session that finished it."""
        stored = {stage: self._read(stage, 'stage.json') for stage in STAGES}
        return {stage: entry['seconds'] for stage, entry in stored.items() if entry}

    def _read(self, stage: str, name: str) -> dict[str, Any] | None:
        if stage not in self.folders or not (path := self.folder(stage) / name).exists():
            return None
        stored = storage.read_json(path)
        if stored.get('format') != FORMAT:
            raise InputError(
                f'{path}: format is {stored.get("format")}; this version reads {FORMAT}. '
                'Use another workdir.'
            )
        return stored

    def _identity(self, stage: str) -> str | None:
        """A hash of all that the outputs of a finished stage depend on."""
        stored = self._read(stage, 'stage.json')
        if stored is None:
            return None
        return _hash(stored['config'], stored['inputs'])

    def _write(self, stage: str, name: str, inputs: Mapping[str, str], **more: Any) -> None:
        entry = {'format': FORMAT, 'config': config_part(self._config, stage)}
        storage.write_json(self.folder(stage) / name, entry | {'inputs': dict(inputs)} | more)

    def _unlink(self, stage: str, name: str) -> None:
        if storage.writes():
            (self.folder(stage) / name).unlink(missing_ok=True)


def _hash(part: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([part, inputs], sort_keys=True).encode()).hexdigest()


def retrieval_reads_texts(config: ConfigDict) -> bool:
    """Whether the retrieval asks the base model what the items' texts say."""
    return 'profile' in config.retrieval.systems or config.retrieval.cold_items


def training_retrieval(config: ConfigDict) -> ConfigDict | None:
    """How candidates for fine-tuning are retrieved; None where they are similar items."""
    if config.tasks.candidates_from == 'similar':
        return None
    settings = config.retrieval.copy_and_resolve_references()
    if config.tasks.candidates_from == 'covisitation':
        settings.systems = ('covisitation',)
    settings.epochs = config.tasks.retriever_epochs or settings.epochs
    return settings


def config_part(config: ConfigDict, stage: str) -> dict[str, Any]:
    """The fields that `stage` reads itself, as {'finetune.steps': 200, …}, JSON-able."""
    part = {}
    names = DEPENDS[stage]
    if stage == 'retrieval' and retrieval_reads_texts(config):
        part['prompts.profile'] = config.prompts.profile
        names = (*names, 'model', *(('prompts',) if config.prompts.profile == 'llm' else ()))
    for name in names:
        value = config[name]
        if isinstance(value, ConfigDict):
            part |= flatten(value, f'{name}.')
        else:
            part[name] = value
    if stage == 'finetune' and (settings := training_retrieval(config)) is not None:
        part |= flatten(settings, 'retrieval.')
    unread = LAYOUT | UNREAD if stage == 'retrieval' else LAYOUT
    if config.lora.dropout > 0:
        unread = unread - {'finetune.accumulate'}  # each part of a batch draws masks of its own
    return {field: value for field, value in part.items() if field not in unread}


def flatten(config: ConfigDict, prefix: str = '') -> dict[str, Any]:
    """Every field of a config by its dotted name; tuples become lists, as in JSON."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields that differ; of LAYOUT those that count in both, as older versions had others."""
    counting = (before.keys() | now.keys()) - (LAYOUT - (before.keys() & now.keys()))
    return sorted(field for field in counting if before.get(field) != now.get(field))


def _first_change(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    before = stored['config']
    for field in _changes(before, wanted):
        old, new = before.get(field), wanted.get(field)
        if not (field == STEPS and old is not None and new > old):
            return f'config.{field} was {old!r} there and is {new!r} now'
    return None


def _remove(folder: epath.Path) -> None:
    if '://' in str(folder):
        folder.rmtree()
    else:
        shutil.rmtree(folder)
