"""Cross entropy of the logits of a linear layer, with label smoothing s and ignored rows.

    z = x w^T + b        loss = -(1 - s) log p_t - s / V sum_v log p_v        log p_v = z_v - log sum_u e^z_u
    dz_v = dloss (p_v - (1 - s) [v = t] - s / V)        both 0 where t is the ignored index

Source: torch.nn.functional.linear_cross_entropy; for the smoothing, Szegedy et al., "Rethinking the Inception
Architecture" (2016). logits/ has the kernels, their FLOPs and traffic.

Shapes: x (N, D), w (V, D), b (V,), t (N,) int64 -> loss (N,) float32. A target that is neither ignored nor in [0, V)
gives NaN, in the row's gradients too, and reads nothing outside w.
"""

from collections.abc import Sequence

from torch import Tensor

from .logits import Head
from .logits.gradient import logits_bwd
from .logits.row_losses import spread_gradient
from .logits.statistics import logits_fwd
from .product import MatmulSettings


def linear_cross_entropy_fwd(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int | None, smoothing: float,
    precision: str, settings: MatmulSettings | None = None, keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """-> losses (N,), lse (2, N) for the backward; float32; logits for it, or None: see logits_fwd."""
    head = Head(1.0, smoothing, ignore_index, -1.0)
    losses, lse, _, kept = logits_fwd(x, w, bias, target, head, False, precision, settings, keep)
    return losses, lse, kept


def linear_cross_entropy_bwd(
    dloss: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, smoothing: float,
    needed: Sequence[bool], precision: str, settings: MatmulSettings | None = None,
    chunk: tuple[int, int] | None = None, kept: Tensor | None = None, ignore_index: int | None = None,
    number: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dloss (N,), or () of the sum of all losses or, with ``number``, of a mean (see logits/row_losses.py); lse, kept
    of the forward -> dx, dw, db if needed. Rows whose target is ``ignore_index`` have no gradient.
    """
    head, score_grad = Head(1.0, smoothing), spread_gradient(dloss, number, target, ignore_index)
    return logits_bwd(score_grad, None, x, w, bias, target, lse, None, head, needed, precision, settings, chunk, kept)
