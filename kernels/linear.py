"""Linear layer: matrix product, bias and activation in one kernel, and its two backward products.

    z  = x w^T + b                     y = activation(z)
    g  = dy * activation'(z)
    dx = g w        dw = g^T x         db = sum over rows of g

One kernel computes every product, as c = a b^T with a (M, K) and b (N, K) in any layout:

    product   a      b      M          N             K
    y         x      w      rows       out features  in features
    dx        g      w^T    rows       in features   out features
    dw        g^T    x^T    out feat.  in features   rows

g is never in memory: its tile is made from the tiles of dy and of what the forward saved, on the way into the product.
The forward saves y where activation' follows from it (relu, leaky_relu, sigmoid, tanh), and activation'(z) itself,
not z, elsewhere: then the backward multiplies where it would evaluate erf again for every tile that it meets.
db is summed by the programs of dw's first tile column from tiles that they load anyway. Another way to the same, taken
where a measurement says so, writes g once and then multiplies as if there were no activation: linear_prepass.py.

FLOPs: 2 M N K each. Traffic: the operands once and c once, while the tile order keeps the operands in L2.
A reduction split over programs goes through float32 partial sums, added in a fixed order: two runs are bitwise equal.
On GPUs with a tensor memory accelerator, operands and results of aligned layout move by descriptors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .descriptor import tensor_descriptor
from .entry import entry
from .launch import Chip, MatmulSettings, Product, cdiv, chip, dot_precision, matmul_settings, on_device_of, passes
from .linear_prepass import Activated, backward_choice, prepass
from .partials import partial_length, reduce_partials
from .tile import FROM_OUTPUT, activate, backpropagate, grouped_tile
from .tunable import Bucket, Variants


@triton.jit
def operand_tile(
    source, row, k, rows, K, stride_row, stride_k,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTOR: tl.constexpr, K_MAJOR: tl.constexpr,
):  # fmt: skip
    """Tile (ROWS, BLOCK_K) of an operand at (row, k), zero past its edges. K_MAJOR: a row's elements are adjacent."""
    if DESCRIPTOR:
        if K_MAJOR:
            tile = source.load([row, k])
        else:
            tile = source.load([k, row]).T
    else:
        offs_row = row + tl.arange(0, ROWS)
        offs_k = k + tl.arange(0, BLOCK_K)
        inside = offs_row[:, None] < rows
        if not EVEN_K:
            inside = inside & (offs_k[None, :] < K)
        offsets = offs_row.to(tl.int64)[:, None] * stride_row + offs_k.to(tl.int64)[None, :] * stride_k
        tile = tl.load(source + offsets, mask=inside, other=0.0)
    return tile


@triton.jit
def _finish(
    products, out, saved, bias_ptr, addend, m, n, M, N,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Addend, bias, activation and store of one tile, in SUBTILES column parts so that fewer values live at once."""
    if SUBTILES > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = products.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _finish(
            left, out, saved, bias_ptr, addend, m, n, M, N,
            ACTIVATION, PRECISE, DESCRIPTORS, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
        _finish(
            right, out, saved, bias_ptr, addend, m, n + HALF, M, N,
            ACTIVATION, PRECISE, DESCRIPTORS, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
    else:
        offs_n = n + tl.arange(0, BLOCK_N)
        if addend is not None:
            if DESCRIPTORS:
                products += addend.load([m, n])
            else:
                offs_m = m + tl.arange(0, BLOCK_M)
                inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
                offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
                products += tl.load(addend + offsets, mask=inside, other=0.0)
        if bias_ptr is not None:
            products += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        y, kept = activate(products, ACTIVATION, PRECISE)
        if DESCRIPTORS:
            out.store([m, n], y.to(out.dtype))
            if saved is not None:
                saved.store([m, n], kept.to(saved.dtype))
        else:
            offs_m = m + tl.arange(0, BLOCK_M)
            inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
            offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
            tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)
            if saved is not None:
                tl.store(saved + offsets, kept.to(saved.dtype.element_ty), mask=inside)


@entry
def _matmul_kernel(
    out, out_saved, out_sums_ptr, part_ptr,  # results: pointers or descriptors of contiguous (M, N); sums (M,)
    a, saved, b, bias_ptr, addend,  # operands: pointers or descriptors; the addend's are as the result's
    stride_am, stride_ak, stride_sm, stride_sk, stride_bn, stride_bk,  # in elements
    M, N, K, k_per_split, numel, total,  # numel = M * N; total: row length of part, at least numel + M
    ACTIVATION: tl.constexpr, GRADIENT_OF: tl.constexpr,  # of the result; of a, which then is a gradient at the output
    PRECISE: tl.constexpr, PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    DESCRIPTORS_IN: tl.constexpr, DESCRIPTORS_OUT: tl.constexpr, A_K_MAJOR: tl.constexpr, B_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """Program (t, s): share s of the reduction of tile t."""
    tiles_n = tl.maximum(tl.cdiv(N, BLOCK_N), 1)  # no columns: sums alone
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
    split = tl.program_id(1)
    k_begin = split * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)

    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, 16), dtype=tl.float32)  # every column holds the same sums
    for k in range(k_begin, k_end, BLOCK_K):
        a_tile = operand_tile(a, m, k, M, K, stride_am, stride_ak, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS_IN, A_K_MAJOR)
        if GRADIENT_OF is not None:
            saved_tile = operand_tile(
                saved, m, k, M, K, stride_sm, stride_sk, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS_IN, A_K_MAJOR
            )
            a_tile = backpropagate(a_tile.to(tl.float32), saved_tile.to(tl.float32), GRADIENT_OF).to(a_tile.dtype)
        if out_sums_ptr is not None:
            if tile_n == 0:
                ones = tl.full((BLOCK_K, 16), 1.0, dtype=a_tile.dtype)
                sums = tl.dot(a_tile, ones, sums, input_precision=SUM_PRECISION)
        b_tile = operand_tile(b, n, k, N, K, stride_bn, stride_bk, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS_IN, B_K_MAJOR)
        products = tl.dot(a_tile, b_tile.T, products, input_precision=PRECISION)

    offs_m = m + tl.arange(0, BLOCK_M)
    row_sums = tl.sum(sums, axis=1) * 0.0625
    if SPLITS > 1:
        part_ptr += split.to(tl.int64) * total
        offs_n = n + tl.arange(0, BLOCK_N)
        inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        tl.store(part_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], products, mask=inside)
        if out_sums_ptr is not None:
            tl.store(part_ptr + numel + offs_m, row_sums, mask=(offs_m < M) & (tile_n == 0))
    else:
        if out_sums_ptr is not None:
            tl.store(
                out_sums_ptr + offs_m, row_sums.to(out_sums_ptr.dtype.element_ty), mask=(offs_m < M) & (tile_n == 0)
            )
        _finish(
            products, out, out_saved, bias_ptr, addend, m, n, M, N,
            ACTIVATION, PRECISE, DESCRIPTORS_OUT, BLOCK_M, BLOCK_N, SUBTILES,
        )  # fmt: skip


class Operand:
    """A 2-D operand (rows, k) as the kernel takes it."""

    def __init__(self, t):
        self.t = t
        row, k = t.stride()
        self.k_major = k == 1 or row != 1  # elements along the reduction are adjacent
        outer = row if self.k_major else k
        self.vector = (  # can be read 16 bytes at a time, by a descriptor too
            (k == 1 or row == 1) and t.data_ptr() % 16 == 0 and outer > 0 and outer * t.element_size() % 16 == 0
        )

    def aligned(self, k_major):
        """The operand in a layout that descriptors take; a copy unless it has it already."""
        if self.vector and self.k_major == k_major:
            return self
        t = self.t if k_major else self.t.T
        step = 16 // t.element_size()
        padded = torch.empty(t.shape[0], cdiv(t.shape[1], step) * step, dtype=t.dtype, device=t.device)
        copy = padded[:, : t.shape[1]].copy_(t)
        return Operand(copy if k_major else copy.T)

    def descriptor(self, block, block_k):
        t, tile = (self.t, [block, block_k]) if self.k_major else (self.t.T, [block_k, block])
        return tensor_descriptor(t, list(t.shape), list(t.stride()), tile)


class Operands(NamedTuple):
    """What the way of a product's operands depends on."""

    M: int
    N: int
    K: int
    itemsize: int
    passes: int = 1  # see Product
    fused: bool = False  # see Product
    aligned: bool = True  # descriptors can move the operands as they lie

    @property
    def large(self) -> bool:
        """Unaligned operands are worth a copy that descriptors can move."""
        return min(self.M, self.N) >= 256 and self.K >= 64


def _by_descriptors(gpu: Chip, p: Operands) -> bool:
    return gpu.has_descriptors and p.N > 0 and p.K > 0


operands_choice = Variants(
    "matmul_operands",
    lambda p: Bucket.of(p.M, p.N, p.K, item=p.itemsize, passes=p.passes, fused=p.fused, aligned=p.aligned),
    {"descriptors": _by_descriptors, "pointers": lambda gpu, p: True},
    lambda gpu, p: "descriptors" if _by_descriptors(gpu, p) and (p.aligned or p.large) else "pointers",
    reach=1,
)  # fmt: skip


def wrapped(a, b, saved):
    """The operands as the kernel takes them, and whether descriptors can move them as they lie."""
    a, b, saved = Operand(a), Operand(b), None if saved is None else Operand(saved)
    return a, b, saved, a.vector and b.vector and (saved is None or (saved.vector and saved.k_major == a.k_major))


def movable(a, b, saved):
    """Wrapped operands, copied where descriptors could not move them."""
    b = b.aligned(b.k_major)
    saved = saved and saved.aligned(saved.k_major)
    return a.aligned(saved.k_major if saved else a.k_major), b, saved


def matmul(
    a, b, precision, *, bias=None, activation=None, keep=False,
    saved=None, gradient_of=None, sums_dtype=None, fill=1.0, out=None, addend=None,
    settings: MatmulSettings | None = None,
):  # fmt: skip
    """a (M, K), b (N, K), any strides -> out (M, N), what to save (M, N) or None, sums of a over K (M,) or None.

    bias (N,), activation: of the result; keep: return the derivative too. saved (M, K), gradient_of: a is a gradient at
    the output of that activation and is taken to its input. sums_dtype: of the sums, None for no sums. fill: see
    Product. out (M, N): where the result goes, contiguous, of any dtype. addend (M, N): added to the products, float32,
    contiguous; it may be out itself, so that a reduction over more products than one is a float32 sum in memory.
    """
    (M, K), N = a.shape, b.shape[0]
    out = torch.empty(M, N, dtype=a.dtype, device=a.device) if out is None else out
    out_saved = torch.empty_like(out) if keep else None
    sums = None if sums_dtype is None else torch.empty(M, dtype=sums_dtype, device=a.device)
    if M == 0 or (N == 0 and sums is None):
        return out, out_saved, sums

    gpu = chip()
    dot, exact = dot_precision(gpu, precision), dot_precision(gpu, "highest")
    products = passes(dot, a.element_size())
    *taken, aligned = wrapped(a, b, saved)
    way = operands_choice(gpu, Operands(M, N, K, a.element_size(), products, saved is not None, aligned))
    descriptors = way.variant == "descriptors"
    a_, b_, saved_ = movable(*taken) if descriptors else taken
    s = settings or matmul_settings(gpu, Product(
        M, N, K, a.element_size(), passes=products,
        descriptors=descriptors, vector=descriptors or (a_.vector and b_.vector and K % 16 == 0),
        wide_result=N * out.element_size() % 16 == 0, fused=saved is not None, double=keep, fill=fill,
    ))  # fmt: skip
    descriptors_out = descriptors and s.SPLITS == 1 and N * out.element_size() % 16 == 0 and out.data_ptr() % 16 == 0
    numel, total = M * N, partial_length(M * N, M)
    part = None
    if s.SPLITS > 1:
        part = torch.empty(s.SPLITS, total, dtype=torch.float32, device=a.device)

    def result(t):
        if t is None or not descriptors_out:
            return t
        return tensor_descriptor(t, [M, N], [N, 1], [s.BLOCK_M, s.BLOCK_N // s.SUBTILES])

    def operand(o, block):
        return o if o is None else o.descriptor(block, s.BLOCK_K) if descriptors else o.t

    with on_device_of(a):
        _matmul_kernel[(cdiv(M, s.BLOCK_M) * max(cdiv(N, s.BLOCK_N), 1), s.SPLITS)](
            result(out), result(out_saved), sums, part,
            operand(a_, s.BLOCK_M), operand(saved_, s.BLOCK_M), operand(b_, s.BLOCK_N), bias, result(addend),
            *a_.t.stride(), *(saved_.t.stride() if saved_ else (0, 0)), *b_.t.stride(),
            M, N, K, cdiv(cdiv(K, s.BLOCK_K), s.SPLITS) * s.BLOCK_K, numel, total,
            activation, gradient_of, a.dtype == torch.float32, dot, exact,
            K % s.BLOCK_K == 0, descriptors, descriptors_out, a_.k_major, b_.k_major,
            s.BLOCK_M, s.BLOCK_N, s.BLOCK_K, s.SPLITS, s.GROUP_M, s.SUBTILES,
            num_warps=s.num_warps, num_stages=s.num_stages,
        )  # fmt: skip
        if s.SPLITS > 1:
            reduce_partials(out, out_saved, sums, part, bias, activation, a.dtype == torch.float32, addend=addend)
    return out, out_saved, sums


def linear_fwd(x, w, b, activation, keep, precision, settings=None):
    """x (M, K), w (N, K), b (N,) or None -> y (M, N), what the backward needs beside x and w (M, N) or None.

    keep: whether a backward will come. precision: torch's float32 matmul precision, "highest", "high" or "medium".
    """
    from_output = activation in FROM_OUTPUT
    keep_derivative = keep and activation is not None and not from_output
    y, saved, _ = matmul(x, w, precision, bias=b, activation=activation, keep=keep_derivative, settings=settings)
    return y, (y if keep and from_output else saved)


def linear_bwd_input(dy, saved, w, activation, precision, settings=None):
    """dy, saved (M, N), w (N, K) -> dx (M, K) in w.dtype."""
    return matmul(dy, w.T, precision, saved=saved, gradient_of=activation, settings=settings)[0]


def linear_bwd_weight(dy, saved, x, activation, bias_dtype, precision, settings=None, fill=1.0):
    """dy, saved (M, N), x (M, K) -> dw (N, K) in x.dtype, db (N,) in bias_dtype, or None where that is None.

    fill: by what factor the estimated time may rise so that the sum over rows is split over the whole chip.
    """
    saved_t = None if saved is None else saved.T
    dw, _, db = matmul(
        dy.T, x.T, precision, saved=saved_t, gradient_of=activation, sums_dtype=bias_dtype, fill=fill, settings=settings
    )
    return dw, db


def linear_bwd(dy, saved, x, w, activation, needed, precision):
    """dy, saved (M, N), x (M, K), w (N, K) -> dx, dw, db, None for each that is not needed: of x, of w, of the bias."""
    need_x, need_w, need_b = needed
    dx = dw = db = None
    if activation is not None and need_x and need_w:  # both products need g
        (M, N), gpu = dy.shape, chip()
        products = passes(dot_precision(gpu, precision), dy.element_size())
        problem = Activated(M, N, x.shape[1], dy.element_size(), products, need_b)
        if backward_choice(gpu, problem).variant == "prepass":
            dy, db = prepass(dy, saved, activation, w.dtype if need_b else None)
            saved = activation = None
            need_b = False
    if need_x:
        dx = linear_bwd_input(dy, saved, w, activation, precision)
    if need_w or need_b:
        columns = x if need_w else x[:, :0]  # the bias gradient alone: a product with no columns
        dw, sums = linear_bwd_weight(dy, saved, columns, activation, w.dtype if need_b else None, precision)
        db = sums if need_b else db
    return dx, dw if need_w else None, db
