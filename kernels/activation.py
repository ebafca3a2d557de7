"""The activations that products fuse, their derivatives, and all that the rest of the package asks of them.

A new one takes an entry in ``ACTIVATIONS``, a function on a tile, a branch in ``activate`` (and in ``backpropagate``
where its derivative follows from its result), and one in ``activate_plain``. Its formula goes into the reference. The
tests go through the table.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as torch_F
import triton
import triton.language as tl
from torch import Tensor

from .tile import LOG2_E


class Activation(NamedTuple):
    """What the host knows of an activation."""

    module: Callable[[], torch.nn.Module]  # makes PyTorch's module that computes the same
    from_output: bool  # the derivative follows from the result, so that a forward keeps the result and no derivative
    rectifies: bool  # passes about half of a centred input on, so that initial weights are larger by sqrt(2)
    instructions: int  # for each element of a 16-bit result, counted in code for sm_90, for estimates of time


ACTIVATIONS = {
    "relu": Activation(torch.nn.ReLU, True, True, 0),
    "leaky_relu": Activation(torch.nn.LeakyReLU, True, True, 2),  # slope 0.01
    "gelu": Activation(torch.nn.GELU, False, True, 15),
    "gelu_tanh": Activation(lambda: torch.nn.GELU(approximate="tanh"), False, True, 9),
    "silu": Activation(torch.nn.SiLU, False, True, 6),
    "sigmoid": Activation(torch.nn.Sigmoid, True, False, 5),
    "tanh": Activation(torch.nn.Tanh, True, False, 15),
}
FROM_OUTPUT = tuple(name for name, a in ACTIVATIONS.items() if a.from_output)
INSTRUCTIONS = {None: 0, **{name: a.instructions for name, a in ACTIVATIONS.items()}}


def keeps_derivative(activation: str | None) -> bool:
    """Whether a forward with this activation writes the derivative beside the output, where a backward will come."""
    return activation is not None and activation not in FROM_OUTPUT


def activate_plain(z: Tensor, activation: Optional[str]) -> Tensor:  # noqa: UP045 (TorchScript compiles this)
    """``activation(z)`` by PyTorch's operators, in place where their gradient needs only the result."""
    if activation is None:
        return z
    if activation == "relu":
        return torch.relu_(z)
    if activation == "leaky_relu":
        return torch_F.leaky_relu_(z)
    if activation == "gelu":
        return torch_F.gelu(z)
    if activation == "gelu_tanh":
        return torch_F.gelu(z, approximate="tanh")
    if activation == "silu":
        return torch_F.silu(z)
    if activation == "sigmoid":
        return torch.sigmoid_(z)
    if activation == "tanh":
        return torch.tanh_(z)
    raise ValueError(f"unknown activation {activation}")


@triton.jit
def reciprocal(d, PRECISE: tl.constexpr):
    """1 / d of a float32 tile, d >= 1. Not precise: two units in the last place, without the division's range tests."""
    if PRECISE:
        r = 1.0 / d
    else:
        root = tl.rsqrt(d)
        r = root * root
    return r


@triton.jit
def tanh(u, PRECISE: tl.constexpr = True):
    """tanh of a float32 tile; an odd polynomial near 0, where the quotient would cancel."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(u))  # e^-2|u|
    far = (1.0 - e) * reciprocal(1.0 + e, PRECISE)
    square = u * u
    near = u * (1.0 + square * (-0.33333333 + square * (0.13333333 - 0.05396825 * square)))
    return tl.where(tl.abs(u) < 0.1, near, tl.where(u < 0, -far, far))


@triton.jit
def normal_cdf(z, PRECISE: tl.constexpr):
    """P(Z <= z) of a standard normal, and its density at z.

    Not precise: Abramowitz & Stegun 26.2.17, absolute error 7.5e-8, far below half a unit of a 16-bit result, at a
    fraction of erf's instructions; it shares its exponential with the density.
    """
    gauss = tl.exp2(-0.7213475204444817 * (z * z))  # e^(-z^2 / 2)
    if PRECISE:
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
    else:
        t = reciprocal(1.0 + 0.23164189 * tl.abs(z), PRECISE)
        poly = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
        tail = poly * gauss
        cdf = tl.where(z < 0, tail, 1.0 - tail)
    return cdf, 0.3989422804014327 * gauss


@triton.jit
def sigmoid(w, PRECISE: tl.constexpr):
    """1 / (1 + e^-w) of a float32 tile."""
    return reciprocal(1.0 + tl.exp2(w * -LOG2_E), PRECISE)


@triton.jit
def sigmoid_pair(w, PRECISE: tl.constexpr):
    """sigmoid(w) and 1 - sigmoid(w); precise: the second by itself, not from a difference that cancels."""
    s = sigmoid(w, PRECISE)
    if PRECISE:
        rest = sigmoid(-w, PRECISE)
    else:
        rest = 1.0 - s
    return s, rest


@triton.jit
def silu(z, PRECISE: tl.constexpr):
    """z sigmoid(z), and its derivative."""
    s, rest = sigmoid_pair(z, PRECISE)
    y = z * s
    return y, s + y * rest


@triton.jit
def gelu(z, PRECISE: tl.constexpr):
    """z P(Z <= z) for a standard normal Z, and its derivative."""
    cdf, density = normal_cdf(z, PRECISE)
    return z * cdf, cdf + z * density


@triton.jit
def gelu_tanh(z, PRECISE: tl.constexpr):
    """0.5 z (1 + tanh u) with u = sqrt(2 / pi) (z + 0.044715 z^3), and its derivative."""
    square = z * z
    # 0.5 (1 + tanh u) = sigmoid(2u); the factor is 2 sqrt(2 / pi)
    s, rest = sigmoid_pair(z * (1.5957691216057308 + 0.07135481627260025 * square), PRECISE)
    y = z * s
    return y, s + y * rest * (1.5957691216057308 + 0.21406444881780074 * square)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr):
    """float32 tile -> (activation(z), what the backward needs of it): the result itself if ``from_output``."""
    if ACTIVATION == "silu":
        y, saved = silu(z, PRECISE)
    elif ACTIVATION == "gelu":
        y, saved = gelu(z, PRECISE)
    elif ACTIVATION == "gelu_tanh":
        y, saved = gelu_tanh(z, PRECISE)
    else:
        if ACTIVATION == "relu":
            y = tl.where(z <= 0, 0.0, z)  # not maximum: NaN must stay NaN
        elif ACTIVATION == "leaky_relu":
            y = tl.where(z <= 0, 0.01 * z, z)
        elif ACTIVATION == "sigmoid":
            y = sigmoid(z, PRECISE)
        elif ACTIVATION == "tanh":
            y = tanh(z, PRECISE)
        else:
            tl.static_assert(ACTIVATION is None, "unknown activation")
            y = z
        saved = y
    return y, saved


@triton.jit
def backpropagate(dy, saved, ACTIVATION: tl.constexpr):
    """float32 tiles: gradient at the output -> gradient at the pre-activation."""
    if ACTIVATION == "relu":
        g = tl.where(saved <= 0, 0.0, dy)  # not a product: 0 * inf is NaN
    elif ACTIVATION == "leaky_relu":
        g = tl.where(saved <= 0, 0.01 * dy, dy)
    elif ACTIVATION == "sigmoid":
        g = dy * saved * (1.0 - saved)
    elif ACTIVATION == "tanh":
        g = dy * (1.0 - saved * saved)
    else:
        g = dy * saved
    return g
