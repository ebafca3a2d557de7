"""Attention's backward in one pass: five products for each pair of blocks, where the deterministic one takes seven.

    p_ij = exp2(scale log2(e) q[i] . k[j] - lse[i]),   ds_ij = p_ij (do[i] . v[j] - delta[i])
    dv[j] = sum_i p_ij do[i],   dk[j] = scale sum_i ds_ij q[i],   dq[i] = scale sum_j ds_ij k[j]

Legend: B sequences, H query heads, HK key heads, H / HK query heads share one key head, T queries, S keys, width D.
lse: base-2 logarithm of a query's sum of exponentials, delta = sum over d of o do.

One program keeps a block of keys, its values and their gradients, and walks over the queries of every head of its group
that see it. dk and dv never leave its registers. dq has a part from every program: the tensor memory accelerator adds
them to a float32 workspace, in the order in which programs come. That order differs between runs, and with it dq's last
bits: this is the one kernel here with atomic additions, for callers who ask for it, never under
torch.use_deterministic_algorithms(True). A second kernel scales and casts dq.

FLOPs: 10 H T S D per sequence, half of it causal. Traffic beside q, k, v, do and their gradients: 4 H T D bytes of
workspace, written, read, and added to by each of S / BLOCK_N programs, in L2 where it fits.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..device import Chip, cdiv, chip_of, on_device_of
from ..launch.entry import entry
from ..tile import LOG2_E
from ..tunable import Variants
from .backward import attention_statistics
from .forward import heads_at_once, ordered_tile
from .settings import AttentionProblem, AttentionSettings, attention_bucket
from .tile import block_width, described, descriptor, empty_like_rows, head_statistics, query_statistics

_CAST = 2048  # elements of dq per program


@entry(do_not_specialize=["T", "S", "offset", "heads_at_once"])
def attention_onepass_kernel(
    dq, dk, dv, do, q, k, v,  # descriptors of (B, H or HK, T or S, D); dq is of float32
    statistics_ptr,  # see attention_statistics
    B, HK, T, S, offset, scale, scale_log2, heads_at_once,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, EVEN_S: tl.constexpr, PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key head. The first keys, which most queries see, come first."""
    tile, head = ordered_tile(tl.program_id(0), tl.cdiv(S, BLOCK_N), B * HK, False, heads_at_once)
    b, hk, n = head // HK, head % HK, tile * BLOCK_N
    keys = n + tl.arange(0, BLOCK_N)
    k_tile = k.load([b, hk, n, 0]).reshape(BLOCK_N, BLOCK_D)
    v_tile = v.load([b, hk, n, 0]).reshape(BLOCK_N, BLOCK_D)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(n - offset, 0) // BLOCK_M * BLOCK_M

    # Keys that no query sees take one block past the last, whose queries have no weight: a way around the loop would
    # define dk and dv without a product, for which ptxas makes every product wait for the one before it
    begin = tl.minimum(begin, tl.cdiv(T, BLOCK_M) * BLOCK_M)
    blocks = tl.maximum(tl.cdiv(T - begin, BLOCK_M), 1)
    steps = GROUP * blocks
    tl.assume(steps > 0)
    for i in range(steps):  # one loop over heads and queries: the pipeline stays full
        h = hk * GROUP + i // blocks
        m = begin + i % blocks * BLOCK_M
        queries = m + tl.arange(0, BLOCK_M)
        statistics = head_statistics(statistics_ptr, b * HK * GROUP + h, T, PAD, False)
        statistics = query_statistics(statistics, m, BLOCK_M, PAD, False)
        q_tile = q.load([b, h, m, 0]).reshape(BLOCK_M, BLOCK_D)
        p = tl.exp2(tl.dot(k_tile, q_tile.T) * scale_log2 - tl.load(statistics)[None, :])
        if CAUSAL:
            p = tl.where(keys[:, None] <= queries[None, :] + offset, p, 0.0)
        if not EVEN_S:  # a key that is not there has score 0, whose exponential can be infinite
            p = tl.where(keys[:, None] < S, p, 0.0)
        do_tile = do.load([b, h, m, 0]).reshape(BLOCK_M, BLOCK_D)
        dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile)
        delta = tl.load(statistics + PAD)
        ds = (p * (tl.dot(v_tile, do_tile.T) - delta[None, :])).to(q_tile.dtype)
        dk_tile = tl.dot(ds, q_tile, dk_tile)
        dq_tile = tl.dot(k_tile.T, ds).T  # wgmma needs 64 rows; BLOCK_M may be 32
        dq.atomic_add([b, h, m, 0], dq_tile.reshape(1, 1, BLOCK_M, BLOCK_D))

    dk.store([b, hk, n, 0], (dk_tile * scale).to(dk.dtype).reshape(1, 1, BLOCK_N, BLOCK_D))
    dv.store([b, hk, n, 0], dv_tile.to(dv.dtype).reshape(1, 1, BLOCK_N, BLOCK_D))


@entry
def attention_onepass_cast_kernel(dq_ptr, sums_ptr, numel, scale, BLOCK: tl.constexpr):
    """One program: BLOCK elements of dq = scale * sums, both dense and laid out alike."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(sums_ptr + offs, mask=offs < numel, other=0.0)
    tl.store(dq_ptr + offs, (sums * scale).to(dq_ptr.dtype.element_ty), mask=offs < numel)


def onepass_default(width: int) -> AttentionSettings:
    """Settings that do not spill on Hopper. width: of a row, rounded up to a power of two, at most 128."""
    return AttentionSettings(64, 128, 8, 2) if width <= 64 else AttentionSettings(32, 128, 8, 2)


def supported(
    q: Tensor, k: Tensor, v: Tensor, *, causal_offset: int | Tensor | None = 0, window: int | None = None,
    softcap: float | None = None, key_lengths: Tensor | None = None, mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> bool:  # fmt: skip
    """Whether attention_bwd_onepass serves these arguments, and determinism is not asked for."""
    return (
        not torch.are_deterministic_algorithms_enabled()
        and chip_of(q).has_descriptors
        and not isinstance(causal_offset, torch.Tensor)
        and window is None and softcap is None and key_lengths is None and mask is None and dropout_p == 0
        and q.element_size() == 2
        and q.shape[-1] == v.shape[-1] <= 128
        and all(described(t) and t.stride(-1) == 1 for t in (q, k, v))
    )  # fmt: skip


# Predicted clocks of a Hopper multiprocessor for a block of 128 queries and 128 keys, by width and whether heads are
# grouped: in one pass, in two kernels. They are sums over the compiled loops of what the tensor cores take (or shared
# memory, at 128 bytes a clock, for operands that come from there), a clock for each instruction of four warps, and 35
# for a barrier. For one pass they hold 5 % for its workspace at 4096 keys. Its steps of 32 queries for rows of 128
# elements make products that read shared memory for half as long again as they multiply; with grouped heads so do those
# of the other way. Not counted: at a width of 64 two programs of the other way share a multiprocessor.
_CLOCKS = {
    (64, False): (5700, 6300),
    (64, True): (5700, 6300),
    (128, False): (11700, 10200),
    (128, True): (11700, 12200),
}


def predicted_way(gpu: Chip, p: AttentionProblem) -> str:
    """The way of the backward that is predicted to take fewer clocks."""
    one_pass, two_kernels = _CLOCKS[64 if p.width <= 64 else 128, p.group > 1]
    return "one-pass" if one_pass < two_kernels else "deterministic"


# Asked only where the caller allows sums without a fixed order and ``supported`` says yes
backward_choice = Variants(
    "attention_backward", attention_bucket,
    {"one-pass": lambda gpu, p: True, "deterministic": lambda gpu, p: True}, predicted_way,
)  # fmt: skip


def chosen(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Whether to take the backward in one pass for q (B, H, T, D), k (B, HK, S, D), which must be ``supported``."""
    (B, H, T, D), (_, HK, S, _) = q.shape, k.shape
    problem = AttentionProblem(
        B * HK, T, S, q.element_size(), block_width(D), True, int(H != HK), group=H // HK, causal=causal
    )  # fmt: skip
    return backward_choice(chip_of(q), problem).variant == "one-pass"


def attention_bwd_onepass(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool,
    causal_offset: int = 0, settings: AttentionSettings | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """do, q (B, H, T, D), k, v (B, HK, S, D), all as ``supported`` asks -> dq, dk, dv, laid out as q, k, v.

    out (B, H, T, D), lse (B, H, T): of the forward. causal: query i saw keys j <= i + causal_offset.
    """
    (B, H, T, D), (_, HK, S, _) = q.shape, k.shape
    dq, dk, dv = empty_like_rows(q, D), empty_like_rows(k, D), empty_like_rows(v, D)
    do = do if described(do) and do.stride(-1) == 1 else empty_like_rows(q, D).copy_(do)
    sums = torch.zeros_like(dq, dtype=torch.float32)
    width = block_width(D)
    settings = settings or onepass_default(width)
    at_once = min(B * HK, heads_at_once(HK, HK, T * H // HK, D, D, q.element_size()))
    with on_device_of(q):
        attention_onepass_kernel[(B * HK * cdiv(S, settings.BLOCK_N),)](
            *(descriptor(t, settings.BLOCK_M) for t in (sums,)), *(descriptor(t, settings.BLOCK_N) for t in (dk, dv)),
            *(descriptor(t, settings.BLOCK_M) for t in (do, q)), *(descriptor(t, settings.BLOCK_N) for t in (k, v)),
            attention_statistics(do, out, lse, settings.BLOCK_M),
            B, HK, T, S, causal_offset, scale, scale * LOG2_E.value, at_once,
            H // HK, causal, S % settings.BLOCK_N == 0, settings.BLOCK_M, settings.BLOCK_M, settings.BLOCK_N, width,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        attention_onepass_cast_kernel[(cdiv(dq.numel(), _CAST),)](dq, sums, dq.numel(), scale, _CAST, num_warps=4)
    return dq, dk, dv
