"""max_pool2d: bit for bit what PyTorch gives (values, indices, gradients, layouts, errors), and its other promises."""

import itertools

import numpy as np
import pytest
import torch
from compiling import printed_where_kernels_compile
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast.functional.max_pool2d import max_pool2d_plain
from primer_fast.kernels.device import CHIPS
from primer_fast.kernels.max_pool2d import is_channels_last, max_pool2d_bwd, max_pool2d_fwd, position_dtype
from primer_fast.kernels.tile_settings import Grid, grid_default
from primer_fast.proof import verify
from primer_fast.proof.inputs import allocate
from primer_fast.reference.max_pool2d import max_pool2d
from primer_fast.reference.ops import OPS

LAYOUTS = [None, "channels_last"]
inf, nan = float("inf"), float("nan")


def same(got, want):
    """Equal, NaN with NaN and zeros of one sign."""
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=0, atol=0, equal_nan=True)
    if got.is_floating_point():
        number = ~want.cpu().isnan()
        assert torch.equal(got.cpu().signbit()[number], want.cpu().signbit()[number])


def same_as_torch(x, *args, **options):
    """Values, indices and the gradient of F.max_pool2d are those of torch on the CPU, bit for bit."""
    leaf, plain = x.detach().requires_grad_(), x.detach().cpu().requires_grad_()
    (y, indices), (want, want_indices) = (
        f(t, *args, return_indices=True, **options) for f, t in ((F.max_pool2d, leaf), (max_pool2d_plain, plain))
    )
    same(y, want)
    same(indices, want_indices)
    dy = torch.randn(want.shape)
    (dx,), (want_dx,) = torch.autograd.grad(y, leaf, dy.to(x.device)), torch.autograd.grad(want, plain, dy)
    same(dx, want_dx)


def few_levels(shape, layout, device, dtype=torch.float32):
    """Values that tie: a few numbers, the smallest above zero, zeros of both signs, infinities, NaN.

    The first plane is -inf but for its last pixel, which is the dtype's least number.
    """
    numbers = torch.finfo(dtype)
    levels = torch.tensor([-1, -0.0, 0.0, 0.5, 1, inf, -inf, nan, numbers.smallest_normal]).to(dtype)
    weights = torch.tensor([4, 4, 4, 4, 2, 0.5, 2, 0.5, 1])
    values = levels[torch.multinomial(weights, int(np.prod(shape)), replacement=True)].view(shape)
    first = values.view(-1, *shape[-2:])[0]
    first[:], first[-1, -1] = -inf, numbers.min
    return allocate(shape, layout, dtype, device).copy_(values)


OPTIONS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (3, 1), "dilation": (1, 2), "ceil_mode": True},
]


def test_reference_has_the_values_and_indices_of_torch(device):
    x = few_levels((2, 3, 9, 8), None, "cpu", torch.float64)
    for options in OPTIONS:
        want = max_pool2d_plain(x, return_indices=True, **options)
        for got, tensor in zip(max_pool2d(x.numpy(), return_indices=True, **options), want, strict=True):
            np.testing.assert_array_equal(got, tensor.numpy())


def settings():
    """Every 5th combination of settings that fits a kernel, each in turn in one of the layouts."""
    kernels, strides = [1, 2, 3, (2, 3), (4, 1)], [None, 1, 2, (1, 3), (3, 2)]
    paddings, dilations, shapes = [0, 1, (0, 1), (2, 0)], [1, 2, (2, 1), (1, 3)], [(2, 3, 11, 10), (1, 17, 10, 11)]
    every = itertools.product(kernels, strides, paddings, dilations, [False, True])
    pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
    fit = [c for c in every if all(p <= k // 2 for p, k in zip(pair(c[2]), pair(c[0]), strict=True))]
    return [(*c, shapes[i % 2], LAYOUTS[i // 2 % 2]) for i, c in enumerate(fit[::5])]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "ceil_mode", "shape", "layout"), settings())
def test_bitwise_torch(kernel, stride, padding, dilation, ceil_mode, shape, layout, device):
    x = few_levels(shape, layout, device)
    assert x.isnan().any()
    same_as_torch(x, kernel, stride, padding, dilation, ceil_mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_torch_in_16_bits(layout, dtype, device):
    """Where no two windows overlap no gradient is rounded."""
    same_as_torch(few_levels((2, 16, 12, 9), layout, device, dtype), 3)


def test_windows_without_a_pixel(device):
    """Padding before the image, dilation past its end: torch returns -inf; no gradient goes anywhere."""
    x = torch.randn(1, 2, 2, 9, device=device, requires_grad=True)
    y = F.max_pool2d(x, 2, 1, 1, 3)
    same(y, max_pool2d_plain(x.detach().cpu(), 2, 1, 1, 3))
    assert y.isneginf().all()
    dy = torch.randn_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx, dy, torch.ones_like(dx))
    assert not dx.any() and not ddy.any()


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded", "strided"])
@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (2, 1, 6, 6), (1, 4, 2, 2), (3, 1, 1, 1), (1, 1, 6, 1), (2, 5, 1, 1)])
def test_memory_format_is_that_of_torch(shape, layout, device):
    x = allocate(shape, layout, torch.float32, device).zero_().requires_grad_()
    kernel = tuple(min(2, n) for n in shape[2:])
    got, want = (f(x, kernel, return_indices=True) for f in (F.max_pool2d, max_pool2d_plain))
    assert [t.stride() for t in got] == [t.stride() for t in want]
    assert is_channels_last(x) == (torch._prims_common.suggest_memory_format(x) is torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradient_of_any_layout(layout, device):
    x = torch.randn(2, 8, 9, 8, device=device).to(memory_format=torch.channels_last).requires_grad_()
    y, want = (f(x, 3, 2, 1) for f in (F.max_pool2d, max_pool2d_plain))
    dy = allocate(y.shape, layout, torch.float32, device).normal_()
    for upstream in (dy, dy[:1].expand_as(dy), dy[..., :1].expand_as(dy), dy.flip(0)):
        got = torch.autograd.grad(y, x, upstream, retain_graph=True)
        same(*got, *torch.autograd.grad(want, x, upstream, retain_graph=True))
        assert got[0].stride() == x.stride()
    same(*torch.autograd.grad(y.sum(), x), *torch.autograd.grad(want.sum(), x))


@pytest.mark.parametrize("spelling", [2, (2,), [2, 2], (np.int64(2), 2), torch.tensor(2)], ids=repr)
def test_spellings_of_a_pair(spelling, device):
    x = torch.randn(1, 1, 6, 6, device=device)
    want = max_pool2d_plain(x, 2)
    assert torch.equal(F.max_pool2d(x, spelling), want) and torch.equal(F.max_pool2d(x, 2, spelling), want)
    assert torch.equal(F.max_pool2d(x, 2, ()), want) and torch.equal(F.max_pool2d(x, 2, []), want)


def test_one_way_to_load_is_verified_once():
    assert not OPS["max_pool2d"].descriptors and OPS["linear"].descriptors
    assert {unit.path for unit in verify.cases_to_verify(["max_pool2d"])} == {None}


def test_tiles_are_wide_and_leave_few_columns_idle():
    for itemsize, cols in itertools.product((2, 4), (1, 7, 14, 56, 64, 96, 112, 280, 4096)):
        rows, width, warps = grid_default(CHIPS["sm_90"], Grid(4096, cols, itemsize))
        assert rows * width * itemsize == warps * 32 * 16 and (cols <= 64 or width >= 64)
    widths = [grid_default(CHIPS["sm_90"], Grid(4096, cols, 2)).BLOCK_COLS for cols in (14, 56, 96, 280)]
    assert widths == [16, 64, 128, 64]
    for itemsize in (2, 4):
        assert grid_default(CHIPS["sm_90"], Grid(4096, 57, itemsize, vector=False)) == (8, 64, 4), "4 elements a thread"
    of_64_lanes = CHIPS["sm_90"]._replace(arch="gfx942")
    rows, of_32 = (grid_default(chip, Grid(4096, 64, 2)).BLOCK_ROWS for chip in (of_64_lanes, CHIPS["sm_90"]))
    assert rows == 2 * of_32


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
    x = torch.randn(1, 1, 16, 17, device=device, requires_grad=True)
    for asked in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = F.max_pool2d(x, kernel, 1, return_indices=asked)
        y, indices = y if asked else (y, None)
        assert [(t.shape, t.dtype) for t in kept] == [(y.shape, dtype)]
    assert not indices.requires_grad and indices.dtype == torch.int64
    want = max_pool2d_plain(x, kernel, 1)
    dy = torch.randn_like(y)
    assert torch.equal(y, want)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy))


def test_positions_fit_their_dtype():
    for elements in (1, 256, 257, 2**15, 2**15 + 1):
        assert torch.iinfo(position_dtype(elements)).max >= elements - 1
    assert [position_dtype(2**bits).itemsize for bits in (8, 15, 16)] == [1, 2, 4]


def test_other_dtypes_take_plain_pytorch(device):
    for dtype, shape in itertools.product((torch.float64, torch.int64, torch.uint8), ((1, 3, 4, 6), (3, 4, 6))):
        x = torch.arange(72, device=device).view(shape).to(dtype)
        got, want = (f(x, 2, 1, return_indices=True) for f in (F.max_pool2d, max_pool2d_plain))
        assert all(map(torch.equal, got, want)) and torch.equal(F.max_pool2d(x, 2, 1), want[0])
    x = torch.randn(2, 2, 5, 6, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: F.max_pool2d(x, 3, 2, 1), x)


def test_offsets_pass_two_to_the_31(far_rows):
    """Coordinate times stride is formed in 64 bits: images, planes, lines, pixels of the input and of dy far apart."""
    flat, shape, window = far_rows.view(-1), (2, 2, 5, 5), ((3, 3), (1, 1), (0, 0), (1, 1))
    span, part = 2**31 + 200, 2**29 + 160
    for strides in ((span, 75, 5, 1), (75, span, 5, 1), (25, 75, part, 1), (25, 75, 5, part)):
        x, dy = (memory.as_strided(s, strides) for memory, s in ((flat, shape), (flat[50:], (2, 2, 3, 3))))
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
        if case.name in ("one", "wide_positions"):
            both_ways(allocate(case.shapes["input"], None, torch.bfloat16, "meta"), **case.options)
    big = torch.empty(2**33, dtype=torch.float32, device="meta")
    for strides in ((2**31 + 2**20, 2**31, 5, 1), (25, 75, 2**29 + 160, 2**29)):
        both_ways(big.as_strided((2, 2, 5, 5), strides), (2**32, 9, 3, 1), kernel_size=3, stride=1)
print(*(f"{launch.kernel} {launch.constexprs['LARGE']} {launch.resources().spills}" for launch in launches), sep=",")
"""


def test_what_only_a_compiler_refuses():
    """Sizes of 1, which are constants to it; loops that are not unrolled; offsets of 64 bits."""
    both = ("max_pool2d_forward_kernel", "max_pool2d_backward_kernel")
    want = [f"{kernel} {large} False" for large in [False] * 2 + [True] * 2 for kernel in both]
    assert printed_where_kernels_compile("-c", COMPILE).strip().split(",") == want


@pytest.mark.parametrize("size", [2**31, 2**62, 2**64])
def test_numbers_past_32_bits(size, either):
    """Past the image a stride leaves one window, and in a window of one element a dilation means nothing."""
    x = torch.randn(1, 2, 5, 5, device=either)
    assert torch.equal(F.max_pool2d(x, 3, size), x[:, :, :3, :3].amax((2, 3), keepdim=True))
    assert torch.equal(F.max_pool2d(x, 1, 2, dilation=size), x[:, :, ::2, ::2])
    with pytest.raises(ValueError, match="max_pool2d: at least one window must fit in the image"):
        F.max_pool2d(x, 3, dilation=size)


IMAGE = torch.ones(1, 2, 6, 5)


WRONG = [
    (TypeError, "input must be a tensor; got list", ([[1.0]], 2)),
    (ValueError, r"input must have shape \(N, C, H, W\) or \(C, H, W\).*; got \(6, 5\)", (IMAGE[0, 0], 2)),
    (ValueError, r"got \(1, 1, 2, 6, 5\)", (IMAGE[None], 2)),
    (ValueError, r"only N may be 0; got \(1, 0, 6, 5\)", (IMAGE[:, :0], 2)),
    (ValueError, r"only N may be 0; got \(0, 6, 5\)", (IMAGE[0, :0], 2)),
    (ValueError, r"only N may be 0; got \(1, 2, 6, 0\)", (IMAGE[..., :0], 2)),
    (TypeError, "input must hold real numbers; got torch.bool", (IMAGE.bool(), 2)),
    (TypeError, "input must hold real numbers; got torch.complex64", (IMAGE.cfloat(), 2)),
    (TypeError, "kernel_size must be an int or a pair of ints; got 2.0", (IMAGE, 2.0)),
    (TypeError, "stride must be an int or a pair of ints; got True", (IMAGE, 2, True)),
    (TypeError, r"padding must be an int or a pair of ints; got \('1', 0\)", (IMAGE, 2, 2, ("1", 0))),
    (ValueError, r"kernel_size must be an int or a pair of ints; got \(2, 2, 2\)", (IMAGE, (2, 2, 2))),
    (ValueError, r"kernel_size must be an int or a pair of ints; got \(\)", (IMAGE, ())),
    (ValueError, r"kernel_size must be at least 1; got \(0, 2\)", (IMAGE, (0, 2))),
    (ValueError, r"stride must be at least 1; got \(0, 0\)", (IMAGE, 2, 0)),
    (ValueError, r"dilation must be at least 1; got \(1, 0\)", (IMAGE, 2, 2, 0, (1, 0))),
    (ValueError, r"padding must be between 0 and half of kernel_size; got padding \(-1, -1\)", (IMAGE, 2, 2, -1)),
    (ValueError, r"got padding \(2, 2\) and kernel_size \(3, 3\)", (IMAGE, 3, 1, 2)),
    (ValueError, r"got padding \(2, 2\) and kernel_size \(3, 3\)", (IMAGE, 3, 1, 2, 2)),
    (ValueError, r"at least one window must fit in the image; got output size \(1, 0\) for image \(6, 5\)", (IMAGE, 6)),
    (ValueError, r"got output size \(0, -1\).*dilation \(6, 6\)", (IMAGE, 2, 1, 0, 6)),
]

test_wrong_arguments = refuses("max_pool2d", [(*wrong, {}) for wrong in WRONG])
