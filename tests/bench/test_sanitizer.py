import os

import pytest
from processes import ends

from primer_fast.bench.report import SANITIZER, load
from primer_fast.bench.stages import sanitized, sanitizer
from primer_fast.bench.stages.sanitizer import main, read_output
from primer_fast.proof import verify

MEMCHECK = """========= COMPUTE-SANITIZER
at linear edges_aligned
========= Invalid __global__ read of size 16 bytes
=========     at matmul_kernel+0x1230
=========     by thread (32,0,0) in block (1,0,0)
=========     Address 0x7f30 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
at the end
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= COMPUTE-SANITIZER
at linear edges_aligned
========= Error: Race reported between Write access at matmul_kernel+0x40
=========     and Read access at matmul_kernel+0x80 [16 hazards]
at the end
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def statuses(path):
    return [(row["tool"], row["status"], row["errors"]) for row in load(path, SANITIZER).rows]


def test_errors_are_counted_and_name_their_kernel():
    row = read_output("memcheck", MEMCHECK, 0, 7.04)
    assert (row.status, row.errors, row.seconds) == ("errors", 1, 7.0)
    assert row.lines[:2] == ["Invalid __global__ read of size 16 bytes", "at matmul_kernel+0x1230"]
    row = read_output("racecheck", RACECHECK, 0, 1.0)
    assert (row.status, row.errors) == ("errors", 1)
    assert row.lines[1] == "and Read access at matmul_kernel+0x80 [16 hazards]" and row.lines[-1] == "at the end"
    row = read_output("memcheck", "========= Invalid __global__ read of size 4\n" * 500, None, 1.0)
    assert row.errors == 500 and len(row.lines) == 40, "many are cut short"


@pytest.mark.parametrize(
    ("text", "code", "status"),
    [
        ("at the end\n========= ERROR SUMMARY: 0 errors\n", 0, "passed"),
        ("at the end\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 2 warnings)\n", 0, "passed"),
        ("at linear odd\n", None, "stopped"),
        ("========= Invalid __shared__ write of size 4 bytes\n", None, "errors"),
        ("at linear odd\n========= ERROR SUMMARY: 0 errors\n", 1, "failed"),  # the program broke down
        ("at linear odd\n========= ERROR SUMMARY: 0 errors\n", 0, "failed"),  # half of it was not run
        ("========= Error: no device\n", 1, "errors"),
        ("Unable to find injection library\n", 1, "failed"),
        ("", 127, "failed"),
    ],
)
def test_status(text, code, status):
    row = read_output("memcheck", text, code, 1.0)
    assert row.status == status and (row.lines or status in ("passed", "stopped"))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compute-sanitizer that does what a shell script says; it does not start the program that it is given."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(script):
        program = folder / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return str(tmp_path / "sanitizer.json")

    return put


CLEAN = """echo "at the end"
case $2 in
memcheck) echo "========= ERROR SUMMARY: 0 errors";;
racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
esac"""


def test_both_tools_are_run(fake, tmp_path, capsys):
    path = fake(f'echo "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> {tmp_path}/calls\n{CLEAN}')
    assert main(["--json", path, "--budget", "30", "--small"]) == 0
    assert statuses(path) == [("memcheck", "passed", 0), ("racecheck", "passed", 0)]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("--tool memcheck --report-api-errors no ") and calls[1].startswith("--tool racecheck ")
    assert all(call.endswith("-u -m primer_fast.bench.stages.sanitized --small 1") for call in calls)
    assert "memcheck: passed, 0 errors" in capsys.readouterr().out
    assert main(["--json", path, "--small", "--resume"]) == 0
    assert (tmp_path / "calls").read_text().splitlines() == calls


def test_an_error_of_one_does_not_stop_the_other(fake):
    path = fake(f'if [ $2 = memcheck ]; then cat <<"END"\n{MEMCHECK}\nEND\nelse\n{CLEAN}\nfi')
    assert main(["--json", path, "--budget", "30"]) == 1
    assert statuses(path) == [("memcheck", "errors", 1), ("racecheck", "passed", 0)]
    assert "at matmul_kernel+0x1230" in load(path, SANITIZER).rows[0]["lines"]


def test_a_tool_is_stopped_at_its_share_and_what_it_said_is_kept(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(sanitizer, "_GRACE", 0.2)
    path = fake(f'echo "at linear odd"\nsleep 1000 & echo $! > {tmp_path}/child\nwait')
    assert main(["--json", path, "--budget", "1.5"]) == 0
    assert statuses(path) == [("memcheck", "stopped", 0), ("racecheck", "stopped", 0)]
    assert [row["lines"] for row in load(path, SANITIZER).rows] == [["at linear odd"]] * 2
    assert ends((tmp_path / "child").read_text().strip())


def test_without_the_tool_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitizer, "which", lambda _: None)
    path = str(tmp_path / "sanitizer.json")
    assert main(["--json", path]) == 0
    assert statuses(path) == [("memcheck", "not available", None), ("racecheck", "not available", None)]
    assert "racecheck: not available: compute-sanitizer is not on the PATH, 0 s" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--json", path, "--budget", "0"])
    assert stop.value.code == 2


def test_every_op_is_looked_at_the_suspicious_first():
    small, whole = sanitized.cases(small=True), sanitized.cases()
    assert [op for op, _ in small[: len(verify.ops())]] == list(sanitized.CASES)
    assert set(sanitized.CASES) == set(verify.ops()) and small[:9] == whole[:9] and len(whole) > 2 * len(small)
    assert small[0][0] == "scaled_dot_product_attention" and small[1][0] == "linear"


def test_the_program_says_where_it_is(capsys, monkeypatch):
    case = sanitized.case_named("layer_norm", "primer")
    monkeypatch.setattr(sanitized, "cases", lambda small: [("layer_norm", case)])
    monkeypatch.setattr(sanitized, "ONE_PASS", "one")
    assert sanitized.main(["--small"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "at layer_norm primer", "at scaled_dot_product_attention one in one pass", "at the end"
    ]  # fmt: skip
