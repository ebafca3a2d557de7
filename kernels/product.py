"""How a product of matrices is cut up: the settings that a roofline estimate likes best, unless a file has better.

Nothing is searched at the first call.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from .device import Chip, cdiv
from .tunable import Choice, bucket_of


class MatmulSettings(NamedTuple):
    """How one product is cut up: tile sizes, warps, pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SPLITS: int = 1  # programs that share the reduction of one tile
    GROUP_M: int = 8
    SUBTILES: int = 1  # parts in which a tile is finished, so that fewer values live at once


class Product(NamedTuple):
    """What the settings of c (M, N) = a (M, K) b (N, K)^T depend on."""

    M: int
    N: int
    K: int
    itemsize: int  # of an operand's element, in bytes
    passes: int = 1  # tensor-core products per product: 3 where float32 is split into tf32 parts
    descriptors: bool = False  # operands move by tensor descriptors
    vector: bool = True  # operands can be read 16 bytes at a time
    wide_result: bool = True  # the result can be written 16 bytes at a time
    fused: bool = False  # a is multiplied by the activation's derivative on the way in
    double: bool = False  # the activation's derivative is written beside the result, or read there
    finish: int = 0  # instructions for an element of the result, beyond those of a plain product
    count: int = 1  # products of this size in one launch
    fill: float = 1.0  # settings slower by up to this factor are taken if they give _FULL of the processors a program
    traffic: int | None = None  # bytes through device memory; None: every operand and result passes once


_TILES = (  # BLOCK_M, BLOCK_N, warps
    (128, 256, 8), (128, 128, 8), (128, 128, 4), (128, 64, 4), (64, 128, 4), (64, 64, 4), (64, 32, 4), (32, 64, 4),
    (32, 32, 4), (64, 16, 4), (16, 64, 4), (16, 32, 4), (16, 16, 4),
)  # fmt: skip
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_TILE_SECONDS = 2.1e-6  # a tile's prologue and epilogue on Hopper, fitted to the figures of Triton's Gluon tutorial 07
_CLOCK = 1.6e9  # cycles a second of a multiprocessor, which begins an instruction of four warps in each
_REGISTERS = 65536  # of a multiprocessor
_SPLIT = 12  # instructions that split an element into two tf32 parts, counted in code for sm_90
_FUSED = 3  # instructions that multiply an element by the derivative on its way to a product
_DOUBLE = 3  # instructions that write the derivative beside an element of the result, or multiply by it
_ORDER = 100  # estimated cycles until the tensor cores see what a program wrote to shared memory
LAUNCH_SECONDS = 3e-6  # that a second launch takes on the device
_FULL = 0.95  # where this share of the processors has a program, the chip counts as full
_LATENCY = 0.8e-6  # of a load from device memory
_INDIFFERENT = 0.3e-6  # of settings whose estimates differ by less, those with fewer programs are taken


def _held(gpu: Chip, p: Product) -> int:
    """The most accumulators that a thread may hold: everything else that it holds needs registers too."""
    limit = 128
    if not p.vector:
        limit = 32  # element-wise loads keep every address in a register
    elif not p.descriptors and (gpu.arch == "sm_80" or p.itemsize == 4):
        limit = 64
    if p.itemsize == 4:
        limit = min(limit, 64)  # the parts of a split float32 need registers too
    return limit


def _shared(p: Product, s: MatmulSettings) -> int:
    """About how many bytes of shared memory a program takes: one buffer of each operand for each stage, or the result.

    An operand that is changed on its way to the product needs one buffer less, and room for what it is changed into.
    """
    a, b = (rows * s.BLOCK_K * p.itemsize for rows in (s.BLOCK_M, s.BLOCK_N))
    if p.passes > 1:  # tf32 parts: of b, of both where two groups of four warps share the tile
        held = (a * (1 + p.fused) + b) * (s.num_stages - 1) + 2 * (a + b if s.num_warps > 4 else b)
    elif p.fused:
        held = 2 * a * (s.num_stages - 1) + b * s.num_stages + a
    else:
        held = (a + b) * s.num_stages
    return max(held, s.BLOCK_M * s.BLOCK_N * p.itemsize) + 3072


def tile_fits(gpu: Chip, p: Product, s: MatmulSettings) -> bool:
    """Whether registers and shared memory hold a tile."""
    threads = s.num_warps * 32
    elements = s.BLOCK_M * s.BLOCK_N // threads
    if p.fused and elements + s.BLOCK_M * s.BLOCK_K // threads > 160:
        return False  # the bias gradient, summed beside the product, needs registers too
    return elements <= _held(gpu, p) and _shared(p, s) <= gpu.shared and s.BLOCK_N >= 16 * s.SUBTILES


def fits(gpu: Chip, p: Product, s: MatmulSettings) -> bool:
    """Whether registers and shared memory hold a tile, and every share of the reduction has at least two steps."""
    return tile_fits(gpu, p, s) and (s.SPLITS == 1 or cdiv(p.K, s.BLOCK_K) >= 2 * s.SPLITS)


def shape_tile(gpu: Chip, p: Product, block_m: int, block_n: int, warps: int) -> MatmulSettings | None:
    """A tile with the reduction step, stages and subtiles that suit it; None where the chip does not hold it."""
    elements = block_m * block_n // (warps * 32)  # accumulators per thread
    step_bytes = 128 if p.descriptors or elements <= 32 else 64
    if not p.vector:
        step_bytes = 64
    # Accumulators per thread that the epilogue can finish at once without spilling
    part = 16 if not p.wide_result else 64 if p.descriptors and p.itemsize == 2 else 32
    subtiles = max(1, min(elements // part, block_n // 16))
    block_k = max(step_bytes // p.itemsize, 16)
    shaped = MatmulSettings(block_m, block_n, block_k, warps, 2 if gpu.is_amd else 4, SUBTILES=subtiles)
    while shaped.num_stages > 2 and _shared(p, shaped) > gpu.shared:
        shaped = shaped._replace(num_stages=shaped.num_stages - 1)
    return shaped if tile_fits(gpu, p, shaped) else None


def _programs(p: Product, s: MatmulSettings) -> int:
    return p.count * cdiv(p.M, s.BLOCK_M) * max(cdiv(p.N, s.BLOCK_N), 1) * s.SPLITS


def _residents(gpu: Chip, p: Product, s: MatmulSettings) -> int:
    """Programs that a processor holds at once."""
    registers = s.BLOCK_M * s.BLOCK_N // (s.num_warps * 32) + (56 if p.passes == 1 else 116)
    by_registers = _REGISTERS // (registers * s.num_warps * 32)
    return max(1, min(gpu.shared // _shared(p, s), by_registers, 16 // s.num_warps))


def _alone(gpu: Chip, p: Product, s: MatmulSettings) -> float:
    """Seconds of a reduction step in which a program prepares an operand, so that its next product has to wait."""
    threads = s.num_warps * 32
    instructions = _SPLIT * (s.BLOCK_M + s.BLOCK_N) * s.BLOCK_K / threads if p.passes > 1 else 0
    if p.fused:
        instructions += _FUSED * s.BLOCK_M * s.BLOCK_K / threads + _ORDER
    return instructions * s.num_warps / 4 / _CLOCK if gpu.has_descriptors else 0.0


def estimate(gpu: Chip, p: Product, s: MatmulSettings) -> float:
    """Estimated seconds of a product.

    A wave of programs takes as long as its slowest resource does: tensor cores, L2, or the latency of a load. What a
    program does without multiplying adds to that, except where other programs on the same processor multiply
    meanwhile. The whole takes at least as long as device memory does.
    """
    steps = cdiv(cdiv(p.K, s.BLOCK_K), s.SPLITS)
    stage = (s.BLOCK_M * (1 + p.fused) + s.BLOCK_N) * s.BLOCK_K * p.itemsize
    resident = _residents(gpu, p, s)
    programs = _programs(p, s)
    waves = cdiv(programs, gpu.processors * resident)
    beside = min(resident, cdiv(programs, gpu.processors))  # programs that share a processor
    fullness = min(1.0, s.BLOCK_N / 128) * (1.0 if s.BLOCK_M >= 64 else 0.5)
    peak = 0.7 * gpu.tflops * 1e12 / gpu.processors * 2 / p.itemsize / p.passes * fullness
    cache = 3 * gpu.bandwidth * 1e12 / gpu.processors
    product, alone = 2 * s.BLOCK_M * s.BLOCK_N * s.BLOCK_K / peak, _alone(gpu, p, s)
    step = max(
        beside * max(product, alone),
        product + alone,
        beside * stage / cache * (1 if p.vector else 4),
        _LATENCY / (s.num_stages - 1),
    )
    elements = s.BLOCK_M * s.BLOCK_N / (s.num_warps * 32)
    ends = _TILE_SECONDS + elements * (p.finish + _DOUBLE * p.double) * s.num_warps / 4 / _CLOCK
    if waves > 1:
        ends /= beside
    moved = p.traffic
    if moved is None:
        moved = p.count * (p.M * p.K * (1 + p.fused) + p.N * p.K + p.M * p.N * (1 + p.double)) * p.itemsize
    seconds = max(waves * (steps * step + ends), moved / (0.9 * gpu.bandwidth * 1e12))
    if s.SPLITS > 1:
        seconds += LAUNCH_SECONDS + s.SPLITS * p.count * p.M * p.N * 8 / (gpu.bandwidth * 1e12)
    return seconds


@functools.lru_cache(maxsize=4096)
def estimated_settings(gpu: Chip, p: Product) -> MatmulSettings:
    """The default: the settings with the least estimated time; where ``fill`` asks for it, those that fill the chip."""
    candidates = []
    for tile in _TILES:
        shaped = shape_tile(gpu, p, *tile)
        if shaped is None:
            continue
        fewer = range(min(shaped.num_stages, 3), shaped.num_stages)  # stages: less memory, perhaps more residents
        shapes = [shaped, *(shaped._replace(num_stages=n) for n in fewer)]
        even = {gpu.processors * n // _programs(p, shaped) for n in (1, 2, 3, 4)} if p.fill > 1 else ()
        for splits in sorted({*_SPLITS, *even} - {0}):
            if splits == 1 or cdiv(p.K, shaped.BLOCK_K) >= 4 * splits:
                candidates += [s._replace(SPLITS=splits) for s in shapes]
    seconds = {s: estimate(gpu, p, s) for s in candidates}
    best = min(seconds.values())
    alike = [s for s in candidates if seconds[s] <= best + _INDIFFERENT]
    chosen = min(alike, key=lambda s: (_programs(p, s), seconds[s], -s.num_stages))
    if p.fill > 1:
        least_m = min(chosen.BLOCK_M, 64)  # wgmma multiplies 64 rows and more
        filling = [s for s in candidates if _programs(p, s) >= _FULL * gpu.processors and least_m <= s.BLOCK_M]
        filled = min(filling, key=seconds.get, default=chosen)
        chosen = filled if seconds[filled] <= p.fill * best else chosen
    return chosen


def product_bucket(p: Product) -> str:
    return bucket_of(
        p.M, p.N, p.K, item=p.itemsize, passes=p.passes, desc=p.descriptors, vector=p.vector, wide=p.wide_result,
        fused=p.fused, double=p.double, count=p.count,
    )  # fmt: skip


def product_choice(name: str, fits: Callable = fits, default: Callable = estimated_settings) -> Choice:
    """The choice of a kernel that multiplies matrices, by its name in tuned files."""
    return Choice(name, MatmulSettings, product_bucket, fits, default)


matmul_choice = product_choice("matmul")
