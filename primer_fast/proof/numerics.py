"""How a kernel's result is judged: by PyTorch's own error on the same inputs, not by a tolerance picked by hand."""

import numpy as np
import torch

SLACK = 2.0  # how many times PyTorch's own error is allowed


def exact(t):
    """Tensor -> float64 array of the same values; float16 and bfloat16 convert exactly."""
    return t.detach().cpu().double().numpy()


def worst(got, want):
    """Largest absolute difference of two arrays; equal infinities and NaN in both places count as no difference."""
    if got.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    error = np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))
    return float(error.max())


def budget(dtype, plain_error, want, magnitude=0.0):
    """Allowed absolute error of a result.

    dtype: of the result. plain_error: PyTorch's worst error at that dtype. want: the float64 truth.
    magnitude: largest sum of absolute terms behind an element; where terms cancel, rounding is relative to it.
    """
    finite = want[np.isfinite(want)]
    rounding = torch.finfo(dtype).eps * float(np.abs(finite).max(initial=0.0))
    return SLACK * plain_error + rounding + 2 * torch.finfo(torch.float32).eps * magnitude
