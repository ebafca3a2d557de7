"""Backward of the loss heads: the gradient at the logits, and the products that take it from there. See __init__.py."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import cdiv, chip_of, dot_precision, on_device_of
from ..launch.descriptor import strides_beside, tensor_descriptor
from ..launch.entry import entry
from ..matmul import Operand, matmul
from ..product import MatmulSettings, product_choice, tile_fits
from ..tile import LOG2_E, grouped_tile
from . import LEAST, LN_2, Head, any_within, large, loaded, operands, padded, product_of, products_tile, registers

CHUNK_BYTES = 2**28  # of the buffer for gradients at the logits
_CHUNK_ROWS = 16384
_KEPT_ROWS, _KEPT_COLUMNS = 8, 1024  # of a program that takes logits from memory


@triton.jit
def _row_terms(
    offs_m, M, target_ptr, peak_ptr, log_total_ptr, score_grad_ptr, entropy_grad_ptr, entropy_ptr,
    first_class, V, ignore_index, share, smooth, inverse_temperature,
):  # fmt: skip
    """What the gradient at the logits of rows is made of; target: -1 where it is not one of the V classes.

    With e = e^(z - max) it is  -e (weight + slope log2 e) + uniform,  and at the target ``at_target`` more.
    """
    rows = offs_m < M
    target = tl.load(target_ptr + offs_m, mask=rows, other=-1)
    counts = rows
    if ignore_index is not None:
        counts &= target != ignore_index
    target -= first_class
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    peak = tl.load(peak_ptr + offs_m, mask=rows, other=0.0)
    log_total = tl.load(log_total_ptr + offs_m, mask=rows, other=0.0)
    score_grad = tl.load(score_grad_ptr + offs_m, mask=counts, other=0.0) * inverse_temperature
    weight, slope = score_grad, score_grad
    if entropy_ptr is not None:
        entropy_grad = tl.load(entropy_grad_ptr + offs_m, mask=counts, other=0.0) * inverse_temperature
        entropy = tl.load(entropy_ptr + offs_m, mask=rows, other=0.0)
        weight += entropy_grad * (entropy - log_total * LN_2)
        slope = entropy_grad * LN_2
    of_total = tl.exp2(-log_total)
    return target, peak, weight * of_total, slope * of_total, score_grad * smooth, score_grad * share


@triton.jit
def _gradient_at(z, target, peak, weight, slope, uniform, at_target, offs_v, scale, has_target, ENTROPY: tl.constexpr):
    """Logits before the scale -> gradient at them, from the terms of their rows."""
    log_e = z * scale - peak[:, None]  # one multiply-add, as in the forward
    factor = -weight[:, None]
    if ENTROPY:
        factor -= slope[:, None] * tl.maximum(log_e, LEAST)
    g = tl.exp2(log_e) * factor + uniform[:, None]
    if has_target:
        g += tl.where(offs_v[None, :] == target[:, None], at_target[:, None], 0.0)
    return g


@triton.jit
def _store_gradient(
    products, out, bias_ptr, target, peak, weight, slope, uniform, at_target, has_target, m, v, M, V, stride_out, scale,
    ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Products -> gradient at them, stored in SUBTILES column parts so that fewer values live at once."""
    if SUBTILES > 1:
        HALF: tl.constexpr = BLOCK_V // 2
        left, right = products.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _store_gradient(
            left, out, bias_ptr, target, peak, weight, slope, uniform, at_target, has_target, m, v, M, V,
            stride_out, scale, ENTROPY, DESCRIPTORS, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
        _store_gradient(
            right, out, bias_ptr, target, peak, weight, slope, uniform, at_target, has_target, m, v + HALF, M, V,
            stride_out, scale, ENTROPY, DESCRIPTORS, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
    else:
        offs_v = v + tl.arange(0, BLOCK_V)
        if bias_ptr is not None:
            products += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)[None, :]
        g = _gradient_at(
            products, target, peak, weight, slope, uniform, at_target, offs_v, scale, has_target, ENTROPY
        )  # fmt: skip
        if DESCRIPTORS:
            out.store([m, v], g.to(out.dtype))
        else:
            offs_m = m + tl.arange(0, BLOCK_M)
            inside = (offs_m[:, None] < M) & (offs_v[None, :] < V)
            offsets = offs_m.to(tl.int64)[:, None] * stride_out + offs_v[None, :]
            tl.store(out + offsets, g.to(out.dtype.element_ty), mask=inside)


@entry
def logits_gradient_kernel(
    out,  # (M, V), rows stride_out apart: pointer or descriptor
    x, w, bias_ptr,
    target_ptr, peak_ptr, log_total_ptr, score_grad_ptr, entropy_grad_ptr, entropy_ptr,  # (M,)
    stride_out, strides_x, strides_w,  # in elements
    M, V, K, first_class, ignore_index,  # V classes from first_class on; None if no row is ignored
    scale, share, smooth, inverse_temperature,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr, DESCRIPTOR_OUT: tl.constexpr,
    X_K_MAJOR: tl.constexpr, W_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """One program: the gradient at one tile of x w^T + b."""
    tile_m, tile_v = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(V, BLOCK_V), GROUP_M)
    m, v = tile_m * BLOCK_M, tile_v * BLOCK_V
    products = products_tile(
        x, w, m, v, M, V, K, strides_x, strides_w,
        PRECISION, EVEN_K, DESCRIPTORS, X_K_MAJOR, W_K_MAJOR, BLOCK_M, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    target, peak, weight, slope, uniform, at_target = _row_terms(
        m + tl.arange(0, BLOCK_M), M, target_ptr, peak_ptr, log_total_ptr, score_grad_ptr, entropy_grad_ptr,
        entropy_ptr, first_class, V, ignore_index, share, smooth, inverse_temperature,
    )  # fmt: skip
    _store_gradient(
        products, out, bias_ptr, target, peak, weight, slope, uniform, at_target, any_within(target, v, BLOCK_V),
        m, v, M, V, stride_out, scale, entropy_ptr is not None, DESCRIPTOR_OUT, BLOCK_M, BLOCK_V, SUBTILES,
    )  # fmt: skip


@entry
def logits_kept_gradient_kernel(
    out_ptr, logits_ptr,  # (M, columns), rows stride_out and stride_logits apart; only V columns are logits
    target_ptr, peak_ptr, log_total_ptr, score_grad_ptr, entropy_grad_ptr, entropy_ptr,  # (M,)
    stride_out, stride_logits, M, V, columns, first_class, ignore_index, scale, share, smooth, inverse_temperature,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: the gradient at one tile of logits that are in memory."""
    tiles_v = tl.cdiv(columns, BLOCK_V)
    offs_m = tl.program_id(0) // tiles_v * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.program_id(0) % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (offs_m < M)[:, None] & (offs_v < columns)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    z = tl.load(logits_ptr + rows * stride_logits + offs_v[None, :], mask=inside, other=0.0).to(tl.float32)
    target, peak, weight, slope, uniform, at_target = _row_terms(
        offs_m, M, target_ptr, peak_ptr, log_total_ptr, score_grad_ptr, entropy_grad_ptr, entropy_ptr,
        first_class, V, ignore_index, share, smooth, inverse_temperature,
    )  # fmt: skip
    g = _gradient_at(
        z, target, peak, weight, slope, uniform, at_target, offs_v, scale, True, entropy_ptr is not None
    )  # fmt: skip
    tl.store(out_ptr + rows * stride_out + offs_v[None, :], g.to(out_ptr.dtype.element_ty), mask=inside)


gradient_choice = product_choice("logits_gradient", tile_fits)


def chunk_size(rows: int, classes: int, itemsize: int, limit: int = CHUNK_BYTES) -> tuple[int, int]:
    """Rows and classes of a chunk of gradients of at most ``limit`` bytes; all chunks about as wide."""
    rows = min(rows, _CHUNK_ROWS)
    most = max(limit // (rows * itemsize) // 256, 1) * 256
    even = cdiv(classes, cdiv(classes, most))
    return rows, min(cdiv(even, 256) * 256, cdiv(classes, 16) * 16)


def logits_bwd(
    score_grad: Tensor, entropy_grad: Tensor | None, x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor,
    lse: Tensor, entropy: Tensor | None, head: Head, needed: Sequence[bool], precision: str,
    settings: MatmulSettings | None = None, chunk: tuple[int, int] | None = None, kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """score_grad, entropy_grad (N,) float32, contiguous, entropy_grad and entropy None where there was none; lse of the
    forward -> dx (N, D), dw (V, D), db (V,), each None unless ``needed`` (three bools); score_grad is of the scores
    before ``head.sign``. chunk: its rows and classes. kept: the forward's logits, or None to make them once more.
    """
    (N, D), V = x.shape, w.shape[0]
    rows, classes = chunk or chunk_size(N, V, x.element_size())
    need_x, need_w, need_b = needed
    gpu = chip_of(x)
    if gpu.has_descriptors and large(N, V, D):
        x = Operand(x)
        x = x.aligned(x.k_major).t

    def empty(*shape, dtype=x.dtype):
        return torch.empty(shape, dtype=dtype, device=x.device)

    buffer = empty(rows, padded(classes))
    dx = empty(N, D) if need_x else None
    dw = empty(V, D, dtype=w.dtype) if need_w else None
    db = torch.zeros(V, dtype=torch.float32, device=x.device) if need_b else None
    single = x.dtype == torch.float32  # then the gradients are themselves what they are summed in
    dx_sum = dx if single or not need_x or classes >= V else empty(N, D, dtype=torch.float32)
    dw_sum = None if single or not need_w or rows >= N else empty(classes, D, dtype=torch.float32)
    for v in range(0, V, classes):
        w_chunk = Operand(w[v : v + classes])
        if gpu.has_descriptors and large(N, V, D):
            w_chunk = w_chunk.aligned(w_chunk.k_major)
        w_chunk = w_chunk.t
        own = slice(v, v + len(w_chunk))
        for r in range(0, N, rows):
            part = slice(r, min(r + rows, N))
            x_rows = x[part]
            g = buffer[: len(x_rows), : len(w_chunk)]
            of_rows = [t if t is None else t[part] for t in (target, *lse, score_grad, entropy_grad, entropy)]
            if kept is None:
                bias_chunk = None if bias is None else bias[own]
                _gradient(g, x_rows, w_chunk, bias_chunk, of_rows, v, V, head, precision, settings)
            else:
                _kept_gradient(buffer, kept[part, v:], len(w_chunk), of_rows, v, V, head)
            if need_x:
                out = dx if own.stop == V else dx_sum
                matmul(g, w_chunk.T, precision, out=out[part], addend=dx_sum[part] if v else None)
            if need_w or need_b:
                out = total = None
                if need_w:
                    total = dw[own] if dw_sum is None else dw_sum[: len(w_chunk)]
                    out = dw[own] if part.stop == N else total
                sums = matmul(
                    g.T, (x_rows if need_w else x_rows[:, :0]).T, precision,
                    sums_dtype=torch.float32 if need_b else None, out=out, addend=total if r else None,
                )[2]  # fmt: skip
                if need_b:
                    db[own] += sums
    return dx, dw, None if db is None else db.to(bias.dtype)


def _gradient(
    out, x, w, bias, of_rows, first_class, classes, head, precision, settings
):  # fmt: skip
    """Fill out with the gradient at the products of rows x and of the classes w, first_class and on, of ``classes``."""
    (M, K), V = x.shape, w.shape[0]
    gpu = chip_of(x)
    dot = dot_precision(gpu, precision)
    x_, w_, descriptors = operands(x, w, gpu, False)
    problem = product_of(M, V, K, x.element_size(), dot, descriptors, x_.vector and w_.vector)
    settings = settings or gradient_choice(gpu, problem)
    result, stride = out, out.stride(0)
    if descriptors:
        result = tensor_descriptor(out, [M, V], [stride, 1], [settings.BLOCK_M, settings.BLOCK_N // settings.SUBTILES])
    with on_device_of(x):
        logits_gradient_kernel[(cdiv(M, settings.BLOCK_M) * cdiv(V, settings.BLOCK_N),)](
            result, *loaded(x_, w_, settings, descriptors), bias, *of_rows,
            1 if descriptors else stride, *strides_beside(descriptors, 2, x_.t, w_.t), M, V, K, first_class,
            head.ignore_index, *_factors(head, classes),
            dot, K % settings.BLOCK_K == 0 < K, descriptors, descriptors, x_.k_major, w_.k_major,
            settings.BLOCK_M, settings.BLOCK_N, settings.BLOCK_K, settings.GROUP_M, settings.SUBTILES,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
            **registers(gpu, settings, x.element_size(), descriptors),
        )  # fmt: skip


def _kept_gradient(out, logits, V, of_rows, first_class, classes, head):
    """Fill out (rows, columns) with the gradient at ``logits`` (rows, ..), of which V are its classes."""
    M, columns = len(logits), padded(V)
    with on_device_of(out):
        logits_kept_gradient_kernel[(cdiv(M, _KEPT_ROWS) * cdiv(columns, _KEPT_COLUMNS),)](
            out, logits, *of_rows, out.stride(0), logits.stride(0), M, V, columns, first_class,
            head.ignore_index, *_factors(head, classes), _KEPT_ROWS, _KEPT_COLUMNS, num_warps=8,
        )  # fmt: skip


def _factors(head, classes):
    """Of the logits in units of log2, of the target's label, of every label, and of the gradient."""
    return LOG2_E.value / head.temperature, 1.0 - head.smoothing, head.smoothing / classes, 1.0 / head.temperature
