"""Sets of versions side by side: what is run, what is used again, and what the table tells."""

import json
import subprocess
import sys

import pytest

from primer_fast.bench import versions
from primer_fast.bench.versions import summary, tables
from primer_fast.proof import verify

RESOURCES = {
    "registers": 100, "spill_bytes": 0, "spill_instructions": 0, "instructions": 1000, "matrix": {"HGMMA": 4},
}  # fmt: skip
TESTS = """<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>
</testcase><testcase classname="a" name="none"><skipped/></testcase></testsuite></testsuites>"""
PASSED = TESTS.replace("<failure/>", "")


def launch(case="square", serialized=False, **resources):
    named = {"op": "linear", "case": case, "direction": "forward", "kernel": "_k", "error": None}
    return {**named, "resources": RESOURCES | resources, "serialized": serialized}


@pytest.fixture
def found(tmp_path):
    """Summaries of sets of versions, by name, from their launches as the parts of a run leave them."""

    def found(passed=True, tests=PASSED, **launches):
        verified = dict.fromkeys(("op", "case", "dtype", "path", "tensor"), "x")
        verified |= {"error": 1.0 if passed else 3.0, "budget": 2.0, "passed": passed}
        for name, rows in launches.items():
            (tmp_path / name).mkdir()
            files = {"verify.json": [verified], "compile.json": rows}
            files = {file: json.dumps({"rows": rows}) for file, rows in files.items()} | {"tests.xml": tests}
            run = {"header": {"python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5"}}
            run["parts"] = {file: {"seconds": 7, "status": 0} for file in files}
            for file, text in (files | {"run.json": json.dumps(run)}).items():
                if text is not None:
                    (tmp_path / name / file).write_text(text)
        return {name: summary(tmp_path / name) for name in launches}

    return found


def test_every_op_has_its_own_case():
    chosen = [(op, case.name) for op in verify.ops() for case in verify.cases(op, native=False)]
    for op, name in versions.CASES.items():
        assert [owner for owner, case in chosen if case == name] == [op]
    assert sorted(versions.CASES) == sorted(verify.ops())


def test_the_pinned_column_is_what_the_project_installs():
    option, file, *wanted = versions.ENVIRONMENTS["pinned"].requirements
    pins = {line.partition("==")[0]: line for line in (versions.ROOT / file).read_text().splitlines() if "==" in line}
    assert option == "-c" and {"torch", "triton", "numpy"} <= pins.keys() & set(wanted)
    assert all(pins[one.partition("==")[0]] == one for one in wanted if "==" in one), "pip refuses two of one package"
    assert set(versions.COMPARED) < set(versions.ENVIRONMENTS)


@pytest.mark.parametrize(
    ("change", "same", "shown"),
    [
        ({}, 2, None), ({"spill_bytes": 8}, 0, True), ({"serialized": True}, 2, True),
        ({"matrix": {"HMMA": 9}}, 0, True), ({"instructions": 1200}, 0, True), ({"registers": 80}, 0, True),
        ({"instructions": 1050}, 0, None),
    ],
)  # fmt: skip
def test_what_differs_is_told(found, change, same, shown):
    """Two launches of a case are told apart; those that differ alike share a line; a small change is only counted."""
    columns = found(pinned=[launch(), launch()], newest=[launch(**change), launch(**change)])
    text = tables(columns)
    assert f"{same} of 2 launches have the very same" in text and "Wrong" not in text
    assert "| tests passed / skipped / failed | 2 / 1 / 0 | 2 / 1 / 0 |" in text
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "linear forward" in line]
    assert [(row[1], row[3] != row[4]) for row in rows] == ([("2", True)] if shown else [])


def test_all_that_is_wrong_is_listed(found):
    broken = launch() | {"error": "RuntimeError: no", "resources": None}
    newest = found(passed=False, tests=TESTS, newest=[broken])["newest"]
    assert newest.wrong == ["x x x x x", "linear square forward _k RuntimeError: no", "a::bad"]
    assert all(f"- `{problem}`" in tables({"newest": newest}) for problem in newest.wrong)
    (wrong,) = found(tests=None, other=[launch()])["other"].wrong
    assert wrong == "tests.xml: nothing was written, exit status 0"


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Nothing is run; what would be run stands in the list. Folders are below ``tmp_path``."""
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    monkeypatch.setattr(versions.subprocess, "run", run)
    return commands


def test_an_environment_is_made_once_and_again_when_its_requirements_change(ran, monkeypatch, tmp_path):
    python = versions.make("newest")
    assert python == tmp_path / "newest" / "bin" / "python"
    assert [command[2] for command in ran] == ["venv", "pip", "pip"]
    assert versions.make("newest") == python and len(ran) == 3
    monkeypatch.setitem(versions.ENVIRONMENTS, "newest", versions.Environment(["torch==9"]))
    versions.make("newest")
    assert len(ran) == 6 and "torch==9" in ran[4]


def test_results_of_the_present_source_are_used_again(ran, monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "make", lambda name: tmp_path / "python")
    monkeypatch.setattr(versions, "versions_of", lambda python: {"torch": "9"})
    monkeypatch.setattr(versions.environment, "source", lambda: "one")
    for again, count in ((False, 3), (False, 3), (True, 6)):
        versions.measure("newest", 1, again)
        assert len(ran) == count
    monkeypatch.setattr(versions.environment, "source", lambda: "two")
    versions.measure("newest", 1)
    assert len(ran) == 9


def test_a_python_that_is_not_installed_is_the_one_at_hand(monkeypatch, tmp_path):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert versions.interpreter("3.99") == versions.interpreter(None) == sys.executable
    kept = tmp_path / "versions" / "3.99.1" / "bin" / "python3.99"
    kept.parent.mkdir(parents=True)
    kept.symlink_to(sys.executable)
    assert versions.interpreter("3.99") == str(kept)
