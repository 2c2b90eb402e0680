"""HTML pages in one file each: no script and no network, light and dark, narrow and wide."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STYLE = Path(__file__).with_name('page.css')
# What a page may load: nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# Drawn around a mean, so that the systems differ in more than colour.
SHAPES = {
    'zero_shot': '<path d="M0 -6L6 5H-6z"/>',
    'retriever': '<path d="M-5 -5H5V5H-5z"/>',
    'llm': '<path d="M0 -7L7 0L0 7L-7 0z"/>',
    'fused': '<circle r="5.5"/>',
}


class Html(str):
    """Markup; any other text is escaped where it enters a page."""


class Section(NamedTuple):
    """A part of a page: the name in its address, its heading and its content."""

    anchor: str
    heading: str
    body: str


class Point(NamedTuple):
    """A mean and its 95 % interval at a cost, with the number that stands on it."""

    number: int
    x: float
    mean: float
    bounds: Sequence[float]


def escape(value: object) -> str:
    """The value as text of a page or of an attribute."""
    return value if isinstance(value, Html) else html.escape(str(value))


def document(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
      title: of the page.
      lead: what stands above the list of sections; markup.
      sections: each gets a heading and an entry in that list.
    """
    links = ''.join(f'<li><a href="#{s.anchor}">{escape(s.heading)}</a></li>' for s in sections)
    content = ''.join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-heading">\n'
        f'<h2 id="{s.anchor}-heading">{escape(s.heading)}</h2>\n{s.body}\n</section>\n'
        for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f'<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">To the results</a>\n<header>\n<h1>{escape(title)}</h1>\n'
        f'{lead}\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n'
        f'<main id="main" tabindex="-1">\n{content}</main>\n</body>\n</html>\n'
    )


def items(lines: Sequence[str]) -> Html:
    """A list."""
    return Html(f'<ul>{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>')


def table(
    head: Sequence[str], body: Sequence[Sequence[str]], *, left: int, label: str, wide: int = -1
) -> Html:
    """A table that scrolls sideways where it is wider than the page, by keyboard too.

    Args:
      head: the columns' headings.
      body: the lines.
      left: how many columns are flush left; the others are flush right.
      label: what the table is, for those who hear it.
      wide: the one column whose cells may have several lines.
    """

    def cell(column: int, value: str, scope: str) -> str:
        kinds = ['left'] * (column < left) + ['wide'] * (column == wide)
        of_kind = f' class="{" ".join(kinds)}"' if kinds else ''
        if not scope:
            return f'<td{of_kind}>{escape(value)}</td>'
        return f'<th scope="{scope}"{of_kind}>{escape(value)}</th>'

    top = ''.join(cell(column, name, 'col') for column, name in enumerate(head))
    lines = ''
    for first, *rest in body:
        cells = [cell(column, value, '') for column, value in enumerate(rest, start=1)]
        lines += f'<tr>{cell(0, first, "row")}{"".join(cells)}</tr>\n'
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f'<table><thead><tr>{top}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>'
    )


def cards(head: Sequence[str], body: Sequence[tuple[str, Sequence[str]]], *, label: str) -> Html:
    """A table whose rows become cards on a narrow page.

    Args:
      head: the columns' headings; a card has each without what stands in small print.
      body: (class of the row, its cells) a row.
      label: what the table is, for those who hear it.
    """
    top = ''.join(f'<th scope="col" role="columnheader">{escape(name)}</th>' for name in head)
    lines = ''
    for kind, (first, *rest) in body:
        # A block is no row any more for those who hear it, unless its role is said.
        lines += (
            f'<tr role="row" class="{kind}"><th scope="row" role="rowheader">{escape(first)}</th>'
        )
        for name, value in zip(head[1:], rest):
            plain = name.split('<small>')[0]
            lines += f'<td role="cell" data-name="{escape(plain)}">{escape(value)}</td>'
        lines += '</tr>\n'
    return Html(
        f'<table class="rows" role="table" aria-label="{escape(label)}">'
        f'<thead role="rowgroup"><tr role="row">{top}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{lines}</tbody></table>'
    )


def details(anchor: str, summary: str, body: str) -> Html:
    """What opens on request."""
    name = f' id="{escape(anchor)}"' if anchor else ''
    return Html(f'<details{name}><summary>{escape(summary)}</summary>\n{body}\n</details>')


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

    Both axes begin at 0. The picture has the shape of a narrow page, where its letters stay
    readable.
    """
    width, height, left, bottom, top = 400, 300, 52, 46, 10
    xs, ys = ticks(max(p.x for p in points)), ticks(max(p.bounds[1] for p in points))

    def x_of(value: float) -> float:
        return left + (width - left - 16) * value / xs[-1]

    def y_of(value: float) -> float:
        return height - bottom - (height - bottom - top) * value / ys[-1]

    parts = [f'<title>{escape(y_label)} against {escape(x_label)}</title>']
    for value in ys:
        y = f'{y_of(value):.1f}'
        parts.append(f'<line class="rail" x1="{left}" x2="{width - 16}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y}" text-anchor="end" dy=".35em">{value:.10g}</text>'
        )
    for value in xs:
        parts.append(
            f'<text x="{x_of(value):.1f}" y="{height - bottom + 17}" text-anchor="middle">'
            f'{value:,.10g}</text>'
        )
    for point in points:
        x, y = f'{x_of(point.x):.1f}', f'{y_of(point.mean):.1f}'
        low, high = (f'{y_of(value):.1f}' for value in point.bounds)
        first = ' first' if point.number == 1 else ''
        parts.append(
            f'<g class="{kind}{first}"><line x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>'
            f'<circle cx="{x}" cy="{y}" r="9"/><text class="on" x="{x}" y="{y}" dy=".35em" '
            f'text-anchor="middle">{point.number}</text></g>'
        )
    parts.append(
        f'<text x="{(left + width - 16) / 2}" y="{height - 6}" text-anchor="middle">'
        f'{escape(x_label)}</text>'
    )
    return Html(
        f'<figure><figcaption>{escape(y_label)}</figcaption>'
        f'<svg class="scatter" role="img" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
        '</figure>'
    )


def ticks(highest: float) -> list[float]:
    """Four to eight round numbers from 0 to `highest` or a little more."""
    if highest <= 0:
        return [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(highest))
    step = next(unit * s for s in (0.2, 0.5, 1, 2, 5) if highest <= 7 * unit * s)
    return [round(step * n, 12) for n in range(math.ceil(highest / step - 1e-9) + 1)]
