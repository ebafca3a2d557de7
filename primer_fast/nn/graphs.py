"""How the modules appear in the graphs of torch.fx.symbolic_trace and torch.jit.script.

In the one a call of a module is one node, as a call of torch.nn's is. The other compiles the branch of ``forward`` that
calls PyTorch's operators, and no other.
"""

__all__ = ["is_leaf", "node_of"]

from typing import Any

import torch
from torch.fx import Proxy


def is_leaf(module: torch.nn.Module, input: Any) -> bool:
    """Whether ``node_of`` shall record the call of the module on ``input``; the module itself can be traced too."""
    return isinstance(input, Proxy) and getattr(input.tracer, "root", None) is not module


def node_of(module: torch.nn.Module, *args, **kwargs):
    """A call of the module, whose first argument is a Proxy, as one node."""
    tracer = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
