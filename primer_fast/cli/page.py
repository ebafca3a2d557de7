"""One HTML page in one file: text, formulas, code, tables, and pictures embedded as base64."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

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


_NUMBER = re.compile(r"[+\-\u2212]?\.?\d")


def text(words: str) -> str:
    """A paragraph; what stands between backticks is code."""
    return f"<p>{_marked(words)}</p>"


def _marked(words: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))


def number(words: str, good: bool = True) -> str:
    """The result that a section is about."""
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
    numeric = [all(_NUMBER.match(str(row[i])) for row in rows) for i in range(len(head))]

    def line(cells: Sequence, tag: str) -> str:
        marks = (' class="n"' if n else "" for n in numeric)
        return (
            "<tr>"
            + "".join(f"<{tag}{m}>{_marked(str(c))}</{tag}>" for m, c in zip(marks, cells, strict=True))
            + "</tr>"
        )

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def section(title: str, *parts: str, level: int = 2) -> str:
    return f'<section id="{anchor(title)}"><h{level}>{escape(title)}</h{level}>{"".join(parts)}</section>'


def anchor(title: str) -> str:
    """What ``#...`` of a link to the section of that title is."""
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


def page(title: str, subtitle: str, *sections: str) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = f'<h1>{escape(title)}</h1><p class="muted">{_marked(subtitle)}</p>{"".join(sections)}'
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n'
