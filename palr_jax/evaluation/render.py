"""A report as text: Markdown for people who read it, a table for the terminal."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

SYSTEMS = {
    'popularity': 'Popularity',
    'retriever': 'Retriever',
    'sequence': 'Sequence model',
    'covisitation': 'Co-visitation',
    'llm_zero_shot': 'LLM zero-shot',
    'llm': 'LLM fine-tuned',
    'fused': 'Fused',
    'random': 'Candidates in random order',
    'popularity_reranked': 'Candidates by popularity',
    'fused_popularity': 'Fused with popularity',
    'fused_shuffled': 'Fused with shuffled LLM',
}
LOSSES = {'answer': ('the answers', 'a token'), 'list': ('the choices', 'a list')}
DATASETS = {'ml100k': 'MovieLens 100K', 'ml1m': 'MovieLens 1M', 'beauty': 'Amazon Beauty'}
SPLITS = {'valid': 'Validation', 'test': 'Test'}
DETAILS = ('variant', 'mode', 'objective')
WITH_INTERVAL = ('HR@10', 'NDCG@10')  # in Markdown; metrics.json has the intervals of all
LISTS = ('coverage@10', 'novelty@10', 'diversity@10')  # of what is recommended
LIST_HEAD = ('System', 'Coverage', 'Novelty (bits)', 'Diversity')
UNKNOWN = '–'
SIGNED = '+z.4f'  # never -0.0000
LISTS_MEANING = (
    'The first 10 items of every list. Coverage: the share of the catalogue that anyone is shown; '
    'more users cover more. Novelty: the mean of log2(users / users who have the item); one bit '
    'more is an item known to half as many. Diversity: the mean Jaccard distance between the '
    "keywords of a list's items, 0 for items all alike and 1 for items with nothing in common."
)


def labels(rows: Sequence[Row]) -> list[str]:
    """One name a row: the system, and of its details those that differ between its rows.

    The rows of a system in another split, user set or group share its name.
    """
    names = []
    for row in rows:
        same = [other for other in rows if other['system'] == row['system']]
        telling = [key for key in DETAILS if len({other[key] for other in same}) > 1]
        names.append('/'.join([row['system'], *(row[key] for key in telling if row[key])]))
    return names


def title(label: str) -> str:
    """A label for people: 'llm/no_profile' -> 'LLM fine-tuned (no profile)'."""
    system, *details = (part.replace('_', ' ') for part in label.split('/'))
    shown = SYSTEMS.get(label.split('/')[0]) or system.capitalize().replace('llm', 'LLM')
    return f'{shown} ({", ".join(details)})' if details else shown


def dataset_title(report: Row) -> str:
    name = report['dataset'].get('name')
    return DATASETS.get(name, name) or 'Unnamed data'


def blocks(report: Row, *, groups: bool = False) -> list[tuple[str, list[tuple[str, Row]]]]:
    """The rows that may be compared with each other: one block a split and user set, test first.

    Args:
      groups: whether to return the rows of groups of users instead of those of all.

    Returns:
      (heading, [(label, row), …]) a block.
    """
    found: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for label, row in zip(labels(report['runs']), report['runs']):
        if ('group' in row) == groups:
            found.setdefault((row['split'], str(row['user_set'])), []).append((label, row))
    ordered = sorted(found.items(), key=lambda block: block[0][0] != 'test')
    return [(_heading(rows[0][1]), rows) for _, rows in ordered]


def _heading(row: Row) -> str:
    split = SPLITS.get(row['split'], row['split'])
    users = row['user_set']
    if users != 'all':
        return f'{split}, sample of {users["n"]:,} users (seed {users["seed"]})'
    return f'{split}, all users' if 'group' in row else f'{split}, all {row["users"]:,} users'


def metric_names(report: Row) -> list[str]:
    return list(report['runs'][0]['ci95'])


def number(value: float | None, form: str = '.4f') -> str:
    return UNKNOWN if value is None else format(value, form)


def interval(bounds: Sequence[float] | None, form: str = '.4f') -> str:
    return UNKNOWN if bounds is None else f'[{bounds[0]:{form}}, {bounds[1]:{form}}]'


def table(report: Row) -> str:
    """The main numbers, at most 100 columns wide."""
    lines = [summary(report)]
    width = 34
    for heading, rows in blocks(report):
        lines += ['', heading]
        lines.append(
            f'{"system":<{width}}{"users":>8}{"HR@1":>8}{"HR@10":>8}{"NDCG@10":>9}'
            f'  {"95 % interval":<18}{"MRR":>6}'
        )
        for label, row in rows:
            lines.append(
                f'{_cut(title(label), width)}{row["users"]:>8,}{number(row["HR@1"]):>8}'
                f'{number(row["HR@10"]):>8}{number(row["NDCG@10"]):>9}'
                f'  {interval(row["ci95"]["NDCG@10"]):<18}{number(row["MRR"]):>6}'
            )
    if report['comparisons']:
        width = 45
        lines += ['', 'Paired differences on the same users']
        lines.append(
            f'{"":<{width}}{"users":>7}  {"metric":<8}{"diff":>8}'
            f'  {"95 % interval":<20}{"p, Holm":>8}'
        )
        for row in report['comparisons']:
            users = number(row.get('users'), ',')  # not told by older versions
            lines.append(
                f'{_cut(pair(row), width)}{users:>7}'
                f'  {row["metric"]:<8}{number(row["difference"], SIGNED):>8}'
                f'  {interval(row["ci95"], SIGNED):<20}{number(row["p_adjusted"]):>8}'
            )
    lines += ['', *_facts(report)]
    return '\n'.join(lines) + '\n'


def _facts(report: Row) -> list[str]:
    """What a reader of the terminal table must know besides, as wrapped list items."""
    found = report['retrieval']
    facts = []
    if 'backend' in found:
        facts.append(
            f'Retrieval, all users: recall@20 {number(found.get("recall@20"))}, recall@50 '
            f'{number(found.get("recall@50"))}; index {found["backend"]}, its recall against exact '
            f'search {number(found.get("recall_vs_exact"))}.'
        )
    if report['finetune']:
        finetune, loss = report['finetune'], report['finetune']['loss']
        of_what, unit = LOSSES[finetune['of']]
        facts.append(
            f'Fine-tuning, {finetune["users"]} users who gave no example: loss of {of_what} '
            f'{number(loss["before"])} before, {number(loss["after"])} after, difference '
            f'{interval(loss["ci95"]["difference"], SIGNED)} nats {unit}.'
        )
    wrap = textwrap.TextWrapper(width=100, initial_indent='- ', subsequent_indent='  ')
    return [line for fact in [*facts, *report['notes']] for line in wrap.wrap(fact)]


def pair(comparison: Row) -> str:
    """What is compared, for people."""
    group = f' ({comparison["group"]})' if 'group' in comparison else ''
    return f'{title(comparison["a"])} − {title(comparison["b"])}{group}'


def _cut(text: str, width: int) -> str:
    """`text` in exactly `width` columns, a blank at the end."""
    return f'{text if len(text) < width else f"{text[: width - 2]}…":<{width}}'


def summary(report: Row) -> str:
    """The data set in one line."""
    counts = [
        f'{report["dataset"][key]:,} {key}'
        for key in ('users', 'items', 'interactions')
        if report['dataset'].get(key) is not None
    ]
    return ': '.join(
        [dataset_title(report), ', '.join(counts)] if counts else [dataset_title(report)]
    )


def markdown(report: Row) -> str:
    """The whole report."""
    names = metric_names(report)
    parts = [f'# {dataset_title(report)}: who ranks better', f'{summary(report)}.']
    parts += ['![HR@10 and NDCG@10 of the systems](comparison.png)', '## Results']
    for heading, rows in blocks(report):
        parts += [f'### {heading}', _result_table(rows, names)]
    if report['comparisons']:
        parts += ['## Comparisons', _comparison_table(report)]
    recommended = [(heading, list_rows(rows)) for heading, rows in blocks(report)]
    if any(body for _, body in recommended):
        parts += ['## What is recommended', LISTS_MEANING]
        for heading, body in recommended:
            parts += [f'### {heading}', table_of(LIST_HEAD, body, left=1)] if body else []
    if blocks(report, groups=True):
        parts.append('## Groups of users')
        for heading, rows in blocks(report, groups=True):
            for grouping, of_grouping in groupings(rows).items():
                parts.append(f'### {heading}{grouping and ": by "}{grouping}')
                parts.append(_group_table(of_grouping))
    if report['finetune']:
        head, line = finetune_rows(report['finetune'])
        parts += ['## Fine-tuning', finetune_text(report['finetune'])]
        parts.append(table_of(head, [line], left=0))
    parts += ['## Retrieval', _properties(report['retrieval'])]
    parts += ['## How to read this', '\n'.join(f'- {line}' for line in reading(report))]
    if report['notes']:
        parts += ['## Notes on this run', '\n'.join(f'- {note}' for note in report['notes'])]
    for name, key in (('Data', 'dataset'), ('Timing', 'timing'), ('Versions', 'versions')):
        parts += [f'## {name}', _properties(report[key])]
    return '\n\n'.join(parts) + '\n'


def _result_table(rows: Sequence[tuple[str, Row]], names: Sequence[str]) -> str:
    body = [[title(label), f'{row["users"]:,}', *_results(row, names)] for label, row in rows]
    return table_of(['System', 'Users', *_result_head(names)], body, left=1)


def _group_table(groups: Mapping[str, list[tuple[str, Row]]]) -> str:
    """The metrics that have intervals: groups are small."""
    body = [
        [group, title(label), f'{row["users"]:,}', *_results(row, WITH_INTERVAL)]
        for group, rows in groups.items()
        for label, row in rows
    ]
    return table_of(['Group', 'System', 'Users', *_result_head(WITH_INTERVAL)], body, left=2)


def groupings(
    rows: Sequence[tuple[str, Row]],
) -> dict[str, dict[str, list[tuple[str, Row]]]]:
    """Rows by grouping and group; a row's 'group' is 'grouping: group', or a group alone."""
    found: dict[str, dict[str, list[tuple[str, Row]]]] = {}
    for label, row in rows:
        *grouping, group = row['group'].split(': ', 1)
        found.setdefault(''.join(grouping), {}).setdefault(group, []).append((label, row))
    return found


def _result_head(names: Sequence[str]) -> list[str]:
    return [
        entry for name in names for entry in ([name, '95 %'] if name in WITH_INTERVAL else [name])
    ]


def _results(row: Row, names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        cells.append(number(row[name]))
        if name in WITH_INTERVAL:
            cells.append(interval(row['ci95'][name]))
    return cells


def list_rows(rows: Sequence[tuple[str, Row]]) -> list[list[str]]:
    """Of the rows with lists: system, coverage, novelty and diversity."""
    return [
        [title(label), *(number(row[name], '.3f') for name in LISTS)]
        for label, row in rows
        if any(row.get(name) is not None for name in LISTS)  # older reports lack them
    ]


def _comparison_table(report: Row) -> str:
    head = ['A − B', 'Metric', 'Users', 'Difference', '95 %', 'p', 'p (Holm)', 'Detectable']
    body = []
    for row in report['comparisons']:
        body.append(
            [
                pair(row),
                row['metric'],
                number(row.get('users'), ','),
                number(row['difference'], SIGNED),
                interval(row['ci95'], SIGNED),
                number(row['p_value']),
                number(row['p_adjusted']),
                number(row.get('detectable')),
            ]
        )
    return table_of(head, body, left=2)


def finetune_text(finetune: Row) -> str:
    """What the losses of `finetune_rows` are of."""
    of_what, unit = LOSSES[finetune['of']]
    return (
        f'Loss of {of_what} of {finetune["users"]:,} users ({finetune["examples"]:,} examples) '
        f'that gave no fine-tuning examples, in nats {unit}; mean over users.'
    )


def finetune_rows(finetune: Row) -> tuple[list[str], list[str]]:
    """The losses before and after, with intervals: a head and a line."""
    loss, line = finetune['loss'], []
    for name, form in (('before', '.4f'), ('after', '.4f'), ('difference', SIGNED)):
        line += [number(loss[name], form), interval(loss['ci95'][name], form)]
    return ['Before', '95 %', 'After', '95 %', 'Difference', '95 %'], line


def reading(report: Row) -> list[str]:
    """What a reader must know."""
    settings = report['evaluation']
    lines = [
        'Every user of a row counts; a user whose target is not among the ranked items is a miss '
        'for every metric. The recall of the retrieval is the ceiling of what ranks its items.',
        'Tied scores: each metric is its expected value over a random order of the tied items.',
        f'MRR is cut at rank {settings["candidates"]} for every system.',
        f'Intervals: 95 % percentile bootstrap over users, {settings["resamples"]:,} resamples, '
        f'seed {report["seed"]}. They cover the choice of the users, not that of the training '
        'seed. A mean of 0 has the interval [0, 0], which does not make it certain.',
        f'p: two-sided paired randomisation test, {settings["resamples"]:,} draws; corrected after '
        f'Holm over the {len(report["comparisons"])} comparisons of this report.',
        'Detectable: the true difference that an uncorrected test at 5 % of as many such users '
        'would find 8 times in 10; a much smaller one needs more users.',
    ]
    if blocks(report, groups=True):
        lines.append(
            'Groups: seen users gave examples for fine-tuning. History length is in items before '
            'the target, parted by the quartiles of all users. Head, middle and tail items have '
            'about a third of the training events each, most popular first; cold items none. Of '
            'many groups some look different by chance.'
        )
    if report['dataset'].get('tie_rule'):
        lines.append(f'Events of a user at the same time: {report["dataset"]["tie_rule"]}.')
    return lines


def _properties(values: Row) -> str:
    return table_of(['', ''], properties(values), left=2)


def properties(values: Row, prefix: str = '') -> list[list[str]]:
    """[name, value] of everything in `values`; nested names are joined by dots."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += properties(value, f'{prefix}{key}.')
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for place, entry in enumerate(value, start=1):
                lines += properties(entry, f'{prefix}{key}.{place}.')
        elif isinstance(value, list):
            lines.append([f'{prefix}{key}', ', '.join(map(str, value))])
        else:
            lines.append([f'{prefix}{key}', _value(value)])
    return lines


def _value(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f'{value:,}' if isinstance(value, int) else f'{value:,.4g}'


def table_of(head: Sequence[str], body: Sequence[Sequence[str]], *, left: int) -> str:
    """A Markdown table whose first `left` columns are flush left and the others right."""
    ruler = [':--' if column < left else '--:' for column in range(len(head))]
    return '\n'.join(
        f'| {" | ".join(str(cell).replace("|", "&#124;") for cell in line)} |'
        for line in (head, ruler, *body)
    )
