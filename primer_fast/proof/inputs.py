"""Tensors in the memory layouts that a case asks for."""

import numpy as np
import torch
from torch import Tensor

LAYOUTS = {  # what Case.layouts may say -> how it lies in memory
    "transposed": "the last two axes are swapped in memory",
    "strided": "every second element of a last axis twice as long",
    "expanded": "one row, repeated along the first axis by stride 0",
    "channels_last": "of four axes, the second is the fastest in memory",
    "heads_last": "of four axes, the middle two are swapped in memory",
    "offset": "contiguous, starting one element past an aligned address",
}


def allocate(shape: tuple[int, ...], layout: str | None, dtype: torch.dtype, device) -> Tensor:
    """An uninitialised tensor of ``shape``; ``layout`` is one of ``LAYOUTS``, or None for a contiguous one.

    Raises:
        ValueError: the layout is unknown, or ``shape`` has too few axes for it.
    """
    shape = tuple(shape)

    def empty(*sizes):
        return torch.empty(sizes, dtype=dtype, device=device)

    four = len(shape) == 4
    fits = {"transposed": len(shape) >= 2, "channels_last": four, "heads_last": four}
    if layout is not None and (layout not in LAYOUTS or not fits.get(layout, len(shape) >= 1)):
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)} and fit the shape; got {layout!r} for {shape}")
    match layout:
        case None:
            return empty(*shape)
        case "transposed":
            return empty(*shape[:-2], shape[-1], shape[-2]).transpose(-2, -1)
        case "strided":
            return empty(*shape[:-1], 2 * shape[-1])[..., ::2]
        case "channels_last":
            return empty(*(shape[i] for i in (0, 2, 3, 1))).permute(0, 3, 1, 2)
        case "heads_last":
            return empty(*(shape[i] for i in (0, 2, 1, 3))).transpose(1, 2)
        case "expanded":
            return empty(1, *shape[1:]).expand(shape)
        case _:  # "offset"
            return empty(int(np.prod(shape)) + 1)[1:].view(shape)


def place(array: np.ndarray, layout: str | None, dtype: torch.dtype, device) -> Tensor:
    """The same with the values of ``array``, rounded to ``dtype``; of an "expanded" one, its first row's."""
    tensor = allocate(array.shape, layout, dtype, device)
    values = torch.from_numpy(np.array(array)).to(dtype)
    rows = slice(1 if layout == "expanded" else None)
    (tensor[rows] if tensor.dim() else tensor).copy_(values[rows] if values.dim() else values)
    return tensor
