"""The activations that ops fuse, by name: which there are, and their plain-PyTorch path."""

__all__ = ["ACTIVATIONS", "apply_plain", "check_activation"]

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.backend import tangents

# In place where torch's gradient needs only the output: one buffer less and one pass less over memory.
_PLAIN = {
    "relu": torch.relu_,
    "leaky_relu": torch_F.leaky_relu_,  # slope 0.01
    "gelu": torch_F.gelu,
    "gelu_tanh": lambda z: torch_F.gelu(z, approximate="tanh"),
    "silu": torch_F.silu,
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}
ACTIVATIONS = tuple(_PLAIN)


def check_activation(op: str, activation: str | None) -> str | None:
    """Return ``activation`` if it is None or one of ``ACTIVATIONS``; raise ValueError otherwise."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return activation


def apply_plain(z: Tensor, activation: str | None) -> Tensor:
    """``activation(z)`` through torch's own operators; ``z`` may be overwritten."""
    if activation == "silu" and tangents():
        return z * z.sigmoid()  # the gradient of torch's own has no forward derivative
    return z if activation is None else _PLAIN[activation](z)
