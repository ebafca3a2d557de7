"""Vision transformer: an image is a sequence of patches.

    X = [class, patch_1 W_P + b, ..., patch_N W_P + b] + P      pre-LN blocks, every token sees all      y = LN(X_0) W

Source: Dosovitskiy et al. 2021 (arXiv:2010.11929). Mean pooling instead of the class token: Zhai et al. 2022
(arXiv:2106.04560).
Legend: B batch, C channels, p patch size, N patches, W width.
"""

__all__ = ["POOLS", "ViT", "ViTConfig"]

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import nn
from primer_fast.models.block import ACTIVATIONS, Block, TransformerConfig, pre_norm

POOLS = ("class", "mean")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer."""

    image: tuple[int, int, int] = (1, 28, 28)  # C, H, W of an input
    patch: int = 7  # lines and columns of a patch; divides both sides of the image
    width: int = 64
    layers: int = 3
    heads: int = 4
    mlp_width: int | None = None  # None: 4 * width
    classes: int = 10
    pool: Literal["class", "mean"] = (
        "class"  # the class token's last state; "mean": the mean of all patches', without a class token
    )
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    dropout: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        object.__setattr__(self, "image", tuple(self.image))
        if len(self.image) != 3 or not all(type(n) is int and n > 0 for n in self.image):
            raise ValueError(f"ViT: image must be channels, height and width; got {list(self.image)}")
        for name in ("patch", "width", "layers", "heads", "classes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"ViT: {name} must be a positive integer; got {value!r}")
        if self.image[1] % self.patch or self.image[2] % self.patch:
            raise ValueError(f"ViT: patch must divide height and width; got {self.patch} and {list(self.image[1:])}")
        for name, choices in (("activation", ACTIVATIONS), ("pool", POOLS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"ViT: {name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        self.blocks()

    @property
    def patches(self) -> int:
        return (self.image[1] // self.patch) * (self.image[2] // self.patch)

    def blocks(self) -> TransformerConfig:
        """Of the blocks; its vocabulary and context are not used."""
        return TransformerConfig(
            vocab=1, context=1, width=self.width, layers=self.layers, heads=self.heads, mlp_width=self.mlp_width,
            activation=self.activation, norm="pre", positions="learned", causal=False, dropout=self.dropout,
            norm_eps=self.norm_eps,
        )  # fmt: skip


class ViT(nn.Module):
    """The network of ``config``: images (B, C, H, W), or (B, H, W) of one channel -> logits (B, classes).

    First weights as in Dosovitskiy et al.'s code: Xavier uniform in the blocks, normal of variance 1 / (C p^2) for the
    patches, zero for the class token and the logits' matrix, so that training starts from equal probabilities. But
    positions of deviation 0.5 instead of 0.02: beside patches of about that size the first norm keeps them visible, and
    digits are learned in half the steps.

    Raises:
        ValueError: an input of another shape.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        blocks = config.blocks()
        tokens = config.patches + (config.pool == "class")
        self.patches = nn.Linear(config.image[0] * config.patch**2, config.width)
        self.class_token = torch.nn.Parameter(torch.zeros(config.width)) if config.pool == "class" else None
        self.positions = torch.nn.Parameter(torch.empty(tokens, config.width))
        self.blocks = nn.ModuleList(Block(blocks) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for block in self.blocks:
            block.reset_xavier()
            for layer in (block.attention.qkv, block.attention.out, block.up, block.down):
                torch.nn.init.zeros_(layer.bias)
        torch.nn.init.normal_(self.patches.weight, std=self.patches.in_features**-0.5)
        torch.nn.init.normal_(self.positions, std=0.5)
        for zero in (self.patches.bias, self.head.weight, self.head.bias):
            torch.nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) or (B, H, W) -> (B, classes)
        hidden = self.hidden(x)
        return self.head(hidden.mean(dim=1) if self.class_token is None else hidden[:, 0])

    def hidden(self, x: Tensor) -> Tensor:  # -> (B, class token and N patches, W)
        """The last states, after the last norm."""
        x = self.patches(self.cut(x))
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), dim=1)
        x = x + self.positions
        if self.config.dropout and self.training:
            x = torch_F.dropout(x, self.config.dropout)
        return pre_norm(self.blocks, self.norm, x, {"is_causal": False})

    def cut(self, x: Tensor) -> Tensor:  # (B, C, H, W) or (B, H, W) -> (B, N, C p p), line after line of patches
        channels, height, width = self.config.image
        if channels == 1 and x.shape[1:] == (height, width):
            x = x[:, None]
        if x.dim() != 4 or x.shape[1:] != self.config.image:
            either = f" or (B, {height}, {width})" if channels == 1 else ""
            raise ValueError(f"ViT: input must be (B, {channels}, {height}, {width}){either}; got {tuple(x.shape)}")
        p = self.config.patch
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H / p, p, W / p, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], self.config.patches, channels * p * p)
