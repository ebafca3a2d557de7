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


def _gelu_slope(z):
    return 0.5 * (1 + _erf(z / math.sqrt(2))) + z * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(z):
    t = np.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * z**2)


# Name -> value and derivative. At the kink of relu and leaky_relu the slope is the left one, as in torch.
_FORMULAS = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.where(z <= 0, 0.0, z), lambda z: np.where(z <= 0, 0.0, 1.0)),
    "leaky_relu": (lambda z: np.where(z <= 0, LEAKY_SLOPE * z, z), lambda z: np.where(z <= 0, LEAKY_SLOPE, 1.0)),
    "gelu": (lambda z: z * 0.5 * (1 + _erf(z / math.sqrt(2))), _gelu_slope),
    "gelu_tanh": (lambda z: 0.5 * z * (1 + np.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3))), _gelu_tanh_slope),
    "silu": (lambda z: z * sigmoid(z), lambda z: sigmoid(z) * (1 + z * (1 - sigmoid(z)))),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * (1 - sigmoid(z))),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
}


def activate(z, activation=None):
    """z, any shape -> activation(z); ``activation`` is None or a name that primer_fast.functional.linear takes."""
    return _formulas(activation)[0](z)


def derivative(z, activation=None):
    """z, any shape -> activation'(z)."""
    return _formulas(activation)[1](z)


def _formulas(activation):
    if activation not in _FORMULAS:
        raise ValueError(f"unknown activation {activation!r}")
    return _FORMULAS[activation]
