"""Classes that are not torch's and compute what LayerNorm or an activation of ours computes, found by running them.

A norm is known by its calls. ``forward`` runs on small inputs while torch's functions are recorded: in training and in
evaluation, with autocast and without. It is a LayerNorm if all that it ever calls is ``layer_norm``, once, on its input
and its own parameters, and returns that; axes may be moved before and after, as norms of pictures do.

An activation is known by its values. The class has no parameters, and in float64 its results equal those of one of ours
on a few thousand numbers between -1e30 and 1e30, whatever the shape.
"""

import copy
import inspect
import itertools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from primer_fast import functional as F
from primer_fast.adopt.chain import Derived
from primer_fast.functional.activation import ACTIVATIONS, apply_plain

__all__ = [
    "KnownLayerNorm",
    "NormCall",
    "known_activation",
    "known_layer_norm",
    "named_as_activation",
    "named_as_layer_norm",
]

_ACTIVATION_NAMES = ("gelu", "silu", "swish", "relu", "sigmoid", "tanh", "activation", "nonlin")
_MOVES = {
    getattr(place, name)
    for place in (torch, Tensor)
    for name in ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims")
}
_LAYER_NORMS = (torch_F.layer_norm, torch.layer_norm)
_SHAPES = (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]


class NormCall(NamedTuple):
    """The one call that a norm's forward makes."""

    shape: tuple[int, ...]
    weight: str | None  # names of the module's parameters
    bias: str | None
    eps: float
    eps_name: str | None  # the attribute that eps is read from
    channels_first: bool  # (N, C, H, W), normalised over C


class KnownLayerNorm(Derived):
    """A norm whose ``forward`` is known to be one call of ``layer_norm``: ours makes it."""

    _attributes = ("_primer_fast_call",)
    _primer_fast_call: NormCall

    def forward(self, *args, **options):
        call = self._primer_fast_call
        if len(args) != 1 or options or (call.channels_first and args[0].dim() != 4):
            return super().forward(*args, **options)  # type: ignore[misc]  # of the module's own class
        x = args[0].movedim(1, -1) if call.channels_first else args[0]
        weight, bias = (None if name is None else getattr(self, name) for name in (call.weight, call.bias))
        eps = call.eps if call.eps_name is None else getattr(self, call.eps_name)
        y = F.layer_norm(x, call.shape, weight, bias, eps)
        return y.movedim(-1, 1) if call.channels_first else y


def named_as_layer_norm(module: torch.nn.Module) -> bool:
    """Whether its class is, or is named as, a layer norm."""
    return isinstance(module, torch.nn.LayerNorm) or "layernorm" in type(module).__name__.lower().replace("_", "")


def named_as_activation(module: torch.nn.Module) -> bool:
    """Whether its class is named as an activation."""
    name = type(module).__name__.lower()
    return name in ("act", "mish") or any(part in name for part in _ACTIVATION_NAMES)


def known_layer_norm(module: torch.nn.Module) -> NormCall | None:
    """The call that the module's forward is, or None."""
    weight = next((p for p in module._parameters.values() if p is not None), None)
    if len(module._parameters) > 2 or (weight is None and not named_as_layer_norm(module)) or not _can_be_run(module):
        return None
    shape = getattr(module, "normalized_shape", None) or (None if weight is None else weight.shape)
    if shape is None or (weight is not None and tuple(shape) != tuple(weight.shape)):
        return None
    like = torch.zeros(()) if weight is None else weight
    last = [like.new_zeros(*sizes, *shape) for sizes in ((4,), (2, 3), (2, 3, 2))]
    first = [like.new_zeros(2, *shape, 3, 5)] if len(shape) == 1 else []
    for inputs, channels_first in ((last, False), (first, True)):
        ways = (
            _call_on(module, *how, channels_first) for how in itertools.product(inputs, (False, True), (False, True))
        )
        call = next(ways, None)
        if call is not None and all(other == call for other in ways):
            return call
    return None


def _can_be_run(module):
    """Whether the module takes one input and has no children or buffers that running it could change."""
    kind = type(module)
    if kind.__module__.startswith(("torch.", "primer_fast.")) or module._modules or module._buffers:
        return False
    try:
        _, *parameters = inspect.signature(kind.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    return len(parameters) == 1 and parameters[0].kind is parameters[0].POSITIONAL_OR_KEYWORD


class _Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.made: list[tuple] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _LAYER_NORMS:  # its value says nothing here, and computing it takes time on a busy machine
            x = _arguments(*args, **kwargs)["input"]
            result = x.new_empty(x.shape)
        else:
            result = func(*args, **kwargs)
        self.made.append((func, args, kwargs, result))
        return result


def _run(module, x, training, autocast):
    """The result of ``forward`` and the calls that it made; None where it failed.

    A shallow copy runs, which shares the parameters: what ``forward`` sets on the module is set on the copy.
    """
    module = copy.copy(module)
    module.training = training
    device = x.device.type
    can_narrow = autocast and torch.amp.is_autocast_available(device)
    narrow = torch.autocast(device, torch.bfloat16) if can_narrow else nullcontext()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), narrow:
            before = torch.random.get_rng_state()
            with _Calls() as calls:
                result = type(module).forward(module, x)
            drew = not torch.equal(torch.random.get_rng_state(), before)
            return None if drew else (result, calls.made)
    except Exception:  # whatever a class of someone else's does with an input that it was not written for
        return None


def _call_on(module, x, training, autocast, channels_first) -> NormCall | None:
    ran = _run(module, x, training, autocast)
    if ran is None:
        return None
    result, made = ran
    own = {id(p) for p in module._parameters.values() if p is not None}
    made = [c for c in made if not (c[0] in _SHAPES and id(c[1][0]) in own)]
    norms = [c for c in made if c[0] in _LAYER_NORMS]
    if len(norms) != 1 or any(c[0] not in _MOVES for c in made if c is not norms[0]):
        return None
    _, args, kwargs, y = norms[0]
    given = _arguments(*args, **kwargs)
    moved, back = (x.movedim(1, -1), y.movedim(-1, 1)) if channels_first else (x, y)
    if not (_same_view(given["input"], moved, x) and _same_view(result, back, y)):
        return None
    names = {id(p): name for name, p in module._parameters.items() if p is not None}
    weight, bias = given["weight"], given["bias"]
    if any(p is not None and id(p) not in names for p in (weight, bias)):
        return None
    eps = given["eps"]
    eps_name = next((name for name, value in vars(module).items() if type(value) is float and value == eps), None)
    return NormCall(
        tuple(given["normalized_shape"]), names.get(id(weight)), names.get(id(bias)), eps, eps_name, channels_first
    )


def _arguments(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return {"input": input, "normalized_shape": normalized_shape, "weight": weight, "bias": bias, "eps": eps}


def _same_view(t, wanted, base):
    """Whether ``t`` shows the same elements in the same order as ``wanted``, a view of ``base``."""
    return (
        isinstance(t, Tensor)
        and t.untyped_storage()._cdata == base.untyped_storage()._cdata
        and (t.shape, t.stride(), t.storage_offset()) == (wanted.shape, wanted.stride(), wanted.storage_offset())
    )


def known_activation(module: torch.nn.Module) -> str | None:
    """The activation of ours that the module computes, or None."""
    if not named_as_activation(module) or module._parameters or not _can_be_run(module):
        return None
    far = [10.0**n for n in (-30, -6, -3, 2, 3, 4, 5, 30)]
    x = torch.cat(
        [torch.linspace(-12, 12, 2001, dtype=torch.float64), torch.tensor([*far, *(-v for v in far)]).double()]
    )
    x = x[: x.numel() // 2 * 2]
    found: set[Any] = set()
    for training in (False, True):
        for arranged in (x, x.flip(0).view(2, -1)):
            ran = _run(module, arranged.clone(), training, False)
            found.add(None if ran is None else _equal_to(ran[0], arranged))
    return found.pop() if len(found) == 1 else None


def _equal_to(y, x):
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    for name in ACTIVATIONS:
        if torch.allclose(y, apply_plain(x.clone(), name), rtol=1e-8, atol=1e-8):
            return name
    return None
