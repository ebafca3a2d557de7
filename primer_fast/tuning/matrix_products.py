"""Spaces of the kernels that multiply matrices: linear, convolution, the logits of a loss head."""

from collections.abc import Iterator
from itertools import product

from primer_fast.kernels.conv2d.gather import gather_choice
from primer_fast.kernels.conv2d.weight import weight_choice
from primer_fast.kernels.device import Chip, cdiv
from primer_fast.kernels.logits.gradient import gradient_choice
from primer_fast.kernels.logits.statistics import share_count, statistics_choice
from primer_fast.kernels.product import MatmulSettings, Product, estimate, matmul_choice, shape_tile
from primer_fast.tuning.space import Space

_BLOCKS = (16, 32, 64, 128, 256)
_STAGES = (2, 3, 4, 5)
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


def tiles(gpu: Chip, p: Product) -> Iterator[MatmulSettings]:
    """Every tile with every reduction step and number of stages, the reduction not split."""
    for block_m, block_n, warps in product(_BLOCKS, _BLOCKS, (4, 8)):
        shaped = shape_tile(gpu, p, block_m, block_n, warps)
        if shaped is None or warps * 32 * 4 > block_m * block_n:
            continue
        groups = (8, 16) if min(cdiv(p.M, block_m), cdiv(p.N, block_n)) > 16 else (8,)  # of few rows there is one order
        for block_k, stages, group in product((shaped.BLOCK_K, shaped.BLOCK_K // 2), _STAGES, groups):
            if block_k >= 16:
                yield shaped._replace(BLOCK_K=block_k, num_stages=stages, GROUP_M=group)


def split(gpu: Chip, p: Product) -> Iterator[MatmulSettings]:
    """Tiles, with the reduction split over any useful number of programs, and over those that fill the chip evenly."""
    for tile in tiles(gpu, p):
        programs = p.count * cdiv(p.M, tile.BLOCK_M) * max(cdiv(p.N, tile.BLOCK_N), 1)
        even = {gpu.processors * n // programs for n in (1, 2, 3, 4)}
        for splits in sorted({*_SPLITS, *even} - {0}):
            if splits == 1 or cdiv(p.K, tile.BLOCK_K) >= 4 * splits:
                yield tile._replace(SPLITS=splits)


def shared(gpu: Chip, p: Product) -> Iterator[MatmulSettings]:
    """Tiles, with the classes shared by the default number of programs, and by half and twice as many."""
    for tile in tiles(gpu, p):
        even = share_count(gpu, tile, p.M, p.N)
        for splits in sorted({even, max(1, even // 2), min(2 * even, cdiv(p.N, tile.BLOCK_N))}):
            yield tile._replace(SPLITS=splits)


def estimate_shared(gpu: Chip, p: Product, s: MatmulSettings) -> float:
    """The product's estimate, longer by the factor that is lost where programs do not end together."""
    row_blocks, tiles_n = cdiv(p.M, s.BLOCK_M), cdiv(p.N, s.BLOCK_N)
    turns = cdiv(row_blocks * s.SPLITS, gpu.processors) * cdiv(tiles_n, s.SPLITS)
    uneven = turns / cdiv(row_blocks * tiles_n, gpu.processors)
    return estimate(gpu, p, s._replace(SPLITS=1)) * max(uneven, 1.0)


PRODUCTS = (
    Space(matmul_choice, ("matmul_kernel", "reduce_partials_kernel"), split, estimate),
    Space(gather_choice, ("conv2d_boxes_kernel", "conv2d_gather_kernel", "reduce_partials_kernel"), split, estimate),
    Space(weight_choice, ("conv2d_weight_kernel", "reduce_partials_kernel"), split, estimate),
    Space(statistics_choice, ("logits_statistics_kernel", "logits_combine_kernel"), shared, estimate_shared),
    Space(gradient_choice, ("logits_gradient_kernel",), tiles, estimate),
)
