"""Kernels that are launched say what the compiler may do, and launchers launch no others."""

import ast
from pathlib import Path

import pytest
import triton
from triton.runtime.jit import JITFunction

from primer_fast import backend
from primer_fast.kernels.launch.entry import Entry, InterpretedEntry, entry

KERNELS = sorted((Path(__file__).parent.parent / "kernels").rglob("*.py"))


def _kernel(x_ptr, N):
    pass


def undeclared(source: str):
    """Names of functions ending in _kernel that are not declared with ``entry``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
            if [ast.unparse(d) for d in decorators] != ["entry"]:
                yield node.name


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_every_kernel_is_an_entry(path):
    assert list(undeclared(path.read_text())) == []


def test_the_lint_finds_a_kernel_that_is_not():
    source = "@entry(a=1)\ndef _good_kernel(): pass\n@triton.jit\ndef _bad_kernel(): pass\n@triton.jit\ndef f(): pass"
    assert list(undeclared(source)) == ["_bad_kernel"]


def test_a_profile_can_tell_the_kernels_apart():
    """It lists them by name alone: "_forward_kernel" could be that of any op."""
    nodes = [node for path in KERNELS for node in ast.walk(ast.parse(path.read_text()))]
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")]
    assert len(names) > 30 and len(set(names)) == len(names)
    assert not [name for name in names if name.startswith("_")]


def test_a_launch_asks_for_fused_sums(monkeypatch):
    asked = {}
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: asked.update(kwargs, args=args))
    Entry(_kernel)[(3,)](1, N=2, num_warps=4)
    assert asked == {
        "args": (1,), "N": 2, "grid": (3,), "warmup": False, "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip


def test_the_decorator_takes_what_triton_takes():
    if backend.interpreting:
        assert isinstance(entry(_kernel), InterpretedEntry)
        assert isinstance(entry(do_not_specialize=["N"])(_kernel), type(triton.jit(_kernel)))
    else:
        assert isinstance(entry(_kernel), Entry)
        assert [p.do_not_specialize for p in entry(do_not_specialize=["N"])(_kernel).params] == [False, True]
