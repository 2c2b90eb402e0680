"""Studies: one base config and variants of it, what they share, and what they came to.

A config of a study is made by `define`. Its base is the first variant and is called `base`. Every
variant has a workdir of its own, STUDY/variants/NAME; stages that do not tell two variants apart
are made once (`stages.py`). A variant is finished when its `stages.json` is there; one that failed
has left its sentence in `error.json`, and is tried again by the next command.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from palr_jax import pipeline, storage
from palr_jax.config import check_name, restore, validate
from palr_jax.errors import InputError, is_local
from palr_jax.parallel import distributed
from palr_jax.stages import FOLDERS, STAGES, config_part, flatten

BASE = 'base'  # the name of the first variant
FORMAT = 1  # of study.json in the folder of a study
# Variants are compared on the same users of the same data, with the same draws.
COMMON = ('data', 'evaluation', 'mesh', 'ranking.users', 'ranking.users_seed')
_NAME = re.compile(r'[a-z0-9][a-z0-9_]*')


@dataclass(frozen=True)
class Variant:
    """A config with a name, and the fields in which it differs from the base."""

    name: str
    changes: Mapping[str, Any]  # {'prompts.profile': 'none'}, JSON-able
    config: ConfigDict


@dataclass(frozen=True)
class Study:
    """A name, and the variants; the base first."""

    name: str
    variants: tuple[Variant, ...]

    @property
    def base(self) -> Variant:
        return self.variants[0]


def define(name: str, base: ConfigDict, *variants: tuple[str, Mapping[str, Any]]) -> ConfigDict:
    """The config of a study, for a config file to return.

    >>> define('profile', base, ('none', {'prompts.profile': 'none'}))

    Args:
      name: of the study.
      base: a whole config.
      variants: each a name and the fields that it sets.
    """
    pairs = tuple((name, tuple(changes.items())) for name, changes in variants)
    return ConfigDict({'name': name, 'base': base, 'variants': pairs})


def open_study(config: ConfigDict) -> Study:
    """Checks the config of a study.

    Raises:
      InputError: the base or a variant is not allowed, changes nothing, or has the name of another.
    """
    if set(config) != {'name', 'base', 'variants'}:
        raise InputError(
            f'The config of a study has the fields name, base and variants; found: '
            f'{", ".join(config)}. A single run is started by palr_jax.main.'
        )
    validate(config.base)
    fields = flatten(config.base)
    variants = [Variant(BASE, {}, restore(fields))]
    taken = [_parts(config.base)]  # what the variants so far give
    for name, pairs in config.variants:
        _check_variant_name(name, [variant.name for variant in variants])
        changes = {
            field: list(value) if isinstance(value, tuple) else value for field, value in pairs
        }
        variant = Variant(name, changes, _changed(name, fields, changes))
        parts = _parts(variant.config)
        for other, known in zip(variants, taken):
            if parts == known:
                raise InputError(
                    f'variant {name}: it gives the same config as {other.name}; allowed: a variant '
                    'that changes something.'
                )
        variants.append(variant)
        taken.append(parts)
    if len(variants) == 1:
        raise InputError(f'The study {config.name} has no variants; allowed: one or more.')
    return Study(config.name, tuple(variants))


def _check_variant_name(name: str, taken: Sequence[str]) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(
            f'variant {name!r}: allowed in a name: lower-case letters, digits and underscores.'
        )
    if name == BASE:
        raise InputError(f'variant {BASE}: this is the name of the base; allowed: another one.')
    if name in taken:
        raise InputError(f'variant {name}: there are two of this name; allowed: one.')


def _changed(name: str, fields: Mapping[str, Any], changes: Mapping[str, Any]) -> ConfigDict:
    """The config with these fields changed, checked."""
    for field in changes:
        try:
            check_name(field)
        except InputError as error:
            raise InputError(f'variant {name}: {error}') from error
        if any(field == common or field.startswith(f'{common}.') for common in COMMON):
            raise InputError(
                f'variant {name}: config.{field} must be the same in all variants, which are '
                'compared on the same users; set it in the base.'
            )
    try:
        return restore({**fields, **changes})
    except InputError as error:
        raise InputError(f'variant {name}: {error}') from error


def _parts(config: ConfigDict) -> list[Any]:
    """All that a run's numbers depend on."""
    return [{stage: config_part(config, stage) for stage in STAGES}, sorted(config.stages)]


# --- running ----------------------------------------------------------------------------------


def variant_folder(workdir: epath.PathLike, name: str) -> epath.Path:
    return epath.Path(workdir) / 'variants' / name


def open_workdir(study: Study, workdir: epath.PathLike, *, write: bool = True) -> None:
    """Checks that `workdir` is of this study and of no other; a new one becomes the study's.

    Raises:
      InputError: it holds something else, or another base or variant of the same name.
    """
    path = epath.Path(workdir) / 'study.json'
    if not path.exists():
        if (epath.Path(workdir) / 'config.json').exists():
            raise InputError(f'--workdir={workdir} is of a single run; allowed: another folder.')
        if write:
            stored = {'format': FORMAT, 'name': study.name, 'base': flatten(study.base.config)}
            storage.write_json(path, stored)
        return
    stored = storage.read_json(path)
    if stored.get('format') != FORMAT:
        raise InputError(
            f'{path}: format is {stored.get("format")}; this version reads {FORMAT}. '
            'Use another workdir.'
        )
    if stored['name'] != study.name:
        raise InputError(
            f'--workdir={workdir} is of the study {stored["name"]}, and this one is '
            f'{study.name}; allowed: another folder.'
        )
    _check_same(workdir, BASE, stored['base'], study.base)
    for variant in study.variants[1:]:
        path = variant_folder(workdir, variant.name) / 'config.json'
        if path.exists():
            _check_same(workdir, variant.name, storage.read_json(path), variant)


def _check_same(
    workdir: epath.PathLike, name: str, before: Mapping[str, Any], variant: Variant
) -> None:
    """Refuses a variant that is not what it was; what changes no number may change."""
    old, new = _parts(restore(before))[0], _parts(variant.config)[0]
    for stage in STAGES[:-1]:
        for field in sorted(old[stage].keys() | new[stage].keys()):
            found, wanted = old[stage].get(field), new[stage].get(field)
            if found != wanted:
                advice = 'another --workdir' if name == BASE else 'another name for the variant'
                raise InputError(
                    f'--workdir={workdir}: config.{field} of {name} was {found!r} there and is '
                    f'{wanted!r} now; allowed: {advice}.'
                )


def run(study: Study, workdir: epath.PathLike, name: str | None = None) -> dict[str, str]:
    """Runs all variants that are not finished, or the one of this name, one after another.

    A variant that fails does not keep the others from being run.

    Returns:
      Why variants failed, by name.

    Raises:
      InputError: there is no such variant, or `workdir` is of something else.
    """
    if name is not None:
        find(study, name)
    distributed.by_one(lambda: open_workdir(study, workdir))
    failed = {}
    for variant in study.variants:
        if name in (None, variant.name):
            logging.info('variant %s: %s', variant.name, variant.changes or 'the base')
            if (why := run_variant(variant, workdir)) is not None:
                failed[variant.name] = why
    return failed


def find(study: Study, name: str) -> Variant:
    """The variant of this name.

    Raises:
      InputError: there is none.
    """
    for variant in study.variants:
        if variant.name == name:
            return variant
    names = ', '.join(variant.name for variant in study.variants)
    raise InputError(f'--variant={name}: the study has no such variant; allowed: {names}.')


def run_variant(variant: Variant, workdir: epath.PathLike) -> str | None:
    """Runs one variant; returns what went wrong, if anything, and keeps it in its `error.json`."""
    folder = variant_folder(workdir, variant.name)
    try:
        pipeline.run(variant.config, folder, shared=True)
    except Exception as error:
        if jax.process_count() > 1 and is_local(error):
            raise  # the others are still in this variant
        if isinstance(error, InputError):
            sentence = str(error)
            logging.error('variant %s: %s', variant.name, sentence)
        else:  # a bug: its traceback is wanted, and the other variants are too
            sentence = f'{type(error).__name__}: {distributed.first_line(error)}'
            logging.exception('variant %s', variant.name)
        storage.write_json(folder / 'error.json', {'error': sentence})
        return sentence
    if distributed.is_writer():
        (folder / 'error.json').unlink(missing_ok=True)
    return None


# --- what there is ----------------------------------------------------------------------------


def failure(variant: Variant, workdir: epath.PathLike) -> str | None:
    """Why the variant failed; None if it did not."""
    path = variant_folder(workdir, variant.name) / 'error.json'
    return storage.read_json(path)['error'] if path.exists() else None


def is_finished(variant: Variant, workdir: epath.PathLike) -> bool:
    """Whether all stages of the variant are there."""
    path = variant_folder(workdir, variant.name) / FOLDERS
    if failure(variant, workdir) is not None or not path.exists():
        return False
    wanted = set(variant.config.stages) - {'report'}
    return wanted <= set(storage.read_json(path))
