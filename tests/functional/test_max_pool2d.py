"""max_pool2d against its reference, and what it owes besides; that it equals PyTorch: test_max_pool2d_torch.py."""

import itertools

import pytest
import torch
from compiling import printed_where_kernels_compile

from primer_fast import functional as F
from primer_fast.functional.max_pool2d import max_pool2d_plain
from primer_fast.kernels.device import CHIPS
from primer_fast.kernels.max_pool2d import max_pool2d_bwd, max_pool2d_fwd, position_dtype
from primer_fast.kernels.tile_settings import Grid, GridSettings, grid_default
from primer_fast.proof import verify
from primer_fast.proof.inputs import allocate
from primer_fast.reference.ops import OPS

LAYOUTS = [None, "channels_last"]


def test_one_way_to_load_is_verified_once():
    assert not OPS["max_pool2d"].descriptors and OPS["linear"].descriptors
    assert {unit.path for unit in verify.cases_to_verify(["max_pool2d"])} == {None}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tile", [GridSettings(2, 8), GridSettings(8, 16), GridSettings(4, 64)], ids=str)
def test_every_tiling_gives_the_same_answer(tile, layout, device):
    """Tile sizes are chosen by size; here each is forced on sizes it does not divide."""
    x = allocate((2, 11, 5, 9), layout, torch.float32, device).copy_(torch.randint(-2, 3, (2, 11, 5, 9)))
    window = (3, 2), (2, 1), (1, 0), (1, 2)
    dy = torch.randn(2, 11, 3, 7, device=device)
    y, kept, indices = max_pool2d_fwd(x, *window, (3, 7), True, True, tile)
    want, want_kept, want_indices = max_pool2d_fwd(x, *window, (3, 7), True, True)
    assert torch.equal(y, want) and torch.equal(kept, want_kept) and torch.equal(indices, want_indices)
    assert torch.equal(want, max_pool2d_plain(x, *window))
    dx = max_pool2d_bwd(dy, kept, *window, (5, 9), tile)
    assert torch.equal(dx, max_pool2d_bwd(dy, want_kept, *window, (5, 9)))


def test_tiles_are_wide_and_leave_few_columns_idle():
    for itemsize, cols in itertools.product((2, 4), (1, 7, 14, 56, 64, 96, 112, 280, 4096)):
        rows, width, warps = grid_default(CHIPS["sm_90"], Grid(4096, cols, itemsize))
        assert rows * width * itemsize == warps * 32 * 16 and (cols <= 64 or width >= 64)
    assert [grid_default(CHIPS["sm_90"], Grid(4096, cols, 2)).BLOCK_COLS for cols in (14, 56, 96, 280)] == [
        16,
        64,
        128,
        64,
    ]
    for itemsize in (2, 4):
        assert grid_default(CHIPS["sm_90"], Grid(4096, 57, itemsize, vector=False)) == (8, 64, 4), "4 elements a thread"


@pytest.mark.parametrize("kernel", [3, 9])
def test_the_gradient_sums_in_float32(kernel, device):
    """1 + 2**-8 + 2**-8 ... in bfloat16 would stay 1. The loops over 9 windows are unrolled, those over 81 are not."""
    x = torch.zeros(1, 1, 2 * kernel - 1, 2 * kernel - 1, device=device, dtype=torch.bfloat16)
    x[..., kernel - 1, kernel - 1] = 1  # the winner of every window
    dy = torch.full((1, 1, kernel, kernel), 2.0**-8, device=device, dtype=torch.bfloat16)
    dy[..., 0, 0] = 1
    y = F.max_pool2d(x.requires_grad_(), kernel, 1)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[..., kernel - 1, kernel - 1] == 1 + (kernel**2 - 1) * 2.0**-8 and dx.sum() == dx.max()


@pytest.mark.parametrize(("kernel", "dtype"), [(2, torch.uint8), (16, torch.uint8), ((16, 17), torch.int16)])
def test_what_the_forward_keeps(kernel, dtype, device):
    """A byte per output for windows of up to 256 elements; not the input, which may be freed."""
    x = torch.randn(1, 2, 17, 18, device=device, requires_grad=True)
    for indices in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = F.max_pool2d(x, kernel, 1, return_indices=indices)
        y = y[0] if indices else y
        assert [(t.shape, t.dtype) for t in kept] == [(y.shape, dtype)]
    want = max_pool2d_plain(x, kernel, 1)
    dy = torch.randn_like(y)
    assert torch.equal(y, want)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy))


def test_positions_fit_their_dtype():
    for elements in (1, 256, 257, 2**15, 2**15 + 1):
        assert torch.iinfo(position_dtype(elements)).max >= elements - 1
    assert [position_dtype(2**bits).itemsize for bits in (8, 15, 16)] == [1, 2, 4]


def test_indices_take_no_gradient(device):
    y, indices = F.max_pool2d(torch.randn(1, 1, 4, 4, device=device, requires_grad=True), 2, return_indices=True)
    assert y.requires_grad and not indices.requires_grad and indices.dtype == torch.int64


@pytest.mark.parametrize("shape", [(1, 3, 4, 6), (3, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8], ids=str)
def test_other_dtypes_take_plain_pytorch(dtype, shape):
    x = torch.arange(72).view(shape).to(dtype)
    for got, want in zip(*(f(x, 2, 1, return_indices=True) for f in (F.max_pool2d, max_pool2d_plain)), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(F.max_pool2d(x, 2, 1), max_pool2d_plain(x, 2, 1))


def test_other_dtypes_have_gradients(device):
    x = torch.randn(2, 2, 5, 6, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: F.max_pool2d(x, 3, 2, 1), x)


def test_offsets_pass_two_to_the_31(device):
    """Coordinate times stride is formed in 64 bits: planes, lines and pixels of the input and of dy lie far apart."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # 8 GiB of NaN take their time
    span = 2**31 + 2**20
    try:
        big = torch.empty(2, span, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("needs 8 GiB of memory")
    shape, window = (2, 2, 5, 5), ((3, 3), (1, 1), (0, 0), (1, 1))
    far = {"planes": (span, 2**31 + 100, 5, 1), "lines": (25, 75, 2**29 + 160, 1), "pixels": (25, 75, 5, 2**29 + 160)}
    for strides in far.values():
        x, dy = (flat.as_strided(s, strides) for flat, s in ((big[0], shape), (big[0, 50:], (2, 2, 3, 3))))
        x.copy_(torch.randn(shape))
        y, kept, _ = max_pool2d_fwd(x, *window, (3, 3), True, False)
        want, want_kept, _ = max_pool2d_fwd(x.contiguous(), *window, (3, 3), True, False)
        assert torch.equal(y, want) and torch.equal(kept, want_kept)
        dy.copy_(torch.randn(dy.shape))
        assert torch.equal(
            max_pool2d_bwd(dy, kept, *window, (5, 5)), max_pool2d_bwd(dy.contiguous(), kept, *window, (5, 5))
        )


COMPILE = """
import torch
from primer_fast import functional as F
from primer_fast.proof.inputs import allocate
from primer_fast.proof.offline import offline
from primer_fast.reference.max_pool2d import CASES

def both_ways(x, dy_strides=None, **options):
    y, _ = F.max_pool2d(x.requires_grad_(), return_indices=True, **options)
    dy = torch.empty_like(y) if dy_strides is None else y.detach().as_strided(y.shape, dy_strides)
    torch.autograd.grad(y, x, dy)

with offline("sm_90") as launches:
    for case in CASES:
        if case.name in ("one", "whole_image", "large_window", "wide_positions"):
            both_ways(allocate(case.shapes["input"], None, torch.bfloat16, "meta"), **case.options)
    big = torch.empty(2**33, dtype=torch.float32, device="meta")
    for strides in ((2**31 + 2**20, 2**31, 5, 1), (25, 75, 2**29 + 160, 1), (25, 75, 5, 2**29 + 160)):
        both_ways(big.as_strided((2, 2, 5, 5), strides), (2**32, 9, 3, 1), kernel_size=3, stride=1)
print(*(f"{launch.kernel} {launch.constexprs['LARGE']} {launch.resources().spills}" for launch in launches), sep=",")
"""


def test_what_only_a_compiler_refuses():
    """Sizes of 1, which are constants to it; loops that are not unrolled; offsets of 64 bits."""
    both = ("max_pool2d_forward_kernel", "max_pool2d_backward_kernel")
    want = [f"{kernel} {large} False" for large in [False] * 4 + [True] * 3 for kernel in both]
    assert printed_where_kernels_compile("-c", COMPILE).strip().split(",") == want


def test_a_chip_of_64_lanes_gets_tiles_twice_as_high():
    amd = CHIPS["sm_90"]._replace(arch="gfx942")
    assert (
        grid_default(amd, Grid(4096, 64, 2)).BLOCK_ROWS
        == 2 * grid_default(CHIPS["sm_90"], Grid(4096, 64, 2)).BLOCK_ROWS
    )


@pytest.mark.parametrize("size", [2**31, 2**62, 2**64])
@pytest.mark.parametrize("cpu", [True, False], ids=["torch", "kernels"])
def test_numbers_past_32_bits(cpu, size, device, request):
    """Past the image a stride leaves one window, and in a window of one element a dilation means nothing."""
    if cpu:
        request.getfixturevalue("plain_path")
    x = torch.randn(1, 2, 5, 5, device="cpu" if cpu else device)
    assert torch.equal(F.max_pool2d(x, 3, size), x[:, :, :3, :3].amax((2, 3), keepdim=True))
    assert torch.equal(F.max_pool2d(x, 1, 2, dilation=size), x[:, :, ::2, ::2])
    with pytest.raises(ValueError, match="max_pool2d: at least one window must fit in the image"):
        F.max_pool2d(x, 3, dilation=size)
