"""Reward model: a transformer with a scalar head.

    r(x, y) = w . h_T + b        h_T: the last norm's output at the last real token
Sources: Stiennon et al. 2020, arXiv:2009.01325 (the head and its start); Ouyang et al. 2022, arXiv:2203.02155.
Legend: N rows, T tokens, W width.
"""

__all__ = ["RewardModel", "freeze_logits"]

import copy

import torch
from torch import Tensor

from primer_fast import nn
from primer_fast.models.transformer import Transformer, TransformerConfig


def freeze_logits(trunk: Transformer) -> Transformer:
    """Freeze the weights that only the logits of ``trunk`` need, and return it: only its hidden states are read."""
    for part in (trunk.unembedding, trunk.head, trunk.head_norm, trunk.head_bias):
        if part is not None:
            part.requires_grad_(False)
    return trunk


class RewardModel(nn.Module):
    """Tokens (N, T) and their lengths (N,) -> rewards (N,), less ``mean`` and over ``std``, which start as 0 and 1.

    The head starts from a normal distribution of deviation 1 / sqrt(W + 1), the bias from 0.

    Raises:
        ValueError: the transformer is an encoder, whose last token is no summary of those before it.
    """

    mean: Tensor  # ()
    std: Tensor  # ()

    def __init__(self, config: TransformerConfig, trunk: Transformer | None = None):
        super().__init__()
        if not config.causal:
            raise ValueError("RewardModel: the transformer must be causal; got causal=False")
        self.config = config
        self.trunk = freeze_logits(Transformer(config) if trunk is None else trunk)
        self.head = nn.Linear(config.width, 1)
        torch.nn.init.normal_(self.head.weight, std=(config.width + 1) ** -0.5)
        torch.nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @classmethod
    def from_language_model(cls, model: Transformer) -> "RewardModel":
        """A reward model that starts from a copy of ``model``'s weights."""
        return cls(model.config, copy.deepcopy(model))

    def values(self, tokens: Tensor) -> Tensor:  # (N, T) -> (N, T) float32
        """The head at every token: what it makes of the text up to there."""
        return self.head(self.trunk.hidden(tokens)).squeeze(-1).float()

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # (N, T), (N,) -> (N,) float32
        last = (lengths - 1).to(tokens.device)
        hidden = self.trunk.hidden(tokens)
        reward = self.head(hidden[torch.arange(tokens.shape[0], device=tokens.device), last]).squeeze(-1)
        return (reward.float() - self.mean) / self.std

    @torch.no_grad()
    def normalise(self, rewards: Tensor) -> None:
        """From now on rewards like these (N,), which this model gave, have mean 0 and variance 1.

        Raises:
            ValueError: the rewards are all equal, or not finite.
        """
        raw = rewards * self.std + self.mean
        std = raw.std(correction=0)
        if not std > 0 or not std.isfinite():
            raise ValueError(f"RewardModel: rewards to normalise by must be finite and differ; got deviation {std}")
        self.mean.copy_(raw.mean())
        self.std.copy_(std)
