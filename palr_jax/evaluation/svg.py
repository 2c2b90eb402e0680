"""Charts of a page as SVG: whatever has a colour has a shape or a stroke of its own as well."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from palr_jax.evaluation.page import Html, escape

# The mark of each kind of system; page.css has the colours, and the strokes of lines.
SHAPES = {
    'popularity': '<path d="M0 6L6 -5H-6z"/>',
    'retriever': '<path d="M-5 -5H5V5H-5z"/>',
    'sequence': '<path d="M-6 -2H-2V-6H2V-2H6V2H2V6H-2V2H-6z"/>',
    'covisitation': '<path d="M-6 -3H6V3H-6z"/>',
    'profile': '<path d="M-3 -6H3V6H-3z"/>',
    'zero_shot': '<path d="M0 -6L6 5H-6z"/>',
    'llm': '<path d="M0 -7L7 0L0 7L-7 0z"/>',
    'fused': '<circle r="5.5"/>',
    'other': '<path d="M-6 -4L-4 -6L0 -2L4 -6L6 -4L2 0L6 4L4 6L0 2L-4 6L-6 4L-2 0z"/>',
}
# A picture has the shape of a narrow page, where its letters stay readable.
WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, BOTTOM, TOP = 52, 16, 46, 10  # around the axes
MARKS = 6  # on a line


class Point(NamedTuple):
    """A mean and its 95 % interval at a cost, with the number that stands on it."""

    number: int
    x: float
    mean: float
    bounds: Sequence[float]


class Line(NamedTuple):
    """The values of one system; `kind` is a key of SHAPES, and a faint line has no marks."""

    name: str
    kind: str
    xs: Sequence[float]
    ys: Sequence[float]
    faint: bool = False


def bar(
    mean: float,
    bounds: Sequence[float],
    limits: tuple[float, float],
    kind: str,
    mark: float | None = None,
) -> Html:
    """A mean with its interval on the scale `limits`, as wide as its place; a number stands beside.

    Args:
      mean: drawn in the shape of its kind.
      bounds: of the interval.
      limits: the values at both ends of the scale.
      kind: a key of SHAPES.
      mark: where a dashed line stands.
    """
    low, high = limits

    def at(value: float) -> str:
        return f'{100 * (value - low) / (high - low):.2f}%'

    marked = (
        f'<line class="mark" x1="{at(mark)}" x2="{at(mark)}" y1="0" y2="100%"/>'
        if mark is not None
        else ''
    )
    return Html(
        '<svg class="bar" aria-hidden="true">'
        f'<line class="rail" x1="0" x2="100%" y1="50%" y2="50%"/>{marked}<g class="{kind}">'
        f'<line class="span" x1="{at(bounds[0])}" x2="{at(bounds[1])}" y1="50%" y2="50%"/>'
        f'<svg x="{at(mean)}" y="50%" overflow="visible">{SHAPES[kind]}</svg></g></svg>'
    )


def scatter(points: Sequence[Point], x_label: str, y_label: str, kind: str) -> Html:
    """Means with intervals against a cost; point number 1 has the colour of the text.

    Both axes begin at 0.
    """
    xs, ys = ticks(max(p.x for p in points)), ticks(max(p.bounds[1] for p in points))
    parts = ''
    for point in points:
        x, y = _across(point.x / xs[-1]), _up(point.mean / ys[-1])
        low, high = (_up(value / ys[-1]) for value in point.bounds)
        first = ' first' if point.number == 1 else ''
        parts += (
            f'<g class="{kind}{first}"><line x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>'
            f'<circle cx="{x}" cy="{y}" r="9"/><text class="on" x="{x}" y="{y}" dy=".35em" '
            f'text-anchor="middle">{point.number}</text></g>'
        )
    across = {f'{value:,.10g}': value / xs[-1] for value in xs}
    up = {f'{value:.10g}': value / ys[-1] for value in ys}
    return _figure(across, up, x_label, y_label, parts)


def lines(
    drawn: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    from_zero: bool = True,
    mark: tuple[float, str] | None = None,
) -> Html:
    """Values against something, a line a system.

    Args:
      drawn: each with at least one value.
      x_label: what the values are against.
      y_label: what they are.
      log: whether the x axis is logarithmic, from 1 on; else it begins at 0.
      from_zero: whether the y axis begins at 0.
      mark: a place on the x axis with a dashed line, and what it is.
    """
    most = max(max(line.xs) for line in drawn)
    values = [y for line in drawn for y in line.ys]
    ys = ticks(max(values)) if from_zero else ticks_between(min(values), max(values))
    xs = decades(most) if log else ticks(most)
    end = max(most, 2) if log else xs[-1]

    def across(x: float) -> float:
        return math.log(x) / math.log(end) if log else x / end

    def up(y: float) -> float:
        return (y - ys[0]) / (ys[-1] - ys[0])

    parts = ''
    if mark is not None:
        at = _across(across(mark[0]))
        parts += f'<line class="mark" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    for number, line in enumerate(drawn):
        places = [(_across(across(x)), _up(up(y))) for x, y in zip(line.xs, line.ys)]
        path = 'L'.join(f'{x} {y}' for x, y in places)
        faint = ' faint' if line.faint else ''
        parts += f'<path class="line {line.kind}{faint}" d="M{path}"/>'
        if line.faint:
            continue
        stride = max(1, len(places) // MARKS)
        # Where lines lie on each other, their marks do not.
        for x, y in places[number * stride // max(1, len(drawn)) :: stride]:
            at = f'transform="translate({x} {y}) scale(.8)"'
            parts += f'<g class="{line.kind}" {at}>{SHAPES[line.kind]}</g>'
    told = '; '.join(
        f'{line.name} from {line.ys[0]:.4g} at {line.xs[0]:,.10g} to {line.ys[-1]:.4g} at '
        f'{line.xs[-1]:,.10g}'
        for line in drawn
    )
    told += f'; {mark[1]}: {mark[0]:,.10g}' if mark else ''
    return _figure(
        {f'{value:,.10g}': across(value) for value in xs},
        {f'{value:.10g}': up(value) for value in ys},
        x_label,
        y_label,
        parts,
        told,
    )


def legend(entries: Iterable[tuple[str, str]], mark: str = '') -> Html:
    """The strokes and shapes of lines: (name, kind) each, and what a dashed upright line is."""
    keys = []
    for name, kind in entries:
        shape = f'<g class="{kind}" transform="translate(22 8) scale(.8)">{SHAPES[kind]}</g>'
        keys.append((name, f'<path class="line {kind}" d="M0 8H44"/>{shape}'))
    keys += [(mark, '<path class="mark" d="M22 0V16"/>')] if mark else []
    shown = ''.join(
        f'<li><svg viewBox="0 0 44 16" width="44" height="16" aria-hidden="true">{drawn}</svg> '
        f'{escape(name)}</li>'
        for name, drawn in keys
    )
    return Html(f'<ul class="legend">{shown}</ul>')


def _across(share: float) -> str:
    return f'{LEFT + (WIDTH - LEFT - RIGHT) * share:.1f}'


def _up(share: float) -> str:
    return f'{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share:.1f}'


def _figure(
    across: Mapping[str, float],
    up: Mapping[str, float],
    x_label: str,
    y_label: str,
    parts: str,
    told: str = '',
) -> Html:
    """Axes with their ticks, each at a share of the axis, around what is drawn.

    Args:
      across: of the x axis.
      up: of the y axis.
      x_label: beneath.
      y_label: above.
      parts: markup of what is drawn.
      told: the picture in words.
    """
    axes = ''
    for text, share in up.items():
        axes += f'<line class="rail" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_up(share)}" '
        axes += f'y2="{_up(share)}"/><text x="{LEFT - 6}" y="{_up(share)}" text-anchor="end" '
        axes += f'dy=".35em">{text}</text>'
    for text, share in across.items():
        axes += f'<text x="{_across(share)}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
        axes += f'{text}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    axes += f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    words = f'<title>{escape(y_label)} against {escape(x_label)}</title>'
    words += f'<desc>{escape(told)}</desc>' if told else ''
    return Html(
        f'<figure><figcaption>{escape(y_label)}</figcaption>'
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}">{words}{axes}{parts}</svg>'
        '</figure>'
    )


def ticks(highest: float) -> list[float]:
    """Four to eight round numbers from 0 to `highest` or a little more."""
    if highest <= 0:
        return [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(highest))
    step = next(unit * s for s in (0.2, 0.5, 1, 2, 5) if highest <= 7 * unit * s)
    return [round(step * n, 12) for n in range(math.ceil(highest / step - 1e-9) + 1)]


def ticks_between(lowest: float, highest: float) -> list[float]:
    """Two to nine round numbers from `lowest` or a little less to `highest` or a little more."""
    if highest <= lowest:
        lowest, highest = lowest - 0.5, highest + 0.5
    step = ticks(highest - lowest)[1]
    first, last = math.floor(lowest / step + 1e-9), math.ceil(highest / step - 1e-9)
    return [round(step * n, 12) for n in range(first, last + 1)]


def decades(highest: float) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to `highest`, which is at least 1."""
    powers = range(math.floor(math.log10(highest)) + 1)
    return [m * 10**power for power in powers for m in (1, 2, 5) if m * 10**power <= highest]
