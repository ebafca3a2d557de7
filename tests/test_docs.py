"""What the documents say of the code, and what their examples print."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from primer_fast.reference.ops import OPS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
WITH_README = [ROOT / "README.md", *DOCUMENTS]
TEST = r"`(tests/[\w/<>]+\.py)(?:::(test_\w+))?`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_are_named_exist(document):
    named = re.findall(TEST, document.read_text())
    assert named
    for path, test in named:
        assert f"def {test}" in (ROOT / path).read_text(), f"{path} has no {test}"


@pytest.mark.parametrize("document", WITH_README, ids=lambda path: path.name)
def test_the_names_that_are_named_exist(document):
    for name in re.findall(r"`(primer_fast(?:\.\w+)+)", document.read_text()):
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("primer_fast"):  # a package that the module needs
                    raise
                continue
            break
        for part in parts[end:]:
            assert hasattr(found, part), f"{document.name} names {name}"
            found = getattr(found, part)


@pytest.mark.parametrize("document", WITH_README, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def table(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_cell_of_the_table_of_ops_has_its_test():
    text = (ROOT / "docs" / "pytorch.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    start = lines.index("| column | what it says | tests |")
    head, _, *rows = table(lines[:start])
    tests = {name: re.findall(TEST, cell) for name, _, cell in table(lines[start + 2 :])}
    tests |= dict.fromkeys(("DDP", "FSDP2"), tests.pop("DDP, FSDP2"))
    assert set(tests) == set(head[1:])
    ops = [row[0].strip("`") for row in rows]
    assert sorted(ops) == sorted(OPS)
    known = collected({path for found in tests.values() for path, _ in found})
    for op, row in zip(ops, rows, strict=True):
        for column, cell in zip(head[1:], row[1:], strict=True):
            ids = [i for path, test in tests[column] for i in known if i.startswith(f"{path}::{test}[")]
            if column in ("DDP", "FSDP2"):
                strategy = "ddp" if column == "DDP" else "fsdp"
                assert any(i.endswith(f"[{cell}-{strategy}]") for i in ids), (op, column)
            else:
                ids = [i for i in ids if re.search(rf"[\[-]{op}\b", i)]
            assert ids, f"no test of {column} for {op}"


def collected(files: set[str]) -> list[str]:
    """The names of all tests in these files, parameters included."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run([*command, *sorted(files)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout.splitlines()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def test_the_first_example_runs(plain_path):
    small = blocks("python")[0].replace('"cuda"', '"cpu"').replace("4096", "32").replace("50257", "257")
    names = {}
    exec(small, names)
    assert names["y"].shape == (32, 32) and names["x"].grad.shape == (32, 1024)
    assert names["o"].shape == (4, 16, 32, 128) and names["loss"].isfinite()


def test_the_example_of_replaced_modules_prints_what_is_shown(plain_path):
    pytest.importorskip("transformers")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks("python")[1], {})
    shown = next(block for block in blocks("") if block.startswith("swapped"))
    assert printed.getvalue().split() == shown.split()
