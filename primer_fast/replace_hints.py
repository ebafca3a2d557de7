"""What ``replace_modules`` cannot do itself, but its caller can: attention called as a function, and the loss head."""

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

import torch

__all__ = ["attention_called", "has_attention", "loss_head", "takes_implementations"]
_NAME = "scaled_dot_product_attention"


def attention_called(module: torch.nn.Module) -> str | None:
    """Why the attention that the module's class calls as a function is torch's still; None where it calls none."""
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
            return f"{function.__module__} imports {_NAME} by name, which primer_fast.sdpa() does not reach"
        if value is attend:
            return f"`with primer_fast.sdpa():` around the model's calls sends its {_NAME} to ours"
        if helpers and _is_theirs(value) and (reason := _calls_torchs(value, helpers=False)):
            return reason
    return None


def _globals_used(code: CodeType, names: dict) -> Iterator[tuple[object, bool]]:
    """What code refers to: globals (True), and what it finds in modules, ``torch.nn.functional.relu`` (False)."""
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
    """Whether there is a class named for it."""
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
