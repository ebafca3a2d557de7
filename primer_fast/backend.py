"""Which tensors the Triton kernels run on; every other tensor takes plain PyTorch."""

__all__ = [
    "DTYPES",
    "apply_of",
    "autocast_dtype",
    "autocast_to",
    "interpreting",
    "needs_operator",
    "prepares",
    "runs_triton",
    "stand_in",
    "sums_narrowly",
    "wants_gradient",
]

from typing import Any

import torch
import triton
from torch import Tensor

_EAGER = frozenset({Tensor, torch.nn.Parameter, type(None)})
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

interpreting = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when Triton was imported: kernels run on CPU tensors
if interpreting:
    from primer_fast.interpreter import mend

    mend()  # its bfloat16 is wrong as it comes
stand_in = "cpu" if interpreting else None  # whose tensors count as a GPU's: "meta" where kernels are only compiled


def runs_triton(x: Tensor) -> bool:
    """True where the kernels compute ``x``: float32, float16, bfloat16 on a GPU, or a CPU under TRITON_INTERPRET=1."""
    if x.dtype not in DTYPES:
        return False
    here = x.is_cuda or (stand_in is not None and x.device.type == stand_in)
    return here and not torch._C._are_functorch_transforms_active()  # vmap, grad and jvp know PyTorch's operators


def prepares(x: Any) -> bool:
    """True where the kernels compute ``x`` and nothing looks on (see ``needs_operator``): there may be a plan."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return not traced and type(x) in _EAGER and x is not None and runs_triton(x)


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


def apply_of(function: type) -> Any:
    """``function.apply`` of an autograd.Function, without the look at functorch's transforms that it begins with."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def needs_operator(*tensors: Tensor | None) -> bool:
    """True where a call must be one operator of primer_fast.library: torch.compile or torch.export traces it, a
    dispatch mode looks on, or a tensor is of a subclass, a fake one for example. Costs eager calls 0.3 us."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for t in tensors:  # noqa: SIM110 (a generator takes three times as long)
        if type(t) not in _EAGER:
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


def autocast_to(dtype: torch.dtype, *tensors: Any) -> tuple[Any, ...]:
    """As torch.autocast casts: float64, integers, and what is no tensor stay as they are."""
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.dtype is not dtype and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )
