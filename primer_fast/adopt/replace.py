"""Put our modules in the place of torch's, in a model that exists, and torch's in the place of ours again."""

__all__ = ["Left", "ModuleReport", "Swapped", "replace_modules", "restore_modules"]

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from primer_fast import nn
from primer_fast.adopt.attention import NAME, register_attention
from primer_fast.adopt.chain import Chain, TransposedLinear, activation_of, children_in_order, derived, fused_activation
from primer_fast.adopt.recognise import KnownLayerNorm
from primer_fast.adopt.rules import (
    UNWANTED,
    attention_called,
    closed,
    has_attention,
    loss_head,
    recognised,
    refusal,
    takes_implementations,
    target_of,
    why_left,
)
from primer_fast.nn.exact_types import become, step_back


class Swapped(NamedTuple):
    """A module that is ours now."""

    name: str  # in the model; "" is the model
    before: str
    after: str
    activation: str | None = None  # which the same kernel computes


class Left(NamedTuple):
    """A module that is not."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class ModuleReport:
    """What ``replace_modules`` did; ``str`` makes a table of it."""

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    hints: tuple[str, ...] = ()  # what the caller can do beside
    _undo: tuple[Callable[[], None], ...] = field(default=(), repr=False, compare=False)

    def restore(self) -> None:
        """Bring the modules back that were there before, with what their parameters hold by now."""
        for undo in reversed(self._undo):
            undo()

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}"]
        lines += _table_of(
            ((s.before if s.activation is None else f"{s.before} + {s.activation}", s.after), s.name)
            for s in self.swapped
        )
        lines.append(f"left {len(self.left)}")
        lines += _table_of(((kind, reason), name) for name, kind, reason in self.left)
        return "\n".join([*lines, *(f"hint: {hint}" for hint in self.hints)])


def _table_of(rows: Iterable[tuple[tuple[str, str], str]]) -> Iterator[str]:
    """Lines of a table; rows of the same kind and outcome share one, which names the first of them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for group, name in rows:
        groups.setdefault(group, []).append(name or "the model")
    widths = [max((len(group[i]) for group in groups), default=0) for i in (0, 1)]
    for (kind, outcome), names in groups.items():
        more = f", {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{len(names):>6}  {kind:<{widths[0]}}  {outcome:<{widths[1]}}  {names[0]}{more}"


def replace_modules(
    model: torch.nn.Module,
    *,
    fuse_activations: bool = True,
    attention: bool = True,
    include: Iterable[type | str] | None = None,
    exclude: Iterable[type | str] = (),
) -> ModuleReport:
    """Let torch's modules in ``model`` compute with our kernels, in place.

    ``Linear``, ``Conv2d``, ``MaxPool2d``, ``LayerNorm``, ``Embedding`` and ``MultiheadAttention`` of ``torch.nn``
    become ``primer_fast.nn``'s, and transformers' ``Conv1D`` a linear layer that reads its weight as it lies. They
    remain the objects that they were, with their parameters, hooks and mode: tied weights stay tied, optimizers go on,
    the state dict does not change. Other classes are taken where they are found to compute what LayerNorm or an
    activation of ours computes: see ``primer_fast.adopt.recognise``, which runs their ``forward`` on small inputs.
    Other subclasses, and what ours would compute otherwise, are left; the report says why.

    Args:
        fuse_activations: where a product is followed by an activation, compute both in one kernel, if ``forward``
            provably calls one after the other on nothing else: in ``Sequential``, and in modules whose ``forward`` is
            written as such calls, ``return self.b(self.act(self.a(x)))`` in one statement or more. Each call looks
            whether it may: a hook on either keeps them apart.
        attention: models of transformers whose attention is "sdpa" use ours, as by
            ``model.set_attn_implementation("primer_fast")``. That is written into the model's config.
        include, exclude: types, or patterns of names such as ``"encoder.*.dense"``. A match holds for all that the
            matched module contains; ``include=None`` is every module.

    Returns:
        What was swapped and what was left, and why. A second call swaps nothing.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a pattern matches no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"replace_modules: model must be a torch.nn.Module; got {type(model).__name__}")
    walked = list(_walk(model))
    chosen = _chosen(walked, include, exclude)
    undo, replaced = [], {}  # id of a module -> type before, type after
    for position in walked:
        module, target = position.module, target_of(position.module)
        if target and id(module) in chosen and id(module) not in replaced and refusal(module) is None:
            replaced[id(module)] = type(module), target
            undo.append(_become(module, target))
        elif id(module) in chosen and closed(module) is None and (found := recognised(module, fuse_activations)):
            if issubclass(found[0], KnownLayerNorm):
                replaced[id(module)] = type(module), found[0]
            undo.append(become(module, *found))
    fused: dict[int, str] = {}  # id of a product -> activation
    absorbed = set()  # ids of a parent and of an activation in it
    if fuse_activations:
        for position in walked:
            if id(position.module) in chosen and (pairs := _pairs(position.module, chosen)):
                kind: type = type(position.module)
                undo.append(_become(position.module, derived(Chain, kind)))
                fused |= {id(product): name for product, _, name in pairs}
                order = children_in_order(position.module) or []
                for _, activation, _ in pairs:
                    if order.count(activation) == sum(activation is other for _, other, _ in pairs):
                        absorbed.add((id(position.module), id(activation)))
    results = _attend(walked, chosen, attention, undo) + _called(walked)
    seen = set()
    for position in walked:
        one = id(position.module)
        if one in seen or (id(position.parent), one) in absorbed:
            continue
        seen.add(one)
        if one in replaced or one in fused:
            before, after = replaced.get(one, (type(position.module),) * 2)
            results.append(Swapped(position.name, before.__name__, _title(after), fused.get(one)))
        elif reason := why_left(position.module, position.parent, one in chosen, fuse_activations):
            results.append(Left(position.name, type(position.module).__name__, reason))
    swapped = tuple(r for r in results if isinstance(r, Swapped))
    left = tuple(r for r in results if isinstance(r, Left))
    return ModuleReport(swapped, left, _hints(model), tuple(undo))


class _Position(NamedTuple):
    name: str
    module: torch.nn.Module
    around: tuple["_Position", ...]  # from the model to the parent

    @property
    def parent(self):
        return self.around[-1].module if self.around else None


def _walk(module, name="", around=()) -> Iterator[_Position]:
    """Every module, once for each of its names, except those inside modules that must not be changed."""
    position = _Position(name, module, around)
    yield position
    if closed(module) is None and type(module) not in (torch.nn.MultiheadAttention, nn.MultiheadAttention):
        for child_name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{name}.{child_name}" if name else child_name, (*around, position))


def _chosen(walked, include, exclude) -> set[int]:
    """Ids of the modules that the caller wants to be looked at."""
    include = None if include is None else _wanted("include", include, walked)
    exclude = _wanted("exclude", exclude, walked)
    ids = {id(p.module) for p in walked if include is None or _matches(p, include)}
    return ids - {id(p.module) for p in walked if _matches(p, exclude)}


def _wanted(argument, wanted, walked):
    wanted = (wanted,) if isinstance(wanted, type | str) else tuple(wanted)
    for one in wanted:
        if not isinstance(one, type | str):
            raise TypeError(f"replace_modules: {argument} must hold types and strings; got {one!r}")
        if isinstance(one, str) and not any(fnmatchcase(p.name, one) for p in walked):
            raise ValueError(f"replace_modules: {argument} must hold patterns that match a module's name; got {one!r}")
    return wanted


def _matches(position, wanted):
    return any(
        fnmatchcase(p.name, one) if isinstance(one, str) else isinstance(p.module, one)
        for p in (*position.around, position)
        for one in wanted
    )


def _become(module, kind) -> Callable[[], None]:
    """Make the module one of class ``kind``; -> what undoes that."""
    return become(module, kind, {"activation": None} if kind in (nn.Linear, nn.Conv2d) else {})


def _pairs(parent, chosen) -> list[tuple]:
    """(product, activation, its name) for all that ``parent`` calls in turn and may run in one kernel."""
    if isinstance(parent, Chain) or "forward" in parent.__dict__ or not any(map(activation_of, parent.children())):
        return []
    found = ((a, b, fused_activation(a, b)) for a, b in pairwise(children_in_order(parent) or []))
    pairs = [pair for pair in found if pair[2]]
    return pairs if all(id(activation) in chosen for _, activation, _ in pairs) else []


def _attend(walked, chosen, wanted, undo) -> list[Swapped | Left]:
    """Set our attention in transformers' models, those that are not part of another."""
    base = _transformers_models()
    results: list[Swapped | Left] = []
    for name, model, around in walked:
        if not isinstance(model, base) or any(isinstance(p.module, base) for p in around):
            continue
        used = sorted({str(m.config._attn_implementation) for m in model.modules() if isinstance(m, base)})
        chosen_by_name = takes_implementations(model)
        if used == [NAME] or not (chosen_by_name or has_attention(model)):
            continue
        if not wanted or id(model) not in chosen:
            reason = UNWANTED
        elif not chosen_by_name:
            reason = "the model has an attention of its own, and no other can be set"
        elif used != ["sdpa"]:
            reason = f"it is {', '.join(used)}, and ours takes the place of sdpa"
        elif "transformers" not in register_attention() or not model._can_set_attn_implementation():
            reason = "it cannot be set in this model; `with primer_fast.sdpa():` may reach it"
        else:
            model.set_attn_implementation(NAME)
            undo.append(lambda model=model: model.set_attn_implementation("sdpa"))
            results.append(Swapped(name, "attention: sdpa", f"attention: {NAME}"))
            continue
        results.append(Left(name, f"attention of {type(model).__name__}", reason))
    return results


def _called(walked) -> list[Swapped | Left]:
    """What is said of modules that call attention as a function."""
    found = {id(p.module): (p, attention_called(p.module)) for p in reversed(walked) if closed(p.module) is None}
    rows = ((p.name, f"attention of {type(p.module).__name__}", why) for p, why in reversed(found.values()) if why)
    return [Left(*row) for row in rows]


def _hints(model):
    if (head := loss_head(model)) is None:
        return ()
    name, layer = head
    bias = "" if layer.bias is None else f", linear_bias={name}.bias"
    call = f"primer_fast.functional.linear_cross_entropy(hidden, {name}.weight, target{bias})"
    return (f"{call} makes the loss of {name} without its logits in memory",)


def _transformers_models():
    """The class of transformers' models, or nothing that a model could be an instance of."""
    return getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())


def _title(kind):
    """What a class of ours is called in a report."""
    if issubclass(kind, KnownLayerNorm):
        return "primer_fast.functional.layer_norm"
    return "linear, weight transposed" if issubclass(kind, TransposedLinear) else f"primer_fast.nn.{kind.__name__}"


def restore_modules(model: torch.nn.Module) -> ModuleReport:
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
    base = _transformers_models()
    for name, module in model.named_modules():
        if isinstance(module, base) and module.config._attn_implementation == NAME:
            module.set_attn_implementation("sdpa")
            swapped.append(Swapped(name, f"attention: {NAME}", "attention: sdpa"))
            undo.append(partial(module.set_attn_implementation, NAME))
    for step in step_back(model):
        if step.left is None:
            swapped.append(Swapped(step.name, step.before.__name__, _title_restored(type(step.module))))
            undo.append(step.undo)
        else:
            left.append(Left(step.name, step.before.__name__, step.left))
    return ModuleReport(tuple(swapped), tuple(left), _undo=tuple(undo))


def _title_restored(kind):
    return f"torch.nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__qualname__
