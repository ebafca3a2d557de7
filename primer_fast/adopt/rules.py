"""Which modules ours can stand for, why the others are left, and what only the caller of a model can change."""

__all__ = [
    "UNWANTED",
    "attention_called",
    "closed",
    "has_attention",
    "loss_head",
    "recognised",
    "refusal",
    "takes_implementations",
    "target_of",
    "why_left",
]

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

import torch

from primer_fast.adopt.chain import (
    Chain,
    Derived,
    KnownActivation,
    TransposedLinear,
    activation_of,
    children_in_order,
    derived,
    fused_activation,
)
from primer_fast.adopt.recognise import (
    KnownLayerNorm,
    known_activation,
    known_layer_norm,
    named_as_activation,
    named_as_layer_norm,
)
from primer_fast.functional.activation import ACTIVATIONS
from primer_fast.nn.exact_types import OURS

_UNBUILT = {  # attributes, and the arguments that they come from
    torch.nn.Embedding: {"max_norm": "max_norm", "scale_grad_by_freq": "scale_grad_by_freq", "sparse": "sparse"},
    torch.nn.MultiheadAttention: {"bias_k": "add_bias_kv", "add_zero_attn": "add_zero_attn"},
}
UNWANTED = "not asked for"
_CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)  # with nothing in them, here
_ATTEND = "scaled_dot_product_attention"
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def target_of(module) -> type | None:
    """The class of ours for a module whose type is exactly one of torch's that we replace; else None."""
    kind: type = type(module)
    if isinstance(module, Derived):
        return None
    if kind.__module__ == "transformers.pytorch_utils" and kind.__name__ == "Conv1D":
        return derived(TransposedLinear, kind)
    return OURS.get(kind)


def recognised(module, fuse_activations) -> tuple[type, dict] | None:
    """The class for a module of a class that is not torch's but computes the same, and what it keeps on the module."""
    if isinstance(module, Derived) or target_of(module) or refusal(module):
        return None
    kind: type = type(module)
    if call := known_layer_norm(module):
        return derived(KnownLayerNorm, kind), {"_primer_fast_call": call}
    if fuse_activations and activation_of(module) is None and (name := known_activation(module)):
        return derived(KnownActivation, kind), {"_primer_fast_computes": name}
    return None


def closed(module) -> str | None:
    """Why nothing in a module may be changed, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if any(kind.__name__ in _WRAPPERS for kind in type(module).__mro__):
        return "call replace_modules before wrapping"
    return None


def refusal(module) -> str | None:
    """Why ours would not compute what the module does, or None."""
    if "forward" in module.__dict__:
        return "its forward is set on the instance"
    if "activation" in module.__dict__ or "activation" in module._modules:
        return "it has an attribute of its own named activation"
    for name, parameter in module.named_parameters():
        if type(parameter) is not torch.nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}, no plain Parameter"
    for kind, options in _UNBUILT.items():
        for attribute, option in options.items() if isinstance(module, kind) else ():
            if getattr(module, attribute) is not None and getattr(module, attribute) is not False:
                return f"{option} is not built"
    return None


def why_left(module, parent, chosen, fuse_activations) -> str | None:
    """Why a module was left as it is; None where it is ours, or computes nothing itself."""
    ours = isinstance(module, Derived) and not isinstance(module, KnownActivation)
    if ours or isinstance(module, torch.nn.Identity) or type(module) in OURS.values():
        return None
    if reason := closed(module):
        return reason
    if target_of(module):
        return refusal(module) if chosen else UNWANTED
    if isinstance(module, torch.nn.TransformerEncoderLayer):
        return "evaluated without gradients torch fuses it; torch.backends.mha.set_fastpath_enabled(False) ends that"
    if named_as_layer_norm(module) and not any(True for _ in module.children()):
        return (refusal(module) or "its forward is not just one call of layer_norm") if chosen else UNWANTED
    for kind in OURS:
        if isinstance(module, kind):
            return f"a subclass of {kind.__name__}"
    if any(True for _ in module.children()) or isinstance(module, _CONTAINERS):
        return None
    if activation_of(module) is None:
        own = named_as_activation(module) and not type(module).__module__.startswith("torch.")
        return (
            f"it computes none of {', '.join(ACTIVATIONS)}" if own and chosen and fuse_activations else "no op of ours"
        )
    return _why_apart(parent, module, fuse_activations and chosen)


def _why_apart(parent, activation, wanted):
    children = (parent is not None and children_in_order(parent)) or []
    if activation not in children:
        return f"{type(parent).__name__}.forward is not known to call it right after a product" if wanted else UNWANTED
    for before, one in zip([None, *children], children, strict=False):
        if one is not activation:
            continue
        if before is None:
            return "it comes first"
        if fused_activation(before, activation) is None:
            why = "hooks keep it apart from" if hasattr(before, "activated") else "it follows"
            return f"{why} {type(before).__name__}"
    return None if isinstance(parent, Chain) else UNWANTED


def attention_called(module: torch.nn.Module) -> str | None:
    """What to do about attention that the module's class calls as a function of torch; None where it calls none."""
    for kind in type(module).__mro__:
        for function in filter(_is_theirs, vars(kind).values()):
            if reason := _calls_torchs(function):
                return reason
    return None


def _is_theirs(value):
    return isinstance(value, FunctionType) and not value.__module__.startswith(("torch.", "primer_fast."))


def _calls_torchs(function, helpers=True):
    attend = torch._C._nn.scaled_dot_product_attention
    for value, by_name in _globals_used(function.__code__, function.__globals__):
        if value is attend and by_name:
            return f"{function.__module__} imports {_ATTEND} by name, which primer_fast.sdpa() does not reach"
        if value is attend:
            return f"`with primer_fast.sdpa():` around the model's calls sends its {_ATTEND} to ours"
        if helpers and _is_theirs(value) and (reason := _calls_torchs(value, helpers=False)):
            return reason
    return None


def _globals_used(code: CodeType, names: dict) -> Iterator[tuple[object, bool]]:
    """The values that code uses: of globals, with True, and of attributes of modules, as torch.relu, with False."""
    value: object = None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            value = names.get(step.argval)
            yield value, True
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = getattr(value, step.argval, None)
            yield value, False
        elif step.opname not in ("PUSH_NULL", "CACHE", "EXTENDED_ARG"):
            value = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_used(constant, names)


def takes_implementations(model: torch.nn.Module) -> bool:
    """Whether a model of transformers lets its attention be chosen; one without attention does not."""
    flags = ("_supports_sdpa", "_supports_attention_backend", "_supports_flash_attn")
    return any(getattr(model, flag, False) for flag in flags)


def has_attention(model: torch.nn.Module) -> bool:
    """Whether the class of any module has attention in its name."""
    return any("attention" in type(module).__name__.lower() for module in model.modules())


def loss_head(model: torch.nn.Module) -> tuple[str, torch.nn.Linear] | None:
    """The layer that makes logits over a vocabulary, and its name: the last one as wide as a table of embeddings."""
    tables = {(m.num_embeddings, m.embedding_dim) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    found = None
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and getattr(module, "activation", None) is None and name:
            of_tokens = (module.out_features, module.in_features) in tables or name.rpartition(".")[2] == "lm_head"
            found = (name, module) if of_tokens else found
    return found
