"""The line charts of a run's page: metrics at every K, recall, training curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from palr_jax.evaluation import page, render, svg
from palr_jax.evaluation.page import Html
from palr_jax.evaluation.svg import Line

KINDS = {'llm_zero_shot': 'zero_shot'}  # other systems look as their name says, if it is a kind
AT = (1, 2, 3, 5, 10, 15, 20, 30, 40, 50)  # the K whose numbers stand in the table
ROWS = 12  # of a curve's table
MARK = 'candidates that the LLM ranks'


def kind(system: str) -> str:
    """How a system is drawn: a key of `svg.SHAPES`."""
    name = KINDS.get(system, system)
    return name if name in svg.SHAPES else 'other'


def cutoffs(details: Mapping[str, Any]) -> Html:
    """HR@K and NDCG@K of each system."""
    found = details['at_k']
    ks, systems = found['ks'], found['systems']
    mark = _mark(found, ks[-1])
    charts, body = '', []
    for metric in ('HR', 'NDCG'):
        drawn = _drawn({name: of[metric] for name, of in systems.items()}, ks)
        if drawn:
            charts += svg.lines(drawn, 'K', f'{metric}@K', mark=mark)
        body += [
            [render.title(name), metric, *(render.number(of[metric][k - 1]) for k in AT)]
            for name, of in systems.items()
        ]
    text = f'<p class="note">Means over {found["users"]:,} users.'
    if found['candidates'] is not None:
        text += (
            f' An LLM ranks {found["candidates"]} candidates, so its HR@K rises no further than '
            'to there; popularity and the retriever rank the whole catalogue.'
        )
    head = ['System', 'Metric', *(f'K = {k}' for k in AT)]
    return Html(f'{text}</p>\n{_with_table(systems, mark, charts, head, body, "HR@K and NDCG@K")}')


def recall(details: Mapping[str, Any]) -> Html:
    """Recall of the whole catalogue's ranking against K."""
    found = details['recall']
    ks, systems = found['ks'], found['systems']
    mark = _mark(found, ks[-1])
    drawn = _drawn(systems, ks)
    chart = svg.lines(drawn, 'K (logarithmic)', 'Recall@K', log=True, mark=mark) if drawn else ''
    body = [[render.title(name), *map(render.number, values)] for name, values in systems.items()]
    text = (
        f'<p class="note">All {found["users"]:,} test users: the share whose target is among the '
        'first K of the whole catalogue, the items of the history left out where the run leaves '
        'them out. It is the ceiling of what ranks K candidates.</p>\n'
    )
    head = ['System', *(f'K = {k}' for k in ks)]
    return Html(text + _with_table(systems, mark, chart, head, body, 'Recall@K'))


def curves(report: Mapping[str, Any], details: Mapping[str, Any]) -> Html:
    """Losses of fine-tuning and of the sequence model, each with a table."""
    tuned, trained = details['curves']['finetune'], details['curves']['retriever']
    text = '<h3>Fine-tuning</h3>\n'
    text += '<p>Nothing was fine-tuned.</p>\n' if tuned is None else _tuning(tuned)
    if report['finetune']:
        head, line = render.finetune_rows(report['finetune'])
        label = 'Held-out loss of fine-tuning'
        held = page.table(['', *head], [['Held-out loss', *line]], left=1, label=label)
        text += f'<p>{page.escape(render.finetune_text(report["finetune"]))}</p>\n{held}\n'
    if trained is not None:
        text += '<h3>Sequence model of the retriever</h3>\n<p class="note">By epoch, where it was '
        text += 'validated. The epoch of the highest NDCG@10 is the one that is used.</p>\n'
        columns = {
            'Training loss': trained['loss'],
            'NDCG@10 of the validation users': trained['NDCG@10'],
        }
        text += _curve(trained['epoch'], columns, 'Epoch')
    return Html(text)


def _tuning(tuned: Mapping[str, Any]) -> str:
    """The loss, and where there are enough points its mean over the last tenth of them."""
    at, losses, steps = tuned['step'], tuned['loss'], tuned['steps']
    of = f'the mean of {steps} steps' if steps > 1 else 'one step'
    text = f'<p class="note">Loss in nats. Each point is {of}, of other examples than the last'
    columns, window = {'Training loss': losses}, len(losses) // 10
    if not losses:
        return '<p>No loss is known.</p>\n'
    drawn = [Line('Training loss', 'llm', at, losses, faint=window > 1)]
    if window > 1:
        mean = [
            sum(part) / len(part)
            for end in range(1, len(losses) + 1)
            if (part := losses[max(0, end - window) : end])
        ]
        columns[f'Mean of the last {window * steps} steps'] = mean
        drawn.append(Line('Mean', 'llm', at, mean))
        text += f'; the thick line is the mean of the last {window * steps} steps'
    chart = svg.lines(drawn, 'Step', 'Training loss', from_zero=False)
    return f'{text}.</p>\n<div class="charts">{chart}</div>\n{_curve_table(at, columns, "Step")}'


def _curve(at: Sequence[int], columns: Mapping[str, Sequence[float | None]], x_label: str) -> str:
    """A chart a column, and the table of them."""
    drawn = [_line(name, 'retriever', at, values) for name, values in columns.items()]
    charts = ''.join(
        svg.lines([line], x_label, line.name, from_zero=False) for line in drawn if line
    )
    return f'<div class="charts">{charts}</div>\n{_curve_table(at, columns, x_label)}'


def _curve_table(
    at: Sequence[int], columns: Mapping[str, Sequence[float | None]], x_label: str
) -> str:
    """Some rows, the first and the last among them."""
    stride = max(1, -(-len(at) // ROWS))
    rows = sorted({*range(0, len(at), stride), len(at) - 1} - {-1})
    body = [
        [f'{at[row]:,}', *(render.number(values[row]) for values in columns.values())]
        for row in rows
    ]
    label = f'The numbers by {x_label.lower()}'
    table = page.table([x_label, *columns], body, left=1, label=label)
    return f'{page.details("", label, table)}\n'


def _mark(found: Mapping[str, Any], most: int) -> tuple[float, str] | None:
    """Where the LLM's candidates end, if that is in the picture."""
    candidates = found['candidates']
    return None if candidates is None or candidates > most else (candidates, MARK)


def _drawn(systems: Mapping[str, Sequence[float | None]], ks: Sequence[int]) -> list[Line]:
    found = [_line(render.title(name), kind(name), ks, of) for name, of in systems.items()]
    return [line for line in found if line is not None]


def _line(name: str, kind: str, xs: Sequence[float], ys: Sequence[float | None]) -> Line | None:
    """The known values; None where there are none."""
    known = [(x, y) for x, y in zip(xs, ys) if y is not None]
    return Line(name, kind, *zip(*known)) if known else None


def _with_table(
    systems: Mapping[str, Any],
    mark: tuple[float, str] | None,
    charts: str,
    head: Sequence[str],
    body: Sequence[Sequence[str]],
    label: str,
) -> Html:
    """Charts under one legend, and their numbers on request."""
    shown = ''
    if charts:
        entries = [(render.title(name), kind(name)) for name in systems]
        text = f'{mark[0]:,} {mark[1]}' if mark else ''
        shown = f'{svg.legend(entries, text)}\n<div class="charts">{charts}</div>\n'
    numbers = page.table(head, body, left=1, label=label)
    return Html(f'{shown}{page.details("", f"The numbers of {label}", numbers)}')
