"""Cross entropy of a linear layer's logits, without the logits in memory."""

import torch.nn.functional as torch_F
from torch import Tensor


def linear_cross_entropy(
    input: Tensor,  # (N, D) or (D,); leading axes beyond torch's are taken too
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # input's leading axes, int64
    *,
    linear_bias: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:  # (), or as target for reduction "none"
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``."""
    return linear_cross_entropy_plain(
        input, linear_weight, target,
        linear_bias=linear_bias, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip


def linear_cross_entropy_plain(
    input, linear_weight, target, *, linear_bias=None, reduction="mean", ignore_index=-100, label_smoothing=0.0
):
    """The same through torch's own operators, logits in memory."""
    logits = torch_F.linear(input, linear_weight, linear_bias)
    loss = torch_F.cross_entropy(
        logits.flatten(0, -2) if logits.dim() > 1 else logits, target.flatten() if target.dim() else target,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss
