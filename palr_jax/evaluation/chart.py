"""A report as one picture: the systems' HR@10 and NDCG@10 with their intervals."""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from palr_jax.evaluation import render

# Okabe & Ito's colours, which stay apart for the colour-blind; the axis names the systems anyway.
COLOURS = {
    'popularity': '#7f7f7f',
    'retriever': '#0072b2',
    'llm_zero_shot': '#e69f00',
    'llm': '#d55e00',
    'fused': '#009e73',
}
OTHER = '#cc79a7'
INK, FAINT = '#222222', '#dddddd'
PANELS = ('HR@10', 'NDCG@10')


def comparison(report: Mapping[str, Any]) -> bytes:
    """PNG: a dot a system and metric with its 95 % interval, a block a user set.

    The test rows are drawn; the validation rows where there are no test rows.
    """
    found = render.blocks(report)
    split = found[0][1][0][1]['split'] if found else None
    found = [block for block in found if block[1][0][1]['split'] == split]

    height = sum(1.6 + len(rows) for _, rows in found)
    figure = Figure(figsize=(9.6, 1.5 + 0.34 * height), dpi=150, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    ticks, y = [], 0.0
    for block, (heading, rows) in enumerate(found):
        top = y
        y += 1.6
        for label, row in rows:
            ticks.append((y, render.title(label)))
            for panel, metric in zip(panels, PANELS):
                _dot(panel, y, row, metric, hollow=row['user_set'] != 'all')
            y += 1
        for panel in panels:
            if block:
                panel.axhline(top, color=INK, linewidth=0.8)
        panels[0].text(
            0,
            top + 0.6,
            _block_title(heading),
            transform=panels[0].get_yaxis_transform(),
            weight='bold',
            color=INK,
            fontsize=10,
            va='center',
            parse_math=False,
        )
    for panel, metric in zip(panels, PANELS):
        panel.set_xlabel(f'{metric} (mean over users, 95 % interval)')
        highest = max((_end(row, metric) for _, rows in found for _, row in rows), default=0)
        panel.set_xlim(0, 1.18 * highest or 1)  # room for the numbers
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.set_ylim(max(y, 1), 0)
        panel.grid(axis='x', color=FAINT, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(axis='y', length=0)
        panel.spines[['top', 'right', 'left']].set_visible(False)
    panels[0].set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    for text in panels[0].get_yticklabels():
        text.set_parse_math(False)
    users = max((row['users'] for _, rows in found for _, row in rows), default=0)
    name = render.SPLITS.get(split, split) or 'No results'
    figure.suptitle(
        f'{render.dataset_title(report)}, {name.lower()}: {users:,} users',
        fontsize=13,
        color=INK,
        parse_math=False,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()


def _block_title(heading: str) -> str:
    """'Test, all 943 users' -> 'All 943 users'; the chart's title names the split."""
    text = heading.split(', ', 1)[1]
    return text[0].upper() + text[1:]


def _end(row: Mapping[str, Any], metric: str) -> float:
    return row['ci95'][metric][1] if row['ci95'][metric] else 0.0


def _dot(panel: Any, y: float, row: Mapping[str, Any], metric: str, *, hollow: bool) -> None:
    mean, bounds = row[metric], row['ci95'][metric]
    if mean is None:
        return
    colour = COLOURS.get(row['system'], OTHER)
    panel.plot(bounds, [y, y], color=colour, linewidth=2, solid_capstyle='round')
    panel.plot(
        mean,
        y,
        marker='D' if hollow else 'o',
        markersize=7,
        color=colour,
        markerfacecolor='white' if hollow else colour,
        markeredgewidth=1.8,
    )
    number = panel.annotate(
        f'{mean:.3f}',
        (max(bounds[1], mean), y),
        xytext=(7, 0),
        textcoords='offset points',
        va='center',
        fontsize=9,
        color=INK,
    )
    number.set_bbox({'facecolor': 'white', 'edgecolor': 'none', 'pad': 1})
