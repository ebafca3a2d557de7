"""summary.md: targets first, then what was wrong, then what had no time, from whatever files there are."""

import pytest
from made_folders import right_row as right
from made_reports import header, op_report, row, timed, trials

from primer_fast.bench.goals import NANOGPT
from primer_fast.bench.gpu import StageResult
from primer_fast.bench.op import FORWARD_BACKWARD, OURS
from primer_fast.bench.report import FAILED, Goal, ProgramRow, Report
from primer_fast.bench.stages import scoreboard, summary

HEADER = header(driver=None, cuda="13.0", source="0123")
STAGES = ("compile", "right", "fast", "programs", "sanitizer")
OUTCOMES = tuple(StageResult(name, "passed", 9.0) for name in STAGES)


def write(folder, name, rows, **more):
    Report(name, HEADER, rows, **more).save(folder / f"{name}.json")


def compiled(folder, *rows):
    write(folder, "compile", list(rows), beside={"launches": 3, "seconds": 2.5})


@pytest.fixture
def folder(tmp_path):
    """What stages that found nothing wrong leave."""
    compiled(tmp_path, {"what": "linear square", "errors": [], "seconds": 1})
    write(tmp_path, "right", [right(error=i * 1e-7, case=f"case{i}") for i in range(3)])
    write(tmp_path, "sanitizer", [{"tool": "memcheck", "status": "passed", "errors": 0, "lines": []}])
    op_report(2.0, row(provider="torch.mm", ms=1.5, error=None)).save(tmp_path / "fast.json")
    trials(timed(ratio=1.4, goal=NANOGPT, provider="nanoGPT"), timed()).save(tmp_path / "programs.json")
    return tmp_path


def test_targets_then_what_was_wrong_then_what_had_no_time(folder):
    page = summary.text(folder, HEADER, OUTCOMES)
    assert page.startswith("# A GPU\n\npython 3.11, torch 2.13.0, triton 3.7.1, cuda 13.0, commit abc123, source 0123")
    heads = [line for line in page.splitlines() if line.startswith("## ")]
    assert heads == ["## Targets", "## Wrong", "## No time", *(f"## {name}" for name in STAGES)]
    assert "Nothing was wrong" in page and "Nothing was left out" in page
    assert page.index("case2 bfloat16 output values: error 2e-07, budget 0.004") < page.index("case1 bfloat16 output")


def test_a_target_stands_beside_its_figure_and_the_fastest_other(folder):
    fast = op_report()
    fast.rows[0].targets = [Goal("versus torch.compile >= 1", at_least=1).judged(0.8)]
    fast.rows[1].error = fast.rows[2].error = 1e-3
    rate = Goal("rate >= 600", at_least=600).judged(630.0)
    fast.rows += [row(op="scaled_dot_product_attention", case="llama_16k", targets=[rate])]
    way = row(op="scaled_dot_product_attention", case="llama_16k", provider=f"{OURS}, another way", ms=0.1, error=1e-3)
    fast.rows.append(way)  # ours too, and no rival
    backward = Goal("median_ms <= 60", at_most=60).judged(90.0)
    fast.rows += [row(op="linear_cross_entropy", case="qwen", pass_name=FORWARD_BACKWARD, targets=[backward])]
    first, second, third = scoreboard.lines_of(fast)
    assert (first.measured, first.met, first.other) == (630, True, "-"), "the agenda's first"
    assert (second.measured, second.met, second.ratio) == (90, False, pytest.approx(2 / 3))
    assert third.what == "linear square" and third.other.startswith("torch.compile: 2.50 ms")
    assert "**0.800**" in scoreboard.markdown([third])
    (line,) = scoreboard.lines_of(trials(timed(ratio=1.4, goal=NANOGPT, provider="nanoGPT"), timed()))
    assert line.met and line.ratio == pytest.approx(1.4 / 1.3) and line.other == "nanoGPT: 28.0 ms"


def test_what_was_wrong_the_gravest_first(folder):
    hung = right("conv2d", error=None, passed=False, reason="hung")
    write(folder, "right", [right(), right(error=0.5, passed=False), hung])
    op_report(2.0, row(case="slow", status="wrong", reason="off by 1")).save(folder / "fast.json")
    trials(ProgramRow("gpt2", "all", "primer_fast, CUDA graph", status=FAILED, reason="no capture")).save(
        folder / "programs.json"
    )
    write(folder, "sanitizer", [{"tool": "racecheck", "status": "failed", "errors": 2, "lines": ["Race in x"]}])
    compiled(folder, {"what": "linear odd", "errors": ["out of registers"], "seconds": 1})
    statuses = ("failed: OutOfMemoryError: no memory", "failed: hung", "2.00 x")
    write(folder, "tune", [{"site": f"matmul {i}", "op": "linear", "status": s} for i, s in enumerate(statuses)])
    page = summary.text(folder, HEADER, [*OUTCOMES, StageResult("tune", "passed", 9.0)])
    wrong = page.split("## Wrong")[1].split("## No time")[0].strip().splitlines()
    said = (
        "linear square_4096 bfloat16 output values: error 0.5",
        "conv2d square_4096 bfloat16 output values: hung",
        "off by 1",
        "2 errors: Race in x",
        "linear odd does not compile: out of registers",
        "no capture",
        "matmul 1: failed",
    )
    assert len(wrong) == len(said) and all(words in line for words, line in zip(said, wrong, strict=True))


def test_what_had_no_time(folder):
    write(folder, "right", [], left_out=["linear square float16", "linear odd float16"])
    stopped = [StageResult("right", "stopped after 90 s", 90.0), StageResult("fast", "not started: no time", 0.0)]
    left = summary.text(folder, HEADER, stopped).split("## No time")[1].split("\n\n")[1].splitlines()
    assert left == [
        "- right: stopped after 90 s", "- fast: not started: no time",
        "- right: 2: linear square float16; linear odd float16",
    ]  # fmt: skip


def test_brief_is_short_whatever_happened(folder):
    write(folder, "right", [right(case=f"case{i}" * 20, passed=False) for i in range(2000)])
    (folder / summary.MEASURED.log).write_text("y" * 50_000 + "\n" * 3)
    assert len(summary.text(folder, HEADER, OUTCOMES, brief=True)) < 10_000
    assert summary.text(folder, HEADER, OUTCOMES).count("- linear case") >= 2000


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [1]}', None])
def test_damaged_and_missing_files_are_named_not_fatal(folder, name, content):
    (folder / summary.MEASURED.log).write_text("Traceback\nValueError: why")
    (folder / f"{name}.json").unlink()
    if content is not None:
        (folder / f"{name}.json").write_text(content)
    page = summary.text(folder, HEADER, OUTCOMES)
    section = page.split(f"## {name}\n")[1].split("## ")[0]
    assert "No result (" in section and "    ValueError: why" in section


def test_rows_whose_figures_are_none(folder):
    rows = [right(error=None, passed=False), right("conv2d", budget=None, passed=False), right(passed=None)]
    write(folder, "right", rows)
    tool = {"tool": "memcheck", "status": "not available", "errors": None, "lines": ["it is not on the PATH"]}
    write(folder, "sanitizer", [tool])
    page = summary.text(folder, HEADER, OUTCOMES)
    assert "0 passed, 2 failed" in page and page.count("output values: no reason is given") == 2
    assert page.endswith("- memcheck: not available: it is not on the PATH\n") and "memcheck" not in page.split("##")[2]
