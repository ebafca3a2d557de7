"""The page of what was measured: all of it, nothing that was not, and whatever is in the files is only text."""

import json
import re
from types import SimpleNamespace

import pytest
from cli.pages import Page
from made_folders import changed, gpu_folder, tune_row, wrong_row
from made_reports import op_report, row, timed, trials
from matplotlib.figure import Figure

from primer_fast.bench import results
from primer_fast.bench.goals import CNN, NANOGPT
from primer_fast.bench.op import EAGER, FORWARD_BACKWARD, OURS
from primer_fast.bench.report import OpRow, ProgramRow
from primer_fast.cli import main, report
from primer_fast.cli.page import figure
from primer_fast.cli.report import plots as report_plots


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def made(folder, *more):
    out = folder.parent / "page" / "report.html"
    assert main(["report", "--results", str(folder), "--out", str(out), *more]) == 0
    return Page(out)


def test_nothing_measured_is_said_and_no_figure_is_shown(folder):
    page = made(folder)
    assert "No GPU run is committed" in page.sections["In short"]
    assert "no GPU run is committed" in page.sections["Targets"]
    assert "Speed and memory of every kernel on a GPU" in page.sections["Not measured"]
    assert "Nothing has been measured twice" in page.sections["History"]
    assert "img" not in page.tags
    results_of = [cells[2][0] for cells in page.rows if len(cells) == 4 and cells[2][0] != "missed"]
    assert set(results_of) <= {"result", "not measured"} | {str(n) for n in range(200)}
    assert not re.search(r"\d (TFLOP/s|GB/s|MiB|tokens)\b(?! )", page.sections["Single ops"])


def fill(folder):
    absent = {"status": "not available", "reason": "needs <b>two</b> & x"}
    peer = OpRow("linear", "square", "bfloat16", "forward", "a peer", **absent)
    backward = row(ms=5.0, pass_name=FORWARD_BACKWARD, versus={EAGER: 1.5})
    old = op_report(4.0, row("conv2d", ms=1.0), date="2026-01-01T00:00:00+00:00")
    later = {"date": "2026-02-01T00:00:00+00:00", "device": "A <GPU> & more"}
    new = op_report(2.6, peer, backward, row("conv2d", ms=3.0), **later)
    new.left_out = ["linear odd, tf32, forward"]
    old.save(folder / "h100" / "old.json")
    new.save(folder / "h100" / "new.json")
    trials(
        timed(peak_mib=30.0), timed(provider="nanoGPT", ratio=1.1, goal=NANOGPT, loss_difference=4e-7, peak_mib=33.0),
        timed("cnn"), timed("cnn", "torch.nn", ratio=1.02, goal=CNN),
        ProgramRow("ppo", "all", "TRL's", status="not available", reason="no <such> trainer"),
    ).save(folder / "cpu" / "a.json")  # fmt: skip
    verified = [{"op": "linear", "case": "a", "dtype": "float32", "passed": passed} for passed in (True, True, False)]
    (folder / "h100" / "verify.json").write_text(json.dumps(verified))
    needs = {
        "registers": 168, "spill_bytes": 16, "spill_instructions": 2, "shared_bytes": 2048, "matrix": {"HGMMA": 4},
        "programs_per_processor": 2, "instructions": 1500, "loads": {}, "stores": {}, "ffma": 0,
    }  # fmt: skip
    launch = {"op": "linear", "case": "a", "dtype": "bfloat16", "target": "sm_90", "kernel": "linear_kernel"}
    launches = [launch | {"resources": needs}, launch | {"resources": None}]
    (folder / "offline").mkdir()
    table = {"triton": "3.7.1", "torch": "2.13.0", "command": "primer-fast kernels linear", "rows": launches}
    (folder / "offline" / "sm_90.json").write_text(json.dumps(table))
    (folder / "reasons.json").write_text(json.dumps({"nanogpt": {NANOGPT.what: "The same <products>."}}))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """The page of what ``fill`` writes, with its pictures beside it in ``png``; made once."""
    folder = tmp_path_factory.mktemp("filled") / "results"
    folder.mkdir()
    fill(folder)
    return made(folder, "--pictures", str(folder.parent / "png"))


def test_everything_is_on_the_page(filled):
    page = filled
    assert "2 runs committed" in page.sections["In short"]
    missed = page.row("GPT training step", "\u2265 1.3 x nanoGPT's tokens/s at equal loss")
    assert missed[2] == ["missed", ["bad"]] and missed[3][0] == "1.10. The same <products>."
    met = page.row("CNN training step", "\u2265 1.0 x torch.nn's images/s")
    assert met[2] == ["met", ["met"]] and met[3][0] == "1.02"
    assert page.row("linear", "time of torch.compile over ours \u2265 1")[2][0] == "missed"
    assert page.row("layer_norm", "host time of a call (us) \u2264 25")[2:] == [
        ["not measured", ["none"]], ["no committed run measures it", ["wide"]]
    ]  # fmt: skip
    assert "Missed: GPT training step, \u2265 1.3 x nanoGPT's tokens/s at equal loss: 1.10" in page.sections["In short"]
    for words in ("python -m primer_fast.bench for a cpu", "abc123", "2026-01-02", "load average before 0.2"):
        assert words in page.sections["Whole programs"], words
    assert [cells[0] for cells in page.row("nanoGPT")] == [
        "nanoGPT", "22.00 ms", "22.0 to 22.0", "34,909 tokens", "1.10", "33.0", "4e-07"
    ]  # fmt: skip
    ours = [cells for cells in page.rows if cells[0][0] == OURS and cells[1][0] == "2.600"]
    assert [cell[0] for cell in ours[0]][3:7] == ["154 TFLOP/s", "31 %", "96.0", "17.5"]
    assert all("n" in cell[1] for cell in ours[0][1:]) and "n" not in ours[0][0][1], "figures stand to the right"
    assert page.row("h100/verify.json")[2:] == [["2", ["n"]], ["1", ["n", "bad"]]]
    compiled = [cell[0] for cell in page.row("linear", "linear", "bfloat16, sm_90")]
    assert compiled[3:] == ["HGMMA", "2", "1", "168", "1", "16", "2", "2", "1,500"]
    for words in ("linear odd, tf32, forward", "no <such> trainer", "Training steps and generation on a GPU"):
        assert words in page.sections["Not measured"], words
    assert "primer-fast kernels linear" in page.sections["Compiled code"]


def test_what_was_wrong_on_a_gpu_comes_first(folder):
    gpu = gpu_folder(folder / "nvidia_h200")
    (gpu / "tuned" / "nvidia_h200.json").unlink()
    changed(gpu, "right", lambda data: data["rows"].append(wrong_row("layer_norm", reason="row <7>")))
    changed(gpu, "sanitizer", lambda data: data["rows"][0].update(status="errors", errors=2, lines=["Invalid read"]))
    changed(gpu, "compile", lambda data: data["rows"][0].update(errors=["_k: no registers"]))
    untimed = {"seconds": None, "default_seconds": None, "winner": None}
    late = tune_row("conv2d", "implicit 64", status="not timed: its share of the time was over", **untimed)
    lost = tune_row("linear", "matmul 64", status="failed: hung", **untimed)
    kept = tune_row("linear", "matmul 512", status="default", winner={"warps": 4}, default={"warps": 4})
    changed(gpu, "tune", lambda data: data["rows"].extend([late, lost, kept]))
    changed(gpu, "fast", lambda data: data["header"].update(not_kept={"conv2d": "conv2d is not right"}))
    page = made(folder)
    short = page.sections["In short"]
    assert short.startswith("4 found wrong on a GPU") and "1 run committed, on NVIDIA H200" in short
    named = "nvidia_h200: layer_norm square_4096", "memcheck: 2 errors", "_k: no registers", "matmul 64: failed: hung"
    assert all(words in short for words in named)
    assert list(page.sections)[:3] == ["In short", "Right on a GPU", "Targets"]
    failed = page.row("layer_norm square_4096 bfloat16 output values")
    assert failed[0][1] == ["bad"] and failed[1][0] == "error 1, budget 0.004: row <7>"
    for cells in (
        ("values", "2", "1", "0"),
        ("graph", "0", "0", "1"),
        ("linear square_4096 bfloat16 output values", "0.001", "0.004", "0.25"),
        ("memcheck", "errors", "2"),
        ("linear", "matmul 4096x4096 item2", "20.0", "10.0", "2.00", "block_m 128, block_n 256"),
    ):
        assert len(page.row(*cells)) == len(cells)
    assert "Left out: 1, the first: conv2d stem float32" in page.sections["Right on a GPU"]
    assert "608 launches compiled in 31.5 s; cases with errors: 1" in "".join(page.sections.values())
    assert page.row("linear", "matmul 512")[-1][0] == "default"
    assert page.row("conv2d", "implicit 64")[-1][0] == "not timed: its share of the time was over"
    assert "conv2d: conv2d is not right" in page.sections["Not measured"]
    assert "nvidia_h200/right.json" in page.sections["Where the figures come from"]


def test_nothing_wrong_is_not_called_wrong(folder):
    (gpu_folder(folder / "nvidia_h200") / "tuned" / "nvidia_h200.json").unlink()
    page = made(folder)
    assert "wrong" not in page.sections["In short"] and page.row("values")[2][1] == ["n"]


def test_a_gpu_that_ran_whole_programs_alone_is_no_lack_of_one(folder):
    trials(timed("gpt2"), kind="cuda", device="A GPU").save(folder / "h100" / "models.json")
    page = made(folder)
    assert "1 run committed, on A GPU" in page.sections["In short"]
    assert "Speed and memory of every kernel on a GPU" in page.sections["Not measured"]
    assert "Training steps and generation on a GPU" not in page.sections["Not measured"]


def test_history_shows_what_became_slower(filled):
    assert "h100: 2 runs" in filled.sections["History"]
    changes = [cells for cells in filled.rows if cells[0][0].endswith("bfloat16 forward") and len(cells) == 5]
    assert [(c[0][0].split()[0], c[3][0]) for c in changes] == [("conv2d", "3.00"), ("linear", "0.650")]


def test_the_page_loads_nothing_and_runs_nothing(filled):
    sources = filled.loaded
    assert sources and all(source.startswith("data:image/png;base64,") or source[0] == "#" for source in sources)
    text = filled.path.read_text()
    assert not {"script", "link", "iframe", "object"} & set(filled.tags) and "@import" not in text
    assert "url(" not in text.split("</style>")[0]
    assert "needs &lt;b&gt;two&lt;/b&gt; &amp; x" in text and "A &lt;GPU&gt; &amp; more" in text


def test_a_file_that_cannot_be_read_is_named(folder, capsys):
    (folder / "h100").mkdir()
    (folder / "h100" / "broken.json").write_text("{")
    page = made(folder)
    assert "Not readable: h100/broken.json" in page.sections["Where the figures come from"]
    assert "h100/broken.json" in capsys.readouterr().err


def test_pictures_are_kept_where_asked_for(filled):
    pictures = list((filled.path.parent.parent / "png").iterdir())
    assert {path.name for path in pictures} == {
        "programs-cpu.png", "roofline-h100-bfloat16.png", "speedups-h100-bfloat16-forward.png",
        "speedups-h100-bfloat16-forward-backward.png", "history-h100.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_page_that_cannot_be_written_leaves_the_old_one(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "write_text", full)
    assert main(["report", "--results", str(folder), "--out", str(out)]) == 2
    assert out.read_text() == "old" and "No space left" in capsys.readouterr().err


def test_kernels_can_be_compiled_on_the_spot(folder, monkeypatch):
    launch = {"op": "conv2d", "case": "a", "dtype": "bfloat16", "target": "sm_90", "kernel": "now_kernel"}
    row = SimpleNamespace(as_dict=lambda: launch | {"resources": None})
    monkeypatch.setattr(report.kernels, "compile_rows", lambda units, jobs: [row] * bool(units and jobs == 2))
    assert made(folder, "--compile").row("conv2d", "now")


@pytest.fixture
def panels(monkeypatch):
    """``panels()``: the axes of the picture that was drawn last, by title."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **o: (figures.append(f), save(f, *a, **o)))
    return lambda: {axes.get_title(loc="left"): axes for axes in figures[-1].axes if axes.get_visible()}


def test_roofline_draws_the_ceilings_and_the_points_below(tmp_path, panels):
    found = op_report(2.0, row("conv2d", flops=1e10, bytes_moved=1e8, ms=1.0))
    assert report_plots.roofline(tmp_path / "a.png", found, "bfloat16", "title")
    drawn = panels()
    assert list(drawn) == ["linear", "conv2d"]
    roof, *marks = drawn["linear"].lines
    x, y = roof.get_data()
    assert (x[1], y[1], y[2]) == (250, 500, 500) and y[0] == pytest.approx(x[0] * 2)
    assert sorted(float(mark.get_ydata()[0]) for mark in marks) == pytest.approx([400 / 3, 160, 200])
    assert all(float(mark.get_xdata()[0]) == 4000 for mark in marks)
    (point,) = drawn["conv2d"].lines[1:]
    assert (float(point.get_xdata()[0]), float(point.get_ydata()[0])) == (100, 10)
    assert "FLOP/byte" in drawn["linear"].get_xlabel() and "TFLOP/s" in drawn["linear"].get_ylabel()
    assert not report_plots.roofline(tmp_path / "b.png", found, "float32", "title")
    assert not (tmp_path / "b.png").exists()


def test_programs_are_coloured_by_their_targets(tmp_path, panels):
    comparison = [
        timed(), timed(provider="missed", ratio=1.1, goal=NANOGPT), timed(provider="met", ratio=1.5, goal=NANOGPT),
        timed(provider="none", ratio=0.5), ProgramRow("nanogpt", "small", "broken", status="failed", reason="x"),
    ]  # fmt: skip
    assert report_plots.programs(tmp_path / "a.png", [comparison], ["GPT"], "title")
    (axes,) = panels().values()
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [p.get_color() for p in points] == [report_plots.TEST, report_plots.TRAIN, report_plots.MUTED]
    assert [float(p.get_xdata()[0]) for p in points] == pytest.approx([1.1, 1.5, 0.5])
    assert not report_plots.programs(tmp_path / "b.png", [[timed()]], ["GPT"], "title")


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(None, 3, "\u2013"), (0.0, 3, "0"), (0.012345, 3, "0.0123"), (-0.5, 2, "-0.50"), (12.34, 3, "12.3"),
     (38984.4, 4, "38,984"), (1.1, 3, "1.10")],
)  # fmt: skip
def test_figures(value, digits, shown):
    assert figure(value, digits) == shown


def test_the_committed_results_make_a_page(tmp_path):
    assert main(["report", "--out", str(tmp_path / "report.html")]) == 0
    page = Page(tmp_path / "report.html")
    gpu = any(found.content.header["kind"] == "cuda" for found in results.read().ops)
    assert ("No GPU run is committed" in page.sections["In short"]) is not gpu
