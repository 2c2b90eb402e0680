"""HTML pages in one file each: no script and no network, light and dark, narrow and wide."""

import html
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

STYLE = Path(__file__).with_name('page.css')
# What a page may load: nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Markup; any other text is escaped where it enters a page."""


class Section(NamedTuple):
    """A part of a page: the name in its address, its heading and its content."""

    anchor: str
    heading: str
    body: str


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
      wide: the one column whose cells may have several lines; the headings may then, too.
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
    wraps = ' wraps' if wide >= 0 else ''
    return Html(
        f'<div class="scroll{wraps}" role="region" tabindex="0" aria-label="{escape(label)}">'
        f'<table><thead><tr>{top}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>'
    )


def cards(
    head: Sequence[str],
    body: Sequence[tuple[str, Sequence[str]]],
    *,
    label: str,
    narrow: Container[int] = (),
) -> Html:
    """A table whose rows become cards on a narrow page.

    Args:
      head: the columns' headings; a card has each without what stands in small print.
      body: (class of the row, its cells) a row.
      label: what the table is, for those who hear it.
      narrow: the columns of short numbers.
    """
    top = ''
    for column, name in enumerate(head):
        of_kind = ' class="narrow"' if column in narrow else ''
        top += f'<th scope="col" role="columnheader"{of_kind}>{escape(name)}</th>'
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
