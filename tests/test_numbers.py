"""Each number in README.md and docs/*.md comes from a raw file, or is said to be a setting.

The text is read in blocks: paragraphs, lists, tables; code and the targets of links are not read.
What looks measured is a decimal (`.1978`, `1.4e-4`), a number with a thousands comma, a percentage
and, in the rows of a table that has sources, every integer. A comment behind the block says where
its numbers come from, one source or several with `;` between them:

    <!-- numbers: results/rank_7b.json#*_gib; set 1,024: the length of the prompt -->

Code is read, for decimals and the like, only where such a comment follows it. A source is one of

    FILE#KEY/KEY     numbers of JSON files below docs/. In FILE and KEY `*` is any text; `a|b` are
                     two keys, `name=value` and `name=value&name=value` the elements of a list that
                     have it. A text gives the numbers in it if the last key is its own.
    mean of FILE#…   the mean over the files, for each path of keys
    sum of FILE#…    one sum of all
    A minus B        and `A over B`; `A above B` is A / B - 1, `A below B` is 1 - A / B
    … as GB          divided by a unit of `UNITS`
    set 8 0.5: why   these numbers are definitions or settings
    set: why         all numbers of the block are; it stands alone

In a table `{0}` is the text of a row's first cell (signs match any text), `{link}` the file that
the row links; what leads to no file has no numbers for that row. A number agrees with a value that
rounds to the digits shown, a percentage with a hundredth of it. Each number must agree with some
value, each source must serve some number, and none may have more than `MOST` values.
"""

import glob
import json
import operator
import re
from collections.abc import Iterator
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
PAGES.remove(ROOT / 'docs/config.md')  # generated from palr_jax/config.py
MOST = 400
UNITS = {'GB': 1e9, 'TFLOP': 1e12}
NOT_MEASURED = re.compile(
    r'(?:arXiv|Python|PyTorch|[Jj][Aa][Xx]|SDK|xpk|SkyPilot|Slurm) \d+\.\d+(?: or \d+\.\d+)?'
    r'|95 %(?= bootstrap| intervals?| of |\s*\||$)'  # the level of an interval
)
NUMBER = re.compile(
    r'(?<![\w.,@/=-])([-+−]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+)(?:e-?\d+)?)'
    r'(?![\w-]|[.,]\d)( ?%)?'
)
BLOCK = re.compile(
    r'(?P<code>^```.*?^```$)|^<!-- numbers:\s(?P<comment>.*?)-->'
    r'|(?:^(?!```|<!--)[^\n]*\S[^\n]*\n?)+',
    re.MULTILINE | re.DOTALL,
)
OPERATORS = {
    'minus': operator.sub,
    'over': operator.truediv,
    'above': lambda a, b: a / b - 1,
    'below': lambda a, b: 1 - a / b,
}


class Row(NamedTuple):  # or a block that is no table
    numbers: list[tuple[str, bool]]  # as shown; whether it is a percentage
    cells: list[str]
    link: str


def numbers(text: str, integers: bool) -> list[tuple[str, bool]]:
    found = NUMBER.findall(NOT_MEASURED.sub('', text))
    return [(n, bool(p)) for n, p in found if integers or p or re.search(r'[.,]', n)]


def rows(block: str, code: bool, sourced: bool) -> list[Row]:
    lines = block.strip().splitlines()
    if code:
        return [Row(numbers('\n'.join(lines[1:-1]), False), [], '')]
    table = len(lines) > 1 and bool(re.fullmatch(r'[|\s:-]+', lines[1]))
    found = []
    for i, line in enumerate([lines[0], *lines[2:]] if table else [' '.join(lines)]):
        link = re.search(r'\]\((results/[^)]*)\)', line)
        plain = re.sub(r'`[^`]*`', '`', re.sub(r'\]\([^)]*\)', ']', line))
        cells = [c.strip() for c in line.strip('|').split('|')] if table else []
        shown = numbers(plain, integers=table and sourced and i > 0)
        found.append(Row(shown, cells, link[1] if link else ''))
    return found


read = cache(lambda path: json.loads(path.read_text()))


def chosen(node: Any, keys: list[str]) -> Iterator[tuple[str, float]]:
    """Paths and numbers below what the keys lead to."""
    if not keys and isinstance(node, str):
        found = ((n, percent) for n, percent in numbers(node, True) if ',' not in n)
        yield from (('', float(n) / (100 if percent else 1)) for n, percent in found)
    if not keys and isinstance(node, int | float) and not isinstance(node, bool):
        yield '', node
    children = enumerate(node) if isinstance(node, list) else ()
    for name, child in node.items() if isinstance(node, dict) else children:
        if fits(str(name), child, keys[0]) if keys else not isinstance(child, str):
            step = keys[0] if keys and '=' in keys[0] else name  # the same in every file
            yield from ((f'{step}/{path}', value) for path, value in chosen(child, keys[1:]))


def fits(name: str, child: Any, key: str) -> bool:
    if '=' not in key:
        return any(fnmatchcase(name, k) for k in key.split('|'))
    pairs = [pair.split('=', 1) for pair in key.split('&')]
    return isinstance(child, dict) and all(fits(str(child.get(k)), None, v) for k, v in pairs)


def values(source: str, row: Row, docs: Path) -> list[float]:
    """The numbers of a source for a row. Raises LookupError where it should have some."""
    if unit := re.fullmatch(rf'(.*) as ({"|".join(UNITS)})', source):
        return [v / UNITS[unit[2]] for v in values(unit[1], row, docs)]
    if pair := re.fullmatch(rf'(.*) ({"|".join(OPERATORS)}) (.*)', source):
        a, b = values(pair[1], row, docs), values(pair[3], row, docs)
        if len(b) not in (1, len(a)):
            raise LookupError(f'{source}: {len(a)} and {len(b)} values')
        return [OPERATORS[pair[2]](x, b[i % len(b)]) for i, x in enumerate(a)]
    form, reference = re.fullmatch(r'(?:(mean|sum) of )?(.*)', source).groups()
    texts = {'link': row.link}
    for i, cell in enumerate(row.cells):  # a comma between digits is kept: 10,000 is not 100,000
        texts[str(i)] = re.sub(r'(?!(?<=\d),\d)[^\w.@+-]+', '*', cell.replace('`', ''))
    filled = re.sub(r'\{(\w+)\}', lambda match: texts.get(match[1], ''), reference)
    name, _, keys = filled.partition('#')
    paths = [docs / p for p in sorted(glob.glob(name, root_dir=docs)) if name.endswith('.json')]
    groups: dict[str, list[float]] = {}
    for path in paths:
        for where, value in chosen(read(path), keys.split('/') if keys else []):
            groups.setdefault(where, []).append(value)
    found = [value for group in groups.values() for value in group]
    if not found and filled == reference:
        raise LookupError(f'{source}: {"no number" if paths else "no such file"}')
    if form == 'sum':
        return [sum(found)] if found else []
    if form == 'mean':
        if any(len(group) != len(paths) for group in groups.values()):
            raise LookupError(f'{source}: not one value in each file')
        return [sum(group) / len(group) for group in groups.values()]
    if len(found) > MOST:
        raise LookupError(f'{source}: {len(found)} values, of {MOST} at most')
    return found


def agrees(shown: str, percent: bool, value: float) -> bool:
    number = Decimal(shown.replace(',', '').replace('−', '-'))
    half = Decimal(1).scaleb(number.as_tuple().exponent) / 2
    return abs(Decimal(value) * (100 if percent else 1) - number) <= half * (1 + Decimal('1e-9'))


def problems_of(block: str, code: bool, comment: str, docs: Path) -> list[str]:
    """What is wrong with one block, in words."""
    sources = [' '.join(s.split()) for s in comment.split(';') if s.strip()]
    settings = {}
    for source in (s for s in sources if re.match(r'set\b', s)):
        match = re.fullmatch(r'set\b([^:]*):.*\w.*', source)
        if match is None or not (match[1].strip() or len(sources) == 1):
            return [f'"{source}" does not say {"which" if match else "why"}']
        settings[source] = match[1].split()
    if [] in settings.values():
        return []
    found, unused = [], set(sources)
    for row in rows(block, code, bool(sources)):
        try:
            served = {s: values(s, row, docs) for s in sources if s not in settings}
        except LookupError as error:
            return [error.args[0]]
        for shown, percent in row.numbers:
            serve = {s for s, given in settings.items() if shown in given}
            serve |= {s for s, vs in served.items() if any(agrees(shown, percent, v) for v in vs)}
            unused -= serve
            if not serve:
                where = f' in {" | ".join(row.cells)}' if row.cells else ''
                found.append(f'{shown}{" %" if percent else ""}{where} has no source')
    return found or [f'no number is of "{s}"' for s in sorted(unused)]


def problems(text: str, docs: Path) -> list[str]:
    """What is wrong with the numbers of a page, each with its line."""
    parts = list(BLOCK.finditer(text))
    found = []
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        comment = (following and following['comment']) or ''
        if not part['comment'] and (comment or not part['code']):
            line = text.count('\n', 0, part.start()) + 1
            wrong = problems_of(part[0], bool(part['code']), comment, docs)
            found += [f'line {line}: {problem}' for problem in wrong]
    return found


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_the_numbers_of_a_page_are_those_of_its_raw_files(page: Path) -> None:
    assert problems(page.read_text(), ROOT / 'docs') == []


def test_what_has_no_raw_file_says_where_it_comes_from() -> None:
    for name, fields in (('by_hand', 'what how machine'), ('published', 'name source table')):
        for entry in read(ROOT / f'docs/results/{name}.json'):
            assert ' '.join(entry) == f'{fields} values'
            assert all(entry.values())


A, B = 'results/a.json#runs/system=x/HR', 'results/b.json#runs/system=x/HR'
TABLE = '| file | users | HR |\n| - | - | - |\n| a | 6040 | '


@pytest.mark.parametrize(
    ('text', 'source', 'problem'),
    [
        ('HR .1978, .198 and .20, or 20 %', A, ''),
        ('HR `.4` by arXiv 2305.07622, 95 % interval, jax 0.10.2, 2 of SmolLM2-1.7B: 0.198', A, ''),
        ('a weight of 0.75', 'results/a.json#note', ''),
        ('HR .2032', 'mean of results/*.json#runs/system=x/HR', ''),
        ('.6978', 'sum of results/a.json#runs/*/HR', ''),
        ('+0.0108, 5 % more', f'{B} minus {A}; {B} above {A}', ''),
        ('5.2 % less, a ratio of .948', f'{A} below {B}; {A} over {B}', ''),
        ('3.0 GB', 'results/a.json#runs/*/bytes as GB', ''),
        ('.1978 of 2,000', f'{A}; set 2,000: the resamples', ''),
        ('rates of 0.1', 'set: the defaults', ''),
        (f'{TABLE}.1978 |', 'results/{0}.json#users|runs', ''),
        (f'{TABLE}[raw](results/b.json) .2086 |', '{link}#users|runs', ''),
        ('```\nHR 0.1978\n```', A, ''),
        ('HR .1978, .1979', A, '.1979 has no source'),
        ('HR .1978', '', '.1978 has no source'),
        ('HR 21 %', A, '21 % has no source'),
        (f'{TABLE}.2086 |', 'results/{0}.json#users|runs', '.2086 in a | 6040 | .2086 has no'),
        ('HR .1978', 'results/c.json#runs', 'results/c.json#runs: no such file'),
        ('HR .1978', 'results/a.json#runs/system=z/HR', 'system=z/HR: no number'),
        ('HR .35', 'mean of results/?.json#*/system=?/HR', 'not one value in each file'),
        ('HR .1978', 'results/a.json', f'{MOST + 5} values, of {MOST} at most'),
        ('HR .1978', f'{A}; {B}', f'no number is of "{B}"'),
        ('HR .1978', f'{A}; set 20: an end', 'no number is of "set 20: an end"'),
        ('HR .1978', f'{A}; set: the defaults', '"set: the defaults" does not say which'),
        ('HR .1978', 'set', '"set" does not say why'),
    ],
)
def test_a_source_serves_its_numbers(text: str, source: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / 'results').mkdir()
    for name, value in (('a', 0.1978), ('b', 0.2086)):
        run = {'runs': [{'system': 'x', 'HR': value, 'bytes': 3e9}, {'system': 'y', 'HR': 0.5}]}
        run |= {'users': 6040, 'note': 'a weight of 0.75', 'many': [*range(MOST + 1)]}
        (tmp_path / f'results/{name}.json').write_text(json.dumps(run))
    comment = f'<!-- numbers: {source} -->\n' if source else ''
    found = problems(f'3 lines.\n\n{text}\n\n{comment}', tmp_path)
    assert [f.startswith('line 3: ') and problem in f for f in found] == [True] * bool(problem)
