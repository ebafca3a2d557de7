"""What PPO computes of a rollout: penalty, rewards, advantages and losses, each a function of tensors alone.

    r_t = -beta kl_t, and the score of the whole completion is added at its last token
    A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = r_t + gamma V_{t+1} - V_t,   R_t = A_t + V_t
    rho_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    policy loss = mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps))          A whitened
    value loss  = 0.5 mean max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)
Sources: Schulman et al. 2017, arXiv:1707.06347; GAE, 2015, arXiv:1506.02438; the KL penalty and its controller, Ziegler
et al. 2019, arXiv:1909.08593; estimators k1 to k3, J. Schulman, "Approximating KL divergence", 2020.
Legend: N completions, T tokens; a mask (N, T) is true at completion tokens, and only those count anywhere.
"""

__all__ = [
    "adapted_coefficient",
    "advantages_and_returns",
    "kl_estimate",
    "masked_mean",
    "policy_loss",
    "shaped_rewards",
    "value_loss",
    "whiten",
]

import torch
from torch import Tensor

from primer_fast.train.settings import KL_ESTIMATORS


def kl_estimate(log_prob: Tensor, reference: Tensor, kind: str = "k1") -> Tensor:  # (N, T), (N, T) -> (N, T)
    """KL(pi || pi_ref) from samples of pi, per token: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d; d = log pi / pi_ref.

    k1 and k3 are unbiased; k2 and k3 are never negative.

    Raises:
        ValueError: ``kind`` is none of these.
    """
    d = log_prob - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d * d / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"ppo: kl must be one of {', '.join(KL_ESTIMATORS)}; got {kind!r}")


def shaped_rewards(kl: Tensor, score: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """kl, mask (N, T), score (N,) -> (N, T): -coefficient * kl, and the score on each row's last completion token."""
    rewards = torch.where(mask, -coefficient * kl, 0.0)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, score[:, None].to(rewards.dtype))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:  # (N, T), (N, T), (N, T) -> (N, T), (N, T)
    """Generalised advantage estimation over each row's completion tokens, which are adjacent; 0 elsewhere.

    Behind the last token the value is 0: the completion has ended.
    """
    advantages = torch.zeros_like(rewards)
    ahead = torch.zeros_like(rewards[:, 0])  # A_{t+1}
    next_value = torch.zeros_like(ahead)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        ahead = torch.where(here, delta + gamma * lam * ahead, 0.0)
        next_value = torch.where(here, values[:, t], 0.0)
        advantages[:, t] = ahead
    return advantages, torch.where(mask, advantages + values, 0.0)


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:  # (N, T), (N, T), () -> ()
    """Mean over the completion tokens of all rows together. count: their number, where these are part of a batch."""
    return torch.where(mask, x, 0.0).sum() / (mask.sum() if count is None else count)


def whiten(x: Tensor, mask: Tensor) -> Tensor:  # (N, T), (N, T) -> (N, T)
    """Mean 0 and (biased) variance 1 over the completion tokens; 0 elsewhere."""
    centred = torch.where(mask, x - masked_mean(x, mask), 0.0)
    return centred * torch.rsqrt(masked_mean(centred * centred, mask) + 1e-8)


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, mask: Tensor, clip: float, count: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:  # each (N, T) -> (), measurements ()
    """The clipped surrogate; also approxkl = 0.5 mean (log rho)^2, clipfrac, the mean ratio. count: masked_mean's."""
    log_ratio = torch.where(mask, log_prob - old_log_prob, 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask, count)
    with torch.no_grad():
        measured = {
            "approxkl": 0.5 * masked_mean(log_ratio * log_ratio, mask, count),
            "clipfrac": masked_mean((clipped > unclipped).to(loss.dtype), mask, count),
            "ratio": masked_mean(ratio, mask, count),
        }
    return loss, measured


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # each (N, T) -> (), () share of tokens where the clipped error is the larger
    """Half the squared error, not below that of the value clipped to within ``clip`` of the old one."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask, count)
    return loss, masked_mean((clipped > unclipped).to(loss.dtype), mask, count).detach()


def adapted_coefficient(coefficient: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The KL coefficient after ``samples`` episodes of mean ``kl``: it rises where kl exceeds its target.

    coefficient (1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon)
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return coefficient * (1 + error * samples / horizon)
