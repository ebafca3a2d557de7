"""Tools that look modules up by their exact type find torch's own: torch.ao's quantization and pruning."""

__all__ = ["OURS", "Step", "attributes_of", "become", "class_before", "serve_exact_types", "step_back"]

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from primer_fast.nn.attention import MultiheadAttention
from primer_fast.nn.conv import Conv2d
from primer_fast.nn.embedding import Embedding
from primer_fast.nn.linear import Linear
from primer_fast.nn.norm import LayerNorm
from primer_fast.nn.pool import MaxPool2d

OURS: dict[type, type] = {  # torch's class -> ours
    torch.nn.Linear: Linear,
    torch.nn.Conv2d: Conv2d,
    torch.nn.MaxPool2d: MaxPool2d,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.Embedding: Embedding,
    torch.nn.MultiheadAttention: MultiheadAttention,
}
_TORCHS = {ours: torchs for torchs, ours in OURS.items()}


def class_before(kind: type) -> type | None:
    """The class that one of ours stands for: torch's, or the user's where ours was derived from it; else None."""
    return _TORCHS.get(kind) or kind.__dict__.get("_class_before")


class Step(NamedTuple):
    """What became of a module of ours."""

    name: str
    module: torch.nn.Module
    before: type
    left: str | None  # why its class is what it was
    undo: Callable[[], None]


def step_back(
    model: torch.nn.Module, wanted: Callable[[torch.nn.Module], bool] = lambda module: True
) -> Iterator[Step]:
    """Give each module of ours that is wanted its class of before, in place, if that class computes the same."""
    for name, module in model.named_modules():
        kind: type = type(module)
        if not wanted(module):
            continue
        before = class_before(kind)
        if before is None:
            if any(issubclass(kind, ours) for ours in _TORCHS):
                yield Step(name, module, kind, f"a subclass of primer_fast.nn.{_nearest(kind)}", _nothing)
        elif kind in _TORCHS and getattr(module, "activation", None) is not None:
            reason = f"its activation is {module.activation}, which {before.__name__} lacks"
            yield Step(name, module, kind, reason, _nothing)
        else:
            yield Step(name, module, kind, None, become(module, before, {}))


def become(module: torch.nn.Module, kind: type, attributes: dict[str, Any]) -> Callable[[], None]:
    """Change the class of the very object: whoever refers to it, by a name, in a list, by a hook, has the new one.

    Args:
        attributes: what the new class keeps on an instance. What the class before kept there is taken away.

    Returns:
        What undoes it.
    """
    before = type(module)
    kept = {name: module.__dict__.pop(name) for name in attributes_of(before) if name in module.__dict__}
    module.__class__ = kind
    module.__dict__.update(attributes)

    def undo() -> None:
        if type(module) is kind:  # and has not been wrapped since
            module.__class__ = before
            for name in attributes:
                module.__dict__.pop(name, None)
            module.__dict__.update(kept)

    return undo


def attributes_of(kind: type) -> tuple[str, ...]:
    """Names of the attributes that a class of ours has on an instance and the class before has not."""
    if kind in (Linear, Conv2d):
        return ("activation",)
    return getattr(kind, "_attributes", ()) if "_class_before" in kind.__dict__ else ()


def _nothing():
    pass


def _nearest(kind):
    return next(base.__name__ for base in kind.__mro__ if base in _TORCHS)


def serve_exact_types() -> None:
    """Let torch.ao see torch's modules in the place of ours. Calling it again changes nothing."""
    quantize = sys.modules.get("torch.ao.quantization.quantize")
    for name, wrapped in (("propagate_qconfig_", _propagating), ("swap_module", _swapping)):
        original = getattr(quantize, name, None)
        if original is not None and not hasattr(original, "_of_primer_fast"):
            replacement = functools.wraps(original)(wrapped(original))
            replacement._of_primer_fast = True  # type: ignore[attr-defined]
            setattr(quantize, name, replacement)
    with suppress(ImportError):  # its parametrizations work on ours as they are
        from torch.ao.pruning.sparsifier.base_sparsifier import SUPPORTED_MODULES

        SUPPORTED_MODULES.add(Linear)


def _configured(module):
    return getattr(module, "qconfig", None) is not None


def _stepped_back(module, stacklevel):
    left = [
        f"{name or 'the model'} ({why})"
        for name, one, kind, why, _ in step_back(module, _configured)
        if why and (kind in _TORCHS or is_parametrized(one))  # torch.ao leaves subclasses of torch's without a word
    ]
    if left:
        warnings.warn(
            "torch.ao.quantization does not know these modules of primer_fast, and leaves them as they are: "
            + ", ".join(left),
            stacklevel=stacklevel + 1,
        )


def _propagating(original):
    """All of torch.ao's eager quantization begins here: each module is given its configuration by its type."""

    def propagate(module, qconfig_dict=None, *args, **options):
        qconfig_dict = dict(qconfig_dict or {})
        for kind in {type_before_parametrizations(m) for m in module.modules()}:
            if (before := class_before(kind)) in qconfig_dict:
                qconfig_dict.setdefault(kind, qconfig_dict[before])
        original(module, qconfig_dict, *args, **options)
        _stepped_back(module, stacklevel=3)

    return propagate


def _swapping(original):
    """Where ``qconfig`` was set by hand, ``convert`` calls this without calling propagate_qconfig_ first."""

    def swap(mod, *args, **options):
        for _ in step_back(mod, _configured):
            pass
        return original(mod, *args, **options)

    return swap
