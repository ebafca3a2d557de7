"""What comes first, how much fits into the time, and what is written of it."""

import json
from contextlib import contextmanager

import made_reports
import pytest
import torch

from primer_fast.bench import units
from primer_fast.bench.op import FORWARD, FORWARD_BACKWARD
from primer_fast.bench.report import FAST, Goal, Report
from primer_fast.kernels.device import CHIPS
from primer_fast.kernels.product import Product
from primer_fast.kernels.tunable import Variant
from primer_fast.proof.targets import TARGETS
from primer_fast.tuning import order, portfolio, prune, search, session
from primer_fast.tuning.__main__ import main
from primer_fast.tuning.problems import Decision, TunedCase
from primer_fast.tuning.prune import Compiled
from primer_fast.tuning.search import Fastest

H100 = CHIPS["sm_90"]


def decision(case, K, backward=False, choice="matmul"):
    return Decision(TunedCase("linear", case, "bfloat16"), choice, Product(64, 64, K, 2), backward)


def target(metric, sign, bound, value):
    return Goal(f"{metric} {sign} {bound}", **{"at_least" if sign == ">=" else "at_most": bound}).judged(value)


def case(name, pass_name, *targets, **more):
    return made_reports.row(case=name, pass_name=pass_name, targets=list(targets), **more)


def test_cases_furthest_below_target_come_first():
    report = made_reports.op_report(
        2.0,
        case("slow", FORWARD, target("share", ">=", 0.9, 0.6), target("host_us", "<=", 25, 250.0)),
        case(
            "slower", FORWARD_BACKWARD, target("versus torch.compile", ">=", 1.1, 0.5), target("share", ">=", 0.9, 0.8)
        ),
        case("late", FORWARD, target("median_ms", "<=", 2, 3.6)),
        case("met", FORWARD, target("versus torch", ">=", 1, 1.5)),
        case("without", FORWARD, versus={"torch": 0.8, "cuDNN": 0.4}),
    )
    needs = order.needs(report)
    assert needs["linear", "slow", "bfloat16", False] == pytest.approx(1.5), "the host's time is not the settings'"
    assert needs["linear", "slower", "bfloat16", True] == pytest.approx(2.2)
    assert ("linear", "slow", "bfloat16", True) not in needs, "nothing is known of the backward"
    every = [
        decision("unknown", 32), decision("met", 64), decision("slow", 128), decision("slow", 256, True),
        decision("slower", 512), decision("slower", 1024, True), decision("late", 2048), decision("without", 4096),
    ]  # fmt: skip
    found = [(s.unit.case, s.backward) for s in order.by_need(every, needs)]
    assert found == [
        ("without", False), ("slower", False), ("slower", True), ("late", False), ("slow", False), ("unknown", False),
        ("met", False), ("slow", True),
    ]  # fmt: skip
    assert order.by_need(every, {}) == every, "without a report the order of the cases stays"
    assert order.needs(Report(FAST, made_reports.header(), [made_reports.row(case="share", ms=4.0)])) == {
        ("linear", "share", "bfloat16", False): 5.0
    }


def test_of_one_case_the_least_likely_to_gain_comes_last():
    operands = decision("a", 32, choice="matmul_operands")
    later = decision("a", 64)
    assert order.by_need([operands, later, decision("b", 128)], {}) == [later, operands, decision("b", 128)]


def test_the_newest_report_of_this_gpu_is_taken(tmp_path):
    for folder, name, date in (
        ("h100", "old", "2026-01-01"),
        ("h100", "new", "2026-02-01"),
        ("b200", "b", "2026-03-01"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        made_reports.op_report(2.0, date=date).save(tmp_path / folder / f"{name}.json")
    assert order.newest("h100", tmp_path).header["date"] == "2026-02-01"
    assert order.newest("a100", tmp_path) is None


def test_calls_are_those_that_the_search_makes():
    for count in (1, 2, 3, 7, 10):
        made = []
        samplers = {n: (lambda n=n, made=made: made.append(n) or 1.0 + n / 100) for n in range(count)}
        search.fastest(samplers, 0, 1e9, lambda: 0.0)
        assert portfolio.calls(count) == len(made)


DECISIONS = [decision("square_512", 64 * n) for n in (1, 2, 4, 8)]
SITES = list(map(str, DECISIONS))


@pytest.fixture
def played(monkeypatch):
    """A search of four problems whose compilers and clocks are played; ``problems`` says what timing one does."""
    problems = {}

    class Workers:
        jobs = 2

        def compile(self, tasks):
            list(tasks)
            return self

        def result(self, decision, settings, seconds):
            return Compiled(settings, code=str(settings))

    def plan(*_, **__):
        todo = session.SearchPlan(
            H100, TARGETS["sm_90"], DECISIONS, 0, {s: prune.prune(s, H100, most=3) for s in DECISIONS}
        )
        todo.needs["linear", "square_512", "bfloat16", False] = 2.5
        return todo

    def time_decision(decision, kept, *_):
        problems.get(decision, lambda: None)()
        return Fastest(kept[-1], 1e-4, 2e-4, 0.01, len(kept), ("(1,): Wrong: result 0",))

    monkeypatch.setattr(session, "plan", plan)
    monkeypatch.setattr(session, "time_decision", time_decision)
    monkeypatch.setattr(session, "clock_for", lambda device: "a clock")

    @contextmanager
    def workers(jobs):
        yield Workers()

    monkeypatch.setattr("primer_fast.tuning.job.Workers", workers)
    return problems


def called(tmp_path, *more):
    path = tmp_path / "tune.json"
    status = main(["--out", str(tmp_path / "tuned"), "--json", str(path), *more])
    return status, json.loads(path.read_text())


def written(tmp_path):
    """The settings that were found, by bucket."""
    return json.loads((tmp_path / "tuned" / "h100.json").read_text())["settings"]["matmul"]


def test_what_became_of_each_problem_is_written(played, tmp_path, capsys):
    status, content = called(tmp_path, "--minutes", "4")
    assert status == 0 and content["schema"] == "tune 1" and content["left_out"] == []
    assert {"torch", "source"} <= set(content["header"]) and [r["site"] for r in content["rows"]] == SITES
    first = content["rows"][0]
    assert first["short"] == 2.5 and first["status"] == "2.00 x" and first["seconds"] == 1e-4
    assert first["winner"] != first["default"] and set(first["winner"]) == set(first["default"])
    assert first["candidates"]["timed"] == first["candidates"]["by compile"] == 3 < first["candidates"]["fit"]
    assert first["refused"] == ["(1,): Wrong: result 0"]
    assert "by estimate 4 of 4 problems fit into 4 minutes" in capsys.readouterr().out
    assert set(written(tmp_path)) == {decision.bucket for decision in DECISIONS}


def test_the_estimate_alone_searches_nothing(played, tmp_path, capsys):
    played.update({s: lambda: 1 / 0 for s in DECISIONS})
    assert main(["--estimate", "--minutes", "4", "--jobs", "15", "--out", str(tmp_path / "tuned")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "h100: by estimate 4 of 4 problems fit into 4 minutes with 15 compiling processes"
    assert [float(line.split()[0]) for line in lines[1:]] == sorted(float(line.split()[0]) for line in lines[1:])
    assert len(lines) == 1 + len(DECISIONS) and not (tmp_path / "tuned").exists()


def test_what_had_no_time_is_named_and_gone_on_with(played, tmp_path):
    status, content = called(tmp_path, "--budget", "0")
    assert status == 0 and content["rows"] == [] and content["left_out"] == SITES

    def interrupt():
        raise KeyboardInterrupt

    played[DECISIONS[1]] = interrupt
    status, content = called(tmp_path, "--resume")
    assert [r["site"] for r in content["rows"]] == SITES[:1] and content["left_out"] == SITES[1:]
    tried = []
    played.update({s: lambda s=s: tried.append(s) for s in DECISIONS})
    status, content = called(tmp_path, "--resume")
    assert tried == DECISIONS[1:] and len(content["rows"]) == 4 and content["left_out"] == [] and status == 0


def test_a_lost_gpu_costs_one_problem(played, tmp_path, monkeypatch, capsys):
    def lose():
        raise RuntimeError("an illegal access")

    played[DECISIONS[1]] = lose
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "synchronize", lose)
        status, content = called(tmp_path)
    assert status == units.LOST and len(content["rows"]) == 2
    assert capsys.readouterr().err == "the GPU was lost: call it again\n"
    assert list(written(tmp_path)) == [DECISIONS[0].bucket], "nothing is written of the problem that lost it"
    assert content["rows"][1]["status"] == "failed: the GPU was lost: RuntimeError: an illegal access"
    del played[DECISIONS[1]]
    status, content = called(tmp_path, "--resume")
    assert status == 1, "an earlier process failed in one"
    assert [r["status"] for r in content["rows"]] == ["2.00 x", content["rows"][1]["status"], "2.00 x", "2.00 x"]


def test_a_process_that_was_killed_costs_one_problem(played, tmp_path):
    """The marker is what it leaves."""
    called(tmp_path, "--budget", "0")
    (tmp_path / "tune.begun").write_text(str(DECISIONS[0]))
    status, content = called(tmp_path, "--resume")
    assert status == 1 and content["rows"][0]["status"] == "failed: the process ended while it was at work"
    assert [r["status"] for r in content["rows"][1:]] == ["2.00 x"] * 3


def test_what_another_run_found_is_not_gone_on_with(played, tmp_path, capsys):
    called(tmp_path)
    (tmp_path / "tune.begun").write_text(str(DECISIONS[0]))
    status, found = called(tmp_path, "--resume", "--small")
    assert status == 0 and found["header"]["small"] and [r["status"] for r in found["rows"]] == ["2.00 x"] * 4
    assert "other code or other sizes" in capsys.readouterr().err


def test_wrong_calls(played, tmp_path, capsys):
    assert main(["--resume"]) == 2 and "--resume must come with --json FILE" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("{}")
    assert main(["--from", str(tmp_path / "report.json")]) == 2 and "schema must be 1" in capsys.readouterr().err


def test_a_way_is_written_by_its_name():
    assert session.DecisionResult(DECISIONS[0], 2, 2, 2, default=Variant("fused")).default._asdict() == {
        "variant": "fused"
    }
