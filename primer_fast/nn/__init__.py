"""Modules with torch.nn's names, parameters and state dicts, computed by primer_fast.functional.

Ours: Conv2d, Embedding, LayerNorm, Linear, MaxPool2d, MultiheadAttention. Every other name is torch.nn's own, its
submodules included, so that one import serves a model file: ``from primer_fast import nn``. ``nn.functional`` is
primer_fast.functional. A class of ours has a ``__module__`` that begins with primer_fast, and derives from torch's.
"""

from typing import TYPE_CHECKING

import torch.nn as _torchs

from primer_fast import functional as functional
from primer_fast.nn.attention import MultiheadAttention as MultiheadAttention
from primer_fast.nn.containers import ModuleList as ModuleList
from primer_fast.nn.conv import Conv2d as Conv2d
from primer_fast.nn.embedding import Embedding as Embedding
from primer_fast.nn.exact_types import serve_exact_types
from primer_fast.nn.linear import Linear as Linear
from primer_fast.nn.norm import LayerNorm as LayerNorm
from primer_fast.nn.pool import MaxPool2d as MaxPool2d
from primer_fast.nn.submodules import find_torchs_submodules

if TYPE_CHECKING:
    from primer_fast.nn.torchs_names import *  # noqa: F403
else:
    __all__ = sorted(name for name in vars(_torchs) if not name.startswith("_"))

    globals().update((name, getattr(_torchs, name)) for name in __all__ if name not in globals())

    def __getattr__(name):  # a submodule that was imported since, for instance
        if name.startswith("__") or not hasattr(_torchs, name):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_torchs, name)

    def __dir__():
        return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


serve_exact_types()
find_torchs_submodules()
