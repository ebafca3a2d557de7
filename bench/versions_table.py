"""What the parts of versions.py found, side by side, as Markdown."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from primer_fast.bench.files import filled, markdown_table

PINNED = "pinned"  # the column that the others are compared with
BEGIN, END = "<!-- make versions: begin -->", "<!-- make versions: end -->"
_SHOWN = 12  # launches in the table of the largest changes
_NOTABLE = 0.1  # a change of instructions or registers by less is the compiler's everyday

Key = tuple[str, str, str, int]  # op, case, direction, number within


@dataclass
class Summary:
    """One column: what was found under one set of versions."""

    versions: dict[str, str]
    seconds: dict[str, int]
    verified: int = 0
    over_budget: list[str] = field(default_factory=list)
    worst_share: float = 0.0  # of its budget
    launches: dict[Key, dict] = field(default_factory=dict)
    not_compiled: list[str] = field(default_factory=list)
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    ended_early: list[str] = field(default_factory=list)  # parts without results, with their exit status

    @property
    def wrong(self) -> list[str]:
        """All that is not as it should be."""
        return [*self.ended_early, *self.over_budget, *self.not_compiled, *self.failed]

    def count(self, what: Callable[[dict], bool]) -> int:
        return sum(map(what, self.launches.values()))

    def total(self, what: str) -> int:
        return sum(row["resources"][what] for row in self.launches.values())


def summaries(folders: dict[str, Path]) -> dict[str, Summary]:
    """The columns, from the folders that ``versions.measure`` filled."""
    return {name: _summary(folder) for name, folder in folders.items()}


def _summary(folder: Path) -> Summary:
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    found = Summary(run["header"], {file: part["seconds"] for file, part in run["parts"].items()})
    readers = {"verify.json": _read_verified, "compile.json": _read_compiled, "tests.xml": _read_tests}
    for file, part in run["parts"].items():
        if (folder / file).is_file():
            readers[file](found, (folder / file).read_text(encoding="utf-8"))
        else:
            found.ended_early.append(f"{file}: nothing was written, exit status {part['status']}")
    return found


def _read_verified(found: Summary, text: str) -> None:
    for row in json.loads(text)["rows"]:
        found.verified += 1
        found.worst_share = max(found.worst_share, row["error"] / row["budget"] if row["budget"] else 0.0)
        if not row["passed"]:
            found.over_budget.append(" ".join(row[name] for name in ("op", "case", "dtype", "path", "tensor")))


def _read_compiled(found: Summary, text: str) -> None:
    counts: dict[tuple[str, str, str], int] = {}
    for row in json.loads(text)["rows"]:
        place = (row["op"], row["case"], row["direction"])
        counts[place] = counts.get(place, 0) + 1
        if row["error"]:
            found.not_compiled.append(" ".join((*place, row["kernel"], row["error"])))
        else:
            found.launches[(*place, counts[place])] = row


def _read_tests(found: Summary, text: str) -> None:
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            found.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in outcomes:
            found.skipped += 1
        else:
            found.passed += 1


def page(text: str, found: dict[str, Summary]) -> str:
    """A page with the tables between its markers, in place of those that were there.

    Raises:
        ValueError: the page lacks the markers, or has them twice or the wrong way round.
    """
    return filled(text, BEGIN, END, f"\n{tables(found)}\n")


def tables(found: dict[str, Summary]) -> str:
    """All that is told, as Markdown."""
    parts = [_overview(found), *_problems(found)]
    if PINNED in found:
        parts += [_compared(name, found[name], found[PINNED]) for name in found if name != PINNED]
    return "\n\n".join(parts)


def _overview(found: dict[str, Summary]) -> str:
    rows: dict[str, Callable[[Summary], object]] = {
        "Python": lambda s: s.versions["python"],
        "PyTorch": lambda s: s.versions["torch"],
        "Triton": lambda s: s.versions["triton"],
        "NumPy": lambda s: s.versions["numpy"],
        "tensors verified in the interpreter": lambda s: s.verified,
        "of these over their budget": lambda s: len(s.over_budget),
        "largest error, of its budget": lambda s: f"{100 * s.worst_share:.0f} %",
        "launches compiled for sm_90": lambda s: len(s.launches),
        "launches that do not compile, or warn": lambda s: len(s.not_compiled),
        "launches that spill registers": lambda s: s.count(_spills),
        "bytes spilled per thread, all launches": lambda s: f"{s.total('spill_bytes'):,}",
        "launches whose wgmma wait for each other": lambda s: s.count(lambda row: bool(row["serialized"])),
        "instructions, all launches": lambda s: f"{s.total('instructions'):,}",
        "tests passed / skipped / failed": lambda s: f"{s.passed} / {s.skipped} / {len(s.failed)}" if s.passed else "-",
        "seconds to verify / compile / test": lambda s: " / ".join(
            str(s.seconds.get(file, "-")) for file in ("verify.json", "compile.json", "tests.xml")
        ),
    }
    return markdown_table(
        ["", *found], [[label, *(str(cell(s)) for s in found.values())] for label, cell in rows.items()]
    )


def _problems(found: dict[str, Summary]) -> list[str]:
    return [
        "\n".join([f"Wrong under {name}:", "", *(f"- `{problem}`" for problem in summary.wrong)])
        for name, summary in found.items()
        if summary.wrong
    ]


def _compared(name: str, ours: Summary, pinned: Summary) -> str:
    """What one column's launches are beside those of the pinned one."""
    both = [(key, ours.launches[key], pinned.launches[key]) for key in ours.launches if key in pinned.launches]
    same = sum(a["resources"] == b["resources"] for _, a, b in both)
    judged = [pair for pair in both if _judge(pair[1]) != _judge(pair[2])]
    changed = [pair for pair in both if pair not in judged and _change(pair) >= _NOTABLE]
    shown = judged + sorted(changed, key=_change, reverse=True)[: max(0, _SHOWN - len(judged))]
    lines = [
        f"**{name} beside {PINNED}**: {same} of {len(both)} launches have the very same code size and resources; "
        f"{len(judged)} differ in spills, in waiting or in their matrix instructions; {len(changed)} more "
        f"differ by {100 * _NOTABLE:.0f} % or more in instructions or registers."
    ]
    alike = Counter(tuple(_difference(*pair)) for pair in shown)
    if shown:
        lines += ["", markdown_table(["launches", "", PINNED, name], [[str(n), *cells] for cells, n in alike.items()])]
    return "\n".join(lines)


def _spills(row: dict) -> bool:
    return row["resources"]["spill_bytes"] > 0 or row["resources"]["spill_instructions"] > 0


def _judge(row: dict) -> tuple:
    """What decides whether a launch is good; amounts of the rest vary."""
    return row["resources"]["spill_bytes"], bool(row["serialized"]), sorted(row["resources"]["matrix"])


def _change(pair: tuple[Key, dict, dict]) -> float:
    """The larger of the relative changes of instructions and registers."""
    _, a, b = (pair[0], pair[1]["resources"], pair[2]["resources"])
    return max(abs(a[what] / b[what] - 1) for what in ("instructions", "registers"))


def _difference(key: Key, ours: dict, pinned: dict) -> list[str]:
    def described(row: dict) -> str:
        r = row["resources"]
        words = [f"{r['instructions']} instructions", f"{r['registers']} registers"]
        words += [f"{r['spill_bytes']} B spilled"] if r["spill_bytes"] else []
        words += ["waits"] if row["serialized"] else []
        return ", ".join([*words, *r["matrix"]])

    op, _, direction, _ = key
    return [f"{op} {direction} `{ours['kernel']}`", described(pinned), described(ours)]
