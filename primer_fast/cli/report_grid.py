"""Tables of figures as HTML: words to the left, figures to the right."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from html import escape

from primer_fast.bench.tables import number

Cell = str | tuple[str, str]  # text, or text and the class that it is shown in
NONE = "\u2013"
STYLE = """
.scroll { overflow-x: auto; } .scroll table { white-space: nowrap; } details { margin: .6rem 0; }
summary { cursor: pointer; } .met { color: #2b8a3e; font-weight: 600; } .none { color: var(--muted); }
td.ours { font-weight: 600; } tr.first td { border-top: 2px solid var(--line); }
td.wide { white-space: normal; min-width: 12rem; }
body { max-width: 72rem; } li { margin: .3rem 0; }
"""


def grid(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, left: int = 1, first: Iterable[int] = ()) -> str:
    """A table whose first ``left`` columns are words and whose others are figures; a line above the rows ``first``."""
    marked = set(first)

    def cell(tag: str, i: int, content: Cell) -> str:
        text, mark = content if isinstance(content, tuple) else (content, "")
        classes = " ".join(filter(None, ["n" if i >= left else "", mark]))
        return f"<{tag}{f' class={classes!r}' if classes else ''}>{escape(text)}</{tag}>".replace("'", '"', 2)

    lines = ["<tr>" + "".join(cell("th", i, h) for i, h in enumerate(head)) + "</tr>"]
    for i, row in enumerate(rows):
        opening = '<tr class="first">' if i in marked else "<tr>"
        lines.append(opening + "".join(cell("td", j, c) for j, c in enumerate(row)) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def figure(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent, thousands apart; a dash for none."""
    return NONE if value is None else format(Decimal(number(value, digits)), ",f")


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f} %"
