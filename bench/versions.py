"""python -m primer_fast.bench.versions: the same code under the versions of PyTorch, Triton and NumPy that users have.

Makes a virtual environment for each set of versions, and in each: checks one case of every op in Triton's interpreter,
compiles what is launched in production for sm_90, and runs the tests of how ops behave as PyTorch's. No GPU takes part.
The differences become a table in docs/versions.md. What an earlier call has made or found is used again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from primer_fast.bench import environment
from primer_fast.bench.files import filled, markdown_table, replace_text

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".versions"
PAGE = ROOT / "docs" / "versions.md"
PINNED = "pinned"  # the column that the others are compared with
BEGIN, END = "<!-- make versions: begin -->", "<!-- make versions: end -->"
_SHOWN = 12  # launches in the table of the largest changes
_NOTABLE = 0.1  # a change of instructions or registers by less is the compiler's everyday
TESTS = ["pytest==9.1.1", "pytest-xdist==3.8.0", "setuptools"]
COMMANDS = ["tyro==1.0.17", "rich==15.0.0", "safetensors==0.8.0"]  # what `primer-fast verify` and `kernels` need
# A machine with few packages: what it lacks, a rehearsal under these versions lacks too.
GPU = ["torch==2.11.0", "triton==3.6.0", "numpy>=2.3,<2.6", "transformers==5.17.*", "hypothesis", "rich", "matplotlib"]
GPU += ["safetensors", "tokenizers"]


class Environment(NamedTuple):
    """One virtual environment."""

    requirements: list[str]
    python: str | None = None  # as 3.12; another Python is taken where this one is not installed


ENVIRONMENTS = {
    "oldest": Environment(["torch==2.11.0", "triton==3.6.0", "numpy==2.3.5", *COMMANDS, *TESTS], "3.12"),
    PINNED: Environment(["-c", "constraints.txt", "torch", "triton", "numpy", *COMMANDS, *TESTS]),
    "newest": Environment(["torch==2.15.0", "triton==3.9.0", "numpy==2.4.6", *COMMANDS, *TESTS]),
    "gpu": Environment([*GPU, *TESTS], "3.12"),
}
COMPARED = ("oldest", PINNED, "newest")
TESTED = ("tests/operators", "tests/citizenship", "tests/test_interpreter.py")
CASES = {  # op -> a small case with something to get wrong; no other op has one of that name
    "conv2d": "groups_wide",
    "embedding": "position_ids",
    "layer_norm": "pre_norm",
    "linear": "edges_aligned",
    "linear_cross_entropy": "ignored_class",
    "linear_log_prob": "entropy",
    "max_pool2d": "overlapping",
    "mlp": "edges_four",
    "scaled_dot_product_attention": "causal_many_keys",
}


class Part(NamedTuple):
    """What is run in each environment: a module with arguments, after which come a file for its results."""

    arguments: list[str]
    variables: dict[str, str]


def parts(jobs: int) -> dict[str, Part]:
    """The parts, in ``jobs`` processes each, by the name of the file that holds its results."""
    production = ["-m", "primer_fast.cli", "kernels", "--dtype", "bfloat16", "--jobs", str(jobs), "--json"]
    tests = ["-m", "pytest", *TESTED, "-p", "no:cacheprovider", "-n", str(jobs)]
    return {
        "verify.json": Part(["-m", "primer_fast.cli", "verify", "--case", *CASES.values(), "--json"], {}),
        "compile.json": Part(  # users must see no warning, and what is in Triton's cache gives none
            ["-W", "error::UserWarning", *production], {"TRITON_ALWAYS_COMPILE": "1"}
        ),
        "tests.xml": Part([*tests, "--junitxml"], {}),
    }


def make(name: str) -> Path:
    """The Python of one of ``ENVIRONMENTS``; made first where it is not there or was made of other requirements.

    Raises:
        subprocess.CalledProcessError: it could not be installed.
    """
    wanted, folder = ENVIRONMENTS[name], FOLDER / name
    python, ready = folder / "bin" / "python", folder / "ready"
    made_of = "\n".join(wanted.requirements)
    if "-c" in wanted.requirements:
        made_of += (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if ready.is_file() and ready.read_text(encoding="utf-8").strip() == made_of.strip():
        return python
    print(f"{name}: installing {' '.join(wanted.requirements)}", flush=True)
    subprocess.run([interpreter(wanted.python), "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    uncapped = os.environ | {"PIP_CONSTRAINT": os.devnull}  # a machine's own cap knows nothing of these versions
    subprocess.run([*install, *wanted.requirements], check=True, cwd=ROOT, env=uncapped)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "-e", "."], check=True, cwd=ROOT)
    replace_text(ready, made_of)
    return python


def interpreter(version: str | None) -> str:
    """A Python of this version, from the PATH or where pyenv keeps them; the one that runs this where there is none."""
    if version is None:
        return sys.executable
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in [f"python{version}", *map(str, sorted(kept.glob(f"{version}.*/bin/python{version}")))]:
        try:
            subprocess.run([candidate, "--version"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    return sys.executable


def versions_of(python: Path) -> dict[str, str]:
    """Of Python and the three packages, without importing any."""
    names = ("python", "torch", "triton", "numpy")
    code = "import platform, importlib.metadata as m; print(platform.python_version(), *map(m.version, %r))"
    done = subprocess.run([python, "-c", code % (names[1:],)], check=True, capture_output=True, text=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def measure(name: str, jobs: int, again: bool = False) -> Path:
    """Run the parts that have no result from the present source; returns the folder of results."""
    python, results = make(name), FOLDER / "results" / name
    results.mkdir(parents=True, exist_ok=True)
    record = results / "run.json"
    header = {**versions_of(python), "source": environment.source(), "jobs": jobs}
    done = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if again or done.get("header") != header:
        done = {"header": header, "parts": {}}
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    for file, part in parts(jobs).items():
        if file in done["parts"]:
            print(f"{name}: {file} is there", flush=True)
            continue
        (results / file).unlink(missing_ok=True)
        begin = time.monotonic()
        with (results / f"{file}.log").open("w", encoding="utf-8") as log:
            command = [str(python), *part.arguments, str(results / file)]
            status = subprocess.run(command, cwd=ROOT, env=kept | part.variables, stdout=log, stderr=log).returncode
        done["parts"][file] = {"seconds": round(time.monotonic() - begin), "status": status}
        replace_text(record, json.dumps(done, indent=1))
        print(f"{name}: {file} in {done['parts'][file]['seconds']} s, exit status {status}", flush=True)
    return results


Key = tuple[str, str, str, int]  # op, case, direction, number within


@dataclass
class Summary:
    """One column: what was found under one set of versions. ``wrong``: all that is not as it should be."""

    versions: dict[str, str]
    seconds: dict[str, int]
    wrong: list[str] = field(default_factory=list)
    verified: list[dict] = field(default_factory=list)
    launches: dict[Key, dict] = field(default_factory=dict)  # those that compile
    not_compiled: int = 0
    tests: Counter[str] = field(default_factory=Counter)  # by their outcome

    def total(self, what: str) -> int:
        return sum(row["resources"][what] for row in self.launches.values())


def summary(folder: Path) -> Summary:
    """A column, from the folder that ``measure`` filled."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    found = Summary(run["header"], {file: part["seconds"] for file, part in run["parts"].items()})
    readers = {"verify.json": _read_verified, "compile.json": _read_compiled, "tests.xml": _read_tests}
    for file, part in run["parts"].items():
        if (folder / file).is_file():
            readers[file](found, (folder / file).read_text(encoding="utf-8"))
        else:
            found.wrong.append(f"{file}: nothing was written, exit status {part['status']}")
    return found


def _read_verified(found: Summary, text: str) -> None:
    found.verified = json.loads(text)["rows"]
    failed = [row for row in found.verified if not row["passed"]]
    found.wrong += [" ".join(row[name] for name in ("op", "case", "dtype", "path", "tensor")) for row in failed]


def _read_compiled(found: Summary, text: str) -> None:
    counts: Counter[tuple[str, str, str]] = Counter()
    for row in json.loads(text)["rows"]:
        place = (row["op"], row["case"], row["direction"])
        counts[place] += 1
        if row["error"]:
            found.not_compiled += 1
            found.wrong.append(" ".join((*place, row["kernel"], row["error"])))
        else:
            found.launches[(*place, counts[place])] = row


def _read_tests(found: Summary, text: str) -> None:
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcomes = {child.tag for child in case}
        failed = bool(outcomes & {"failure", "error"})
        found.tests["failed" if failed else "skipped" if "skipped" in outcomes else "passed"] += 1
        found.wrong += [f"{case.get('classname')}::{case.get('name')}"] * failed


def tables(found: dict[str, Summary]) -> str:
    """All that is told, as Markdown."""
    parts = [_overview(found)]
    for name, column in found.items():
        if column.wrong:
            parts.append("\n".join([f"Wrong under {name}:", "", *(f"- `{problem}`" for problem in column.wrong)]))
    if PINNED in found:
        parts += [_compared(name, found[name], found[PINNED]) for name in found if name != PINNED]
    return "\n\n".join(parts)


def _overview(found: dict[str, Summary]) -> str:
    def cells(s: Summary) -> dict[str, object]:
        launches, tests = s.launches.values(), s.tests
        shares = [row["error"] / row["budget"] for row in s.verified if row["budget"]]
        return {
            "Python": s.versions["python"],
            "PyTorch": s.versions["torch"],
            "Triton": s.versions["triton"],
            "NumPy": s.versions["numpy"],
            "tensors verified in the interpreter": len(s.verified),
            "of these over their budget": sum(not row["passed"] for row in s.verified),
            "largest error, of its budget": f"{100 * max(shares, default=0.0):.0f} %",
            "launches compiled for sm_90": len(launches),
            "launches that do not compile, or warn": s.not_compiled,
            "launches that spill registers": sum(map(_spills, launches)),
            "bytes spilled per thread, all launches": f"{s.total('spill_bytes'):,}",
            "launches whose wgmma wait for each other": sum(bool(row["serialized"]) for row in launches),
            "instructions, all launches": f"{s.total('instructions'):,}",
            "tests passed / skipped / failed": f"{tests['passed']} / {tests['skipped']} / {tests['failed']}"
            if tests["passed"]
            else "-",
            "seconds to verify / compile / test": " / ".join(str(s.seconds.get(file, "-")) for file in parts(1)),
        }

    columns = [cells(s) for s in found.values()]
    labels = dict.fromkeys(label for column in columns for label in column)
    return markdown_table(["", *found], [[label, *(str(column[label]) for column in columns)] for label in labels])


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
    _, a, b = pair[0], pair[1]["resources"], pair[2]["resources"]
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


def main(argv: Iterable[str] | None = None) -> int:
    """The exit status is 0, or 1 where something was wrong under one of the versions, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m primer_fast.bench.versions", description=__doc__.splitlines()[0])
    parser.add_argument("--make", choices=ENVIRONMENTS, help="only make this environment and print its Python")
    parser.add_argument("--only", nargs="+", choices=COMPARED, default=COMPARED, help="measure these")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile, or run tests (2)")
    parser.add_argument("--again", action="store_true", help="measure what an earlier call has measured")
    args = parser.parse_args(None if argv is None else list(argv))
    if args.jobs < 1:
        parser.error(f"--jobs must be positive; got {args.jobs}")
    if args.make:
        print(make(args.make))
        return 0
    for name in args.only:
        measure(name, args.jobs, args.again)
    there = {name: FOLDER / "results" / name for name in COMPARED}
    found = {name: summary(folder) for name, folder in there.items() if (folder / "run.json").is_file()}
    page = filled(PAGE.read_text(encoding="utf-8"), BEGIN, END, f"\n{tables(found)}\n")
    replace_text(PAGE, page.rstrip("\n"))
    print(f"the table is in {PAGE.relative_to(ROOT)}")
    return int(any(column.wrong for column in found.values()))


if __name__ == "__main__":
    sys.exit(main())
