"""max_pool2d gives what PyTorch gives, bit for bit: values, indices, gradients, layouts and errors."""

import itertools

import numpy as np
import pytest
import torch

from primer_fast import functional as F
from primer_fast.functional.max_pool2d import max_pool2d_plain
from primer_fast.kernels.max_pool2d import is_channels_last
from primer_fast.proof import verify
from primer_fast.proof.inputs import allocate
from primer_fast.reference.max_pool2d import max_pool2d

LAYOUTS = [None, "channels_last"]
inf, nan = float("inf"), float("nan")


def same(got, want):
    """Equal, NaN with NaN and zeros of one sign."""
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=0, atol=0, equal_nan=True)
    if got.is_floating_point():
        number = ~want.cpu().isnan()
        assert torch.equal(got.cpu().signbit()[number], want.cpu().signbit()[number])


def same_as_torch(x, *args, **options):
    """Values, indices and the gradient of F.max_pool2d are those of torch on the CPU, bit for bit; returns them."""
    leaf, plain = x.detach().requires_grad_(), x.detach().cpu().requires_grad_()
    (y, indices), (want, want_indices) = (
        f(t, *args, return_indices=True, **options) for f, t in ((F.max_pool2d, leaf), (max_pool2d_plain, plain))
    )
    same(y, want)
    same(indices, want_indices)
    dy = torch.randn(want.shape)
    (dx,), (want_dx,) = torch.autograd.grad(y, leaf, dy.to(x.device)), torch.autograd.grad(want, plain, dy)
    same(dx, want_dx)
    return y, indices, dx


def few_levels(shape, layout, device, dtype=torch.float32):
    """Values that tie: a few numbers, zeros of both signs, infinities, NaN; the first plane is -inf throughout."""
    levels = torch.tensor([-1, -0.0, 0.0, 0.5, 1, inf, -inf, nan])
    weights = torch.tensor([4, 4, 4, 4, 2, 0.5, 2, 0.5])
    values = levels[torch.multinomial(weights, int(np.prod(shape)), replacement=True)].view(shape)
    values.view(-1, *shape[-2:])[0] = -inf
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


WINDOWS = [
    ([1, 2, 2, 1], 1, "of equals the first"),
    ([nan, 1, nan, inf], 2, "of several NaN the last"),
    ([inf, nan, 1, 2], 1, "NaN above infinity"),
    ([-inf, -inf, -inf, -inf], 0, "nothing exceeds -inf"),
    ([-inf, "min", -inf, -inf], 1, "every number above -inf"),
    ([-0.0, 0.0, -1, -0.0], 0, "zeros are equal"),
    ([0.0, "smallest_normal", 0.0, 0.0], 1, "the smallest number above zero"),
]


@pytest.mark.parametrize("dtype", verify.DTYPES)
@pytest.mark.parametrize(("window", "winner", "why"), WINDOWS, ids=[w[2] for w in WINDOWS])
def test_which_element_wins(window, winner, why, dtype, device):
    numbers = torch.finfo(verify.DTYPES[dtype])
    window = [getattr(numbers, v) if isinstance(v, str) else v for v in window]
    window = torch.tensor(window, dtype=verify.DTYPES[dtype])
    x = window.view(1, 1, 2, 2).to(device).requires_grad_()
    y, index = F.max_pool2d(x, 2, return_indices=True)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 3))
    assert index.item() == winner, why
    same(y.detach().view(1), window[winner : winner + 1])
    assert dx.view(4).tolist() == [3 * (i == winner) for i in range(4)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_never_wins(layout, device):
    """An image of -inf: each window's winner is its first element inside, also where the padding comes first."""
    x = allocate((1, 3, 6, 7), layout, torch.float32, device).fill_(-inf)
    y, indices, _ = same_as_torch(x, 5, 2, 2, ceil_mode=True)
    assert y.isneginf().all() and indices[0, 0, 0, 0] == 0 and indices[0, 0, 1, 0] == 0 and indices[0, 0, 2, 0] == 14


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


@pytest.mark.parametrize(("error", "message", "args"), WRONG, ids=[w[1] for w in WRONG])
def test_wrong_arguments(error, message, args):
    """Each is an error of torch too."""
    with pytest.raises(error, match=f"^max_pool2d: .*{message}"):
        F.max_pool2d(*args)
    with pytest.raises((RuntimeError, TypeError)):
        torch.nn.functional.max_pool2d(*args)
