"""Log-probability of a target class under the softmax of a linear layer, and the entropy of that softmax.

    z = (x w^T + b) / T        y = z_t - log sum_v e^z_v        H = -sum_v p_v log p_v        p = softmax(z)
    dz_v = dy ([v = t] - p_v) - dH p_v (log p_v + H)

Source: apple/ml-cross-entropy (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024) for the
logits that are never in memory. logits/ has the kernels, their FLOPs and traffic.

Shapes: x (N, D), w (V, D), b (V,), t (N,) int64 -> y, H (N,) float32. A target outside [0, V) gives NaN, in the row's
gradients too, and reads nothing outside w. Where the target is ``ignore_index``, y, H and the row's gradients are 0.
"""

from collections.abc import Sequence

from torch import Tensor

from .logits import Head
from .logits.gradient import logits_bwd
from .logits.statistics import logits_fwd
from .product import MatmulSettings


def linear_log_prob_fwd(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, temperature: float, entropy: bool, precision: str,
    settings: MatmulSettings | None = None, keep: bool = False, ignore_index: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """-> y (N,), lse (2, N) for the backward, H (N,) or None; float32; logits for it, or None: see logits_fwd."""
    head = Head(temperature, ignore_index=ignore_index)
    return logits_fwd(x, w, bias, target, head, entropy, precision, settings, keep)


def linear_log_prob_bwd(
    dy: Tensor, dH: Tensor | None, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor,
    H: Tensor | None, temperature: float, needed: Sequence[bool], precision: str,
    settings: MatmulSettings | None = None, chunk: tuple[int, int] | None = None, kept: Tensor | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dy, dH (N,) float32, contiguous; lse, H, kept of the forward -> dx, dw, db, each None unless ``needed``."""
    head = Head(temperature, ignore_index=ignore_index)
    return logits_bwd(dy, dH, x, w, bias, target, lse, H, head, needed, precision, settings, chunk, kept)
