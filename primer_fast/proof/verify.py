"""Every case of every op: forward and each gradient, kernel against NumPy, judged by PyTorch's own error.

Without a GPU the kernels run in Triton's interpreter, so TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import argparse
import contextlib
import importlib
import json
import math
import pkgutil
import sys
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from primer_fast import backend, functional, reference
from primer_fast.kernels import launch
from primer_fast.proof.inputs import place
from primer_fast.proof.numerics import budget, exact, worst
from primer_fast.reference.case import Case

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PATHS = {"pointers": "sm_80", "descriptors": "sm_90"}  # how operands are loaded -> a chip that loads them so
_NATIVE_FLOPS, _NATIVE_ELEMENTS = 2**34, 2**25  # largest production case that NumPy checks in seconds


@dataclass(frozen=True)
class Row:
    """One compared tensor. Errors are the largest absolute difference to the float64 truth."""

    op: str
    case: str
    dtype: str
    path: str
    tensor: str  # "output", or the argument whose gradient it is
    error: float
    budget: float
    plain_error: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """Error as a fraction of the budget."""
        return self.error / self.budget if self.budget > 0 else 0.0 if self.error == 0 else float("inf")

    def as_dict(self) -> dict:
        return asdict(self) | {"passed": self.passed}


def ops() -> list[str]:
    """Names of all ops that have a reference with cases."""
    names = (module.name for module in pkgutil.iter_modules(reference.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"primer_fast.reference.{name}"), "CASES")]


def cases(op: str, native: bool) -> list[Case]:
    """The cases that are checked: on a GPU (``native``) also those of production size that NumPy can follow."""
    module = importlib.import_module(f"primer_fast.reference.{op}")

    def small_enough(case):
        elements = sum(math.prod(shape) for shape in case.shapes.values())
        return sum(module.flops(case).values()) <= _NATIVE_FLOPS and elements <= _NATIVE_ELEMENTS

    return [case for case in module.CASES if not case.production or (native and small_enough(case))]


def loads_by_descriptors(op: str) -> bool:
    """Whether there are two ways to load operands; a reference says ``DESCRIPTORS = False`` where there is one."""
    return getattr(importlib.import_module(f"primer_fast.reference.{op}"), "DESCRIPTORS", True)


def device() -> str:
    """Where the kernels run: "cuda", or "cpu" in the interpreter.

    Raises:
        RuntimeError: there is no GPU and Triton was imported without TRITON_INTERPRET=1.
    """
    if torch.cuda.is_available():
        return "cuda"
    if backend.interpreting:
        return "cpu"
    raise RuntimeError("verify: without a GPU, TRITON_INTERPRET=1 must be set before Triton is imported; it was not")


def draw(case: Case, dtype: torch.dtype, where: str) -> dict[str, torch.Tensor]:
    """Random inputs of a case, the same for every dtype up to its rounding; they require gradients."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    return {
        name: place(rng.normal(size=shape), case.layouts.get(name), dtype, where).requires_grad_()
        for name, shape in case.shapes.items()
    }


def check(op: str, case: Case, dtype: torch.dtype, path: str | None = None) -> list[Row]:
    """Run one case and judge its output and each gradient, asked for together and, in float32, each alone as well."""
    truth = importlib.import_module(f"primer_fast.reference.{op}")
    implementation = importlib.import_module(f"primer_fast.functional.{op}")
    where = device()
    inputs = draw(case, dtype, where)
    arrays = {name: exact(t) for name, t in inputs.items()}
    want = {"output": getattr(truth, op)(**arrays, **case.options)}
    rng = np.random.default_rng(0)
    dy = torch.from_numpy(np.asarray(rng.normal(size=want["output"].shape))).to(dtype).to(where)
    if dy.dim() == 4 and "channels_last" in case.layouts.values():
        dy = dy.contiguous(memory_format=torch.channels_last)  # as the output: the layout that a network sends back
    want |= getattr(truth, f"{op}_grad")(exact(dy), **arrays, **case.options)
    magnitude = getattr(truth, f"{op}_magnitude")(exact(dy), **arrays, **case.options)

    def run(function, wanted):
        y = function(**inputs, **case.options)
        return {"output": y, **dict(zip(wanted, torch.autograd.grad(y, [inputs[n] for n in wanted], dy), strict=True))}

    with launch.assume_chip(PATHS[path]) if path else contextlib.nullcontext():
        got = run(getattr(functional, op), list(inputs))
        for name in inputs if dtype == torch.float32 else ():  # which kernels run does not depend on the dtype
            for other, t in inputs.items():
                t.requires_grad_(other == name)
            got[f"{name} alone"] = run(getattr(functional, op), [name])[name]
    for t in inputs.values():
        t.requires_grad_()
    plain = run(getattr(implementation, f"{op}_plain"), list(inputs))

    rows = []
    for label, tensor in got.items():
        name = label.removesuffix(" alone")
        plain_error = worst(exact(plain[name]), want[name])
        allowed = budget(dtype, plain_error, want[name], magnitude[name])
        wrong_form = tensor.shape != plain[name].shape or tensor.dtype != plain[name].dtype
        error = float("inf") if wrong_form else worst(exact(tensor), want[name])
        rows.append(Row(op, case.name, str(dtype)[6:], path or "native", label, error, allowed, plain_error))
    return rows


class Unit(NamedTuple):
    """What one call of ``check`` does."""

    op: str
    case: Case
    dtype: torch.dtype
    path: str | None

    def __str__(self) -> str:
        return " ".join((self.op, self.case.name, str(self.dtype)[6:], self.path or ""))


def plan(names: Iterable[str] = (), dtypes: Iterable[str] = (), case_names: Iterable[str] = ()) -> list[Unit]:
    """What there is to check: all ops, dtypes and cases where none is named, on every way to load operands.

    Raises:
        ValueError: an op, a dtype or a case is unknown.
        RuntimeError: see ``device``.
    """
    names, dtypes, case_names = list(names) or ops(), list(dtypes) or list(DTYPES), list(case_names)
    native = device() == "cuda"
    there = {op: cases(op, native) for op in names if op in ops()}
    known = {case.name for op in there.values() for case in op}
    for what, asked, known_ones in (("op", names, ops()), ("dtype", dtypes, DTYPES), ("case", case_names, known)):
        unknown = [a for a in asked if a not in known_ones]
        if unknown:
            raise ValueError(f"verify: {what} must be one of {', '.join(known_ones)}; got {', '.join(unknown)}")
    both = not native or launch.chip().has_descriptors
    paths = {op: PATHS if both and loads_by_descriptors(op) else (None,) for op in names}
    return [
        Unit(op, case, DTYPES[dtype], path)
        for op in names
        for case in there[op]
        if not case_names or case.name in case_names
        for dtype in dtypes
        for path in paths[op]
    ]


def main(argv: list[str] | None = None) -> int:
    """``python -m primer_fast.proof.verify``: the same as ``primer-fast verify`` with PyTorch and Triton alone."""
    parser = argparse.ArgumentParser(prog="python -m primer_fast.proof.verify", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--dtype", nargs="+", default=(), choices=DTYPES)
    parser.add_argument("--case", nargs="+", default=())
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    try:
        units = plan(options.ops, options.dtype, options.case)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    rows = []
    for unit in units:
        checked = check(*unit)
        rows.extend(checked)
        worst_row = max(checked, key=lambda row: row.share)
        verdict = "ok    " if worst_row.passed else "FAILED"
        errors = f"{worst_row.error:.1e} of {worst_row.budget:.1e}"
        print(f"{verdict} {unit!s:60} {worst_row.tensor:16} {errors}", flush=True)
        if options.json:  # after every unit: an interrupted run keeps what it has
            part = Path(f"{options.json}.part")
            part.write_text(json.dumps([row.as_dict() for row in rows]))
            part.replace(options.json)
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows)} results, {failed} over budget")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
