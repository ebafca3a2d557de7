"""Our kernels in the place of the flash kernels that torch's scaled_dot_product_attention calls on CUDA.

torch.nn.attention's registry asks a backend to override operators of its dispatcher. Those for whole batches,
(B, H, T, D) with one length, are overridden here; those for sequences packed into one tensor remain torch's.
"""

__all__ = ["Override", "override"]

import math

import torch
from torch.library import Library

from primer_fast.kernels.scaled_dot_product_attention import Band, Scoring, attention_backward, attention_forward


class Override:
    """Operators of torch that ours stand in for, until ``remove`` is called."""

    def __init__(self, library: Library):
        self.library = library

    def remove(self) -> None:
        self.library._destroy()


def override(device: str = "CUDA") -> Override:
    """Put our attention in the place of torch's flash operators, for tensors of the dispatch key ``device``."""
    library = Library("aten", "IMPL", device)
    library.impl("_scaled_dot_product_flash_attention", _forward, device)
    library.impl("_scaled_dot_product_flash_attention_backward", _backward, device)
    return Override(library)


def _forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """What torch's operator returns: output, logsumexp, None twice, T, S, the generator's state in two, no weights."""
    if return_debug_mask:
        raise NotImplementedError("primer_fast: weights are never in memory; set return_debug_mask=False")
    seed = torch.randint(2**62, (2,), device=query.device) if dropout_p > 0 else query.new_empty(2, dtype=torch.int64)
    out, lse = attention_forward(
        *_rows(query, key, value), *_rules(query, key, is_causal, dropout_p, seed, scale), _precision(), True
    )
    like = torch.empty_like(query)  # compiled graphs count on its strides
    out = out if out.stride() == like.stride() else like.copy_(out)
    none = query.new_empty(0)
    return (
        out, lse * math.log(2), None, None, query.shape[2], key.shape[2],
        seed.view(torch.uint64), torch.empty((), dtype=torch.uint64, device=query.device), none,
    )  # fmt: skip


def _backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    """-> gradients of query, key and value"""
    rules = _rules(query, key, is_causal, dropout_p, philox_seed.view(torch.int64), scale)
    tensors = _rows(grad_out, query, key, value, out)
    return attention_backward(*tensors, logsumexp * (1 / math.log(2)), *rules, _precision())


def _rules(query, key, is_causal, dropout_p, seed, scale):
    T, S = query.shape[2], key.shape[2]
    if is_causal and T != S:  # torch never gets here, and the operator's own rule is another than ours
        raise NotImplementedError(f"primer_fast: causal attention here needs as many keys as queries; got {S} and {T}")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return Band(right=0 if is_causal else None), Scoring(
        scale, dropout_p=dropout_p, seed=seed[:1] if dropout_p else None
    )


def _rows(*tensors):
    """Each tensor with its last axis adjacent in memory; copied where it is not."""
    return (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors)


def _precision():
    return torch.get_float32_matmul_precision()
