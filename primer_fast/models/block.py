"""The block of a transformer and its settings: attention of a sequence to itself, then a perceptron on every position.

    Q, K, V = X W_Q, X W_K, X W_V        O = concat_h(softmax(Q_h K_h^T / sqrt(d)) V_h) W_O

    post-LN   X = LayerNorm(O + X)      X = LayerNorm(MLP(X) + X)
    pre-LN    X = X + O(LayerNorm(X))   X = X + MLP(LayerNorm(X))

Sources: Vaswani et al. 2017 (arXiv:1706.03762), post-LN and sinusoidal positions; Radford et al. 2019 (GPT-2), pre-LN.
Legend: B batch, T tokens, W width, H heads, Hk key heads, d = W / H.
"""

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "POSITIONS",
    "Attention",
    "Block",
    "TransformerConfig",
    "post_norm",
    "pre_norm",
    "sinusoids",
]

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import functional as F
from primer_fast import nn
from primer_fast.models.kv_cache import KVCache
from primer_fast.nn.layers import in_turn

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
NORMS = ("post", "pre")
POSITIONS = ("sinusoidal", "learned")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and variants of a transformer; the defaults are the primer's block at GPT-2's size."""

    vocab: int
    context: int = 1024  # longest sequence: rows of the position table
    width: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None  # heads of keys and values, each shared by heads / kv_heads queries; None: heads
    mlp_width: int | None = None  # None: 4 * width
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # of the perceptron
    norm: Literal["post", "pre"] = (
        "post"  # "post": LayerNorm(O + X); "pre": X + O(LayerNorm(X)), and a norm before the logits
    )
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    causal: bool = True  # False: an encoder, every token sees every token
    dropout: float = 0.0  # of the embedding, the attention's weights and the residual branches
    bias: bool = True  # of the linear layers and the norms
    tied: bool = True  # logits through the transposed embedding; False: through a matrix of their own
    segments: int = 0  # rows of BERT's token-type embedding
    norm_eps: float = 1e-5
    embedding_norm: bool = False  # a norm after the embedding, as in BERT
    head_transform: bool = False  # linear, activation, norm before the logits, as in BERT's masked-language head
    head_bias: bool = False  # a bias of the logits

    def __post_init__(self):
        for name in ("vocab", "context", "width", "layers", "heads", "kv_heads", "mlp_width"):
            value = getattr(self, name)
            if value is None and name in ("kv_heads", "mlp_width"):
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"Transformer: {name} must be a positive integer; got {value!r}")
        if type(self.segments) is not int or self.segments < 0:
            raise ValueError(f"Transformer: segments must be an integer of 0 or more; got {self.segments!r}")
        for name in ("causal", "bias", "tied", "embedding_norm", "head_transform", "head_bias"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"Transformer: {name} must be True or False; got {getattr(self, name)!r}")
        for name in ("dropout", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
                raise ValueError(f"Transformer: {name} must be a number of 0 or more, and finite; got {value!r}")
        for name, choices in (("activation", ACTIVATIONS), ("norm", NORMS), ("positions", POSITIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Transformer: {name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if self.width % self.heads:
            raise ValueError(f"Transformer: heads must divide width; got {self.heads} and {self.width}")
        if self.heads % self.key_heads:
            raise ValueError(f"Transformer: kv_heads must divide heads; got {self.kv_heads} and {self.heads}")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"Transformer: width must be even for sinusoidal positions; got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Transformer: dropout must be in [0, 1); got {self.dropout!r}")

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def sinusoids(length: int, width: int) -> Tensor:  # -> (length, width)
    """``P[t, 2i] = sin(t / 10000^(2i / width))`` and ``P[t, 2i+1] = cos`` of the same: Vaswani et al. 2017, 3.5."""
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate  # (length, width / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).view(length, width).to(torch.get_default_dtype())


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself; queries, keys and values come from one product."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.key_heads, self.head_width = config.heads, config.key_heads, config.head_width
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.key_heads) * self.head_width, config.bias)
        self.out = nn.Linear(config.width, config.width, config.bias)

    def forward(
        self, x: Tensor, visible: dict[str, Any], cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:  # (B, T, W) -> (B, T, W)
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_width))  # (B, T, H + 2 Hk, d)
        if cache is not None:
            key, value = cache.write(layer, qkv[:, :, self.heads :])
            query = qkv[:, :, : self.heads]
        else:
            query, key, value = qkv.split((self.heads, self.key_heads, self.key_heads), dim=2)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # (B, H, T, d)
        dropout = self.dropout if self.training else 0.0
        gqa = self.key_heads != self.heads
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, enable_gqa=gqa, **visible)
        return self.out(y.transpose(1, 2).flatten(2))

    def scores(self, x: Tensor) -> Tensor:  # (B, T, W) -> (B, H, T, T)
        """``Q K^T / sqrt(d)`` before any mask."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, H + 2 Hk, T, d)
        query, key, _ = qkv.split((self.heads, self.key_heads, self.key_heads), dim=1)
        key = key.repeat_interleave(self.heads // self.key_heads, dim=1)
        return query @ key.transpose(-2, -1) / math.sqrt(self.head_width)


class Block(nn.Module):
    """Attention, then the perceptron; two norms, which post_norm and pre_norm place."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden = 4 * config.width if config.mlp_width is None else config.mlp_width
        self.dropout = config.dropout
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps, bias=config.bias)
        self.up = nn.Linear(config.width, hidden, config.bias, activation=config.activation)
        self.down = nn.Linear(hidden, config.width, config.bias)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps, bias=config.bias)

    def attend(self, x: Tensor, visible: dict[str, Any], cache: KVCache | None, layer: int) -> Tensor:
        return self.drop(self.attention(x, visible, cache, layer))

    def mlp(self, x: Tensor) -> Tensor:
        return self.drop(in_turn((self.up, self.down), x))

    def drop(self, x: Tensor) -> Tensor:
        return torch_F.dropout(x, self.dropout) if self.dropout and self.training else x

    def reset_xavier(self) -> None:
        """Glorot & Bengio 2010, uniform, for each matrix: W_Q, W_K and W_V are three."""
        attention = self.attention
        rows = [n * attention.head_width for n in (attention.heads, attention.key_heads, attention.key_heads)]
        others = (layer.weight for layer in (attention.out, self.up, self.down))
        for matrix in (*attention.qkv.weight.data.split(rows), *others):
            torch.nn.init.xavier_uniform_(matrix)


def post_norm(
    blocks: Iterable[Block], x: Tensor, visible: dict[str, Any], cache: KVCache | None = None
) -> Tensor:  # (B, T, W) -> (B, T, W)
    """The primer's blocks: X <- LayerNorm(O + X), X <- LayerNorm(MLP(X) + X)."""
    for i, block in enumerate(blocks):
        x = block.attention_norm(block.attend(x, visible, cache, i), x)
        x = block.mlp_norm(block.mlp(x), x)
    return x


def pre_norm(
    blocks: Iterable[Block], norm: nn.LayerNorm, x: Tensor, visible: dict[str, Any], cache: KVCache | None = None
) -> Tensor:  # (B, T, W) -> (B, T, W)
    """With the last ``norm``. The sum of a branch and the residual is taken in the next norm's kernel."""
    branch = None
    for i, block in enumerate(blocks):
        y, x = (block.attention_norm(x), x) if branch is None else block.attention_norm(branch, x, True)
        branch = block.attend(y, visible, cache, i)
        y, x = block.mlp_norm(branch, x, True)
        branch = block.mlp(y)
    return norm(branch, x)
