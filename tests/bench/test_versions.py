"""Sets of versions side by side: what is run, what is used again, and what the table tells."""

import json
import subprocess
import sys

import pytest

from primer_fast.bench import versions
from primer_fast.bench.versions_table import BEGIN, END, page, summaries, tables
from primer_fast.proof import verify

RESOURCES = {
    "registers": 100, "spill_bytes": 0, "spill_instructions": 0, "instructions": 1000, "matrix": {"HGMMA": 4},
}  # fmt: skip


def launch(case="square", serialized=False, **resources):
    named = {"op": "linear", "case": case, "direction": "forward", "kernel": "_k", "error": None}
    return {**named, "resources": RESOURCES | resources, "serialized": serialized}


def verified(passed=True):
    named = dict.fromkeys(("op", "case", "dtype", "path", "tensor"), "x")
    return {**named, "error": 1.0 if passed else 3.0, "budget": 2.0, "passed": passed}


TESTS = """<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>
</testcase><testcase classname="a" name="none"><skipped/></testcase></testsuite></testsuites>"""
PASSED = TESTS.replace("<failure/>", "")


@pytest.fixture
def write(tmp_path):
    """The results of one set of versions, as the parts leave them."""

    def write(name, launches, passed=True, tests=PASSED):
        folder = tmp_path / name
        folder.mkdir()
        files = {"verify.json": [verified(passed)], "compile.json": launches}
        files = {file: json.dumps({"rows": rows}) for file, rows in files.items()} | {"tests.xml": tests}
        for file, text in files.items():
            if text is not None:
                (folder / file).write_text(text)
        header = {"python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5"}
        run = {"header": header, "parts": {file: {"seconds": 7, "status": 0} for file in files}}
        (folder / "run.json").write_text(json.dumps(run))
        return folder

    return write


def test_every_op_has_its_own_case():
    chosen = [(op, case.name) for op in verify.ops() for case in verify.cases(op, native=False)]
    for op, name in versions.CASES.items():
        assert [owner for owner, case in chosen if case == name] == [op]
    assert sorted(versions.CASES) == sorted(verify.ops())


def test_the_pinned_column_is_what_the_project_installs():
    option, file, *wanted = versions.ENVIRONMENTS["pinned"].requirements
    pins = {line.partition("==")[0]: line for line in (versions.ROOT / file).read_text().splitlines() if "==" in line}
    assert option == "-c" and {"torch", "triton", "numpy"} <= pins.keys() & set(wanted)
    assert all(pins[one.partition("==")[0]] == one for one in wanted if "==" in one), (
        "pip refuses two pins of one package"
    )
    assert set(versions.COMPARED) < set(versions.ENVIRONMENTS)


def test_equal_versions_show_no_difference(write):
    found = summaries({name: write(name, [launch(), launch("odd")]) for name in ("oldest", "pinned")})
    assert not any(column.wrong for column in found.values())
    text = tables(found)
    assert "2 of 2 launches have the very same code size and resources; 0 differ" in text
    assert "| tests passed / skipped / failed | 2 / 1 / 0 | 2 / 1 / 0 |" in text
    assert "| seconds to verify / compile / test | 7 / 7 / 7 | 7 / 7 / 7 |" in text
    assert "Wrong under" not in text


@pytest.mark.parametrize(
    "change, told",
    [
        ({"spill_bytes": 8}, "8 B spilled"),
        ({"serialized": True}, "waits"),
        ({"matrix": {"HMMA": 9}}, "100 registers, HMMA"),
        ({"instructions": 1200}, "1200 instructions"),
        ({"registers": 80}, "80 registers"),
    ],
)
def test_what_differs_is_told(write, change, told):
    folders = {"pinned": write("pinned", [launch()]), "newest": write("newest", [launch(**change)])}
    text = tables(summaries(folders))
    assert ("1 of 1" if "serialized" in change else "0 of 1") + " launches have the very same" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 | linear forward")]
    assert told in row.split("|")[4] and told not in row.split("|")[3]


def test_launches_that_differ_alike_share_a_line(write):
    changed = [launch(instructions=1200), launch("odd", instructions=1200)]
    folders = {"pinned": write("pinned", [launch(), launch("odd")]), "newest": write("newest", changed)}
    assert "| 2 | linear forward `_k` | 1000 instructions" in tables(summaries(folders))


def test_a_small_change_is_counted_and_not_shown(write):
    folders = {"pinned": write("pinned", [launch()]), "newest": write("newest", [launch(instructions=1050)])}
    text = tables(summaries(folders))
    assert "0 of 1 launches have the very same" in text and "| linear forward" not in text


def test_two_launches_of_a_case_are_told_apart(write):
    two = [launch(), launch(registers=200)]
    found = summaries({name: write(name, two) for name in ("oldest", "pinned")})
    assert [row["resources"]["registers"] for row in found["oldest"].launches.values()] == [100, 200]
    assert "2 of 2 launches" in tables(found)


def test_all_that_is_wrong_is_listed(write):
    broken = launch() | {"error": "RuntimeError: no", "resources": None}
    (found,) = summaries({"newest": write("newest", [broken], passed=False, tests=TESTS)}).values()
    assert found.wrong == ["x x x x x", "linear square forward _k RuntimeError: no", "a::bad"]
    assert all(f"- `{problem}`" in tables({"newest": found}) for problem in found.wrong)


def test_a_part_that_wrote_nothing_is_wrong(write):
    (found,) = summaries({"newest": write("newest", [launch()], tests=None)}).values()
    assert found.wrong == ["tests.xml: nothing was written, exit status 0"]


def test_a_page_keeps_what_stands_around_the_tables(write):
    found = summaries({"pinned": write("pinned", [launch()])})
    once = page(f"before\n{BEGIN}\nold\n{END}\nafter\n", found)
    assert once.startswith(f"before\n{BEGIN}\n") and once.endswith(f"{END}\nafter\n") and "old" not in once
    assert page(once, found) == once
    for other in ("no markers", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n" * 2):
        with pytest.raises(ValueError, match="must have one place between"):
            page(other, found)


def test_an_environment_is_made_once_and_again_when_its_requirements_change(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    monkeypatch.setattr(versions.subprocess, "run", lambda command, **options: commands.append(command))
    python = versions.make("newest")
    assert python == tmp_path / "newest" / "bin" / "python"
    made = [command[1:4] for command in commands]
    assert made[0] == ["-m", "venv", "--clear"] and made[1:] == [["-m", "pip", "install"]] * 2
    assert versions.make("newest") == python and len(commands) == 3
    monkeypatch.setitem(versions.ENVIRONMENTS, "newest", versions.Environment(["torch==9"]))
    versions.make("newest")
    assert len(commands) == 6 and "torch==9" in commands[4]


def test_a_python_that_is_not_installed_is_the_one_at_hand(monkeypatch, tmp_path):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert versions.interpreter("3.99") == versions.interpreter(None) == sys.executable
    kept = tmp_path / "versions" / "3.99.1" / "bin" / "python3.99"
    kept.parent.mkdir(parents=True)
    kept.symlink_to(sys.executable)
    assert versions.interpreter("3.99") == str(kept)


def test_results_of_the_present_source_are_used_again(monkeypatch, tmp_path):
    ran = []

    def run(command, **options):
        ran.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    monkeypatch.setattr(versions, "make", lambda name: tmp_path / "python")
    monkeypatch.setattr(versions, "versions_of", lambda python: {"torch": "9"})
    monkeypatch.setattr(versions.subprocess, "run", run)
    monkeypatch.setattr(versions.environment, "source", lambda: "one")
    versions.measure("newest", 1)
    assert len(ran) == 3
    versions.measure("newest", 1)
    assert len(ran) == 3
    versions.measure("newest", 1, again=True)
    monkeypatch.setattr(versions.environment, "source", lambda: "two")
    versions.measure("newest", 1)
    assert len(ran) == 9
