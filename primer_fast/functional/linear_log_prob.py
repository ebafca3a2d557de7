"""log p(target) of a linear layer's softmax, without the logits in memory."""

import torch
import torch.nn.functional as torch_F
from torch import Tensor


def linear_log_prob(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...) int64
    *,
    linear_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (...) float32, with return_entropy twice
    """``log softmax((input @ linear_weight.T + linear_bias) / temperature)[target]``, and the entropy in nats."""
    return linear_log_prob_plain(
        input, linear_weight, target, linear_bias=linear_bias, temperature=temperature, return_entropy=return_entropy
    )


def linear_log_prob_plain(input, linear_weight, target, *, linear_bias=None, temperature=1.0, return_entropy=False):
    """The same through torch's own operators, logits in memory."""
    logits = torch_F.linear(input, linear_weight, linear_bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    log_probs = logits.log_softmax(dim=-1)
    chosen = log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return (chosen, -(log_probs.exp() * log_probs).sum(dim=-1)) if return_entropy else chosen
