import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast.functional.activation import ACTIVATIONS
from primer_fast.functional.conv2d import conv2d_plain
from primer_fast.kernels.conv2d import (
    Geometry,
    conv2d_bwd_input,
    conv2d_bwd_weight,
    conv2d_fwd,
    depthwise,
    gather,
    weight,
)
from primer_fast.kernels.conv2d.geometry import FEW_PIXELS, box_of, flat_pixels, numbers_are_large
from primer_fast.kernels.device import assume_chip
from primer_fast.kernels.product import MatmulSettings
from primer_fast.proof.numerics import exact, worst
from primer_fast.reference.conv2d import conv2d, conv2d_grad, output_size

LAST = torch.channels_last

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


# --- every tiling, split and layout gives the same answer

TILES = [
    MatmulSettings(16, 16, 16, 4, 2, SPLITS=1, GROUP_M=1),
    MatmulSettings(64, 32, 32, 4, 2, SPLITS=3, GROUP_M=2),
    MatmulSettings(32, 64, 16, 4, 2, SPLITS=1, GROUP_M=3, SUBTILES=2),
    MatmulSettings(64, 64, 64, 4, 2, SPLITS=16, SUBTILES=4),  # more splits than steps: some have no work
]
SHAPES = {
    "many channels": ((1, 32, 5, 4), (40, 32, 2, 2), 1, (1, 0), (1, 1), 1),
    "exact boxes": ((2, 32, 4, 4), (24, 32, 3, 3), 1, (1, 1), (1, 1), 1),
    "few channels": ((2, 3, 6, 5), (20, 3, 2, 3), 1, (1, 0), (1, 2), 1),
    "stride": ((2, 64, 4, 4), (40, 64, 2, 1), 2, (1, 1), (1, 1), 1),
    "groups": ((2, 64, 3, 3), (40, 32, 2, 1), 1, (1, 0), (1, 1), 2),
}


WAYS = [(torch.contiguous_format, "sm_80"), (LAST, "sm_80"), (LAST, "sm_90")]  # descriptors move channels_last alone
TILINGS = [
    (settings, shape, *way)
    for i, settings in enumerate(TILES)
    for j, shape in enumerate(SHAPES)
    for k, way in enumerate(WAYS)
    if (i + j + k) % 3 != 0 or shape == "many channels"  # two of three ways by turns
]


@pytest.mark.parametrize("settings, shape, layout, chip", TILINGS, ids=str)
def test_every_tiling_gives_the_same_answer(settings, shape, layout, chip, device):
    """Tiles, splits and subtiles are chosen by size; here each is forced on sizes that it does not divide."""
    xs, ws, stride, padding, dilation, groups = SHAPES[shape]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    size = output_size(xs[2:], ws[2:], stride, padding, dilation)
    geometry = Geometry((stride, stride), padding, dilation, groups, size)
    x, w, dy = (torch.randn(s, device=device).to(memory_format=layout) for s in (xs, ws, (xs[0], ws[0], *size)))
    b = torch.randn(ws[0], device=device)
    with assume_chip(chip):
        y, saved = conv2d_fwd(x, w, b, geometry, "gelu", True, "highest", layout is LAST, settings)
        g = dy * saved
        dx = conv2d_bwd_input(g, x, w, geometry, "highest", settings)
        dw = conv2d_bwd_weight(g, x, w, geometry, "highest", settings)
    arrays = [exact(t) for t in (x, w, b)]
    want = conv2d_grad(exact(dy), *arrays, **options, activation="gelu")
    want["output"] = conv2d(*arrays, **options, activation="gelu")
    for name, got in {"output": y, "input": dx, "weight": dw}.items():
        assert worst(exact(got), want[name]) < 2e-4, name


@pytest.mark.parametrize(
    ("image", "pixels", "box"),
    [
        ((64, 56, 56), 128, (2, 8, 8)),
        ((64, 7, 7), 64, (64, 1, 1)),
        ((1, 224, 224), 64, (1, 2, 32)),
        ((1, 7, 7), 64, (1, 8, 8)),
        ((3, 5, 9), 16, (1, 1, 16)),
    ],
)
def test_boxes_have_the_least_overhang(image, pixels, box):
    got = box_of(*image, pixels)
    covered = lambda b: np.prod([-(-n // k) * k for n, k in zip(image, b, strict=True)])  # noqa: E731
    assert np.prod(got) == pixels and covered(got) <= covered(box)


@pytest.mark.parametrize("w_last", [False, True], ids=["weight contiguous", "weight channels_last"])
@pytest.mark.parametrize("x_last", [False, True], ids=["input contiguous", "input channels_last"])
@pytest.mark.parametrize(
    ("xs", "ws", "options"),
    [
        ((2, 8, 5, 4), (16, 8, 3, 3), {}),
        ((2, 8, 5, 4), (16, 8, 1, 1), {"activation": "gelu"}),
        ((2, 1, 5, 4), (16, 1, 3, 3), {}),
        ((2, 8, 1, 1), (16, 8, 1, 1), {}),
        ((2, 4, 5, 4), (4, 1, 3, 3), {"groups": 4}),
    ],
    ids=str,
)
def test_layouts_of_results(xs, ws, options, x_last, w_last, device):
    """The output has torch's layout; a gradient has its tensor's."""
    x = torch.randn(xs, device=device).contiguous(memory_format=LAST if x_last else torch.contiguous_format)
    w = torch.randn(ws, device=device).contiguous(memory_format=LAST if w_last else torch.contiguous_format)
    y = F.conv2d(x.requires_grad_(), w.requires_grad_(), **options)
    plain = conv2d_plain(x, w, **options)
    for size, got, want in zip(y.shape, y.stride(), plain.stride(), strict=True):
        assert size == 1 or got == want
    dx, dw = torch.autograd.grad(y, (x, w), torch.randn_like(y))
    assert dx.stride() == x.stride() and dw.stride() == w.stride()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("ws", [(16, 8, 2, 2), (16, 8, 1, 1), (8, 1, 1, 2)], ids=["2x2", "1x1", "depthwise"])
def test_upstream_gradient_in_any_layout(ws, activation, device):
    """channels_last output, gradient contiguous, or one element with stride 0 as sum() sends it back."""
    x = torch.randn(1, 8, 4, 3, device=device).to(memory_format=LAST).requires_grad_()
    w = torch.randn(ws, device=device, requires_grad=True)
    y = F.conv2d(x, w, groups=8 // ws[1], activation=activation)
    plain = conv2d_plain(x, w, groups=8 // ws[1], activation=activation)
    for dy in (torch.randn(y.shape, device=device), torch.ones(1, 1, 1, 1, device=device).expand(y.shape)):
        got, want = (torch.autograd.grad(t, (x, w), dy, retain_graph=True) for t in (y, plain))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_contiguous_weights_of_a_large_layer(chip, device):
    """1,024 pixels and more: the weights are copied to where their channels are adjacent."""
    x = torch.randn(1, 32, 32, 32, device=device).to(memory_format=LAST).requires_grad_()
    w = torch.randn(16, 32, 1, 2, device=device, requires_grad=True)
    settings = MatmulSettings(128, 32, 32, 4, 2)
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1, (32, 31))
    dy = torch.randn(1, 16, 32, 31, device=device).to(memory_format=LAST)
    with assume_chip(chip), torch.no_grad():
        y, _ = conv2d_fwd(x, w, None, geometry, None, False, "highest", True, settings)
        dx = conv2d_bwd_input(dy, x, w, geometry, "highest", settings)
    plain = conv2d_plain(x, w)
    (want,) = torch.autograd.grad(plain, x, dy)
    torch.testing.assert_close((y, dx), (plain.detach(), want), rtol=1e-4, atol=1e-4)
    assert dx.stride() == x.stride()


# --- values


@pytest.mark.parametrize("depthwise", [False, True], ids=["product", "depthwise"])
def test_the_bias_gradient_sums_in_float32(depthwise, device):
    """1 + 1/256 + 1/256 ... in bfloat16 would stay 1."""
    x = torch.zeros(1, 2, 17, 64, device=device, dtype=torch.bfloat16)
    w = torch.zeros(2, 1 if depthwise else 2, 1, 2, device=device, dtype=torch.bfloat16)
    b = torch.zeros(2, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.full((1, 2, 17, 63), 2.0**-8, device=device, dtype=torch.bfloat16)
    dy[:, :, 0, 0] = 1
    (db,) = torch.autograd.grad(F.conv2d(x, w, b, groups=2 if depthwise else 1), b, dy)
    assert torch.equal(db, torch.full_like(db, 1 + (17 * 63 - 1) / 256))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("depthwise", [False, True], ids=["product", "depthwise"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_nan_and_infinity_go_where_the_formula_sends_them(activation, depthwise, device):
    """One pixel each; a window that misses it stays finite."""
    x = torch.ones(3, 2, 4, 5, device=device)
    x[:, :, 1, 2] = torch.tensor([float("nan"), float("inf"), float("-inf")], device=device)[:, None]
    w = torch.ones(2, 1 if depthwise else 2, 2, 2, device=device)
    groups = 2 if depthwise else 1
    x.requires_grad_()
    y = F.conv2d(x, w, groups=groups, activation=activation)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    want = conv2d(exact(x), exact(w), groups=groups, activation=activation)
    want_dx = conv2d_grad(np.ones(y.shape), exact(x), exact(w), groups=groups, activation=activation)["input"]
    np.testing.assert_allclose(exact(y), want, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(exact(dx)), np.isnan(want_dx))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_an_infinite_pixel_reaches_the_taps_that_meet_it_alone(chip, device):
    """The second tap meets the last column; pixels of a tile past the output must not bring it to the first."""
    x = torch.randn(1, 32, 4, 4, device=device).to(memory_format=LAST)
    x[:, :, :, 3] = float("inf")
    w = torch.randn(16, 32, 1, 2, device=device, requires_grad=True)
    with assume_chip(chip):
        y = F.conv2d(x, w)
        (dw,) = torch.autograd.grad(y, w, torch.randn_like(y))
    assert y[..., :2].isfinite().all() and not y[..., 2].isfinite().any()
    assert dw[..., 0].isfinite().all() and not dw[..., 1].isfinite().any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinite_weight_reaches_no_other_tap(device):
    """A tap has fewer channels than a step of the sum, and the step would meet the next tap's first."""
    x = torch.rand(1, 40, 3, 3, device=device).to(memory_format=LAST) + 1
    w = torch.rand(16, 40, 1, 2, device=device).to(memory_format=LAST)
    w[:, 0, 0, 1] = float("inf")
    settings = MatmulSettings(16, 16, 32, 4, 2)
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1, (3, 2))
    y, _ = conv2d_fwd(x, w, None, geometry, None, False, "highest", True, settings)
    assert (y == float("inf")).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_infinite_pixel_reaches_the_windows_that_hold_it_alone(device):
    """Few channels: the copy's elements beside a window's own are real pixels."""
    x = torch.randn(1, 3, 40, 40, device=device)
    x[:, 1, 20, 21] = float("inf")
    x.requires_grad_()
    w = torch.randn(8, 3, 3, 5, device=device, requires_grad=True)
    y = F.conv2d(x, w)
    assert y.numel() // 8 >= FEW_PIXELS
    dy = torch.zeros_like(y)
    dy[:, :, 5:15, 5:15] = 1
    (dw,) = torch.autograd.grad(y, w, dy)
    np.testing.assert_array_equal(np.isfinite(exact(y)), np.isfinite(conv2d(exact(x), exact(w))))
    # Zero times infinity: the tap that meets the pixel where dy is zero. Others have a number
    want = conv2d_grad(exact(dy), exact(x), exact(w))["weight"]
    np.testing.assert_array_equal(np.isnan(exact(dw)), np.isnan(want))
    assert np.isnan(want).any() and not np.isnan(want).all()


# --- wrong calls

ONES = torch.ones
X, W = ONES(2, 4, 5, 6), ONES(6, 4, 3, 3)
WRONG = [
    (ValueError, r"got input \(4, 5\) and weight", (ONES(4, 5), W), {}),
    (ValueError, r"weight \(6, 4, 3\)", (X, ONES(6, 4, 3)), {}),
    (ValueError, r"groups 1, input \(2, 4, 5, 6\) and weight \(6, 3, 3, 3\)", (X, ONES(6, 3, 3, 3)), {}),
    (ValueError, r"got groups 4, ", (X, ONES(6, 1, 3, 3)), {"groups": 4}),
    (ValueError, r"got groups 0, ", (X, W), {"groups": 0}),
    (TypeError, r"groups must be an int; got 1\.0", (X, W), {"groups": 1.0}),
    (ValueError, r"bias \(5,\) and weight", (X, W, ONES(5)), {}),
    (ValueError, r"bias \(6, 1\)", (X, W, ONES(6, 1)), {}),
    (ValueError, r"stride must be one or two numbers of at least 1; got 0", (X, W), {"stride": 0}),
    (ValueError, r"stride must be .* got \(1, 2, 3\)", (X, W), {"stride": (1, 2, 3)}),
    (TypeError, r"stride must be an int or a pair of ints; got 1\.5", (X, W), {"stride": 1.5}),
    (ValueError, r"padding must be .* at least 0; got -1", (X, W), {"padding": -1}),
    (TypeError, r"padding must be .* got \(1, '1'\)", (X, W), {"padding": (1, "1")}),
    (ValueError, r"padding must be \"same\", \"valid\", .* got 'full'", (X, W), {"padding": "full"}),
    (ValueError, r"\"same\" must come with stride 1; got stride \(2, 2\)", (X, W), {"padding": "same", "stride": 2}),
    (ValueError, r"dilation must be .* at least 1; got \(1, 0\)", (X, W), {"dilation": (1, 0)}),
    (ValueError, r"got kernel 7 x 5 and input 5 x 6", (X, W), {"dilation": (3, 2)}),
    (ValueError, r"got kernel 3 x 3 and input 2 x 8", (ONES(1, 4, 0, 6), W), {"padding": 1}),
    *((ValueError, rf"{name} must be one or two numbers of at least \d, in 64 bits", (X, W), {name: 2**64})
      for name in ("stride", "padding", "dilation")),
    (TypeError, r"input torch.float32 and weight torch.float16", (X, W.half()), {}),
    (TypeError, r"bias torch.bfloat16", (X, W, ONES(6).bfloat16()), {}),
    (TypeError, r"input must be a tensor; got list", ([1.0], W), {}),
    (TypeError, r"weight must be a tensor; got ndarray", (X, np.ones((6, 4, 3, 3))), {}),
    (ValueError, r"weight meta", (X, W.to("meta")), {}),
    (ValueError, r"one of relu, .*; got 'swish'", (X, W), {"activation": "swish"}),
]  # fmt: skip

test_wrong_arguments = refuses("conv2d", WRONG)


@pytest.mark.parametrize("transposed", [False, True], ids=["y", "dx"])
def test_offsets_pass_two_to_the_31(transposed, far_rows):
    """Image times stride is formed in 64 bits; in the sums over pixels too."""
    device, images = far_rows.device, len(far_rows)
    x = far_rows[:, :24].view(images, 2, 3, 4)
    x.copy_(torch.arange(images * 24, dtype=torch.float16, device=device).view(images, 2, 3, 4) / 64)
    w = torch.randn(2, 2, 2, 2, dtype=torch.float16, device=device, requires_grad=True)
    small = x.clone()
    with assume_chip("sm_80"):
        if transposed:
            leaf = torch.zeros(images, 2, 4, 5, dtype=torch.float16, device=device, requires_grad=True)
            got, want = (torch.autograd.grad(F.conv2d(leaf, w), (leaf, w), dy) for dy in (x, small))
        else:
            got, want = [], []
            for t, results in ((x, got), (small, want)):
                y = F.conv2d(t, w)
                results += [y, *torch.autograd.grad(y, w, torch.ones_like(y))]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@triton.jit
def _pixels_kernel(out_ptr, tile, images, P, Q, LARGE: tl.constexpr, BLOCK: tl.constexpr):
    image, row, column, inside = flat_pixels(tile, images, P, Q, LARGE, BLOCK)
    at = out_ptr + tl.arange(0, BLOCK) * 4
    tl.store(at, image)
    tl.store(at + 1, row.to(tl.int64))
    tl.store(at + 2, column.to(tl.int64))
    tl.store(at + 3, inside.to(tl.int64))


@pytest.mark.parametrize("images, P, Q", [(40000, 240, 250), (1, 60000, 50000)], ids=["images", "one image"])
def test_pixels_are_numbered_past_two_to_the_31(images, P, Q, device):
    """The tiles around pixel 2**31, and the last, whose end is past the last pixel."""
    pixels, block = images * P * Q, 64
    assert numbers_are_large(pixels) and not numbers_are_large(2**30)
    out = torch.empty(block, 4, dtype=torch.int64, device=device)
    for tile in (0, 2**31 // block - 1, 2**31 // block, pixels // block):
        _pixels_kernel[(1,)](out, tile, images, P, Q, True, block)
        i = tile * block + np.arange(block)
        image, row, column = np.unravel_index(np.minimum(i, pixels - 1), (images, P, Q))
        inside = i < pixels
        got = exact(out)
        assert (got[:, 3] == inside).all()
        assert (got[inside, :3] == np.stack([image, row, column], 1)[inside]).all()


@pytest.mark.parametrize("ws, groups", [((4, 2, 2, 2), 1), ((4, 1, 2, 2), 4)], ids=["product", "depthwise"])
def test_large_numbers_of_pixels_take_the_wide_numbering(ws, groups, device, monkeypatch):
    """The launchers ask for it; results stay as they are."""
    xs = (2, ws[1] * groups, 5, 4)
    results = {}
    for large in (False, True):
        for module in (gather, weight, depthwise):
            monkeypatch.setattr(module, "numbers_are_large", lambda pixels, large=large: large)
        torch.manual_seed(0)
        x, w = torch.randn(xs, device=device).requires_grad_(), torch.randn(ws, device=device).requires_grad_()
        y = F.conv2d(x, w, groups=groups)
        results[large] = y, *torch.autograd.grad(y, (x, w), torch.randn_like(y))
    torch.testing.assert_close(*results.values(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [
    {"stride": 2**31}, {"stride": (1, 2**62)}, {"dilation": (2**31, 1), "taps": (1, 3)},
    {"dilation": 2**62, "taps": (1, 1)}, {"stride": 2**31, "padding": 2**31}, {"stride": 2**33, "padding": 2**33},
])  # fmt: skip
def test_numbers_past_32_bits(options, either):
    """A stride means nothing where there is one output, nor a dilation where there is one tap."""
    R, S = options.get("taps", (3, 3))
    options = {name: n for name, n in options.items() if name != "taps"}
    x, w = (torch.randn(s, device=either, requires_grad=True) for s in ((1, 2, 5, 5), (2, 2, R, S)))
    y = F.conv2d(x, w, **options)
    far = options.get("padding", 0) > 0
    # With these small numbers the same taps meet the image, and the others meet zeros.
    small = {"stride": 5, "padding": 5} if far else {name: 1 if name == "dilation" else 6 for name in options}
    small = {"stride": (1, 6)} if options.get("stride") == (1, 2**62) else small
    want = torch.nn.functional.conv2d(x, w, **small)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    grads = (torch.autograd.grad(t.square().sum(), (x, w)) for t in (y, want))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
