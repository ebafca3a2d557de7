"""max_pool2d where neighbours along a line move together: the bits are those of torch, however the lines lie."""

import pytest
import torch
from functional.test_max_pool2d import few_levels, same, same_as_torch

from primer_fast import backend
from primer_fast import functional as F
from primer_fast.functional.max_pool2d import max_pool2d_plain
from primer_fast.kernels import max_pool2d as kernels
from primer_fast.kernels.max_pool2d import lines, max_pool2d_bwd, max_pool2d_fwd
from primer_fast.kernels.max_pool2d.lines import grain, line_of, strip_width
from primer_fast.kernels.tile_settings import GridSettings

# Width; arguments of the pool; results side by side that the forward makes in float32, and cells that the backward does
LINES = [
    (16, (3, 2, 1), 4, 4),  # ResNet's: each strip needs one column of its neighbour
    (32, (3, 2, 1), 4, 4),
    (12, (3, 2, 1), 2, 2),  # 6 outputs
    (16, (2, 2), 4, 4),
    (16, (3, 1, 1), 4, 4),  # a column of both neighbours
    (16, ((1, 9), 1, (0, 4)), 4, 4),  # whole pieces of both neighbours
    (16, ((2, 5), (1, 2), (1, 2)), 4, 4),
    (16, ((11, 3), 1, (5, 1)), 4, 1),  # lines of windows are not unrolled
    (12, (3, 3), 4, 2),  # three pieces a strip; 9 pixels a cell
    (8, (1, 2), 4, 4),  # every second column
    (12, (4, 4, 2), 4, 1),  # a piece past the image; more windows than cells
    (16, (2, 2, 1), 1, 1),  # 9 outputs
    (16, (5, 2), 2, 1),  # 6 outputs, windows of 25 elements
    (16, (4, 2), 1, 1),  # 7 outputs
    (24, (1, 3), 4, 2),  # pixels that are in no window
    (15, (3, 2, 1), 1, 1),  # 8 outputs of 15 columns
    (14, (3, 2, 1, 1, True), 1, 1),  # 8 outputs of 14 columns
    (16, (3, 1, 1, (2, 1)), 4, 4),
    (16, (5, 1, (1, 2), (1, 2)), 1, 1),  # holes in the lines of a window
]


@pytest.fixture
def strips(monkeypatch):
    """STRIP of each launch, forward and backward; interpreted, each piece must start where the compiler is told."""
    seen, piece = [], lines._piece

    def aligned(ptr, N):
        assert not (ptr.handle.data % (N * ptr.dtype.element_ty.primitive_bitwidth // 8)).any()
        return piece(ptr, N)

    if backend.interpreting:
        monkeypatch.setattr(lines, "_piece", aligned)

    class Watched:
        def __init__(self, kernel):
            self.kernel, self.place = kernel, kernel.arg_names.index("STRIP")

        def __getitem__(self, grid):
            launch = self.kernel[grid]
            return lambda *args, **options: seen.append(args[self.place]) or launch(*args, **options)

    for name in ("max_pool2d_forward_kernel", "max_pool2d_backward_kernel"):
        monkeypatch.setattr(kernels, name, Watched(getattr(kernels, name)))
    return seen


@pytest.mark.parametrize(("width", "window", "forward", "backward"), LINES, ids=str)
def test_bitwise_torch(width, window, forward, backward, strips, device):
    same_as_torch(few_levels((2, 3, 11, width), None, device), *window)
    assert strips == [forward, backward]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "backward"), [((3, 2, 1), 8), ((2,), 8), ((3, 3), 2), ((3, 1, 1), 8)], ids=str)
def test_16_bits_are_those_of_float32_rounded_once(window, backward, dtype, strips, device):
    x, dy = few_levels((1, 2, 6, 48), None, device, dtype), torch.randn(1, 2, 6, 48, device=device).to(dtype)
    results = []
    for of in (dtype, torch.float32):
        leaf = x.to(of).requires_grad_()
        y, indices = F.max_pool2d(leaf, *window, return_indices=True)
        upstream = dy[..., : y.shape[2], : y.shape[3]].contiguous().to(of)
        results.append((y.detach(), indices, *torch.autograd.grad(y, leaf, upstream)))
    for got, want in zip(*results, strict=True):
        same(got, want.to(got.dtype))
    assert strips[:2] == [8, backward]


def views(x):
    """Views of one shape (..., 16) whose lines lie differently, and how many results stand side by side there."""
    wide = x.repeat(1, 1, 1, 2)
    return {
        "columns of wider lines": (wide[..., 16:], 4),
        "off a boundary": (wide[..., 1:17], 1),
        "lines of 18": (torch.nn.functional.pad(x, (0, 2))[..., :16], 2),
        "every second line": (x.repeat(1, 1, 2, 1)[:, :, ::2], 4),
        "every second column": (x.repeat_interleave(2, 3)[..., ::2], 1),
        "one image for all": (x[:1].expand_as(x), 4),
        "planes in another order": (x.transpose(0, 1).contiguous().transpose(0, 1), 4),
    }


@pytest.mark.parametrize("name", views(torch.zeros(1, 1, 1, 16)))
def test_lines_that_lie_elsewhere(name, strips, device):
    x, strip = views(few_levels((3, 2, 6, 16), None, device))[name]
    same_as_torch(x, 3, 1, 1)
    assert strips == [strip, 4]
    dy, strip = views(torch.randn(3, 2, 6, 16, device=device))[name]
    leaf, plain = x.detach().requires_grad_(), x.detach().cpu().requires_grad_()
    (got,) = torch.autograd.grad(F.max_pool2d(leaf, 3, 1, 1), leaf, dy)
    (want,) = torch.autograd.grad(max_pool2d_plain(plain, 3, 1, 1), plain, dy.cpu())
    same(got, want)
    assert strips[-1] == strip


IMAGES = {  # shape, layout, window, size of the output; whether its lines are read in strips
    "odd": ((1, 11, 3, 5), None, ((3, 2), (2, 1), (1, 0), (1, 2)), (2, 3), False),
    "channels_last": ((1, 11, 3, 5), "channels_last", ((3, 2), (2, 1), (1, 0), (1, 2)), (2, 3), False),
    "lines": ((1, 3, 5, 16), None, ((3, 3), (2, 2), (1, 1), (1, 1)), (3, 8), True),
}


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("rows, cols, warps, strip", [(2, 8, 1, 1), (64, 8, 4, 4), (16, 64, 4, 4), (1, 8, 1, 1)])
def test_every_tiling_gives_the_same_answer(rows, cols, warps, strip, image, strips, device):
    """Tiles are chosen by size; here each is forced. A strip is no wider than what a thread has."""
    shape, layout, window, size, in_strips = IMAGES[image]
    tile = GridSettings(rows, cols, warps)
    x = few_levels(shape, layout, device)
    dy = torch.randn(*shape[:2], *size, device=device)
    y, kept, indices = max_pool2d_fwd(x, *window, size, True, True, tile)
    want = max_pool2d_fwd(x, *window, size, True, True)
    for got, expected in zip((y, kept, indices), want, strict=True):
        same(got, expected)
    same(max_pool2d_bwd(dy, kept, *window, shape[2:], tile), max_pool2d_bwd(dy, kept, *window, shape[2:]))
    assert strips == ([strip, 4] if in_strips else [1, 1]) * 2


def test_pieces_are_as_wide_as_all_strides_allow():
    x = torch.empty(2, 3, 8, 24, dtype=torch.float16)
    assert [grain(line_of(x), span) for span in (1, 2, 6, 8, 16, 24)] == [1, 2, 2, 8, 8, 8]
    assert [grain(line_of(x[..., first:]), 8) for first in (0, 1, 2, 4, 8)] == [8, 1, 2, 4, 8]
    assert grain(line_of(x.float()), 8) == 4 and grain(line_of(x[..., ::2]), 8) == 1
    assert grain(line_of(x[..., :12]), 8) == 4, "a line must end where a piece does"
    line = line_of(x)
    assert [strip_width(cols, (line, 2)) for cols in (1, 2, 4, 6, 7, 8, 12, 16)] == [1, 2, 4, 2, 1, 8, 4, 16]
    assert strip_width(12, (line_of(x[..., :12]), 1)) == 4 and strip_width(12, (line_of(x[..., :12]), 4)) == 1


def test_cells_start_where_they_meet_the_fewest_windows():
    """Of two alike with the image, so that lines of cells start where lines of pixels do."""
    axes = {(3, 2, 1, 1): 0, (2, 2, 1, 1): 1, (3, 3, 1, 1): 1, (4, 4, 2, 1): 2, (3, 1, 1, 1): 0, (5, 2, 2, 1): 0}
    assert {axis: kernels._start(*axis) for axis in axes} == axes
