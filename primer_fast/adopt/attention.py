"""Attention of code that calls torch's or transformers', computed by our kernels."""

__all__ = ["NAME", "register_attention", "sdpa", "transformers_attention"]

from contextlib import ContextDecorator, suppress
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import functional as F
from primer_fast.adopt.flash_backend import override

NAME = "primer_fast"  # in the registries


# A function in torch's place. A torch.overrides mode would also reach code that imported the function by name, but not
# torch.nn.MultiheadAttention or what autograd computes again for checkpoints, and it would cost every other function.
class sdpa(ContextDecorator):
    """``with primer_fast.sdpa():`` sends ``torch.nn.functional.scaled_dot_product_attention`` to ours in the block.

    It holds for the process as long as a block is open in any thread or task; blocks can be nested and decorate
    functions. Calls that ours does not compute as torch does go to torch: a mask that needs a gradient or comes with
    ``is_causal``, nested tensors, tensor subclasses, ``torch.func`` transforms. Code that did ``from
    torch.nn.functional import scaled_dot_product_attention`` before is not reached.

    Where activations are checkpointed, call ``backward`` in the block too: it computes them again there, and must do
    it the same way. A compiled function is compiled again for the block; a block within one breaks its graph.
    """

    _lock = Lock()
    _open = 0
    _torchs: Any = None

    def __enter__(self):
        with sdpa._lock:
            if sdpa._open == 0:
                sdpa._torchs = torch_F.scaled_dot_product_attention
                torch_F.scaled_dot_product_attention = _routed  # type: ignore[assignment]
            sdpa._open += 1
        return self

    def __exit__(self, *_):
        with sdpa._lock:
            sdpa._open -= 1
            if sdpa._open == 0 and torch_F.scaled_dot_product_attention is _routed:
                torch_F.scaled_dot_product_attention = sdpa._torchs


def _routed(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):  # fmt: skip
    attend = sdpa._torchs
    if _ordinary(query) and _ordinary(key) and _ordinary(value) and (
        attn_mask is None or (_ordinary(attn_mask) and not attn_mask.requires_grad and not is_causal)
    ):  # fmt: skip
        attend = F.scaled_dot_product_attention
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _ordinary(t):
    kind = type(t)
    return (kind is Tensor or kind is torch.nn.Parameter) and not (
        t.is_nested or (not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(t))
    )


def register_attention() -> tuple[str, ...]:
    """Make our attention known to those who keep a list, and return who does: "torch", "transformers" where installed.

    transformers: ``attn_implementation="primer_fast"`` and ``model.set_attn_implementation("primer_fast")`` then work.
    Masks are those of its "sdpa"; also softcap is computed, and grouped keys and values are not repeated.

    torch: ``torch.nn.attention.activate_flash_attention_impl("primer_fast")`` then puts ours where its flash kernels
    for CUDA are called, in compiled graphs too, until ``restore_flash_attention_impl()``: for the whole process, for
    float16 and bfloat16 without a mask. Sequences packed into one tensor keep torch's kernels.

    Calling it again changes nothing.
    """
    known = []
    if register := getattr(torch.nn.attention, "register_flash_attention_impl", None):
        register(NAME, register_fn=override)
        known.append("torch")
    with suppress(ImportError):  # not installed, or from before there were these lists
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register(NAME, transformers_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        known.append("transformers")
    return tuple(known)


def transformers_attention(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, Hk, S, D)
    value: Tensor,  # (B, Hk, S, Dv)
    attention_mask: Tensor | None,  # (B or 1, H or 1, T, S), bool: True takes part, or floating; holds every rule
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:  # (B, T, H, Dv), no weights
    """What transformers calls as "primer_fast": as its "sdpa", which keeps masks and biases that need a gradient.

    Without a mask the module's ``is_causal`` decides, and a single query sees every key.

    Raises:
        NotImplementedError: the model has attention sinks.
    """
    if s_aux is not None:
        raise NotImplementedError(f'{NAME}: attention sinks are not built; use attn_implementation="eager"')
    if position_bias is not None or (attention_mask is not None and attention_mask.requires_grad):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options |= {"softcap": softcap, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    output = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, bool(is_causal and attention_mask is None and query.shape[2] > 1),
        scaling, key.shape[1] != query.shape[1], softcap=softcap,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None
