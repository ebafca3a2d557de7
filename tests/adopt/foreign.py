"""Norms and activations of other authors' classes, and modules whose forward is a chain of calls."""

import math

import torch
import torch.nn.functional as torch_F
from parity import OneStatement

T = torch.nn


class OtherNames(T.Module):
    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = T.Parameter(torch.ones(width)), T.Parameter(torch.zeros(width))
        self.variance_epsilon = 1e-3

    def forward(self, x):
        return torch.layer_norm(x, (8,), self.scale, self.shift, self.variance_epsilon)


class Subclass(T.LayerNorm):
    fast = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fast:
            return x
        return torch_F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class OfPictures(T.LayerNorm):
    def forward(self, x):
        x = torch_F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, 1e-3)
        return x.permute(0, 3, 1, 2)


class EitherOrder(T.LayerNorm):
    def __init__(self, width, order):
        super().__init__(width, eps=1e-3)
        self.order = order

    def forward(self, features):
        if self.order == "last":
            return super().forward(features)
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class MyActivation(T.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def swish(x):
    return x.mul_(x.sigmoid())


class Statements(OneStatement):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same."""
        inner = self.act(self.fc1(hidden))  # a comment
        return self.fc2(inner)


class Sequence(T.Sequential):
    def extra_repr(self):
        return "of its own class"
