"""One HTML page in one file: text, formulas, code, tables, and pictures embedded as base64."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from html import escape
from pathlib import Path
from typing import NamedTuple

from primer_fast.bench import tables

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --muted: #5b6472; --line: #d9dde3; --code: #f4f5f7; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --muted: #a2abb8; --line: #3a414c; --code: #23272e; --paper: #16191e; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
h3 { margin: 2rem 0 .25rem; } p { margin: .6rem 0; } .muted, figcaption, th { color: var(--muted); }
.formula { font: italic 1.15rem/1.8 Georgia, serif; margin: .8rem 1.5rem; }
.number { font-size: 1.35rem; font-weight: 600; margin: .4rem 0; }
pre { background: var(--code); padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; font-size: .88rem; line-height: 1.45; }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: #fff; border-radius: 6px; }
.side { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.side figure { flex: 1 1 20rem; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .92rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; } p code, td code { background: var(--code); padding: .1rem .3rem; border-radius: 4px; }
a { color: inherit; } .bad { color: #d9480f; font-weight: 600; }
"""  # noqa: E501
WIDE = """
.scroll { overflow-x: auto; } .scroll table { white-space: nowrap; } details { margin: .6rem 0; }
summary { cursor: pointer; } .met { color: #2b8a3e; font-weight: 600; } .none { color: var(--muted); }
td.ours { font-weight: 600; } tr.title td { padding-top: 1rem; color: var(--muted); white-space: normal; }
td.wide { white-space: normal; min-width: 12rem; }
body { max-width: 72rem; } li { margin: .3rem 0; }
"""  # besides, for a page of wide tables
Cell = str | tuple[str, str]  # text, or text and the class that it is shown in
NONE = "\u2013"
_NUMBER = re.compile(r"[+\-\u2212]?\.?\d")


def text(words: str) -> str:
    """A paragraph; what stands between backticks is code."""
    return f"<p>{_marked(words)}</p>"


def _marked(words: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))


def number(words: str, good: bool = True) -> str:
    """The result that a section is about, in large letters."""
    return f'<p class="number{"" if good else " bad"}">{escape(words)}</p>'


def formula(*lines: str) -> str:
    """Formulas written in HTML, a line each: <sub>, <sup>; not escaped."""
    return f'<p class="formula">{"<br>".join(lines)}</p>'


def code(lines: str) -> str:
    return f"<pre><code>{escape(lines.strip())}</code></pre>"


def picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def side_by_side(*figures: str) -> str:
    return f'<div class="side">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Numbers to the right, everything else to the left."""
    rows = [list(row) for row in rows]
    right = [all(_NUMBER.match(str(row[i])) for row in rows) for i in range(len(head))]
    return f"<table>{_row('th', head, right)}{''.join(_row('td', row, right) for row in rows)}</table>"


def grid(
    head: Sequence[str], rows: Iterable[Sequence[Cell]], *, left: int = 1, titles: Mapping[int, str] | None = None
) -> str:
    """A wide table whose first ``left`` columns are words and whose others are figures.

    A row that is short of cells ends in words over the columns left; ``titles`` stand in lines of their own before the
    rows of those numbers.
    """
    right = [i >= left for i in range(len(head))]
    lines = [_row("th", head, right)]
    for number, row in enumerate(rows):
        if titles and number in titles:
            lines.append(f'<tr class="title"><td colspan="{len(head)}">{_marked(titles[number])}</td></tr>')
        lines.append(_row("td", row, right))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _row(tag: str, row: Sequence[Cell], right: Sequence[bool]) -> str:
    """A line of a table; in columns that are ``right`` stand figures, and the last cell fills the columns left over."""
    cells = []
    for i, cell in enumerate(row):
        content, shown = cell if isinstance(cell, tuple) else (cell, "")
        over = len(right) - i if i == len(row) - 1 else 1
        classes = " ".join(filter(None, ["n" if right[i] and over == 1 else "", shown]))
        attributes = f' class="{classes}"' * bool(classes) + f' colspan="{over}"' * (over > 1)
        cells.append(f"<{tag}{attributes}>{_marked(str(content))}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def figure(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent, thousands apart; a dash for none."""
    return NONE if value is None else format(Decimal(tables.number(value, digits)), ",f")


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f} %"


def section(title: str, *parts: str, level: int = 2) -> str:
    return f'<section id="{anchor(title)}"><h{level}>{escape(title)}</h{level}>{"".join(parts)}</section>'


def anchor(title: str) -> str:
    """The name by which a link reaches the section of that title."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


class Chapter(NamedTuple):
    """One of a page's main sections, and what it found in a line."""

    title: str
    result: str
    html: str
    good: bool = True


def contents(chapters: Iterable[Chapter]) -> str:
    """A table of the chapters and their results, each a link."""
    lines = []
    for chapter in chapters:
        mark = "" if chapter.good else ' class="bad"'
        link = f'<a href="#{anchor(chapter.title)}">{escape(chapter.title)}</a>'
        lines.append(f"<tr><td>{link}</td><td{mark}>{_marked(chapter.result)}</td></tr>")
    return f"<table>{''.join(lines)}</table>"


def page(title: str, subtitle: str, *sections: str, style: str = "") -> str:
    """The whole page; ``style`` is CSS besides that of every page."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = f'<h1>{escape(title)}</h1><p class="muted">{_marked(subtitle)}</p>{"".join(sections)}'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}{style}</style></head><body>{body}</body></html>\n'
    )
