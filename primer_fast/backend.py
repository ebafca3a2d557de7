"""Which tensors the Triton kernels run on; every other tensor takes plain PyTorch."""

__all__ = [
    "DTYPES",
    "autocast",
    "autocast_dtype",
    "has_kernels",
    "interpreting",
    "jit_traces",
    "prepares",
    "runs_triton",
    "sharded",
    "stand_in",
    "sums_narrowly",
    "tangents",
    "transformed",
    "wants_gradient",
]

from typing import Any

import torch
import triton
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad

EAGER = frozenset({Tensor, torch.nn.Parameter, type(None)})  # what no subclass looks on
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

interpreting = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when Triton was imported: kernels run on CPU tensors
if interpreting:
    from primer_fast.interpreter import mend

    mend()  # its bfloat16 is wrong as it comes
stand_in = "cpu" if interpreting else None  # whose tensors count as a GPU's: "meta" where kernels are only compiled


def has_kernels(x: Tensor) -> bool:
    """True for float32, float16 and bfloat16 on a GPU, or on a CPU under TRITON_INTERPRET=1."""
    return x.dtype in DTYPES and (x.is_cuda or (stand_in is not None and x.device.type == stand_in))


def runs_triton(x: Tensor) -> bool:
    """True where the kernels compute ``x``: they have it, and nothing needs PyTorch's operators."""
    return has_kernels(x) and not (transformed() or jit_traces())


def transformed() -> bool:
    """Whether a derivative or a batch is carried along that PyTorch's operators alone know how to carry on: in a
    transform of torch.func, or where a level of torch.autograd.forward_ad is open.
    """
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def jit_traces() -> bool:
    """Whether torch.jit.trace records what runs: its graph holds PyTorch's operators."""
    return _get_tracing_state() is not None


def tangents() -> bool:
    """Whether tensors may have tangents: forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def prepares(x: Any) -> bool:
    """True where the kernels compute ``x`` and nothing looks on (see functional/operator.py): there may be a plan."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() or type(x) not in EAGER or x is None:
        return False
    # As transformed(). Under torch.jit.trace sizes are tensors, so that no call is known there.
    return has_kernels(x) and forward_ad._current_level < 0 and not _are_functorch_transforms_active()


def wants_gradient(*tensors: Any) -> bool:
    """Whether autograd will want a gradient at one of the tensors; what is none has no gradient."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and getattr(t, "requires_grad", False):
                return True
    return False


def sums_narrowly(x: Tensor | None) -> bool:
    """Whether PyTorch's CPU operators might add up a gradient of ``x`` in 16 bits: where they do, 256 ones and one more
    are 256. Callers then compute in float32, and the gradient is rounded once."""
    return x is not None and x.dtype in (torch.float16, torch.bfloat16) and wants_gradient(x)


def sharded(*tensors: Any) -> bool:
    """Whether one of the tensors is a DTensor; known by name, as most processes never import them."""
    for t in tensors:  # noqa: SIM110 (a generator takes three times as long)
        if type(t) not in EAGER and type(t).__name__ == "DTensor":
            return True
    return False


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that a matrix product of ``x`` runs in under torch.autocast; None where autocast leaves it alone."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    if x.dtype is torch.float64 or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """As torch.autocast casts the arguments of a matrix product; the first says on which device. What is no tensor, and
    tensors of float64 or integers, stay as they are.
    """
    if not torch._C._is_any_autocast_enabled() or not isinstance(tensors[0], Tensor):
        return tensors
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.dtype is not dtype and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )
