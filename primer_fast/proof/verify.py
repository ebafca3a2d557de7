"""Every case of every op: forward and each gradient, kernel against NumPy, judged by PyTorch's own error.

Without a GPU the kernels run in Triton's interpreter, so TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import contextlib
import importlib
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from primer_fast import backend, functional
from primer_fast.kernels.device import assume_chip, chip
from primer_fast.proof.inputs import place
from primer_fast.proof.numerics import budget, exact, worst
from primer_fast.reference.case import Case, arguments
from primer_fast.reference.ops import OPS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PATHS = {"pointers": "sm_80", "descriptors": "sm_90"}  # how operands are loaded -> a chip that loads them so
_NATIVE_FLOPS, _NATIVE_ELEMENTS = 2**34, 2**25  # largest production case that NumPy checks in seconds


@dataclass(frozen=True)
class VerifiedTensor:
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
    """Names of all ops."""
    return list(OPS)


def cases(op: str, native: bool) -> list[Case]:
    """The cases that are checked: on a GPU (``native``) also those of production size that NumPy can follow."""
    reference = OPS[op]

    def small_enough(case):
        elements = sum(math.prod(shape) for shape in case.shapes.values())
        return sum(reference.flops(case).values()) <= _NATIVE_FLOPS and elements <= _NATIVE_ELEMENTS

    return [case for case in reference.cases if not case.production or (native and small_enough(case))]


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


def draw(op: str, case: Case, dtype: torch.dtype, where: str) -> dict[str, torch.Tensor]:
    """The inputs of a case, the same for every dtype up to its rounding; those that have a gradient require it.

    They are normal, but for the arrays that ``values`` of the op's reference returns.
    """
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    own = OPS[op].values(case, rng)
    inputs = {}
    for name, shape in case.shapes.items():
        array = own[name] if name in own else rng.normal(size=shape)
        kind = getattr(torch, case.dtypes[name]) if name in case.dtypes else dtype
        inputs[name] = place(array, case.layouts.get(name), kind, where)
        inputs[name].requires_grad_(name in OPS[op].differentiable(case))
    return inputs


def plain(op: str) -> Callable:
    """The op through PyTorch's own operators."""
    return getattr(importlib.import_module(f"primer_fast.functional.{op}"), f"{op}_plain")


def _named(outputs, names) -> dict:
    """An op's result, one tensor or several, by the names that its reference gives them."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return dict(zip(names, outputs, strict=False))


def check(
    op: str, case: Case, dtype: torch.dtype, path: str | None = None, alone: Iterable[str] | None = None
) -> list[VerifiedTensor]:
    """Run one case and judge its output and each gradient; of ``alone``, also as the only one that is asked for.

    An op of several outputs returns a tuple, and its gradient takes one.

    Args:
        alone: names of inputs with a gradient; None: all of them in float32, as which kernels run does not depend on
            the dtype.
    """
    reference, names = OPS[op], OPS[op].outputs
    where = device()
    inputs = draw(op, case, dtype, where)
    leaves = [name for name, t in inputs.items() if t.requires_grad]
    arrays = {name: exact(t) if name not in case.dtypes else t.cpu().numpy() for name, t in inputs.items()}
    arrays = arguments(arrays)
    want = _named(reference.function(**arrays, **case.options), names)
    plain_outputs = _named(plain(op)(**arguments(inputs), **case.options), names)
    rng = np.random.default_rng(0)
    dy = {}
    for name, y in want.items():
        dy[name] = torch.from_numpy(np.asarray(rng.normal(size=y.shape))).to(plain_outputs[name].dtype).to(where)
        if y.ndim == 4 and "channels_last" in case.layouts.values():
            # as the output: the layout that a network sends back
            dy[name] = dy[name].contiguous(memory_format=torch.channels_last)
    upstream = tuple(map(exact, dy.values()))
    upstream = upstream if len(upstream) > 1 else upstream[0]
    if leaves:
        want |= reference.gradient(upstream, **arrays, **case.options)
    magnitude = reference.magnitude(upstream, **arrays, **case.options)

    def run(function, wanted):
        outputs = _named(function(**arguments(inputs), **case.options), names)
        asked = [inputs[name] for name in wanted]
        grads = torch.autograd.grad(list(outputs.values()), asked, list(dy.values())) if asked else ()
        return {**outputs, **dict(zip(wanted, grads, strict=True))}

    with assume_chip(PATHS[path]) if path else contextlib.nullcontext():
        got = run(getattr(functional, op), leaves)
        if alone is None:
            alone = leaves if dtype == torch.float32 else ()
        for name in alone if len(leaves) > 1 else ():
            for other in leaves:
                inputs[other].requires_grad_(other == name)
            got[f"{name} alone"] = run(getattr(functional, op), [name])[name]
    for name in leaves:
        inputs[name].requires_grad_()
    theirs = run(plain(op), leaves)

    rows = []
    for label, tensor in got.items():
        name = label.removesuffix(" alone")
        plain_error = worst(exact(theirs[name]), want[name])
        allowed = budget(tensor.dtype, plain_error, want[name], magnitude[name])
        wrong_form = tensor.shape != theirs[name].shape or tensor.dtype != theirs[name].dtype
        error = float("inf") if wrong_form else worst(exact(tensor), want[name])
        rows.append(VerifiedTensor(op, case.name, str(dtype)[6:], path or "native", label, error, allowed, plain_error))
    return rows


class CaseOnPath(NamedTuple):
    """What one call of ``check`` does."""

    op: str
    case: Case
    dtype: torch.dtype
    path: str | None

    def __str__(self) -> str:
        return " ".join((self.op, self.case.name, str(self.dtype)[6:], self.path or ""))


def cases_to_verify(
    names: Iterable[str] = (), dtypes: Iterable[str] = (), case_names: Iterable[str] = ()
) -> list[CaseOnPath]:
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
    both = not native or chip().has_descriptors
    paths = {op: PATHS if both and OPS[op].descriptors else (None,) for op in names}
    return [
        CaseOnPath(op, case, DTYPES[dtype], path)
        for op in names
        for case in there[op]
        if not case_names or case.name in case_names
        for dtype in dtypes
        for path in paths[op]
    ]
