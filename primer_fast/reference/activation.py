"""Activations and their derivatives, element by element.

Sources: GELU, Hendrycks & Gimpel 2016, arXiv:1606.08415, eq. 1 and 2; SiLU, ibid. section 4.
"""

__all__ = ["LEAKY_SLOPE", "activate", "derivative", "sigmoid"]

import math

import numpy as np

LEAKY_SLOPE = 0.01
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(z):
    """1 / (1 + exp(-z)), from the side where exp is small."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + e), e / (1 + e))


def activate(z, activation=None):
    """z, any shape -> activation(z); ``activation`` is None or a name that primer_fast.functional.linear takes."""
    match activation:
        case None:
            return z
        case "relu":
            return np.where(z <= 0, 0.0, z)  # NaN stays NaN
        case "leaky_relu":
            return np.where(z <= 0, LEAKY_SLOPE * z, z)
        case "gelu":
            return z * 0.5 * (1 + _erf(z / math.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * z * (1 + np.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3)))
        case "silu":
            return z * sigmoid(z)
        case "sigmoid":
            return sigmoid(z)
        case "tanh":
            return np.tanh(z)
    raise ValueError(f"activate: unknown activation {activation!r}")


def derivative(z, activation=None):
    """z, any shape -> activation'(z); at the kink of relu and leaky_relu the slope is the left one, as in torch."""
    match activation:
        case None:
            return np.ones_like(z)
        case "relu":
            return np.where(z <= 0, 0.0, 1.0)
        case "leaky_relu":
            return np.where(z <= 0, LEAKY_SLOPE, 1.0)
        case "gelu":
            return 0.5 * (1 + _erf(z / math.sqrt(2))) + z * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        case "gelu_tanh":
            t = np.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3))
            return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * z**2)
        case "silu":
            s = sigmoid(z)
            return s * (1 + z * (1 - s))
        case "sigmoid":
            s = sigmoid(z)
            return s * (1 - s)
        case "tanh":
            return 1 - np.tanh(z) ** 2
    raise ValueError(f"derivative: unknown activation {activation!r}")
