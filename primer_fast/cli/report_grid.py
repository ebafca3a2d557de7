"""Tables of figures as HTML: words to the left, figures to the right."""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from html import escape

from primer_fast.bench import tables

Cell = str | tuple[str, str]  # text, or text and the class that it is shown in
NONE = "\u2013"
STYLE = """
.scroll { overflow-x: auto; } .scroll table { white-space: nowrap; } details { margin: .6rem 0; }
summary { cursor: pointer; } .met { color: #2b8a3e; font-weight: 600; } .none { color: var(--muted); }
td.ours { font-weight: 600; } tr.title td { padding-top: 1rem; color: var(--muted); white-space: normal; }
td.wide { white-space: normal; min-width: 12rem; }
body { max-width: 72rem; } li { margin: .3rem 0; }
"""


def grid(
    head: Sequence[str], rows: Iterable[Sequence[Cell]], *, left: int = 1, titles: Mapping[int, str] | None = None
) -> str:
    """A table whose first ``left`` columns are words and whose others are figures.

    A row that is short of cells ends in words over the columns left; ``titles`` stand in lines of their own before the
    rows of those numbers.
    """
    lines = [_line("th", head, head, left)]
    for number, row in enumerate(rows):
        if titles and number in titles:
            lines.append(f'<tr class="title"><td colspan="{len(head)}">{escape(titles[number])}</td></tr>')
        lines.append(_line("td", row, head, left))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _line(tag: str, row: Sequence[Cell], head: Sequence[str], left: int) -> str:
    cells = []
    for i, content in enumerate(row):
        text, mark = content if isinstance(content, tuple) else (content, "")
        over = len(head) - i if i == len(row) - 1 else 1
        classes = " ".join(filter(None, ["n" if i >= left and over == 1 else "", mark]))
        attributes = f' class="{classes}"' * bool(classes) + f' colspan="{over}"' * (over > 1)
        cells.append(f"<{tag}{attributes}>{escape(text)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def figure(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent, thousands apart; a dash for none."""
    return NONE if value is None else format(Decimal(tables.number(value, digits)), ",f")


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f} %"
