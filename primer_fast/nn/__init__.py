"""Modules with torch.nn's names, parameters and state dicts, computed by primer_fast.functional.

torch's containers are re-exported by name, so that a model file imports one ``nn``.
"""

from torch.nn import Module as Module
from torch.nn import Sequential as Sequential

from primer_fast.nn.attention import MultiheadAttention as MultiheadAttention
from primer_fast.nn.containers import ModuleList as ModuleList
from primer_fast.nn.conv import Conv2d as Conv2d
from primer_fast.nn.embedding import Embedding as Embedding
from primer_fast.nn.exact_types import serve_exact_types
from primer_fast.nn.linear import Linear as Linear
from primer_fast.nn.norm import LayerNorm as LayerNorm
from primer_fast.nn.pool import MaxPool2d as MaxPool2d

serve_exact_types()
