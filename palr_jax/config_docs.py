"""Prints the page of all config fields: `python -m palr_jax.config_docs > docs/config.md`.

The meaning of a field is its comment in `default_config`, so there is one place to write it.
"""

import ast
import inspect
import io
import math
import tokenize
from typing import Any

from palr_jax import config as source
from palr_jax.stages import flatten

HEAD = """# Config fields

Made from `palr_jax/config.py` by `python -m palr_jax.config_docs > docs/config.md`.

A config file (`configs/NAME.py`) sets fields in Python, and each can be set on the command line:

| type | on the command line |
| --- | --- |
| int, float | `--config.finetune.learning_rate=1e-5`, `--config.mesh.fsdp=-1` |
| bool | `--config.finetune.full`, `--noconfig.finetune.full`, `--config.finetune.full=False` |
| str | `--config.prompts.style=plain`, and `--config.data.delimiter=` for the empty text |
| tuple | `--config.lora.targets="('q','v')"`; of one entry `--config.lora.targets=q` |

A wrong type, a value that is not allowed and a misspelt field end the program with one sentence,
before any work. Defaults and values below are written as in Python.
"""
FIELDS = """| field | type | default | allowed | meaning |
| --- | --- | --- | --- | --- |
"""
TOGETHER = """
## Fields that must fit together

Each row is refused where its fields contradict each other.

| fields | why | allowed |
| --- | --- | --- |
"""


def page() -> str:
    """The Markdown of all fields: a table for each group, and the rules between fields."""
    defaults, comments = flatten(source.default_config()), field_comments()
    tables: dict[str, list[str]] = {}
    for field, meaning in comments.items():
        if field not in defaults:
            continue  # a group
        group, name = field.rpartition('.')[::2]
        default = defaults[field]
        kind = 'tuple' if isinstance(default, list) else type(default).__name__
        shown = tuple(default) if isinstance(default, list) else default
        row = _row(f'`{name}`', kind, f'`{shown!r}`', allowed(field), meaning)
        tables.setdefault(group, []).append(row)
    written = [HEAD]
    for group, rows in tables.items():
        title = f'config.{group}' if group else 'config'
        about = f'{comments[group]}\n\n' if comments.get(group) else ''
        written += [f'\n## `{title}`\n\n{about}', FIELDS, *rows]
    written.append(TOGETHER)
    for fields, why, remedy in rules():
        written.append(_row(', '.join(f'`{field}`' for field in fields), why, remedy))
    return ''.join(written)


def allowed(field: str) -> str:
    """What `field` may hold beyond its type, '' if anything."""
    default = flatten(source.default_config())[field]
    if field in source.MEMBERS:
        return 'one or more of ' + _values(source.MEMBERS[field])
    if isinstance(default, list):
        return f'one or more {type(default[0]).__name__}, {limits(field)[0]} or larger'
    if field in source.CHOICES:
        return _values(source.CHOICES[field])
    if isinstance(default, bool | str):
        return ''
    least, largest = limits(field)
    return f'{least} or more' if largest == math.inf else f'{least} to {largest}'


def limits(field: str) -> tuple[float, float]:
    """The least and the largest value of a number, or of each in a tuple."""
    default = flatten(source.default_config())[field]
    number = default[0] if isinstance(default, list) else default
    return source.RANGES.get(field, (1 if isinstance(number, int) else 0, math.inf))


def field_comments() -> dict[str, str]:
    """The comment of every field and group of `default_config`, '' where there is none.

    By dotted name, in the order of the source. A comment belongs to the assignment that it stands
    above or behind. A field without one, right under a field that has one above, shares that.
    """
    text = inspect.getsource(source.default_config)
    remarks = {
        token.start[0]: token.string.lstrip('# ')
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    (function,) = ast.parse(text).body
    comments, end, shared = {}, 0, ''
    for statement in function.body:
        if not isinstance(statement, ast.Assign) or isinstance(statement.targets[0], ast.Name):
            continue
        field = ast.unparse(statement.targets[0]).removeprefix('config.')
        above = [remarks[line] for line in range(end + 1, statement.lineno) if line in remarks]
        lines = range(statement.lineno, statement.end_lineno + 1)
        behind = [remarks[line] for line in lines if line in remarks]
        comments[field] = ' '.join((*above, *behind))
        if shared and not comments[field] and statement.lineno == end + 1:
            comments[field] = f'see `{shared}`'
        shared = field.rpartition('.')[2] if above else ''
        end = statement.end_lineno
    return comments


def rules() -> list[tuple[list[str], str, str]]:
    """(fields, why, allowed) of each rule between fields, from the table in `_check_together`."""
    (function,) = ast.parse(inspect.getsource(source._check_together)).body
    (loop,) = (node for node in function.body if isinstance(node, ast.For))
    found = []
    for entry in loop.iter.elts:
        _, fields, why, remedy = entry.elts
        names = [node for node in ast.walk(fields) if isinstance(node, ast.Constant)]
        names = [node.value for node in sorted(names, key=lambda n: (n.lineno, n.col_offset))]
        found.append((names, ast.literal_eval(why), ast.literal_eval(remedy)))
    return found


def _values(values: tuple[Any, ...]) -> str:
    return ', '.join(f'`{value!r}`' for value in values)


def _row(*cells: str) -> str:
    escaped = [cell.replace('|', '\\|') for cell in cells]
    return f'| {" | ".join(escaped)} |\n'


if __name__ == '__main__':
    print(page(), end='')
