"""Reward modelling: a score for completions, learned from which of two people preferred.

    loss = -log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2
The second term centres the rewards at 0; the first sees only differences.
Sources: Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin, Touvron et al. 2023,
arXiv:2307.09288, eq. 2; centring, Eisenstein et al. 2023, arXiv:2312.09244.
Legend: B pairs; w won (chosen), l lost (rejected).
"""

import math

import torch.nn.functional as torch_F
from torch import Tensor


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centring: float = 0.0) -> Tensor:
    """Rewards of both, (B,) and (B,) -> loss of each pair (B,)."""
    loss = -torch_F.logsigmoid(chosen - rejected - margin)
    return loss if centring == 0 else loss + centring * (chosen + rejected) ** 2


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a share, 95 % unless z says otherwise (E.B. Wilson 1927).

    Unlike share +- z s it stays within 0 to 1 and holds for few samples.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"wilson_interval: must have 0 <= right <= total, total positive; got {right} of {total}")
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)
