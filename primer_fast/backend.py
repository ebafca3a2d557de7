"""Which tensors the Triton kernels run on; every other tensor takes plain PyTorch."""

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

interpreting = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when Triton was imported: kernels run on CPU tensors
if interpreting:
    from primer_fast.interpreter import mend

    mend()  # its bfloat16 is wrong as it comes
compiling_offline = False  # proof/offline.py: kernels are compiled, not run, for tensors without memory


def runs_triton(x: Tensor) -> bool:
    """True where the kernels compute ``x``: float32, float16, bfloat16 on a GPU, or a CPU under TRITON_INTERPRET=1."""
    if x.dtype not in DTYPES:
        return False
    return x.is_cuda or (x.is_meta and compiling_offline) or (x.device.type == "cpu" and interpreting)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that a matrix product of ``x`` runs in under torch.autocast; None where autocast leaves it alone."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device) or x.dtype is torch.float64 or not x.is_floating_point():
        return None
    return torch.get_autocast_dtype(device)


def autocast_to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As torch.autocast casts: float64, integers, and what is no tensor stay as they are."""
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.dtype is not dtype and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )
