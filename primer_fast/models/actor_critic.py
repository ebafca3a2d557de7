"""Actor and critic: a language model as the policy, and a value for every token of what it writes.

    pi(a_t | s_t) = softmax(logits / temperature)        V(s_t) = w . h_t + b
The critic reads h_t off a trunk of its own, or off the policy's, which its loss then trains too.
Source: Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593.
"""

__all__ = ["ActorCritic"]

import copy

import torch
from torch import Tensor

from primer_fast import nn
from primer_fast.models.reward import RewardModel, freeze_logits
from primer_fast.models.transformer import Transformer


class ActorCritic(nn.Module):
    """The trained networks of PPO, and the coefficient of its KL penalty, which a controller may move.

    Args:
        policy: the actor; trained in place.
        critic: a model whose trunk and head the critic starts from, as copies; None: a trunk copied from the policy's
            and a head that starts at 0; "shared": a head on the policy's own trunk, which starts at 0.
        kl_coefficient: beta of the penalty.
    """

    trunk: Transformer | None  # of the critic; None: the policy's
    kl_coefficient: Tensor  # () float64

    def __init__(self, policy: Transformer, critic: RewardModel | str | None = None, kl_coefficient: float = 0.05):
        super().__init__()
        if isinstance(critic, str) and critic != "shared":
            raise ValueError(f"ActorCritic: critic must be a RewardModel, 'shared' or None; got {critic!r}")
        self.policy, self.trunk = policy, None
        if isinstance(critic, RewardModel):
            self.trunk, self.head = copy.deepcopy(critic.trunk), copy.deepcopy(critic.head)
        else:
            if critic is None:
                self.trunk = freeze_logits(copy.deepcopy(policy))
            self.head = nn.Linear(policy.config.width, 1)
            torch.nn.init.zeros_(self.head.weight)
            torch.nn.init.zeros_(self.head.bias)
        self.register_buffer("kl_coefficient", torch.tensor(kl_coefficient, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # (N, T) -> (N, T, W) of the policy, (N, T) values
        """The policy's hidden states, which its log-probabilities are made of, and the critic's values in float32."""
        hidden = self.policy.hidden(tokens)
        seen = hidden if self.trunk is None else self.trunk.hidden(tokens)
        return hidden, self.head(seen).squeeze(-1).float()
