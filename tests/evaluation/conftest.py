"""Pages as tests read them: parsed, and in a browser; and a made-up details.json."""

import html.parser
import itertools
import os
import re
import shutil

import pytest

VOID = {'meta', 'link', 'br'}
BLOCKS = {'p', 'ul', 'ol', 'table', 'div', 'figure', 'details', 'section', 'h2', 'h3'}  # in no <p>


class Parsed(html.parser.HTMLParser):
    """The tags with their attributes, and the texts of every table's rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.words = [], [], [], ''
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert tag not in BLOCKS or 'p' not in self.open
        if tag not in VOID:
            self.open.append(tag)
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' in self.open:
            return
        self.words += data
        if {'td', 'th'} & set(self.open):
            self.rows[-1][-1] += data

    def check_links(self):
        """Every link leads to a part of the page, no name is there twice, no heading is missing."""
        names = [attributes['id'] for _, attributes in self.tags if 'id' in attributes]
        assert len(names) == len(set(names))
        links = {attributes['href'] for tag, attributes in self.tags if tag == 'a'}
        assert {link.removeprefix('#') for link in links} <= set(names)
        levels = [int(tag[1]) for tag, _ in self.tags if re.fullmatch('h[1-6]', tag)]
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        return links

    def check_loads_nothing(self):
        assert not {'script', 'img', 'iframe', 'object'} & {tag for tag, _ in self.tags}
        for _, attributes in self.tags:
            assert attributes.get('href', '#')[:1] == '#' or attributes['href'] == 'data:,'
            assert not {'src', 'onclick', 'onload', 'srcset'} & set(attributes)


@pytest.fixture(scope='session')
def parse():
    return Parsed


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope='session')
def browser():
    """Chromium: that of the system, else the one that Playwright has installed."""
    api = pytest.importorskip('playwright.sync_api', reason='needs playwright, extra "browser"')
    path = shutil.which('chromium') or shutil.which('google-chrome')
    with api.sync_playwright() as started:
        try:
            launched = started.chromium.launch(
                executable_path=path, args=['--no-sandbox'] * (os.geteuid() == 0)
            )
        except api.Error as error:
            pytest.skip(f'no Chromium to start: {str(error).splitlines()[0]}')
        yield launched
        launched.close()


@pytest.fixture
def shown(browser, text, tmp_path):
    """(width, scheme) -> the page `text` as it is seen there; at the end nothing has gone wrong."""
    file, heard, contexts = tmp_path / 'report.html', [], []
    file.write_text(text)

    def show(width, scheme):
        contexts.append(
            browser.new_context(viewport={'width': width, 'height': 800}, color_scheme=scheme)
        )
        opened = contexts[-1].new_page()
        opened.on('console', lambda message: heard.append(message.text))
        opened.on('pageerror', lambda error: heard.append(str(error)))
        opened.on('request', lambda request: heard.append(request.url))
        opened.goto(file.as_uri())
        assert heard.pop() == file.as_uri()
        return opened

    yield show
    for context in contexts:
        context.close()
    assert heard == []


# The size in pixels and the contrast (WCAG 2) of every text that is seen.
TEXTS = """() => {
  const light = (colour) => {
    const part = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => part(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const circle = e.matches('text.on') && e.parentNode.querySelector('circle');
    if (circle) return getComputedStyle(circle).fill;
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
  };
  return [...document.querySelectorAll('body *')].filter((e) =>
    [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
    && !['title', 'desc'].includes(e.tagName) && e.checkVisibility() && !e.matches('.skip')
  ).map((e) => {
    const style = getComputedStyle(e), svg = e.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const [a, b] = [light(svg ? style.fill : style.color), light(behind(e))].sort((x, y) => y - x);
    return [e.textContent.trim(), parseFloat(style.fontSize) * scale, (a + 0.05) / (b + 0.05)];
  });
}"""


@pytest.fixture
def check_readable(shown):
    """(width, scheme) -> the page with all of it open; no sideways scrolling, no text too faint.

    No text is smaller than 10 pixels, and each has the contrast of WCAG 2, level AA.
    """

    def check(width, scheme):
        opened = shown(width, scheme)
        assert opened.evaluate('document.documentElement.scrollWidth') == width
        opened.evaluate('for (const d of document.querySelectorAll("details")) d.open = true')
        assert opened.evaluate('document.documentElement.scrollWidth') == width
        texts = opened.evaluate(TEXTS)
        assert len(texts) > 200
        assert [text for text in texts if text[1] < 10 or text[2] < 4.5] == []
        paper = opened.evaluate('getComputedStyle(document.body).backgroundColor')
        assert (paper != 'rgb(255, 255, 255)') == (scheme == 'dark')
        return opened

    return check


FOCUSED = """() => {
  const e = document.activeElement, box = e.getBoundingClientRect();
  return {
    tag: e.tagName, text: e.textContent.trim(), outline: getComputedStyle(e).outlineStyle,
    seen: box.width > 0 && box.bottom > 0 && box.top < innerHeight && box.right > 0,
  };
}"""


@pytest.fixture
def press_tab():
    """(opened page) -> what each press of Tab reaches, until everything is; all of it is seen.

    What is reached may be opened and has to be closed again before the next press.
    """

    def press(opened):
        for _ in range(opened.locator(':is(a, summary, [tabindex="0"]):visible').count()):
            opened.keyboard.press('Tab')
            reached = opened.evaluate(FOCUSED)
            assert reached['seen'], reached
            assert reached['outline'] != 'none', reached
            yield reached

    return press


# --- a made-up details.json -------------------------------------------------------------------


def example(name, candidates, targets, **changes):
    """An example user whose candidates are 'title: (retriever's, LLM's place)'."""
    systems = ('retriever', 'llm_zero_shot')
    return {
        'user': name,
        'items': 30,
        'history': ['First & <last>', 'Second (1995)'],
        'history_known': True,
        'profile': ['Drama', 'Film-Noir'],
        'target': 'Seen & <liked>',
        'targets': dict(zip(systems, targets)),
        'left_out': 0,
        'candidates': [
            {
                'title': title,
                'target': title == 'Seen & <liked>',
                'places': {s: place for s, place in zip(systems, places) if place},
            }
            for title, places in candidates.items()
        ],
    } | changes


@pytest.fixture
def details():
    """What a run with two systems has, and four candidates a user."""
    ks = list(range(1, 51))
    listed = {
        'Seen & <liked>': ([2, 2], [1, 1]),
        'Other (1990)': ([1, 1], [2, 4]),
        'Third': ([3, 3], [2, 4]),
        'Fourth': ([4, 4], [2, 4]),
    }
    hit, tied = {'place': [2, 2], 'hit': 1.0}, {'place': [9, 12], 'hit': 0.5}
    missed = {'place': None, 'hit': 0.0}
    return {
        'schema': 1,
        'config': {'model.path': '<a&b>', 'prompts.candidates': True}
        | {'ranking.mode': 'title', 'ranking.skip_misses': False},
        'curves': {
            'finetune': {'steps': 1, 'step': [1, 2, 3, 4], 'loss': [4.0, 3.0, 2.5, 2.25]},
            'retriever': {'epoch': [2, 4], 'loss': [6.0, 5.5], 'NDCG@10': [0.1, 0.15]},
        },
        'at_k': {
            'users': 24,
            'candidates': 20,
            'ks': ks,
            'systems': {
                'retriever': {'HR': [k / 100 for k in ks], 'NDCG': [k / 200 for k in ks]},
                'llm_zero_shot': {'HR': [k / 50 for k in ks], 'NDCG': [k / 100 for k in ks]},
            },
        },
        'recall': {
            'users': 60,
            'candidates': 20,
            'ks': [1, 10, 20, 40],
            'systems': {'popularity': [0, 0.1, 0.3, 1], 'retriever': [0.1, 0.4, 0.5, 1]},
        },
        'examples': {
            'seed': 3,
            'of': 24,
            'hit': 10,
            'systems': ['retriever', 'llm_zero_shot'],
            'users': [
                example('<7>', listed, [hit, tied]),
                example('11', listed, [hit, missed], profile=[], left_out=6),
                example('12', {}, [hit, missed], profile=None, history_known=False),
            ],
        },
    }
