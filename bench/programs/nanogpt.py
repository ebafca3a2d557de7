"""nanoGPT's model in plain PyTorch, written anew from its published architecture, to compare with.

    x = E[tokens] + P,  then per layer  x = x + Attention(LN(x)),  x = x + MLP(LN(x)),  logits = LN(x) E^T

What makes it nanoGPT's: pre-LN with an optional bias, queries, keys and values from one product, torch's
scaled_dot_product_attention with is_causal, exact GELU over four times the width, the output tied to the embedding, all
logits in memory before the cross entropy. Its training step: AdamW with decay for matrices alone, fused on CUDA and not
on a CPU, gradient clipped to norm 1. Source: github.com/karpathy/nanoGPT, model.py and train.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from primer_fast.models.transformer import Transformer, TransformerConfig


class Norm(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalAttention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, W) -> (B, T, W)
        B, T, W = x.shape
        q, k, v = (part.view(B, T, self.heads, W // self.heads).transpose(1, 2) for part in self.qkv(x).split(W, 2))
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=rate, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, W)
        return F.dropout(self.out(y), self.dropout, self.training)


class Layer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = Norm(config.width, config.bias)
        self.attention = CausalAttention(config)
        self.mlp_norm = Norm(config.width, config.bias)
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + F.dropout(self.down(self.gelu(self.up(self.mlp_norm(x)))), self.dropout, self.training)


class NanoGPT(nn.Module):
    """Tokens (B, T), targets (B, T) -> logits (B, T, V) and the mean cross entropy ().

    Raises:
        ValueError: a configuration that nanoGPT does not have.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        published = (config.norm, config.positions, config.activation, config.tied, config.causal, config.mlp_width)
        if published != ("pre", "learned", "gelu", True, True, None) or config.key_heads != config.heads:
            raise ValueError(f"NanoGPT: config must be pre-LN, learned, gelu, tied, causal, 4 x width; got {config}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = Norm(config.width, config.bias)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(tokens)
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)

    def logits(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        where = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.positions(where)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def twin(model: Transformer) -> NanoGPT:
    """nanoGPT's model with copies of the weights of ours, on the same device."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weights["positions.weight"] = weights.pop("positions")
    weights["head.weight"] = weights["embedding.weight"]
    with next(model.parameters()).device:
        made = NanoGPT(model.config)
    made.load_state_dict(weights)
    return made


def optimizer(model: NanoGPT, *, lr: float, weight_decay: float, betas: tuple[float, float], fused: bool):
    """AdamW over its two groups: what has two axes or more decays."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, **({"fused": True} if fused else {}))
