"""What linear_log_prob and linear_cross_entropy share: checks, which path a call takes, and the path off the GPU.

There logits are made chunk by chunk of rows and classes, at most CHUNK_BYTES at a time, in float32 where the input has
16 bits; the forward keeps one number per row, and the backward makes each chunk once more.
"""

__all__ = [
    "CHUNK_BYTES",
    "LEAST",
    "PLAIN_BYTES",
    "as_they_are",
    "check",
    "check_ignore_index",
    "check_target",
    "chunked_bwd",
    "chunked_fwd",
    "like_kept",
    "plain_is_best",
    "rows_of",
    "sums_dtype",
    "wide_logits",
]

import contextlib

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast.backend import autocast_dtype, has_kernels, jit_traces, runs_triton, transformed
from primer_fast.functional.checks import check_alike, check_tensors
from primer_fast.functional.operator import as_rows
from primer_fast.kernels.logits import Head, padded

PLAIN_BYTES = 2**24  # of all logits: below, PyTorch's own operators are as small and faster
CHUNK_BYTES = 2**23  # of logits at a time: they stay in a processor's cache
_CHUNK_ROWS = 4096
LEAST = -1e3  # log of an exponential that is 0: in place of what is less, so that 0 log 0 = 0


def plain_is_best(input: Tensor, linear_weight: Tensor, target: Tensor) -> bool:
    """Whether PyTorch's own operators take it: there are no rows, or so few that all logits may be in memory."""
    if jit_traces():
        return True
    rows = target.numel()
    if rows == 0:
        return True
    if runs_triton(input):
        return False
    small = rows * linear_weight.shape[0] * max(input.itemsize, 4) <= PLAIN_BYTES
    return small or transformed()


def wide_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:  # (..., V)
    """All logits through PyTorch's operators, in float32 or for float64 in float64, as no 16 bits and no autocast."""
    dtype = sums_dtype(input)
    bias = linear_bias if linear_bias is None else linear_bias.to(dtype)
    with as_they_are(input):
        return torch_F.linear(input.to(dtype), linear_weight.to(dtype), bias)


def check(op: str, input, linear_weight, target, linear_bias, probabilities: bool = False) -> None:
    """Raise TypeError or ValueError where the tensors do not fit each other.

    probabilities: the target holds one for each class, not the index of a class.
    """
    if not probabilities and _fit(input, linear_weight, target, linear_bias):
        return
    floats = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    named = {**floats, "target": target}
    check_tensors(op, named, optional=("linear_bias",))
    if input.dim() == 0 or linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{op}: linear_weight must have shape (V, D) with D the last axis of input; "
            f"got linear_weight {tuple(linear_weight.shape)} and input {tuple(input.shape)}"
        )
    if linear_weight.shape[0] == 0:
        raise ValueError(f"{op}: linear_weight must have at least one row; got {tuple(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(
            f"{op}: linear_bias must have one element per row of linear_weight; "
            f"got linear_bias {tuple(linear_bias.shape)} and linear_weight {tuple(linear_weight.shape)}"
        )
    if probabilities and target.shape != (*input.shape[:-1], len(linear_weight)):
        raise ValueError(
            f"{op}: a target of probabilities must have one element per row of input and class; "
            f"got target {tuple(target.shape)}, input {tuple(input.shape)} and {len(linear_weight)} classes"
        )
    if not probabilities and target.dtype is not torch.int64:
        raise TypeError(f"{op}: target must hold class indices, int64; got {target.dtype}")
    if not probabilities and target.shape != input.shape[:-1]:
        raise ValueError(
            f"{op}: target must have one element per row of input; "
            f"got target {tuple(target.shape)} and input {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise TypeError(f"{op}: input must hold floating-point numbers; got {input.dtype}")
    check_alike(op, named, dtypes=False)
    check_alike(op, floats)


def check_ignore_index(op: str, ignore_index) -> None:
    """Raise TypeError where it is neither an integer nor None."""
    if type(ignore_index) is int or ignore_index is None:
        return
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{op}: ignore_index must be an integer or None; got {ignore_index!r}")


def check_target(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError where a target is neither a class nor ignored; waits for the device to say so."""
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        got = int(target[outside].flatten()[0])
        raise IndexError(f"{op}: target must be in [0, {classes}) or ignore_index {ignore_index}; got {got}")


def _fit(input, linear_weight, target, linear_bias) -> bool:
    """All of ``check`` at once: on a small tensor its loops would take longer than the op."""
    if not (isinstance(input, Tensor) and isinstance(linear_weight, Tensor) and isinstance(target, Tensor)):
        return False
    shape, of_weight, dtype, device = input.shape, linear_weight.shape, input.dtype, input.device
    return (
        len(shape) > 0
        and len(of_weight) == 2
        and of_weight[0] > 0
        and of_weight[1] == shape[-1]
        and target.shape == shape[:-1]
        and dtype.is_floating_point
        and linear_weight.dtype is dtype
        and target.dtype is torch.int64
        and linear_weight.device == device
        and target.device == device
        and (
            linear_bias is None
            or (
                isinstance(linear_bias, Tensor)
                and linear_bias.shape == of_weight[:1]
                and linear_bias.dtype is dtype
                and linear_bias.device == device
            )
        )
    )


def as_they_are(x: Tensor):
    """Context in which autocast leaves products alone; costs nothing where it is off."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def sums_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over classes, and so of the results."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def like_kept(x: Tensor, w: Tensor) -> Tensor | None:
    """A tensor with the shape of the logits that the forward of x (N, D) and w (V, D) keeps: none off the GPU."""
    return x.new_empty(x.shape[0], padded(w.shape[0])) if has_kernels(x) else None


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _steps(length: int, step: int):
    return (slice(i, min(i + step, length)) for i in range(0, length, step))


def rows_of(input: Tensor, target: Tensor, linear_bias: Tensor | None):
    """-> input (N, D), target (N,), and the bias, the last two with adjacent elements."""
    return as_rows(input), target.reshape(-1).contiguous(), None if linear_bias is None else linear_bias.contiguous()


class _Chunks:
    """Walks over the logits of x (N, D) and w (V, D), in one buffer."""

    def __init__(self, x, w, bias, target, temperature):
        self.x, self.w, self.bias, self.target, self.temperature = x, w, bias, target, temperature
        itemsize = max(x.element_size(), 4)
        row_step = max(min(len(x), _CHUNK_ROWS, CHUNK_BYTES // itemsize // 16), 1)
        class_step = max(CHUNK_BYTES // itemsize // row_step, 16)
        self.rows = list(_steps(len(x), row_step))
        self.classes = list(_steps(len(w), class_step))
        elements = min(row_step, len(x)) * min(class_step, len(w))
        self.buffer = torch.empty(elements, dtype=sums_dtype(x), device=x.device)

    def logits(self, x, w, bias):
        """x (n, D), w (c, D), bias (c,), wide -> (n, c), valid until the next call."""
        z = self.buffer[: len(x) * len(w)].view(len(x), len(w))
        torch.mm(x, w.t(), out=z)
        if bias is not None:
            z.add_(bias)
        return z if self.temperature == 1 else z.div_(self.temperature)

    def hits(self, rows, classes):
        """-> each row's target as an index into the classes, clamped, and whether it is one of them."""
        index = self.target[rows] - classes.start
        count = classes.stop - classes.start
        return index.clamp(0, count - 1).unsqueeze(1), (index >= 0) & (index < count)


def chunked_fwd(x, w, bias, target, head: Head, entropy: bool):
    """x (N, D), w (V, D), bias (V,) or None, target (N,) int64 -> scores (N,), lse (2, N), entropies (N,) or None.

    As logits_fwd of the kernels, lse in nats.
    """
    chunks = _Chunks(x, w, bias, target, head.temperature)
    peak = torch.full((len(x),), -torch.inf, dtype=chunks.buffer.dtype, device=x.device)
    total, chosen, extra = (torch.zeros_like(peak) for _ in range(3))
    for rows in chunks.rows:
        x_rows = _wide(x[rows])
        for classes in chunks.classes:
            z = chunks.logits(x_rows, _wide(w[classes]), None if bias is None else _wide(bias[classes]))
            index, there = chunks.hits(rows, classes)
            chosen[rows] += torch.where(there, z.gather(1, index).squeeze(1), 0)
            top = torch.maximum(peak[rows], z.amax(dim=1))
            base, before = (t.masked_fill(t == -torch.inf, 0) for t in (top, peak[rows]))
            shrink = (peak[rows] - base).exp_()
            z.sub_(base.unsqueeze(1))
            if head.smoothing:  # a mean of what is relative to the peak: no sum overflows, large logits cancel
                share = z.new_full((z.shape[1],), 1 / len(w))
                extra[rows] += (before - base) * (classes.start / len(w)) + z @ share
            e = z.exp() if entropy else z.exp_()
            if entropy:
                moved = (peak[rows] - base).clamp_(min=LEAST) * total[rows]
                z.clamp_(min=LEAST)
                extra[rows] = shrink * (extra[rows] + moved) + z.mul_(e).sum(dim=1)
            total[rows] = total[rows] * shrink + e.sum(dim=1)
            peak[rows] = top
    log_total = total.log()
    scores = chosen - peak - log_total
    if head.smoothing:
        scores = (1 - head.smoothing) * scores + head.smoothing * (extra - log_total)
    scores = head.sign * scores
    known = (target >= 0) & (target < len(w))
    if head.ignore_index is not None:
        ignored = target == head.ignore_index
        scores, known = scores.masked_fill(ignored, 0), known | ignored
    found = log_total - extra / total if entropy else None
    if found is not None and head.ignore_index is not None:
        found = found.masked_fill(ignored, 0)
    scores, lse = scores.masked_fill(~known, torch.nan), torch.stack((peak, log_total.masked_fill(~known, torch.nan)))
    return scores, lse, found


def chunked_bwd(score_grad, entropy_grad, x, w, bias, target, lse, entropy, head: Head, needed):
    """As logits_bwd of the kernels, with lse of chunked_fwd: -> dx (N, D), dw (V, D), db (V,), None unless needed."""
    need_x, need_w, need_b = needed
    if head.ignore_index is not None:
        ignored = target == head.ignore_index
        score_grad = score_grad.masked_fill(ignored, 0)
        entropy_grad = None if entropy_grad is None else entropy_grad.masked_fill(ignored, 0)
    chunks = _Chunks(x, w, bias, target, head.temperature)
    wide = chunks.buffer.dtype
    dx = torch.zeros(x.shape, dtype=wide, device=x.device) if need_x else None
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if need_w else None
    db = torch.empty_like(bias) if need_b else None
    peak, log_total = lse
    total = log_total.exp()
    for classes in chunks.classes:
        w_chunk, bias_chunk = _wide(w[classes]), None if bias is None else _wide(bias[classes])
        dw_sum = dw[classes] if dw is not None and dw.dtype == wide else None
        if dw is not None and dw_sum is None:
            dw_sum = torch.empty(w_chunk.shape, dtype=wide, device=w.device)
        db_sum = torch.zeros(len(w_chunk), dtype=wide, device=w.device)
        for rows in chunks.rows:
            x_rows = _wide(x[rows])
            z = chunks.logits(x_rows, w_chunk, bias_chunk)
            scale = (score_grad[rows] / head.temperature).unsqueeze(1)
            index, there = chunks.hits(rows, classes)
            if entropy is None:
                g = z.sub_(peak[rows].unsqueeze(1)).exp_().mul_(-scale / total[rows].unsqueeze(1))
            else:
                log_p = z.sub_(peak[rows].unsqueeze(1)).sub_(log_total[rows].unsqueeze(1))
                p = log_p.exp()
                g = log_p.clamp_(min=LEAST).add_(entropy[rows].unsqueeze(1)).mul_(p)  # before what could overflow
                g.mul_((-entropy_grad[rows] / head.temperature).unsqueeze(1)).sub_(p.mul_(scale))
            if head.smoothing:
                g.add_(scale * (head.smoothing / len(w)))
            g.scatter_add_(1, index, torch.where(there.unsqueeze(1), scale * (1 - head.smoothing), 0))
            if dx is not None:
                dx[rows].addmm_(g, w_chunk)
            if dw_sum is not None:
                torch.addmm(dw_sum, g.t(), x_rows, beta=1 if rows.start else 0, out=dw_sum)
            if need_b:
                db_sum += g.sum(dim=0)
        if dw is not None and dw_sum is not None and dw.dtype != wide:
            dw[classes] = dw_sum
        if db is not None:
            db[classes] = db_sum
    return dx if dx is None else dx.to(x.dtype), dw, db
