"""Matrix product with bias and activation, or with an activation's derivative, in one kernel.

    c = activation(a b^T + bias)                    a (M, K), b (N, K), in any layout
    c = g b^T            sums_m = sum_k g_mk        g = a * activation'(z), made from a and what a forward saved
    c = (a b^T) * activation'(z)                    the derivative made from what a forward saved

FLOPs: 2 M N K. Traffic: the operands once and c once, while the tile order keeps the operands in L2.
A reduction split over programs goes through float32 partial sums, added in a fixed order: two runs are bitwise equal.
On GPUs with a tensor memory accelerator, operands and results of aligned layout move by descriptors.

g is never in memory: its tile is made on the way into the product. In 16-bit dtypes it is the product's second operand
then, and the result's tile is computed transposed (SWAPPED). A first operand would stay in registers, from where
Hopper's tensor cores take one product at a time, each waiting for the one before; a second operand goes through shared
memory, from where products follow each other. float32 is split in registers in either order, and needs fewer of them
unswapped.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import INSTRUCTIONS, activate, backpropagate, keeps_derivative
from .device import Chip, cdiv, chip_of, dot_precision, on_device_of, passes
from .launch.descriptor import strides_beside, tensor_descriptor
from .launch.entry import entry
from .partials import partial_length, reduce_partials
from .product import MatmulSettings, Product, matmul_choice
from .tile import grouped_tile
from .tunable import Variants, bucket_of


@triton.jit
def operand_tile(
    source, row, k, rows, K, strides,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTOR: tl.constexpr, K_MAJOR: tl.constexpr,
):  # fmt: skip
    """Tile (ROWS, BLOCK_K) of an operand at (row, k), zero past its edges. strides: between rows, and along them.

    K_MAJOR: a row's elements are adjacent.
    """
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
        offsets = offs_row.to(tl.int64)[:, None] * strides[0] + offs_k.to(tl.int64)[None, :] * strides[1]
        tile = tl.load(source + offsets, mask=inside, other=0.0)
    return tile


@triton.jit
def _result_tile(
    source, m, n, M, N, DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tile (BLOCK_M, BLOCK_N) at (m, n) of what is laid out as the result, contiguous (M, N); float32."""
    if DESCRIPTORS:
        tile = source.load([m, n])
    else:
        offs_m = m + tl.arange(0, BLOCK_M)
        offs_n = n + tl.arange(0, BLOCK_N)
        inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tile = tl.load(source + offsets, mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _store_tile(
    target, tile, m, n, M, N, DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if DESCRIPTORS:
        target.store([m, n], tile.to(target.dtype))
    else:
        offs_m = m + tl.arange(0, BLOCK_M)
        offs_n = n + tl.arange(0, BLOCK_N)
        inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(target + offsets, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    products, out, saved, bias_ptr, addend, slope, m, n, M, N,
    ACTIVATION: tl.constexpr, SLOPE_OF: tl.constexpr, PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """What comes after the products -> result and what to save, in the dtype of both.

    In SUBTILES column parts, so that fewer float32 values live at once. Without descriptors each part is stored, too:
    the addresses of a whole tile would fill the registers. With them, one store of the whole tile is one wait.
    """
    if SUBTILES > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = products.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        left_y, left_kept = _finish(
            left, out, saved, bias_ptr, addend, slope, m, n, M, N,
            ACTIVATION, SLOPE_OF, PRECISE, DESCRIPTORS, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
        right_y, right_kept = _finish(
            right, out, saved, bias_ptr, addend, slope, m, n + HALF, M, N,
            ACTIVATION, SLOPE_OF, PRECISE, DESCRIPTORS, BLOCK_M, HALF, SUBTILES // 2,
        )  # fmt: skip
        y = tl.join(left_y, right_y).permute(0, 2, 1).reshape(BLOCK_M, BLOCK_N)
        kept = tl.join(left_kept, right_kept).permute(0, 2, 1).reshape(BLOCK_M, BLOCK_N)
    else:
        if addend is not None:
            products += _result_tile(addend, m, n, M, N, DESCRIPTORS, BLOCK_M, BLOCK_N)
        if bias_ptr is not None:
            offs_n = n + tl.arange(0, BLOCK_N)
            products += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if slope is not None:
            products = backpropagate(products, _result_tile(slope, m, n, M, N, DESCRIPTORS, BLOCK_M, BLOCK_N), SLOPE_OF)
        y, kept = activate(products, ACTIVATION, PRECISE)
        dtype: tl.constexpr = out.dtype if DESCRIPTORS else out.dtype.element_ty
        y, kept = y.to(dtype), kept.to(dtype)
        if not DESCRIPTORS:
            _store_tile(out, y, m, n, M, N, False, BLOCK_M, BLOCK_N)
            if saved is not None:
                _store_tile(saved, kept, m, n, M, N, False, BLOCK_M, BLOCK_N)
    return y, kept


@entry
def matmul_kernel(
    out, out_saved, out_sums_ptr, part_ptr,  # results: pointers or descriptors of contiguous (M, N); sums (M,)
    a, saved, b, bias_ptr, addend, slope,  # operands: pointers or descriptors; the last two are laid out as the result
    strides_a, strides_saved, strides_b,  # each between rows and along K, in elements
    M, N, K, k_per_split, numel, total,  # numel = M * N; total: row length of part, at least numel + M
    ACTIVATION: tl.constexpr, SLOPE_OF: tl.constexpr,  # of the result; whose derivative the result is multiplied by
    GRADIENT_OF: tl.constexpr,  # of a, which then is a gradient at the output
    PRECISE: tl.constexpr, PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    DESCRIPTORS_IN: tl.constexpr, DESCRIPTORS_OUT: tl.constexpr, A_K_MAJOR: tl.constexpr, B_K_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Program (t, s): share s of the reduction of tile t."""
    tiles_n = tl.maximum(tl.cdiv(N, BLOCK_N), 1)  # no columns: sums alone
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
    split = tl.program_id(1)
    k_begin = split * k_per_split
    # One step at least, of zeros where K is 0. A way around the loop would define accumulators without a product, for
    # which ptxas makes every product wait for the one before it.
    k_end = tl.maximum(tl.minimum(k_begin + k_per_split, K), k_begin + 1)
    tl.assume(k_begin < k_end)

    products = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    sums = tl.zeros((64, BLOCK_M) if SWAPPED else (BLOCK_M, 16), dtype=tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        a_tile = operand_tile(a, m, k, M, K, strides_a, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS_IN, A_K_MAJOR)
        b_tile = operand_tile(b, n, k, N, K, strides_b, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS_IN, B_K_MAJOR)
        if GRADIENT_OF is not None:
            saved_tile = operand_tile(
                saved, m, k, M, K, strides_saved, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS_IN, A_K_MAJOR
            )
            g = backpropagate(a_tile.to(tl.float32), saved_tile.to(tl.float32), GRADIENT_OF)
            a_tile = g.to(a_tile.dtype)
        if out_sums_ptr is not None:
            if tile_n == 0:
                if SWAPPED:
                    ones = tl.full((64, BLOCK_K), 0.015625, dtype=a_tile.dtype)  # a share in each of 64 equal rows
                    sums = tl.dot(ones, a_tile.T, sums, input_precision=SUM_PRECISION)
                else:
                    ones = tl.full((BLOCK_K, 16), 0.0625, dtype=a_tile.dtype)  # a share in each of 16 equal columns
                    sums = tl.dot(a_tile, ones, sums, input_precision=SUM_PRECISION)
        if SWAPPED:
            products = tl.dot(b_tile, a_tile.T, products, input_precision=PRECISION)
        else:
            products = tl.dot(a_tile, b_tile.T, products, input_precision=PRECISION)
    if SWAPPED:
        products = products.T

    offs_m = m + tl.arange(0, BLOCK_M)
    if out_sums_ptr is not None:
        row_sums = tl.sum(sums, axis=0 if SWAPPED else 1)
        first = (offs_m < M) & (tile_n == 0)
    if SPLITS > 1:
        part_ptr += split.to(tl.int64) * total
        _store_tile(part_ptr, products, m, n, M, N, False, BLOCK_M, BLOCK_N)
        if out_sums_ptr is not None:
            tl.store(part_ptr + numel + offs_m, row_sums, mask=first)
    else:
        if out_sums_ptr is not None:
            tl.store(out_sums_ptr + offs_m, row_sums.to(out_sums_ptr.dtype.element_ty), mask=first)
        if GRADIENT_OF is not None:  # nothing comes after the products
            _store_tile(out, products, m, n, M, N, DESCRIPTORS_OUT, BLOCK_M, BLOCK_N)
        else:
            y, kept = _finish(
                products, out, out_saved, bias_ptr, addend, slope, m, n, M, N,
                ACTIVATION, SLOPE_OF, PRECISE, DESCRIPTORS_OUT, BLOCK_M, BLOCK_N, SUBTILES,
            )  # fmt: skip
            if DESCRIPTORS_OUT:
                out.store([m, n], y)
                if out_saved is not None:
                    out_saved.store([m, n], kept)


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


class OperandsProblem(NamedTuple):
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


def _by_descriptors(gpu: Chip, p: OperandsProblem) -> bool:
    return gpu.has_descriptors and p.N > 0 and p.K > 0


operands_choice = Variants(
    "matmul_operands",
    lambda p: bucket_of(p.M, p.N, p.K, item=p.itemsize, passes=p.passes, fused=p.fused, aligned=p.aligned),
    {"descriptors": _by_descriptors, "pointers": lambda gpu, p: True},
    lambda gpu, p: "descriptors" if _by_descriptors(gpu, p) and (p.aligned or p.large) else "pointers",
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
    a: Tensor, b: Tensor, precision: str, *, bias: Tensor | None = None, activation: str | None = None,
    keep: bool = False, saved: Tensor | None = None, gradient_of: str | None = None, slope: Tensor | None = None,
    slope_of: str | None = None, sums_dtype: torch.dtype | None = None, fill: float = 1.0, out: Tensor | None = None,
    addend: Tensor | None = None, settings: MatmulSettings | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """a (M, K), b (N, K), any strides -> out (M, N), what to save (M, N) or None, sums of a over K (M,) or None.

    bias (N,), activation: of the result; keep: return the derivative too. saved (M, K), gradient_of: a is a gradient at
    the output of that activation and is taken to its input. slope (M, N), contiguous, slope_of: the result is such a
    gradient. sums_dtype: of the sums, None for no sums. fill: see Product. out (M, N): where the result goes,
    contiguous, of any dtype. addend (M, N): added to the products, float32, contiguous; it may be out itself, so that a
    reduction over more products than one is a float32 sum in memory.

    gradient_of excludes what comes after the products: bias, activation, keep, slope and addend.
    """
    (M, K), N = a.shape, b.shape[0]
    out = torch.empty(M, N, dtype=a.dtype, device=a.device) if out is None else out
    out_saved = torch.empty_like(out) if keep else None
    sums = None if sums_dtype is None else torch.empty(M, dtype=sums_dtype, device=a.device)
    if M == 0 or (N == 0 and sums is None):
        return out, out_saved, sums

    gpu = chip_of(a)
    dot, exact = dot_precision(gpu, precision), dot_precision(gpu, "highest")
    products = passes(dot, a.element_size())
    *taken, aligned = wrapped(a, b, saved)
    way = operands_choice(gpu, OperandsProblem(M, N, K, a.element_size(), products, saved is not None, aligned))
    descriptors = way.variant == "descriptors"
    a_, b_, saved_ = movable(*taken) if descriptors else taken
    problem = Product(
        M, N, K, a.element_size(), passes=products,
        descriptors=descriptors, vector=descriptors or (a_.vector and b_.vector and K % 16 == 0),
        wide_result=N * out.element_size() % 16 == 0, fused=saved is not None,
        double=keeps_derivative(activation) or slope is not None,  # kept or not: then two forwards are bitwise equal
        finish=INSTRUCTIONS[activation], fill=fill,
    )  # fmt: skip
    settings = settings or matmul_choice(gpu, problem)
    k_per_split = max(cdiv(cdiv(K, settings.BLOCK_K), settings.SPLITS), 1) * settings.BLOCK_K
    splits = max(cdiv(K, k_per_split), 1)  # all of them have work
    descriptors_out = descriptors and splits == 1 and all(
        t is None or (N * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0) for t in (out, addend, slope)
    )  # fmt: skip
    numel, total = M * N, partial_length(M * N, M)
    part = None
    if splits > 1:
        part = torch.empty(splits, total, dtype=torch.float32, device=a.device)

    def result(t, parts=1):
        if t is None or not descriptors_out:
            return t
        return tensor_descriptor(t, [M, N], [N, 1], [settings.BLOCK_M, settings.BLOCK_N // parts])

    def operand(o, block):
        return o if o is None else o.descriptor(block, settings.BLOCK_K) if descriptors else o.t

    precise = a.dtype == torch.float32
    with on_device_of(a):
        matmul_kernel[(cdiv(M, settings.BLOCK_M) * max(cdiv(N, settings.BLOCK_N), 1), splits)](
            result(out), result(out_saved), sums, part,
            operand(a_, settings.BLOCK_M), operand(saved_, settings.BLOCK_M), operand(b_, settings.BLOCK_N), bias,
            result(addend, settings.SUBTILES), result(slope, settings.SUBTILES),
            *strides_beside(descriptors, 2, a_.t, saved_ and saved_.t, b_.t),
            M, N, K, k_per_split, numel, total, activation, slope_of, gradient_of, precise, dot, exact,
            K > 0 and K % settings.BLOCK_K == 0, descriptors, descriptors_out, a_.k_major, b_.k_major,
            settings.BLOCK_M, settings.BLOCK_N, settings.BLOCK_K,
            splits, settings.GROUP_M, settings.SUBTILES, saved is not None and not precise,
            num_warps=settings.num_warps, num_stages=settings.num_stages,
        )  # fmt: skip
        if splits > 1:
            reduce_partials(
                out, out_saved, sums, part, bias, activation, precise, addend=addend, slope=slope, slope_of=slope_of
            )
    return out, out_saved, sums
