"""Every kind of file: read as it was written, refused where it cannot be; and what the tables show of it."""

import json
import math

import pytest
from made_folders import gpu_folder
from made_reports import op_report, timed

from primer_fast.bench import results, tables
from primer_fast.bench.op import OURS
from primer_fast.bench.report import FAST, KINDS, PROGRAMS, RIGHT, SANITIZER, TUNE, Goal, ProgramRow, load, parse


@pytest.fixture
def written(tmp_path):
    """The path of a file of each kind."""
    folder = gpu_folder(tmp_path / "gpu-out")
    return {kind: folder / f"{kind}.json" for kind in KINDS}


def refused(path, change, message):
    """Change what a file holds: what then cannot be read names the file."""
    data = json.loads(path.read_text())
    change(data, data.get("rows", data.get("trials")))
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(written, kind, tmp_path):
    found, copy = load(written[kind], kind), tmp_path / "new" / "copy.json"
    assert found.kind == kind and found.rows
    found.left_out = ["something"]
    found.save(copy)
    assert load(copy) == found and [p.name for p in copy.parent.iterdir()] == ["copy.json"], "no temporary name is left"
    found.header["device"] = math.nan
    with pytest.raises(ValueError):
        found.save(copy)
    assert load(copy).header["device"] == "NVIDIA H200", "a failed write leaves the old file"
    data = json.loads(copy.read_text())
    assert parse({key: value for key, value in data.items() if key != "left_out"}, copy).left_out == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, rows: data.update(schema="none"), "schema must be .*; got 'none'"),
        (lambda data, rows: data.update(schema=[]), "schema must be"),
        (lambda data, rows: [data.pop(key, None) for key in ("rows", "trials")], "must have a header and "),
        (lambda data, rows: data.update(header=5), "must have a header and "),
        (lambda data, rows: data["header"].pop("device"), "header must have .*; missing device"),
        (lambda data, rows: data.update(left_out=3), "left_out must be names; got 3"),
        (lambda data, rows: data.update(left_out=[3]), "left_out must be names"),
        (lambda data, rows: rows.append(5), r"row \d+ must have .*; missing 5"),
        (lambda data, rows: rows.append({}), r"row \d+ must have .*; missing "),
    ],
)
def test_a_file_of_another_form_is_refused(written, kind, change, message):
    refused(written[kind], change, message)


BOTH = (FAST, PROGRAMS)


@pytest.mark.parametrize(
    ("kinds", "row", "message"),
    [
        (BOTH, {"speed": 1}, "row 0 has unknown columns: speed"),
        (BOTH, {"median_ms": None}, "row 0: it is ok, so it must have 0 < low_ms"),
        (BOTH, {"median_ms": -1.0}, "row 0: it is ok, so it must have 0 < low_ms"),
        (BOTH, {"high_ms": 1e-9}, "row 0: it is ok, so it must have 0 < low_ms"),
        (BOTH, {"high_ms": "1"}, "row 0: high_ms must be a number or null; got '1'"),
        ((*BOTH, SANITIZER), {"status": "fine"}, "row 0: status must be one of"),
        (BOTH, {"status": "failed"}, "row 0: it is failed, so it must say why"),
        (BOTH, {"targets": [{"what": "x"}]}, "row 0: a target must have"),
        ([RIGHT], {"passed": "yes"}, "row 0: passed must be true, false or null; got 'yes'"),
        ([RIGHT], {"error": 3.0}, "row 0: it has passed, so its error must be within its budget; got 3.0 and 0.004"),
        ([SANITIZER], {"status": "passed", "errors": 2}, "does not go with errors 2"),
        ([SANITIZER], {"status": "errors", "errors": 0}, "does not go with errors 0"),
        ([SANITIZER], {"errors": "none"}, "row 0: errors must be a number or null"),
        ([TUNE], {"seconds": "1"}, "row 0: seconds must be a number or null"),
    ],
)
def test_a_row_that_cannot_be_is_refused(written, kinds, row, message):
    for kind in kinds:
        refused(written[kind], lambda data, rows: rows[0].update(row), message)


def test_numbers_beside_the_rows_are_asked_for(written):
    message = "must have the numbers launches, seconds; got none for seconds"
    refused(written["compile"], lambda data, rows: data.pop("seconds"), message)


@pytest.mark.parametrize("content", ["", '{"schema": 1, "rows": [', "[1, 2]", '{"schema": 2}'])
def test_what_is_no_report_is_refused(tmp_path, content):
    path = tmp_path / "bench.json"
    path.write_text(content)
    for kind in (None, *KINDS):
        with pytest.raises(ValueError, match=r"bench\.json: (must be JSON|schema must be)"):
            load(path, kind)


def test_what_is_committed_can_be_read():
    found = results.read()
    assert found.unreadable == {} and found.programs


def test_figures_of_a_program_are_those_of_the_turns():
    found = ProgramRow("nanogpt", "small", "nanoGPT", unit="tokens")
    found.time((2.0, 1.0, 4.0), (1.0, 1.0, 1.0), 500)
    assert (found.low_ms, found.median_ms, found.high_ms) == (1500, 2000, 3000)
    assert found.samples == 3 and found.rate == 250
    assert (found.versus_low, found.versus, found.versus_high) == (1.5, 2, 3)
    found.time((2.0, 20.0, 2.0), (1.0, 10.0, 1.0), 500)
    assert found.versus == 2, "a slow spell of both cancels"


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [(Goal("", at_least=1.3), 1.3, True), (Goal("", at_least=1.3), 1.29, False), (Goal("", at_most=5), 5.1, False),
     (Goal("", at_most=5), -2, True), (Goal("", at_least=1), math.nan, False)],
)  # fmt: skip
def test_a_goal_is_judged(goal, value, met):
    assert goal.judged(value)["met"] is met


def test_tables_show_every_row_and_what_is_missing():
    report = op_report(3.0)
    report.left_out = ["linear odd, tf32, forward"]
    report.rows[2].status, report.rows[2].reason = "failed", "not installed: a|b"
    heading, *rows = tables.group_text(report.rows).splitlines()[1:]
    assert len(rows) == 3 and len({len(line) for line in (heading, *rows[:2])}) == 1, "columns are aligned"
    assert "host us" in heading and "error" not in heading, "a column without figures is left out"
    assert "a|b" in rows[2]
    lines = [line for line in tables.markdown(report).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    closing = "\n".join(tables.closing_lines(report))
    assert "MISSED: linear square" in closing and "linear odd, tf32, forward" in closing
    missed = timed(provider="nanoGPT", ratio=1.2, goal=Goal("goal", at_least=1.3), loss=3.25, loss_difference=5e-7)
    absent = ProgramRow("nanogpt", "small", "TRL", status="not available", reason="no such thing")
    _, ours, theirs, other = tables.program_lines([timed(), missed, absent])
    assert OURS in ours and "MISSED" not in ours and "MISSED: goal" in theirs and other.endswith("no such thing")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0"), (0.01234, "0.0123"), (9.999, "10.00"), (12.34, "12.3"), (4321.0, "4321")],
)
def test_number(value, shown):
    assert tables.number(value, 3) == shown
