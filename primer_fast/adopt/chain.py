"""Modules that call their children one after another, run with a product and the activation after it in one kernel.

Nothing but the parent's ``forward`` changes: the activation stays where it was, and every call looks again whether the
two may still be one. Hooks, slices of a Sequential and children that are exchanged later behave as before.
"""

__all__ = [
    "Chain",
    "Derived",
    "KnownActivation",
    "TransposedLinear",
    "activation_of",
    "children_in_order",
    "derived",
    "fused_activation",
]

import ast
import inspect
import textwrap
from functools import cache, wraps
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from primer_fast import functional as F
from primer_fast import nn
from primer_fast.functional.activation import ACTIVATIONS
from primer_fast.nn.layers import only_forward

_OF_TORCH: dict[type, list[tuple[str, torch.nn.Module]]] = {}
for _name, _activation in ACTIVATIONS.items():
    _module = _activation.module()
    _OF_TORCH.setdefault(type(_module), []).append((_name, _module))
_TRANSFORMERS = {  # by name: the package need not be there
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}


def activation_of(module) -> str | None:
    """The activation of ours that computes what ``module`` does, or None."""
    kind = type(module)
    if issubclass(kind, KnownActivation):
        return module._primer_fast_computes
    if kind.__module__ == "transformers.activations":
        return _TRANSFORMERS.get(kind.__name__)
    for name, known in _OF_TORCH.get(kind, ()):
        # The result depends on the constants of the class alone, but not on whether it is computed in place.
        if all(getattr(module, c) == getattr(known, c) for c in getattr(known, "__constants__", ()) if c != "inplace"):
            return name
    return None


class Derived:
    """Base of the mixins that ``derived`` puts in front of a module's own class."""

    _attributes: ClassVar[tuple[str, ...]] = ()  # that it adds to an instance

    def __reduce_ex__(self, protocol):  # the class made has no name of its own to be pickled by
        state = super().__reduce_ex__(max(protocol, 2))[2]
        return _rebuild, type(self).__bases__, state


@cache
def derived(mixin: type, kind: type) -> type:
    """The class that derives from ``mixin`` and ``kind``, with ``kind``'s name; a ``kind`` can be made one in place."""
    members: dict[str, Any] = {
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "_class_before": kind,
        "__annotations__": getattr(kind, "__annotations__", {}),  # by which TorchScript knows attributes' types
    }  # fmt: skip
    return type(kind.__name__, (mixin, kind), members)


def _rebuild(mixin, kind):
    made: Any = derived(mixin, kind)
    return made.__new__(made)


class KnownActivation(Derived):
    """An activation of another author's class that computes one of ours; ``_primer_fast_computes`` names that."""

    _attributes = ("_primer_fast_computes",)
    _primer_fast_computes: str


class TransposedLinear(Derived):
    """A linear layer whose weight is (in, out), as transformers' Conv1D has it: read in place, and never copied."""

    activation = None
    weight: Tensor  # (in, out)
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(x, self.activation)

    def activated(self, x: Tensor, activation: str | None) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias, activation=activation)


_PRODUCTS = (nn.Linear.forward, nn.Conv2d.forward, TransposedLinear.forward)


def fused_activation(module, following) -> str | None:
    """The activation that ``following`` computes, if ``module`` can compute it in the same kernel; else None."""
    if getattr(type(module), "forward", None) not in _PRODUCTS or module.activation is not None:
        return None
    name = activation_of(following)
    if name is None or not (only_forward(module) and only_forward(following)) or _has_any_global_hook():
        return None
    return name


class Chain(Derived):
    """A module whose ``forward`` calls its children one after another."""

    _order: ClassVar[tuple[str, ...] | None]

    def __init_subclass__(cls):
        if Chain in cls.__bases__:  # read once: torch.compile does not trace how a source is read
            cls._order = _order_of(cls.__bases__[1])
            own: Any = cls.__bases__[1]
            cls.forward = _in_turn(own.forward)  # type: ignore[attr-defined]


def _in_turn(own):
    """The ``forward`` of a Chain, which takes the place of ``own``, the module's.

    It wraps that, so that TorchScript compiles the module's own, and torch.fx and torch.export see its arguments.
    """

    @wraps(own)
    def forward(self, *args, **kwargs):
        if len(args) != 1 or kwargs or isinstance(args[0], Proxy) or (modules := children_in_order(self)) is None:
            return own(self, *args, **kwargs)
        (x,) = args
        i = 0
        while i < len(modules):
            name = fused_activation(modules[i], modules[i + 1]) if i + 1 < len(modules) else None
            x = modules[i](x) if name is None else modules[i].activated(x, name)
            i += 1 if name is None else 2
        return x

    return forward


def children_in_order(module) -> list | None:
    """The children that ``module.forward`` calls one after another; None where it is not known to do just that."""
    order = module._order if isinstance(module, Chain) else _order_of(type(module))
    if order is None:
        return None
    return [getattr(module, name) for name in order] if order else list(module._modules.values())


def _order_of(kind) -> tuple[str, ...] | None:
    """Names of what ``kind.forward`` calls in order, () for all children; None where it does anything else."""
    return () if kind.forward is torch.nn.Sequential.forward else _called_in_order(kind.forward)


@cache
def _called_in_order(function) -> tuple[str, ...] | None:
    """``x = self.a(x); return self.b(x)`` -> ("a", "b"). None for any other function, or one without its source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or not _is_source_of(tree, function):
        return None
    if len(definition.args.args) != 2:
        return None
    me, x = (a.arg for a in definition.args.args)
    *steps, last = definition.body[1:] if ast.get_docstring(definition) else definition.body
    called = []
    for step in steps:
        if not isinstance(step, ast.Assign) or len(step.targets) != 1 or not isinstance(step.targets[0], ast.Name):
            return None
        if step.targets[0].id == me or (names := _nested_calls(step.value, me, x)) is None:
            return None
        called += names
        x = step.targets[0].id
    names = _nested_calls(last.value, me, x) if isinstance(last, ast.Return) else None
    return None if names is None else (*called, *names) or None


def _nested_calls(expression, me, x):
    """``self.b(self.a(x))`` -> ["a", "b"]; None for any other expression."""
    names: list[str] = []
    while isinstance(expression, ast.Call):
        child = expression.func
        if not (isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == me):
            return None
        if len(expression.args) != 1 or expression.keywords:
            return None
        names.insert(0, child.attr)
        expression = expression.args[0]
    return names if isinstance(expression, ast.Name) and expression.id == x else None


def _is_source_of(tree, function):
    """Whether the source, which may have changed on disk, compiles to the code that runs."""
    code, runs = next(c for c in compile(tree, "", "exec").co_consts if isinstance(c, CodeType)), function.__code__
    return (code.co_code, code.co_names, code.co_varnames) == (runs.co_code, runs.co_names, runs.co_varnames)
