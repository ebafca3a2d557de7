"""Spaces of the kernels that are bound by memory: layer_norm, max_pool2d, embedding, depthwise convolution."""

from collections.abc import Iterator
from itertools import product

from primer_fast.kernels import embedding, max_pool2d
from primer_fast.kernels.conv2d.depthwise import (
    DepthwiseProblem,
    DepthwiseSettings,
    depthwise_choice,
    depthwise_weight_choice,
)
from primer_fast.kernels.device import Chip, cdiv
from primer_fast.kernels.embedding import Runs, RunSettings
from primer_fast.kernels.layer_norm.rows import Rows, RowSettings, backward_choice, forward_choice
from primer_fast.kernels.tile_settings import Grid, GridSettings, idle
from primer_fast.tuning.space import Space, seconds_to_move


def row_candidates(gpu: Chip, p: Rows) -> Iterator[RowSettings]:
    default = forward_choice.default(gpu, p)
    widths = (default.BLOCK_N,) if default.BLOCK_N >= p.N else (4096, 8192, 16384, 32768)
    for rows, width, warps in product((1, 2, 4, 8, 16, 32), widths, (1, 2, 4, 8, 16)):
        yield RowSettings(rows, width, warps)


def estimate_rows(gpu: Chip, p: Rows, s: RowSettings) -> float:
    tile = s.BLOCK_ROWS * s.BLOCK_N
    held = tile / (32 * s.num_warps)
    reads = (p.arrays / 2) * tile * p.itemsize
    moved = p.rows * p.N * p.arrays * p.itemsize
    seconds = seconds_to_move(gpu, moved, cdiv(p.rows, s.BLOCK_ROWS), reads, s.num_warps, held * p.arrays / 2)
    return seconds * (1.0 if s.BLOCK_N >= p.N else 1.3)  # the second read comes from L2


def walk_candidates(gpu: Chip, p: Rows) -> Iterator[RowSettings]:
    default = backward_choice.default(gpu, p)
    if not default.CHUNK:
        for rows, warps, stages in product((1, 2, 4, 8, 16), (2, 4, 8, 16), (1, 2, 3, 4)):
            for beside in (1, 2, 3, 4, 6, 8):
                yield RowSettings(rows, default.BLOCK_N, warps, stages, beside * gpu.processors)
        return
    for warps, cols, chunk, stages in product((4, 8, 16, 32), (128, 256, 512, 1024), (16, 32, 64, 128), (1, 2, 3)):
        rows = min(warps * 512, 8192) // cols
        for width in (warps * 512, warps * 1024):
            yield RowSettings(rows, width, warps, stages, CHUNK=chunk, BLOCK_COLS=cols)


def estimate_walk(gpu: Chip, p: Rows, s: RowSettings) -> float:
    """Programs that do not fit beside each other come one after another, and each writes its sums of dw and db."""
    tile = s.BLOCK_ROWS * (s.BLOCK_COLS if s.CHUNK else s.BLOCK_N)
    held = tile / (32 * s.num_warps)
    sums = cdiv(p.rows, s.CHUNK) if s.CHUNK else s.programs
    programs = p.rows + sums * cdiv(p.N, s.BLOCK_COLS) if s.CHUNK else min(sums, cdiv(p.rows, s.BLOCK_ROWS))
    reads = (p.arrays - 1) * tile * p.itemsize
    moved = p.rows * p.N * p.arrays * p.itemsize + sums * 2 * p.N * 8
    shared = (s.STAGES - 1) * reads
    return seconds_to_move(gpu, moved, programs, reads * max(s.STAGES - 1, 0.5), s.num_warps, held * 5, shared)


def tile_candidates(gpu: Chip, p: Grid) -> Iterator[GridSettings]:
    for width, warps, bytes_each in product((8, 16, 32, 64, 128, 256, 512), (1, 2, 4, 8), (4, 8, 16, 32)):
        elements = warps * (64 if gpu.is_amd else 32) * bytes_each // p.itemsize
        if elements >= width:
            yield GridSettings(elements // width, width, warps)


def estimate_tiles(gpu: Chip, p: Grid, s: GridSettings) -> float:
    """Idle columns cost no traffic, but leave fewer bytes in flight; narrow loads move fewer bytes an instruction."""
    tile = s.BLOCK_ROWS * s.BLOCK_COLS
    held = tile / (32 * s.num_warps)
    width = min(16.0, held * p.itemsize, s.BLOCK_COLS * p.itemsize) if p.vector else p.itemsize  # bytes of one load
    programs = cdiv(p.rows, s.BLOCK_ROWS) * cdiv(p.cols, s.BLOCK_COLS)
    in_flight = tile * p.itemsize * min(p.reads, 4) * (1 - idle(p.cols, s.BLOCK_COLS))
    moved = 2 * p.rows * p.cols * p.itemsize
    return seconds_to_move(gpu, moved, programs, in_flight, s.num_warps, 4 * held) * (16 / width) ** 0.25


def run_candidates(gpu: Chip, p: Runs) -> Iterator[RunSettings]:
    for chunk, width, chunks in product((4, 8, 16, 32), (32, 64, 128, 256, 512), (16, 32, 64)):
        yield RunSettings(chunk, width, chunks)


def estimate_runs(gpu: Chip, p: Runs, s: RunSettings) -> float:
    tile = s.CHUNK * s.BLOCK_COLS
    chunks = cdiv(p.indices, s.CHUNK)
    programs = chunks * cdiv(p.cols, s.BLOCK_COLS)
    moved = 2 * p.indices * p.cols * p.itemsize + 8 * chunks * p.cols
    return seconds_to_move(gpu, moved, programs, tile * p.itemsize, 1, tile * p.itemsize / 4 / 32)


def depthwise_candidates(gpu: Chip, p: DepthwiseProblem) -> Iterator[DepthwiseSettings]:
    widths = (32, 64, 128, 256) if p.adjacent else (1,)
    for pixels, width, warps in product((4, 8, 16, 32, 64, 128, 256, 512, 1024), widths, (2, 4, 8)):
        yield DepthwiseSettings(pixels, width, warps)


def estimate_depthwise(gpu: Chip, p: DepthwiseProblem, s: DepthwiseSettings) -> float:
    tile = s.BLOCK_P * s.BLOCK_C
    held = tile / (32 * s.num_warps)
    programs = cdiv(p.pixels, s.BLOCK_P) * cdiv(p.channels, s.BLOCK_C)
    moved = 2 * p.pixels * p.channels * p.itemsize
    return seconds_to_move(gpu, moved, programs, tile * p.itemsize * 2, s.num_warps, 3 * held)


MEMORY_BOUND = (
    Space(forward_choice, ("layer_norm_forward_kernel",), row_candidates, estimate_rows),
    Space(
        backward_choice, ("layer_norm_backward_kernel", "layer_norm_long_rows_kernel", "add_rows_kernel"),
        walk_candidates, estimate_walk,
    ),
    Space(max_pool2d.forward_choice, ("max_pool2d_forward_kernel",), tile_candidates, estimate_tiles),
    Space(max_pool2d.backward_choice, ("max_pool2d_backward_kernel",), tile_candidates, estimate_tiles),
    Space(embedding.forward_choice, ("embedding_forward_kernel",), tile_candidates, estimate_tiles),
    Space(embedding.run_choice, ("embedding_runs_kernel", "embedding_join_kernel"), run_candidates, estimate_runs),
    Space(depthwise_choice, ("conv2d_depthwise_kernel",), depthwise_candidates, estimate_depthwise),
    Space(
        depthwise_weight_choice, ("conv2d_depthwise_weight_kernel", "reduce_partials_kernel"),
        depthwise_candidates, estimate_depthwise,
    ),
)  # fmt: skip
