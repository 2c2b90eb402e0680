"""A study as pictures: the variants' metrics with intervals, and quality against cost."""

import io
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from palr_jax.evaluation.chart import COLOURS, FAINT, INK, PANELS
from palr_jax.evaluation.study import finished, main_role, total_seconds

SHOWN = {'retriever': 'Retriever', 'llm': 'LLM', 'fused': 'Fused'}
MARKERS = {'retriever': 's', 'llm': 'D', 'fused': 'o'}
STEP = 0.24  # between the systems of a variant, in rows


def metrics(report: Mapping[str, Any]) -> bytes:
    """PNG: HR@10 and NDCG@10 with 95 % intervals; a row a variant, a dot a system.

    A dashed line is the base's.
    """
    variants = finished(report)
    figure, panels = _figure(9.6, 1.6 + 0.55 * len(variants), len(PANELS), share=True)
    shown = [role for role in SHOWN if any(role in v['systems'] for v in variants)]
    for panel, metric in zip(panels, PANELS):
        highest = 0.0
        for role in shown:
            offset = STEP * (shown.index(role) - (len(shown) - 1) / 2)
            label = SHOWN[role]
            for place, variant in enumerate(variants):
                row = variant['systems'].get(role)
                if row is None or row[metric] is None:
                    continue
                style = {'color': COLOURS[role], 'linewidth': 2}
                panel.plot(row['ci95'][metric], [place + offset] * 2, **style)
                panel.plot(
                    row[metric],
                    place + offset,
                    marker=MARKERS[role],
                    markersize=6,
                    linestyle='none',
                    color=COLOURS[role],
                    label=label,
                )
                label = None  # one entry of the legend a system
                highest = max(highest, row['ci95'][metric][1])
                if place == 0:
                    panel.axvline(row[metric], color=COLOURS[role], linewidth=0.9, linestyle='--')
        panel.set_xlim(0, 1.08 * highest or 1)
        panel.set_ylim(len(variants) - 0.5, -0.5)
        panel.set_xlabel(f'{metric} (mean over users, 95 % interval)')
        panel.tick_params(axis='y', length=0)
        _plain(panel, 'x')
    panels[0].set_yticks(range(len(variants)), [v['name'].replace('_', ' ') for v in variants])
    panels[-1].legend(frameon=False, fontsize=9, loc='upper left', bbox_to_anchor=(1, 1))
    return _png(figure, report)


def cost(report: Mapping[str, Any]) -> bytes:
    """PNG: NDCG@10 of the fused system, else of the LLM or the retriever, against two costs.

    Variants are numbered; the base is number 1 and dark.
    """
    variants = finished(report)
    names = [variant['name'] for variant in report['variants']]
    role = main_role(variants)
    costs = {
        'Prompt tokens a user': operator.itemgetter('prompt_tokens'),
        'Seconds of fine-tuning and ranking': total_seconds,
    }
    figure, panels = _figure(9.6, 4.2, len(costs), share=True)
    for panel, (title, of) in zip(panels, costs.items()):
        points = [
            (of(v['costs']), v['systems'][role], v['name'])
            for v in variants
            if role in v['systems'] and of(v['costs']) is not None
        ]
        for x, row, name in points:
            mean, bounds = row['NDCG@10'], row['ci95']['NDCG@10']
            panel.plot([x, x], bounds, color=COLOURS[role], linewidth=1.2, alpha=0.5)
            panel.plot(
                x,
                mean,
                marker='o',
                markersize=6,
                linestyle='none',
                color=INK if name == names[0] else COLOURS[role],
                label=f'{names.index(name) + 1}  {name.replace("_", " ")}',
            )
            panel.annotate(
                str(names.index(name) + 1),
                (x, mean),
                xytext=(5, 4),
                textcoords='offset points',
                fontsize=9,
                color=INK,
            )
        panel.set_xlabel(title)
        panel.set_xlim(0, 1.1 * max([x for x, _, _ in points], default=0) or 1)
        panel.xaxis.set_major_locator(MaxNLocator(6))
        _plain(panel, 'both')
    panels[-1].legend(
        frameon=False,
        fontsize=9,
        loc='upper left',
        bbox_to_anchor=(1, 1),
        handlelength=0,
        markerscale=0,
    )
    panels[0].set_ylabel(f'NDCG@10, {SHOWN[role]} (95 % interval)')
    return _png(figure, report)


def _figure(width: float, height: float, panels: int, *, share: bool) -> tuple[Figure, Sequence]:
    figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, sharey=share)


def _plain(panel: Any, grid: str) -> None:
    panel.grid(axis=grid, color=FAINT, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[['top', 'right', 'left']].set_visible(False)


def _png(figure: Figure, report: Mapping[str, Any]) -> bytes:
    title = f'Study: {report["study"].replace("_", " ")}'
    figure.suptitle(title, fontsize=13, color=INK, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()
