"""What is committed: read, judged against the targets, compared with what came before."""

import json

import pytest
from made_folders import gpu_folder, right_row, wrong_row
from made_reports import op_report, row, timed, trials

from primer_fast.bench import history, results, roofline
from primer_fast.bench import op as ops
from primer_fast.bench.goals import CNN, DECLARED, NANOGPT
from primer_fast.bench.op import OURS
from primer_fast.bench.report import COMPILE, RIGHT, ProgramRow
from primer_fast.bench.stages import stages
from primer_fast.bench.stages.verdicts import MET, MISSED, NOT_MEASURED, verdicts

VERIFIED = {"op": "linear", "case": "square", "dtype": "float32", "passed": True}
COMPILED_ROW = {**VERIFIED, "target": "sm_90", "kernel": "_k", "resources": None}


def find(judged, subject, what):
    (found,) = [v for v in judged if (v.subject, v.what) == (subject, what)]
    return found


def test_files_are_told_apart_by_what_is_in_them(tmp_path):
    op_report(date="2026-02-01").save(tmp_path / "h100" / "a.json")
    op_report(date="2026-01-01").save(tmp_path / "h100" / "b.json")
    trials(timed()).save(tmp_path / "cpu" / "c.json")
    (tmp_path / "h100" / "verify.json").write_text(json.dumps([VERIFIED]))
    (tmp_path / "offline").mkdir()
    table = {"triton": "3.7.1", "torch": "2.13.0", "rows": [COMPILED_ROW]}
    (tmp_path / "offline" / "sm_90.json").write_text(json.dumps(table))
    found = results.read(tmp_path)
    assert [(f.path, f.machine) for f in found.ops] == [("h100/b.json", "h100"), ("h100/a.json", "h100")]
    assert [f.path for f in found.programs] == ["cpu/c.json"] and found.programs[0].content == trials(timed())
    assert found.verified == {"h100/verify.json": [VERIFIED]} and found.compiled == {"offline/sm_90.json": table}
    assert found.unreadable == {}


def test_stages_of_a_gpu_are_read_the_newest_last(tmp_path):
    gpu_folder(tmp_path / "nvidia_h200")
    old = json.loads((tmp_path / "nvidia_h200" / "right.json").read_text())
    old["header"]["date"], old["rows"] = "2026-01-01T00:00:00+00:00", [wrong_row()]
    (tmp_path / "nvidia_h200" / "old.json").write_text(json.dumps(old))
    found = results.read(tmp_path)
    assert found.unreadable == {}
    kinds = [one.content.kind for one in found.reports]
    assert kinds == ["right", "compile", "right", "fast", "programs", "sanitizer", "tune"], "by date"
    (newest,) = found.newest(RIGHT)
    assert newest.path == "nvidia_h200/right.json" and newest.content.left_out == ["conv2d stem float32"]
    assert stages.failures(newest.content) == [] and found.newest(COMPILE)[0].content.beside["launches"] == 608


def test_the_worst_is_the_nearest_to_its_budget():
    rows = [right_row(case="a"), right_row(case="b", error=3e-3), right_row(case="c", error=float("nan"))]
    rows += [right_row(case="d", error=None), right_row(case="e", budget=0.1, error=0.05)]
    assert [row["case"] for row in stages.worst_first(rows)] == ["c", "b", "e", "a"]


@pytest.mark.parametrize("content", ["", "{", "{}", '{"schema": 2}', "3", '[{"op": 1}]', '{"schema": 1, "rows": []}'])
def test_a_broken_file_is_named_and_hides_nothing(tmp_path, content):
    trials(timed()).save(tmp_path / "cpu" / "good.json")
    (tmp_path / "cpu" / "bad.json").write_text(content)
    found = results.read(tmp_path)
    assert list(found.unreadable) == ["cpu/bad.json"] and found.unreadable["cpu/bad.json"]
    assert len(found.programs) == 1


def test_nothing_committed_is_nothing_measured(tmp_path):
    judged = verdicts(results.read(tmp_path))
    assert {v.result for v in judged} == {NOT_MEASURED} and all(v.reason for v in judged)
    assert find(judged, "nanogpt", NANOGPT.what).reason == "no CPU run of whole programs is committed"
    assert find(judged, "layer_norm", "host_us <= 25").reason == "no GPU run is committed"
    assert {v.subject for v in judged} > {subject for declared in DECLARED.values() for subject, _ in declared}


def test_targets_are_met_missed_or_not_measured_with_the_reason(tmp_path):
    report = trials(
        timed(), timed(provider="nanoGPT", ratio=1.1, goal=NANOGPT), timed("cnn"),
        timed("cnn", "torch.nn", ratio=1.02, goal=CNN),
        ProgramRow("dpo", "all", OURS, status="failed", reason="no memory"),
    )  # fmt: skip
    report.save(tmp_path / "cpu" / "a.json")
    slow = row(case="other", ms=3.0, targets=[{"what": "versus torch.compile >= 1", "value": 0.8, "met": False}])
    memory = [{"what": "peak_mib <= 25", "value": value, "met": value <= 25} for value in (20.0, 30.0, 10.0)]
    op_report(2.0, slow, row(case="large", targets=memory)).save(tmp_path / "h100" / "a.json")
    judged = verdicts(results.read(tmp_path))
    assert find(judged, "nanogpt", NANOGPT.what).result == MISSED
    assert find(judged, "cnn", CNN.what).result == MET
    dpo = next(v for v in judged if v.subject == "dpo")
    assert dpo.result == NOT_MEASURED and dpo.reason == f"{OURS}: no memory"
    linear = find(judged, "linear", "versus torch.compile >= 1")
    assert linear.result == MISSED and [f.met for f in linear.figures] == [False, True], "one of two cases"
    assert linear.figures[0].value == 0.8 and "other" in linear.figures[0].case
    assert find(judged, "linear", "peak_mib <= 25").figures[0].value == 30, "the worst of what must be small"
    assert find(judged, "linear", "host_us <= 25").reason == "no committed run measures it"


def test_the_newest_run_counts_and_a_missed_target_has_its_reason(tmp_path):
    for date, nanogpt, cnn in (("2026-02-01", 1.1, 1.5), ("2026-01-01", 1.4, 0.5)):
        rows = timed(provider="nanoGPT", ratio=nanogpt, goal=NANOGPT), timed("cnn", "torch.nn", cnn, goal=CNN)
        trials(*rows, date=date).save(tmp_path / "cpu" / f"{date}.json")
    reasons = {"nanogpt": {NANOGPT.what: "the products"}, "cnn": {CNN.what: "no longer true"}}
    (tmp_path / "reasons.json").write_text(json.dumps(reasons))
    judged = verdicts(results.read(tmp_path))
    nanogpt, cnn = find(judged, "nanogpt", NANOGPT.what), find(judged, "cnn", CNN.what)
    assert (nanogpt.result, nanogpt.reason) == (MISSED, "the products")
    assert (cnn.result, cnn.reason) == (MET, "")
    (tmp_path / "reasons.json").write_text('{"nanogpt": "the products"}')
    found = results.read(tmp_path)
    assert list(found.unreadable) == ["reasons.json"] and len(found.programs) == 2 and found.reasons == {}


def test_the_reasons_are_of_targets_that_there_are():
    declared = {(subject, goal.what) for goals in DECLARED.values() for subject, goal in goals}
    declared |= {(name, target.goal.what) for name in ops.names() for target in ops.load(name).goals}
    assert {(subject, what) for subject, of in results.read().reasons.items() for what in of} <= declared


def test_roofline():
    assert roofline.ridge(2000, 500) == 250
    assert roofline.attainable(250, 2000, 500) == 500 == roofline.attainable(1e6, 2000, 500)
    assert roofline.attainable(1, 2000, 500) == 2, "2 TB/s at an operation a byte"
    old = row(case="old", flops=None)
    found = roofline.points(op_report(2.0, old, row(case="none", flops=0.0)), "bfloat16")
    assert [(p.provider, p.intensity, p.tflops) for p in found] == [
        (OURS, 4000, 200), ("torch", 4000, pytest.approx(400 / 3)), ("torch.compile", 4000, 160)
    ]  # fmt: skip
    assert roofline.points(op_report(), "float32") == []


def test_history_is_over_the_cases_that_runs_share():
    first = op_report(2.0, row(case="a", ms=4.0), row("conv2d", ms=1.0), date="1")
    second = op_report(1.0, row(case="a", ms=32.0), row(case="new", ms=99.0), date="2")
    series = history.relative_times([first, second])
    assert series == {"linear": [("1", 1), ("2", pytest.approx(2))], "conv2d": [("1", 1)]}  # half of one, 8 x the other
    third = op_report(1.0, row(case="a", ms=4.0), row("conv2d", ms=3.0), date="3")
    series = history.relative_times([first, second, third])
    assert series["linear"][-1] == ("3", pytest.approx(0.5**0.5)) and series["conv2d"][-1] == ("3", pytest.approx(3))


def test_changes_of_the_last_two_runs_the_worst_first():
    runs = [op_report(9.0), op_report(2.0, row(case="a", ms=4.0)), op_report(1.0, row(case="a", ms=6.0))]
    found = history.changes(runs)
    assert [(c.group[1], c.ratio) for c in found] == [("a", 1.5), ("square", 0.5)]
    assert history.changes(runs[:1]) == []


def test_ratios_run_by_run():
    runs = [trials(timed(), timed(provider="nanoGPT", ratio=r), date=d) for d, r in (("1", 1.25), ("2", 1.5))]
    series = history.ratios(runs)
    assert series["nanogpt", "small", "nanoGPT"] == [("1", pytest.approx(1.25)), ("2", pytest.approx(1.5))]
