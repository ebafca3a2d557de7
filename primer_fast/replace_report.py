"""What ``replace_modules`` and ``restore_modules`` did, as data and as a table."""

__all__ = ["Left", "Report", "Swapped"]

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Swapped(NamedTuple):
    """A module that is ours now."""

    name: str  # in the model; "" is the model
    before: str
    after: str
    activation: str | None = None  # which the same kernel computes


class Left(NamedTuple):
    """A module that is not."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What ``replace_modules`` did; ``str`` makes a table of it."""

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    hints: tuple[str, ...] = ()  # what the caller can do beside
    _undo: tuple[Callable[[], None], ...] = field(default=(), repr=False, compare=False)

    def restore(self) -> None:
        """Bring the modules back that were there before, with what their parameters hold by now."""
        for undo in reversed(self._undo):
            undo()

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}"]
        lines += _table(
            ((s.before if s.activation is None else f"{s.before} + {s.activation}", s.after), s.name)
            for s in self.swapped
        )
        lines.append(f"left {len(self.left)}")
        lines += _table(((kind, reason), name) for name, kind, reason in self.left)
        return "\n".join([*lines, *(f"hint: {hint}" for hint in self.hints)])


def _table(rows: Iterable[tuple[tuple[str, str], str]]) -> Iterator[str]:
    """Rows of one kind and outcome share a line, which names the first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for group, name in rows:
        groups.setdefault(group, []).append(name or "the model")
    widths = [max((len(group[i]) for group in groups), default=0) for i in (0, 1)]
    for (kind, outcome), names in groups.items():
        more = f", {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{len(names):>6}  {kind:<{widths[0]}}  {outcome:<{widths[1]}}  {names[0]}{more}"
