"""The whole search with compilers and clocks that a test plays: order, budget, what is written, what is skipped."""

import pytest
import torch

from primer_fast.kernels.device import CHIPS
from primer_fast.kernels.product import Product, matmul_choice
from primer_fast.proof.targets import TARGETS
from primer_fast.tuning import prune, report, session, tuned_file
from primer_fast.tuning.problems import Decision, TunedCase
from primer_fast.tuning.prune import Compiled
from primer_fast.tuning.search import Fastest

H100 = CHIPS["sm_90"]
UNIT = TunedCase("linear", "square_1024", "bfloat16")
DECISIONS = [Decision(UNIT, "matmul", Product(1024, 1024, 1024 * n, 2, descriptors=True)) for n in (1, 2, 4, 8, 16)]


class Time:
    """Every candidate takes a second to compile and every problem ten to time; the last candidate is the fastest."""

    def __init__(self, monkeypatch):
        self.seconds, self.timed = 0.0, []
        monkeypatch.setattr(session, "clock_for", lambda device: "a clock")
        monkeypatch.setattr(session, "time_decision", self.time_decision)

    def compile(self, tasks):
        self.tasks = list(tasks)
        return self

    def result(self, decision, settings, seconds):
        if seconds < 1:
            raise TimeoutError
        self.seconds += 1
        return Compiled(settings, code=str(settings), seconds=1.0, registers=99)

    def time_decision(self, decision, kept, clock, until, now):
        assert clock == "a clock" and until > self.seconds
        self.timed.append(decision)
        self.seconds += 10
        return Fastest(kept[-1], 1e-4, 2e-4, 0.01)

    def now(self):
        return self.seconds


@pytest.fixture
def played(monkeypatch):
    return Time(monkeypatch)


def searched(todo, seconds, played, **options):
    """The rows of a search, those that it did not reach too."""
    rows = todo.rows()
    session.search(todo, rows, seconds, workers=played, now=played.now, **options)
    return rows


def planned(decisions=DECISIONS):
    pruned = {decision: prune.prune(decision, H100, most=5) for decision in decisions}
    return session.SearchPlan(H100, TARGETS["sm_90"], list(decisions), 0, pruned)


def test_it_stops_in_time_and_has_written_what_it_found(played, tuned, tmp_path):
    rows = searched(planned(), 61, played, out=tmp_path)
    assert [row.decision for row in rows] == DECISIONS and played.timed == DECISIONS[:3]
    assert played.seconds <= 61
    assert [row.outcome is not None for row in rows] == [True] * 3 + [False] * 2
    written = tuned_file.load(tmp_path / "h100.json")["matmul"]
    assert set(written) == {decision.bucket for decision in DECISIONS[:3]}
    assert all(row["default_seconds"] == 2 * row["seconds"] for row in written.values())
    assert [row.status for row in rows][2:] == ["2.00 x", "not compiled", "not compiled"]


def test_all_candidates_are_compiled_in_order_of_importance(played, tmp_path):
    todo = planned()
    searched(todo, 1e6, played, out=tmp_path)
    candidates = [task for task in played.tasks if task.settings is not None]
    assert [task.decision for task in candidates] == [
        decision for decision in DECISIONS for _ in todo.pruned[decision].estimated
    ]
    assert all(task.settings in todo.pruned[task.decision].estimated for task in candidates)
    (whole,) = (task for task in played.tasks if task.settings is None)
    assert whole.decision == DECISIONS[0], "the unit is compiled whole before its first problem is timed"


def test_without_a_folder_nothing_is_timed(played, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "clock_for", lambda device: 1 / 0)
    rows = searched(planned(), 1e6, played)
    assert played.timed == [] and all(row.compiled == row.estimated == 5 for row in rows)
    assert [row.status for row in rows] == ["compiled"] * 5


def test_no_time_means_no_compiler(played, monkeypatch):
    monkeypatch.setattr(played, "compile", lambda tasks: 1 / 0)
    assert [row.compiled for row in searched(planned(), 0, played)] == [None] * 5


def test_a_default_that_fails_is_said_and_nothing_is_written(played, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("misaligned address\nmore of it")

    monkeypatch.setattr(session, "time_decision", fail)
    rows = searched(planned(DECISIONS[:1]), 1e6, played, out=tmp_path)
    assert rows[0].status == "failed: RuntimeError: misaligned address" and not list(tmp_path.iterdir())


def test_a_problem_without_time_for_it_does_not_end_the_search(played, tmp_path, monkeypatch):
    def late(decision, *_):
        if decision == DECISIONS[0]:
            raise TimeoutError
        return Fastest(matmul_choice.default(H100, decision.problem), 1e-4, 1e-4, 0.01)

    monkeypatch.setattr(session, "time_decision", late)
    rows = searched(planned(DECISIONS[:2]), 1e6, played, out=tmp_path)
    assert [row.status for row in rows] == ["not timed: its share of the time was over", "default"]
    assert list(tuned_file.load(tmp_path / "h100.json")["matmul"].values()) == [
        {"seconds": 1e-4, "default_seconds": 1e-4}
    ]


def test_buckets_that_stand_there_are_skipped(played, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session, "chip", lambda: H100)
    monkeypatch.setattr(session, "decisions_of", lambda unit, gpu, target: DECISIONS)
    searched(planned(DECISIONS[:2]), 1e6, played, out=tmp_path)
    todo = session.plan(["linear"], out=tmp_path)
    assert todo.decisions == DECISIONS[2:] and todo.skipped == 2 and todo.target == TARGETS["sm_90"]
    assert session.plan(["linear"], out=tmp_path, again=True).decisions == DECISIONS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_go_on():
    with pytest.raises(RuntimeError, match="--dry-run --target"):
        session.plan()


def test_the_report_counts_each_stage(played, tmp_path):
    todo = planned()
    rows = searched(todo, 61, played, out=tmp_path)
    *_, matmul, total = report.counts(rows)
    assert matmul[0] == "matmul" and total[0] == "all" and matmul[1:] == total[1:]
    assert matmul[1] == "5" and matmul[4] == "25" and matmul[5] == "15 of 15"
    left = [int(n.replace(",", "")) for n in matmul[2:5]]
    assert left == sorted(left, reverse=True)
    lines = report.text(report.counts(rows)).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[0].split()[0] == "choice"
    words = report.closing(todo, rows, 59.0, 2)
    assert "3 of 5 buckets" in words and "3 timed, 3 faster" in words and "15 candidates, 15 s in 2 processes" in words
