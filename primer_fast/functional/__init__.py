"""Differentiable functions with torch.nn.functional's names, one file per kernel file.

Ours: conv2d, embedding, layer_norm, linear, linear_cross_entropy, linear_log_prob, max_pool2d, mlp,
scaled_dot_product_attention. Every other name is torch.nn.functional's own function, so that one import serves a model
file: ``import primer_fast.functional as F``. A function of ours has a ``__module__`` that begins with primer_fast.
"""

from typing import TYPE_CHECKING

import torch.fx
import torch.nn.functional as _torchs

from primer_fast.functional.conv2d import conv2d as conv2d
from primer_fast.functional.embedding import embedding as embedding
from primer_fast.functional.layer_norm import layer_norm as layer_norm
from primer_fast.functional.linear import linear as linear
from primer_fast.functional.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from primer_fast.functional.linear_log_prob import linear_log_prob as linear_log_prob
from primer_fast.functional.max_pool2d import max_pool2d as max_pool2d
from primer_fast.functional.mlp import mlp as mlp
from primer_fast.functional.scaled_dot_product_attention import (
    fast_attention_backward as fast_attention_backward,
)
from primer_fast.functional.scaled_dot_product_attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)

if TYPE_CHECKING:
    from primer_fast.functional.torchs_names import *  # noqa: F403
else:
    _OPS = (
        "conv2d", "embedding", "layer_norm", "linear", "linear_cross_entropy", "linear_log_prob", "max_pool2d", "mlp",
        "scaled_dot_product_attention",
    )  # fmt: skip
    _OURS = (*_OPS, "fast_attention_backward")

    def _is_function(value):
        """What torch.nn.functional only imports for itself is none."""
        elsewhere = ("torch._jit_internal", "torch.overrides", "typing")
        return callable(value) and not isinstance(value, type) and value.__module__ not in elsewhere

    __all__ = sorted(
        {*_OURS, *(name for name, value in vars(_torchs).items() if name[0] != "_" and _is_function(value))}
    )

    for _name in _OPS:
        torch.fx.wrap(_name)  # a call is one node of the graph that torch.fx.symbolic_trace makes

    globals().update((name, getattr(_torchs, name)) for name in __all__ if name not in _OURS)

    def __getattr__(name):  # what has an underscore, for instance
        if name.startswith("__") or not hasattr(_torchs, name):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_torchs, name)

    def __dir__():
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
