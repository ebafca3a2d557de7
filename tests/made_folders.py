"""A folder that `make gpu` wrote, for tests of what is done with it: nobody measured what is in it."""

import json

from made_reports import header, op_report, timed, trials

from primer_fast.bench.report import COMPILE, RIGHT, SANITIZER, TUNE, Report

SOURCE = "0123456789abcdef"
TUNED = {"seconds": 1e-5, "default_seconds": 2e-5}
MATMUL = {"block_m": 128, "block_n": 256}


def right_row(op="linear", case="square_4096", **more):
    found = {
        "check": "values", "op": op, "case": case, "dtype": "bfloat16", "tensor": "output", "error": 1e-3,
        "budget": 4e-3, "plain_error": 2e-3, "passed": True, "reason": "", "seconds": 0.5, "truth": "float64",
    }  # fmt: skip
    return found | more


def wrong_row(op="linear", **more):
    return right_row(op, error=1.0, passed=False) | more


def tune_row(op, site, **more):
    return {"site": site, "op": op, "case": "any", "status": "2.00 x", "winner": MATMUL, **TUNED} | more


def gpu_header(stage=0, **more):
    """Stages of one run begin one after the other."""
    machine = {"device": "NVIDIA H200", "details": "sm_90", "driver": "580.1", "source": SOURCE, "commit": None}
    return header(date=f"2026-01-02T03:0{stage}:05+00:00", **machine) | more


def gpu_folder(folder):
    """Write all the files there may be."""
    fast = op_report(2.0)
    for row in fast.rows:
        row.case = "square_4096"
    fast.header = gpu_header(2)
    programs = trials(timed("gpt2"), timed("gpt2", "nanoGPT", ratio=1.2))
    programs.header = gpu_header(3)
    compiled = [{"what": "linear square_4096 bfloat16", "launches": 6, "errors": [], "seconds": 2.0}]
    untried = right_row(check="graph", passed=None, error=None, budget=None, reason="nothing to try")
    checked = [right_row(), right_row("layer_norm", "width_1024"), untried]
    tool = {"tool": "memcheck", "status": "passed", "errors": 0, "lines": [], "seconds": 9.0}
    for report in (
        Report(COMPILE, gpu_header(0), compiled, beside={"launches": 608, "seconds": 31.5}),
        Report(RIGHT, gpu_header(1), checked, ["conv2d stem float32"]),
        fast,
        programs,
        Report(SANITIZER, gpu_header(4), [tool]),
        Report(TUNE, gpu_header(5), [tune_row("linear", "matmul 4096x4096 item2")]),
    ):
        report.save(folder / f"{report.kind}.json")
    tuned_file(folder / "tuned" / "nvidia_h200.json", {"matmul": {"4096x4096 item2": MATMUL | TUNED}})
    (folder / "log.txt").write_text("what the stages said")
    return folder


def tuned_file(path, settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"gpu": "nvidia_h200", "date": "2026-01-02", "torch": "2.11.0", "triton": "3.6.0", "settings": settings}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def changed(folder, stage, change):
    """Change one file of a folder in place: ``change`` is called with its content."""
    path = folder / f"{stage}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
