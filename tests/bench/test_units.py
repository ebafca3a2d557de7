"""Every unit is tried once, whatever one of them does to its process."""

import pytest
import torch

from primer_fast.bench import units
from primer_fast.bench.report import TUNE, Report, load
from primer_fast.bench.units import LOST, DeviceLost


@pytest.fixture
def played(tmp_path):
    """Calls ``each`` on a, b, c; what a unit does is a function by its name; returns what was seen and what is left."""

    def play(doing=None, **options):
        seen = []

        def work(unit):
            seen.append(unit)
            (doing or {}).get(unit, lambda: None)()

        left = units.each("abc", work, lambda unit, reason: seen.append((unit, reason)), **options)
        return seen, left

    play.marker = tmp_path / "stage.begun"
    return play


def raises(error):
    def do():
        raise error

    return do


def test_all_in_turn_but_for_what_an_earlier_process_tried(played):
    """The marker names the unit at work."""
    found = []
    played.marker.write_text("x")  # of another plan
    doing = {"b": lambda: found.append(played.marker.read_text())}
    assert played(doing, marker=played.marker) == (["a", "b", "c"], []) and found == ["b"]
    assert not played.marker.exists()
    assert played(done=["a"]) == (["b", "c"], [])
    played.marker.write_text("b")
    seen, left = played(done=["a"], marker=played.marker)
    assert seen == [("b", "the process ended while it was at work"), "c"] and not left


def test_time_is_over_before_the_longest_of_the_last_would_fit(played):
    clock = iter([0.0, 0.0, 4.0, 4.0, 8.0, 8.0]).__next__  # begin, then start and end of each
    assert played(budget=10, now=clock) == (["a", "b"], ["c"])


def test_a_unit_that_would_take_too_long_by_its_estimate_is_passed_over(played):
    seen, left = played(budget=50.0, now=lambda: 0.0, expected={"a": 10.0, "b": 60.0, "c": 50.0}.get)
    assert (seen, left) == (["a", "c"], ["b"])


def test_an_interrupt_leaves_the_rest(played):
    assert played({"b": raises(KeyboardInterrupt())}, marker=played.marker) == (["a", "b"], ["b", "c"])
    assert not played.marker.exists()


HEADER = {"device": "d", "kind": "cuda", "torch": "t", "source": "s", "date": "", "python": "", "triton": ""}


def row(unit, **more):
    return {"site": unit, "op": "linear", "status": "2.00 x"} | more


def test_a_report_is_filled_unit_by_unit(tmp_path):
    """It is whole after each. A lost GPU is its unit's failure, and the next process goes on behind it."""
    path, tried = tmp_path / "tune.json", []

    def rows_of(unit):
        tried.append(unit)
        assert unit == "a" or [r["site"] for r in load(path, TUNE).rows] == tried[:-1]
        if unit == "b":
            raise DeviceLost("misaligned address")
        return [row(unit)]

    def fill(report):
        done = [r["site"] for r in report.rows]
        return units.fill(report, path, "abc", rows_of, lambda unit, why: row(unit, status=why), done=done)

    assert not fill(Report(TUNE, HEADER))
    left = load(path, TUNE)
    assert left.rows == [row("a"), row("b", status="the GPU was lost: misaligned address")] and left.left_out == ["c"]
    again = units.resumed(path, TUNE, HEADER)
    assert again == left and fill(again)
    assert load(path, TUNE).left_out == [] and tried == ["a", "b", "c"]
    assert [file.name for file in tmp_path.iterdir()] == ["tune.json"]


@pytest.mark.parametrize("change", [{"source": "another"}, {"device": "another"}, {"small": True}, "half a fi"])
def test_what_another_run_left_is_not_gone_on_with(tmp_path, capsys, change):
    path, marker = tmp_path / "tune.json", tmp_path / "tune.begun"
    Report(TUNE, HEADER | (change if isinstance(change, dict) else {}), [row("a")]).save(path)
    if isinstance(change, str):
        path.write_text(change)
    marker.write_text("b")
    assert units.resumed(path, TUNE, HEADER) is None and not marker.exists()
    assert "not resumed" in capsys.readouterr().err
    assert units.resumed(tmp_path / "none.json", TUNE, HEADER) is None and not capsys.readouterr().err


def test_a_gpu_that_takes_no_more_work_is_lost(monkeypatch):
    units.check_device("without a GPU there is none to lose")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", raises(RuntimeError("misaligned address\nand more")))
    for reason, said in ((None, "RuntimeError: misaligned address"), ("what was tried", "what was tried")):
        with pytest.raises(DeviceLost) as lost:
            units.check_device(reason)
        assert str(lost.value) == said


def test_a_lost_gpu_cannot_change_the_exit_status(monkeypatch):
    """The interpreter's shutdown, which takes down what is on the GPU, has no turn then."""
    ended = []
    monkeypatch.setattr(units.os, "_exit", ended.append)
    for status in (LOST, 1):
        with pytest.raises(SystemExit) as left:
            units.leave(status)
        assert left.value.code == status and ended == [LOST]
