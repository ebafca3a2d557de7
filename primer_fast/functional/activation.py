"""The activations that ops fuse, by name, and their plain-PyTorch path."""

__all__ = ["ACTIVATIONS", "apply_plain", "check_activation"]

from torch import Tensor

from primer_fast.backend import tangents
from primer_fast.kernels.activation import ACTIVATIONS, activate_plain


def check_activation(op: str, activation: str | None) -> str | None:
    """Return ``activation`` if it is None or one of ``ACTIVATIONS``; raise ValueError otherwise."""
    if activation is not None and activation not in tuple(ACTIVATIONS):  # a tuple: it need not be hashable
        raise ValueError(f"{op}: activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return activation


def apply_plain(z: Tensor, activation: str | None) -> Tensor:
    """``activation(z)`` through torch's own operators; ``z`` may be overwritten."""
    if activation == "silu" and tangents():
        return z * z.sigmoid()  # the gradient of torch's own has no forward derivative
    return activate_plain(z, activation)
