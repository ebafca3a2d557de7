"""Torch's modules again, in a model that holds ours."""

__all__ = ["restore_modules"]

import sys
from collections.abc import Callable
from functools import partial

import torch

from primer_fast.attention import NAME
from primer_fast.nn.exact_types import step_back
from primer_fast.replace_report import Left, Report, Swapped


def restore_modules(model: torch.nn.Module) -> Report:
    """Make the modules of ours in ``model`` torch's again, in place: for tools that look modules up by exact type.

    It needs no report of ``replace_modules``, so it also serves models that were loaded, copied, or written with
    ``primer_fast.nn``. The modules remain the objects that they were, with their parameters, hooks and mode. Attention
    of transformers' models goes back to "sdpa". What torch's module would compute otherwise is left: a product with an
    activation of its own, and subclasses.

    Returns:
        What is torch's now, and what was left and why.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore_modules: model must be a torch.nn.Module; got {type(model).__name__}")
    swapped, left = [], []
    undo: list[Callable[[], None]] = []
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    for name, module in model.named_modules():
        if isinstance(module, base) and module.config._attn_implementation == NAME:
            module.set_attn_implementation("sdpa")
            swapped.append(Swapped(name, f"attention: {NAME}", "attention: sdpa"))
            undo.append(partial(module.set_attn_implementation, NAME))
    for step in step_back(model):
        if step.left is None:
            swapped.append(Swapped(step.name, step.before.__name__, _place(type(step.module))))
            undo.append(step.undo)
        else:
            left.append(Left(step.name, step.before.__name__, step.left))
    return Report(tuple(swapped), tuple(left), _undo=tuple(undo))


def _place(kind):
    return f"torch.nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__qualname__
