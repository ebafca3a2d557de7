"""The order in which programs take the tiles of a result."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are taken in base 2: e^x = 2^(x log2 e)


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Program number -> (tile row, tile column), GROUP_M tile rows at a time so that both operands stay in L2."""
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid - group * GROUP_M * tiles_n
    return first_m + within % rows, within // rows
