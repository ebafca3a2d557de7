"""Direct preference optimisation: a policy learns from preference pairs alone, held to a frozen reference.

    h = (log pi(y_w | x) - log pi(y_l | x)) - (log pi_ref(y_w | x) - log pi_ref(y_l | x))
    sigmoid   -log sigmoid(beta h)
    cdpo      -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)        preferences are wrong with probability e
    ipo       (h - 1 / (2 beta))^2
A log-probability of a completion is the sum over its tokens, its end included; for ipo the mean.
Sources: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; E. Mitchell, "A note on DPO with noisy preferences", 2023; Azar
et al. 2023, arXiv:2310.12036, eq. 17. Erratum: the primer once prints the loss without its minus sign.
Legend: B pairs, T tokens; w won (chosen), l lost (rejected).
"""

import torch.nn.functional as torch_F
from torch import Tensor

LOSSES = ("sigmoid", "cdpo", "ipo")


def log_ratio_margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Log-probabilities of completions, (B,) -> h (B,): how much more the policy prefers y_w."""
    return (chosen - rejected) - (ref_chosen - ref_rejected)


def preference_loss(h: Tensor, beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """h (B,) -> loss of each pair (B,).

    Args:
        beta: how hard the policy is held to the reference.
        label_smoothing: e of cdpo.

    Raises:
        ValueError: ``kind`` is not sigmoid, cdpo or ipo.
    """
    if kind == "sigmoid":
        return -torch_F.logsigmoid(beta * h)
    if kind == "cdpo":
        wrong = label_smoothing
        return -(1 - wrong) * torch_F.logsigmoid(beta * h) - wrong * torch_F.logsigmoid(-beta * h)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    raise ValueError(f"dpo: loss must be one of {', '.join(LOSSES)}; got {kind!r}")
