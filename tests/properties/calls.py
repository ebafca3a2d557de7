"""Drawn calls of an op, right and wrong ones, and that the op does with each what torch's operators do.

A call is a dict of arguments; its tensors are drawn as descriptions, which hypothesis prints and makes simpler. CI
draws the same calls every time; ``PRIMER_FAST_EXPLORE=100 pytest tests/properties`` draws new ones, a hundred times as
many.
"""

import contextlib
import os
import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from primer_fast import functional as F
from primer_fast.proof.numerics import budget, exact, worst
from primer_fast.reference import case as cases

EXPLORE = int(os.environ.get("PRIMER_FAST_EXPLORE", "0"))
EXAMPLES = {"plain": 150, "kernels": 20}  # the interpreter takes 0.1 ms per operation of a kernel
LUCK = 4.0  # budgets; the worst of three elements is a matter of luck, for PyTorch's error as for ours
REFUSALS = (ValueError, TypeError, NotImplementedError, IndexError)
FLOATS = {
    "plain": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "kernels": (torch.float32, torch.float16, torch.bfloat16),
}
SIZES = {"plain": (1, 2, 3, 5, 0, 8, 17, 33), "kernels": (1, 2, 3, 5, 0, 17)}


@dataclass(frozen=True)
class Drawn:
    """A tensor to be made: how it lies in memory, what it holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: tuple = ("contiguous",)
    seed: int = 0
    values: str = "normal"  # "integers": with ties; "special": with NaN and infinities; (low, high): such integers
    grad: bool = True

    def make(self, device: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        rng = np.random.default_rng(self.seed)
        if isinstance(self.values, tuple):
            array = rng.integers(*self.values, self.shape).astype(float)
        elif self.values == "integers":
            array = rng.integers(-2, 3, self.shape).astype(float)
        else:
            array = rng.normal(size=self.shape)
            if self.values == "special":
                array = np.where(rng.random(self.shape) < 0.2, rng.choice([np.nan, np.inf, -np.inf], self.shape), array)
        t = self._place(torch.from_numpy(np.array(array)).to(self.dtype))
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype)
        t = t.to(device).detach()
        return t.requires_grad_(self.grad and t.is_floating_point())

    def _place(self, t):
        kind, *how = self.layout
        if kind == "permuted":
            order = sorted(range(t.dim()), key=lambda axis: how[0][axis])
            return t.permute(how[0]).contiguous().permute(order)
        if kind == "sliced":
            axis, step, start = how
            size = [n * step + start if i == axis else n for i, n in enumerate(t.shape)]
            room = torch.full(size, 7, dtype=t.dtype)
            view = room.narrow(axis, start, t.shape[axis] * step)[(slice(None),) * axis + (slice(None, None, step),)]
            return view.copy_(t)
        if kind == "expanded":
            return t.narrow(how[0], 0, 1).expand(t.shape)
        if kind == "offset":
            room = torch.full((t.numel() + how[0],), 7, dtype=t.dtype)
            return room[how[0] :].view(t.shape).copy_(t)
        return t


@st.composite
def tensors(draw, shape, dtype=torch.float32, values="normal", grad=True):
    """A tensor of ``shape`` in any layout."""
    shape = tuple(shape)
    kinds = ["contiguous", "offset"]
    if shape:
        kinds += ["permuted", "sliced", "sliced"] + (["expanded"] if min(shape) > 0 else [])
    kind = draw(st.sampled_from(kinds))
    axis = st.integers(0, max(len(shape) - 1, 0))
    how = {
        "contiguous": (),
        "offset": (draw(st.integers(1, 9)),),
        "permuted": (tuple(draw(st.permutations(range(len(shape))))),),
        "sliced": (draw(axis), draw(st.integers(2, 3)), draw(st.integers(0, 2))),
        "expanded": (draw(axis),),
    }[kind]
    grad = draw(st.sampled_from([True, True, True, False])) if grad else False
    return Drawn(shape, dtype, (kind, *how), draw(st.integers(0, 2**16)), values, grad)


def rarely(draw, right, *wrong):
    """``right``, or in one of two dozen draws something that is (mostly) wrong."""
    if draw(st.integers(0, 23)) < 23:
        return right
    return draw(st.sampled_from(wrong))


def near(draw, shape):
    """``shape``, or in one of two dozen draws one that is off by something."""
    shape = tuple(shape)
    off = [(*shape, 1), shape[:-1], (0, *shape[1:])]
    off += [(*shape[:i], n + 1, *shape[i + 1 :]) for i, n in enumerate(shape)]
    return rarely(draw, shape, *off)


def not_a_tensor(draw, drawn):
    return rarely(draw, drawn, None, 3, [1.0], "x", drawn, drawn, drawn, drawn)


def one_not_a_tensor(draw, arguments, *names):
    """The arguments, rarely with something else in the place of one of these tensors."""
    name = draw(st.sampled_from(names))
    return arguments | {name: not_a_tensor(draw, arguments[name])}


@dataclass
class Outcome:
    """What a call gave: its outputs and gradients, or what it raised and where."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    error: Exception | None = None
    where: str = ""


def call(function, arguments: dict[str, Any], device: str, dtype: torch.dtype | None, seed: int) -> Outcome:
    """Forward, and backward from upstream gradients that are the same for every dtype."""
    made = {k: v.make(device, dtype) if isinstance(v, Drawn) else v for k, v in arguments.items()}
    try:
        outputs = function(**cases.arguments(made))
    except Exception as error:
        return Outcome(error=error, where="forward")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    moving = [y for y in outputs if y.requires_grad]
    leaves = {k: t for k, t in made.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    if moving and leaves:
        upstream = [Drawn(tuple(y.shape), torch.float16, seed=seed + i).make(device) for i, y in enumerate(moving)]
        upstream = [dy.detach().to(y.dtype) for dy, y in zip(upstream, moving, strict=True)]
        try:
            grads = torch.autograd.grad(moving, list(leaves.values()), upstream, allow_unused=True)
        except Exception as error:
            return Outcome(error=error, where="backward")
        found |= {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return Outcome(found)


def agree(op: str, arguments: dict[str, Any], reference, path: str, *, terms: int = 100, beyond=(), refused=()) -> None:
    """The op does what ``reference``, made of torch's operators, does; or both refuse, the op by its name.

    Args:
        terms: how many products of normal numbers an element is the sum of, at most.
        beyond: what torch raises for calls that the op is documented to take.
        refused: what the op is documented to refuse though torch takes it: words of its message.
    """
    device = "cuda" if path == "kernels" and torch.cuda.is_available() else "cpu"
    seed = 1 + sum(v.seed for v in arguments.values() if isinstance(v, Drawn))
    got = call(getattr(F, op), arguments, device, None, seed)
    want = call(reference, arguments, device, None, seed)
    if got.error is not None:
        assert isinstance(got.error, REFUSALS), f"{got.where}: {type(got.error).__name__}: {got.error}; {want.error!r}"
        assert str(got.error).startswith(f"{op}: "), f"{got.where}: {got.error!r}"
        known = any(word in str(got.error) for word in refused)
        assert known or want.error is not None, f"torch takes what is refused: {got.error}"
        return
    if want.error is not None:
        assert any(word in str(want.error) for word in beyond), f"torch refuses what is taken: {want.error}"
        return
    truth = call(reference, arguments, device, torch.float64, seed)
    assert truth.error is None, truth.error
    assert got.tensors.keys() == want.tensors.keys(), f"{got.tensors.keys()}, {want.tensors.keys()}"
    for name, t in got.tensors.items():
        plain, exactly = want.tensors[name], truth.tensors[name]
        assert t.shape == plain.shape and t.dtype == plain.dtype, (
            f"{name}: {t.shape} {t.dtype}, {plain.shape} {plain.dtype}"
        )
        if not t.is_floating_point():
            assert torch.equal(t, plain), name
            continue
        true = exact(exactly)
        allowed = LUCK * budget(t.dtype, worst(exact(plain), true), true, 9.0 * terms)
        assert worst(exact(t), true) <= allowed, f"{name}: error {worst(exact(t), true)}, allowed {allowed}"


def explore(op: str, path: str, calls, reference, times: int = 1, **how) -> None:
    """Draw calls, ``times`` as many as for most ops, and check that each ``agree``s."""

    @settings(
        max_examples=EXAMPLES[path] * times * max(1, EXPLORE), derandomize=EXPLORE == 0, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
        phases=(Phase.generate, Phase.shrink) if EXPLORE or path == "plain" else (Phase.generate,),
    )  # fmt: skip
    @given(calls)
    def check(arguments):
        more = {key: value(arguments) if callable(value) else value for key, value in how.items()}
        agree(op, arguments, reference, path, **more)

    plain = mock.patch("primer_fast.backend.stand_in", None) if path == "plain" else contextlib.nullcontext()
    with plain, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            check()
        finally:
            torch.set_num_threads(threads)


def explores(op: str, calls, reference, *, of_kernels: int = 1, **how):
    """A test that explores ``calls(path)`` on both paths, ``of_kernels`` times as many on the kernels as usual."""

    @pytest.mark.parametrize("path", EXAMPLES)
    def test(path):
        explore(op, path, calls(path), reference, of_kernels if path == "kernels" else 1, **how)

    return test
