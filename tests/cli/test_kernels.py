"""`primer-fast kernels`: what it prints, writes and refuses; that kernels compile is the matter of tests/proof."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("tyro", reason="`primer-fast kernels` needs primer-fast[cli]")
pytest.importorskip("rich", reason="`primer-fast kernels` needs primer-fast[cli]")

from primer_fast import backend
from primer_fast.cli import kernels, main
from primer_fast.proof.hot_loop import HotLoop
from primer_fast.proof.production import CaseOnTarget, CompiledLaunch
from primer_fast.proof.resources import Resources

GOOD = Resources(
    174, 0, 0, 196640, 1, {"HGMMA": 4}, {"narrow": 30, "async narrow": 2, "tma": 8}, {"tma": 4}, 896, 4552,
    hot_loop=HotLoop(86, 8, 3, 5, 1, 2, 1, 3, 4075),
)  # fmt: skip
SPILLING = Resources(
    255, 104, 66, 147456, 1, {"HGMMA": 4}, {"async wide": 36}, {"wide": 32, "narrow": 1}, 0, 5344,
    ("(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized",),
    HotLoop(154, 4, 0, 4, 4, 8, 0, 4, 154),
)  # fmt: skip
TILE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "SPLITS": 3, "ACTIVATION": "gelu", "EVEN_K": True}


def row(direction, resources, error=None, epilogue=None):
    unit = ("linear", "square_4096", "bfloat16", "sm_90")
    serialized = None if resources is None else resources.serialized
    return CompiledLaunch(*unit, direction, "matmul_kernel", 1536, TILE, 8, 4, resources, error, serialized, epilogue)


@pytest.fixture
def compiled(monkeypatch):
    """Answers the compiler's part: each unit gives the rows of the fixture's list."""
    rows = [row("forward", GOOD, epilogue=31.84), row("backward", SPILLING)]

    def compile_units(units, jobs):
        assert all(isinstance(unit, CaseOnTarget) for unit in units) and jobs == 2
        for _ in units:
            yield list(rows)

    monkeypatch.setattr(kernels, "compile_units", compile_units)
    return rows


ONE = ["linear", "--case", "square_4096", "--dtype", "bfloat16"]


def test_table(compiled, capsys):
    assert main(["kernels", *ONE]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert "linear · bfloat16 · sm_90 (H100 SXM: 132 processors, 227 KiB" in out
    assert max(map(len, out.splitlines())) <= 120
    first = ["square_4096", "fwd", "matmul", "1,536", "128x256x64", "/3", "8/4", "174", "192", "1"]
    assert [*first, "86", "1", "31.8", "3S", "5R", "TMA", "8", "small", "32", "TMA", "4"] in lines
    second = ["bwd", "matmul", "1,536", "128x256x64", "/3", "8/4", "255+104", "144", "1", "154", "4!", "4R"]
    assert [*second, "async", "36", "16B", "32", "small", "1"] in lines
    assert "2 launches: 2 compiled, 0 failed, 1 spill, 1 with serialised products" in out


def test_a_failure_is_named_and_is_the_exit_status(compiled, capsys):
    """Beside kernels without a loop, which have none of its columns."""
    compiled[:] = [row("forward", replace(GOOD, hot_loop=None)), row("backward", replace(SPILLING, hot_loop=None))]
    compiled.append(row("backward", None, "PTXASError: Insufficient registers"))
    assert main(["kernels", *ONE]) == 1
    out = capsys.readouterr().out
    assert "sm_90 bfloat16 linear square_4096 backward matmul_kernel: PTXASError: Insufficient registers" in out
    assert "3 launches: 2 compiled, 1 failed, 1 spill" in out


def test_json(compiled, tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text("an older table")
    assert main(["kernels", *ONE, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["rows"] == [json.loads(json.dumps(r.as_dict())) for r in compiled]
    assert content["triton"] and content["torch"] and content["primer_fast"]
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.json"]


def test_targets_and_dtypes_multiply(compiled, capsys):
    argv = ["linear", "--case", "square_4096", "decode", "--dtype", "float16", "float32", "--target", "sm_80", "gfx942"]
    assert main(["kernels", *argv]) == 0
    assert "16 launches" in capsys.readouterr().out  # two rows for each of 2 cases x 2 dtypes x 2 targets


def test_refuses_an_interpreting_process(monkeypatch, capsys):
    monkeypatch.setattr(backend, "interpreting", True)
    assert main(["kernels", *ONE]) == 2
    assert "TRITON_INTERPRET=1 was set when Triton was imported" in capsys.readouterr().err
