"""Spaces of attention's kernels: forward, the two of the backward, decoding."""

from collections.abc import Iterator
from itertools import product

from primer_fast.kernels.attention.decode import DecodeProblem, DecodeSettings, decode_choice
from primer_fast.kernels.attention.settings import (
    PLAIN,
    AttentionProblem,
    AttentionSettings,
    forward_choice,
    keys_choice,
    queries_choice,
)
from primer_fast.kernels.device import Chip, cdiv
from primer_fast.kernels.tunable import Choice
from primer_fast.tuning.space import Space, seconds_to_move

_CLOCK = 1.7e9  # of Hopper; ratios alone matter
_EXPONENTIALS, _FUSED = 16, 128  # a cycle and processor
_AROUND = 10  # other operations on a weight: scale, maximum, sum, masks, conversion
_STEP_LATENCY = 0.7e-6  # of a tile from L2, with its barriers
_TILE_SECONDS = 2e-6  # beginning and end of one program


def tiles(gpu: Chip, p: AttentionProblem, choice: Choice) -> Iterator[AttentionSettings]:
    columns = choice.default(gpu, p).COLUMNS
    for block_m, block_n, warps, stages in product((16, 32, 64, 128, 256), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        for part in (columns,) if columns == 0 else (16, 32, 64):
            yield AttentionSettings(block_m, block_n, warps, stages, part)


def visible(p: AttentionProblem) -> float:
    """How many pairs of a query and a key that it sees there are in one head."""
    keys = min(p.S, p.window) if p.window else p.S
    return p.T * keys * (0.5 if p.causal and not p.window else 1.0)


def estimate(
    gpu: Chip, p: AttentionProblem, s: AttentionSettings, products: int, results: int, rows_are_keys: bool
) -> float:
    """Seconds of tensor cores and of exponentials; both overlap where two groups of warps share a processor."""
    kept, walked = (s.BLOCK_N, s.BLOCK_M) if rows_are_keys else (s.BLOCK_M, s.BLOCK_N)
    rows = p.S if rows_are_keys else p.T
    programs = p.heads * cdiv(rows, kept)
    steps = visible(p) / rows / walked + (1 if p.causal or p.window else 0)  # a program, on average
    if rows_are_keys:
        steps *= p.group

    held = (results * kept * p.width + products / 2 * kept * walked) / (32 * s.num_warps)
    shared = (kept + (s.num_stages * 2 + 1) * walked) * p.width * p.itemsize
    by_registers = 65536 // int((40 + held) * 32 * s.num_warps)
    resident = max(1, min(by_registers, gpu.shared // shared, 64 // s.num_warps))
    beside = min(resident, cdiv(programs, gpu.processors))

    # wgmma takes 64 rows at a time and is at its best with 128 columns
    fullness = (1.0 if kept >= 64 else 0.5) * (0.5 + min(walked, 128) / 256)
    peak = 0.75 * gpu.tflops * 1e12 / gpu.processors * 2 / p.itemsize / p.passes * fullness
    matrix = beside * products * 2 * kept * walked * p.width / peak
    around = _AROUND + (4 if products > 2 else 0) + (0 if p.burden <= PLAIN else 8)
    weights = beside * kept * walked * (1 / _EXPONENTIALS + around / _FUSED) / _CLOCK
    groups = beside * s.num_warps // 4
    step = max(matrix, weights) + (0.3 if groups > 1 else 1.0) * min(matrix, weights)
    # A tile is on its way while others are multiplied, or before
    step = max(step, _STEP_LATENCY / (s.num_stages - 1)) if s.num_stages > 1 else step + _STEP_LATENCY
    waves = programs / (gpu.processors * beside)
    waves = cdiv(programs, gpu.processors * beside) if not p.causal and waves < 8 else max(waves, 1.0)
    return waves * (steps * step + _TILE_SECONDS)


def decode_candidates(gpu: Chip, p: DecodeProblem) -> Iterator[DecodeSettings]:
    default = decode_choice.default(gpu, p)
    blocks_m = {default.BLOCK_M, max(16, default.BLOCK_M // 2), min(64, default.BLOCK_M * 2)}
    for block_m, block_n, warps, stages in product(sorted(blocks_m), (16, 32, 64, 128, 256), (2, 4, 8), (1, 2, 3, 4)):
        programs = max(p.heads, 1) * cdiv(p.rows, block_m)
        most = max(cdiv(p.S, block_n), 1)
        filling = {min(most, max(1, n * gpu.processors // programs)) for n in (1, 2, 3, 4, 6)}
        for splits in sorted({1, min(default.SPLITS, most), *filling}):
            yield DecodeSettings(block_m, block_n, splits, warps, stages)


def estimate_decode(gpu: Chip, p: DecodeProblem, s: DecodeSettings) -> float:
    tiles_m = cdiv(p.rows, s.BLOCK_M)
    step = s.BLOCK_N * (p.D + p.DV) * p.itemsize
    cache = p.heads * p.S * (p.D + p.DV) * p.itemsize
    held = s.BLOCK_M * (s.BLOCK_N + p.DV) / (32 * s.num_warps)
    stages = max(s.num_stages - 1, 0.5)
    shared = s.num_stages * step
    seconds = seconds_to_move(
        gpu, cache * tiles_m, p.heads * tiles_m * s.SPLITS, stages * step, s.num_warps, held, shared
    )
    if s.SPLITS > 1:  # the shares' sums, and a second launch
        seconds += 3e-6 + 8 * p.heads * p.rows * p.DV * s.SPLITS / (gpu.bandwidth * 1e12)
    return seconds


def _space(choice, kernels, products, results, rows_are_keys):
    return Space(
        choice, kernels, lambda gpu, p: tiles(gpu, p, choice),
        lambda gpu, p, s: estimate(gpu, p, s, products, results, rows_are_keys),
    )  # fmt: skip


ATTENTION = (
    _space(forward_choice, ("attention_forward_kernel",), 2, 1, False),
    _space(keys_choice, ("attention_backward_kv_kernel",), 4, 2, True),
    _space(queries_choice, ("attention_backward_q_kernel",), 3, 1, False),
    Space(decode_choice, ("attention_decode_kernel", "attention_combine_kernel"), decode_candidates, estimate_decode),
)
