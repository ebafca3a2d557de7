"""Pure functions on tiles, shared by the kernels: tile order, activations and their gradients. No load, no store."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are taken in base 2: e^x = 2^(x log2 e)

# What an op keeps for its backward: these recover their derivative from the output, the others keep the derivative.
FROM_OUTPUT = ("relu", "leaky_relu", "sigmoid", "tanh")


def keeps_derivative(activation):
    """Whether a forward with this activation writes the derivative beside the output, where a backward will come."""
    return activation is not None and activation not in FROM_OUTPUT


# Instructions that each adds to an element of a 16-bit result, counted in code for sm_90, for estimates of time.
INSTRUCTIONS = {None: 0, "relu": 0, "leaky_relu": 2, "sigmoid": 5, "tanh": 15, "silu": 6, "gelu": 15, "gelu_tanh": 9}


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Program number -> (tile row, tile column), GROUP_M tile rows at a time so that both operands stay in L2."""
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid - group * GROUP_M * tiles_n
    return first_m + within % rows, within // rows


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
    return reciprocal(1.0 + tl.exp2(-1.4426950408889634 * w), PRECISE)


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
def activate(z, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr):
    """float32 tile -> (activation(z), what the backward needs of it): see FROM_OUTPUT."""
    if ACTIVATION == "relu":
        y = tl.where(z <= 0, 0.0, z)  # not maximum: NaN must stay NaN
        saved = y
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z <= 0, 0.01 * z, z)
        saved = y
    elif ACTIVATION == "sigmoid":
        y = sigmoid(z, PRECISE)
        saved = y
    elif ACTIVATION == "tanh":
        y = tanh(z, PRECISE)
        saved = y
    elif ACTIVATION == "silu":
        s, rest = sigmoid_pair(z, PRECISE)
        y = z * s
        saved = s + y * rest
    elif ACTIVATION == "gelu":
        cdf, density = normal_cdf(z, PRECISE)
        y = z * cdf
        saved = cdf + z * density
    elif ACTIVATION == "gelu_tanh":
        square = z * z
        # 0.5 (1 + tanh u) = sigmoid(2u); the factor is 2 sqrt(2 / pi)
        s, rest = sigmoid_pair(z * (1.5957691216057308 + 0.07135481627260025 * square), PRECISE)
        y = z * s
        saved = s + y * rest * (1.5957691216057308 + 0.21406444881780074 * square)
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
        y = z
        saved = z
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
