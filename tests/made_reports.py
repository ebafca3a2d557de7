"""Reports that nobody measured, for tests of what is done with them: the numbers are round."""

from primer_fast.bench.op import COMPILED, EAGER, FORWARD, OURS
from primer_fast.bench.report import FAST, PROGRAMS, OpRow, ProgramRow, Report

CEILINGS = {"copy_gbps": 2000.0, "tflops": {"bfloat16": 500.0}, "sizes": {}}


def header(kind="cuda", date="2026-01-02T03:04:05+00:00", **more):
    found = {
        "device": "A GPU" if kind == "cuda" else "A CPU", "kind": kind, "details": "some of it", "date": date,
        "measures": "device time", "torch": "2.13.0", "triton": "3.7.1", "python": "3.11", "commit": "abc123",
        "ceilings": CEILINGS, "command": f"python -m primer_fast.bench for a {kind}", "load_before": 0.25,
    }  # fmt: skip
    return found | more


def row(op="linear", case="square", provider=OURS, ms=2.0, pass_name=FORWARD, **more):
    figures = {"low_ms": 0.95 * ms, "high_ms": 1.05 * ms, "samples": 9, "flops": 4e11, "bytes_moved": 1e8}
    figures |= {"rate": 4e11 / ms / 1e9, "unit": "TFLOP/s", "share": 0.8 / ms, "peak_mib": 96.0, "host_us": 17.5}
    return OpRow(op, case, "bfloat16", pass_name, provider, median_ms=ms, **figures | more)


def op_report(ours_ms=2.0, *rows, **more):
    versus = {EAGER: 3.0 / ours_ms, COMPILED: 2.5 / ours_ms}
    target = {"what": f"versus {COMPILED} >= 1", "value": 2.5 / ours_ms, "met": ours_ms <= 2.5}
    common = [
        row(ms=ours_ms, versus=versus, noise=0.01, targets=[target]), row(provider=EAGER, ms=3.0),
        row(provider=COMPILED, ms=2.5),
    ]  # fmt: skip
    return Report(FAST, header(**more), [*common, *rows])


def timed(name="nanogpt", provider=OURS, ratio=1.0, setting="small", goal=None, **more):
    made = ProgramRow(name, setting, provider, unit="tokens", **more)
    made.time([0.02 * ratio] * 3, [0.02] * 3, 768)
    made.targets += [goal.judged(ratio)] if goal else []
    return made


def trials(*found, **more):
    return Report(PROGRAMS, header(**{"kind": "cpu"} | more), list(found))
