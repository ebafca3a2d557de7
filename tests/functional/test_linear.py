import numpy as np
import pytest
import torch
from functional.wrong_calls import refuses

from primer_fast import functional as F
from primer_fast.functional.activation import ACTIVATIONS
from primer_fast.functional.linear import linear_plain
from primer_fast.kernels.device import assume_chip
from primer_fast.kernels.linear import linear_bwd_input, linear_bwd_weight, linear_fwd
from primer_fast.kernels.matmul import matmul
from primer_fast.kernels.product import MatmulSettings
from primer_fast.proof import verify
from primer_fast.proof.numerics import budget, exact, worst
from primer_fast.reference.linear import linear, linear_grad


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", verify.DTYPES)
def test_activations_over_their_whole_range(activation, dtype, device):
    """A product with the identity, so that every input from -30 to 30 reaches the activation and its derivative."""
    dtype = verify.DTYPES[dtype]
    z = torch.linspace(-30, 30, 1024, device=device, dtype=dtype).view(32, 32).requires_grad_()
    identity, dy = torch.eye(32, device=device, dtype=dtype), torch.ones(32, 32, device=device, dtype=dtype)
    y = F.linear(z, identity, activation=activation)
    plain = linear_plain(z, identity, activation=activation)
    want = linear(exact(z), np.eye(32), activation=activation)
    want_grad = linear_grad(np.ones((32, 32)), exact(z), np.eye(32), activation=activation)["input"]
    (dz,), (plain_dz,) = torch.autograd.grad(y, z, dy), torch.autograd.grad(plain, z, dy)
    assert worst(exact(y), want) <= budget(dtype, worst(exact(plain), want), want)
    assert worst(exact(dz), want_grad) <= budget(dtype, worst(exact(plain_dz), want_grad), want_grad)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_nan_and_infinity_go_where_the_formula_sends_them(activation, device):
    x = torch.tensor([[float("nan")], [float("inf")], [float("-inf")], [1.0]], device=device, requires_grad=True)
    w = torch.ones(16, 1, device=device)
    y = F.linear(x, w, activation=activation)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    want = linear(exact(x), exact(w), activation=activation)
    want_dx = linear_grad(np.ones((4, 16)), exact(x), exact(w), activation=activation)["input"]
    np.testing.assert_allclose(exact(y), want, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(exact(dx)), np.isnan(want_dx))


TILES = [
    MatmulSettings(16, 16, 16, 4, 2, SPLITS=1, GROUP_M=1),
    MatmulSettings(32, 64, 32, 4, 2, SPLITS=3, GROUP_M=2),
    MatmulSettings(64, 32, 64, 4, 3, SPLITS=1, GROUP_M=3, SUBTILES=2),
    MatmulSettings(32, 64, 16, 4, 2, SPLITS=16, GROUP_M=8, SUBTILES=4),  # more splits than steps: some have no work
]


@pytest.mark.parametrize("shape", [None, (), (1,)], ids=str)
def test_a_weight_of_one_axis_gives_a_number_a_row(shape, device):
    x, weight = torch.randn(5, 8, device=device), torch.randn(8, device=device)
    bias = None if shape is None else torch.full(shape, 2.0, device=device)
    torch.testing.assert_close(F.linear(x, weight, bias), x @ weight + (0 if bias is None else 2))


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [88, 80])
@pytest.mark.parametrize("settings", TILES, ids=lambda s: "x".join(map(str, s)))
def test_every_tiling_gives_the_same_answer(settings, K, dtype, chip, device):
    """Tile sizes, groups, splits and subtiles are chosen by size; here each is forced on sizes it does not divide.

    80 is 5 steps of 16: of 16 shares, 11 have no work. In 16-bit dtypes the fused backward is computed transposed.
    """
    M, N = 104, 72
    x, w, b, dy = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (N, K), (N,), (M, N)))
    with assume_chip(chip):
        y, saved = linear_fwd(x, w, b, "gelu", True, "highest", settings)
        dx = linear_bwd_input(dy, saved, w, "gelu", "highest", settings)
        dw, db = linear_bwd_weight(dy, saved, x, "gelu", torch.float32, "highest", settings)
    arrays = [exact(t) for t in (x, w, b)]
    want = linear_grad(exact(dy), *arrays, activation="gelu") | {"output": linear(*arrays, activation="gelu")}
    for name, got in {"output": y, "input": dx, "weight": dw, "bias": db}.items():
        limit = 2e-4 if dtype == torch.float32 else 2**-7 * np.abs(want[name]).max()
        assert worst(exact(got), want[name]) < limit, name


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("settings", [None, *TILES], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "relu", "sigmoid"])
def test_a_product_times_the_derivative_of_an_activation(activation, settings, chip, device):
    """Of what comes before it: its slope is read where the result is written."""
    M, N, K = 104, 72, 88
    a, b, kept = (torch.randn(s, device=device) for s in ((M, K), (N, K), (M, N)))
    with assume_chip(chip):
        got = matmul(a, b, "highest", slope=kept, slope_of=activation, settings=settings)[0]
    products = exact(a) @ exact(b).T
    slope = {"gelu": exact(kept), "relu": exact(kept) > 0, "sigmoid": exact(kept) * (1 - exact(kept))}[activation]
    assert worst(exact(got), products * slope) < 5e-4


def test_the_bias_gradient_sums_in_float32(device):
    """In bfloat16 the sum would stay at 16, where a tile's 1/16 is less than half a unit."""
    x = torch.zeros(8193, 16, device=device, dtype=torch.bfloat16)
    dy = torch.full((8193, 16), 2.0**-8, device=device, dtype=torch.bfloat16)
    dy[0] = 1
    one_tile = MatmulSettings(16, 16, 16, 4, 2)
    _, db = linear_bwd_weight(dy, None, x, None, torch.bfloat16, "highest", one_tile)
    assert torch.equal(db, torch.full_like(db, 33.0))


@pytest.mark.slow
def test_large_unaligned_operands_are_copied_to_where_descriptors_can_read_them(device):
    x, w = (torch.randn(s, device=device, requires_grad=True) for s in ((260, 67), (259, 67)))
    dy = torch.randn(260, 259, device=device)
    y = F.linear(x, w, activation="silu")
    plain = linear_plain(x, w, activation="silu")
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    got, want = (torch.autograd.grad(t, (x, w), dy) for t in (y, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


ONES = torch.ones
WRONG = [
    (ValueError, r"weight \(2, 5\) and input \(3, 4\)", (ONES(3, 4), ONES(2, 5)), {}),
    (ValueError, r"weight \(1, 2, 4\)", (ONES(3, 4), ONES(1, 2, 4)), {}),
    (ValueError, r"input \(\)", (torch.tensor(1.0), ONES(2, 4)), {}),
    (ValueError, r"bias \(3,\) and weight \(2, 4\)", (ONES(3, 4), ONES(2, 4), ONES(3)), {}),
    (ValueError, r"bias \(1, 2\)", (ONES(3, 4), ONES(2, 4), ONES(1, 2)), {}),
    (TypeError, r"input torch.float32 and weight torch.float16", (ONES(3, 4), ONES(2, 4).half()), {}),
    (TypeError, r"bias torch.bfloat16", (ONES(3, 4), ONES(2, 4), ONES(2).bfloat16()), {}),
    (TypeError, r"input must be a tensor; got list", ([1.0], ONES(2, 4)), {}),
    (TypeError, r"weight must be a tensor; got ndarray", (ONES(3, 4), np.ones((2, 4))), {}),
    (ValueError, r"weight meta", (ONES(3, 4), torch.ones(2, 4, device="meta")), {}),
    (ValueError, r"one of relu, .*; got 'swish'", (ONES(3, 4), ONES(2, 4)), {"activation": "swish"}),
]

test_wrong_arguments = refuses("linear", WRONG)


def test_offsets_pass_two_to_the_31(far_rows):
    """Row times stride is formed in 64 bits."""
    device, rows = far_rows.device, len(far_rows)
    x = far_rows[:, :16]
    x.copy_(torch.arange(rows * 16, dtype=torch.float16, device=device).view(rows, 16))
    with assume_chip("sm_80"):
        y = F.linear(x, torch.eye(16, dtype=torch.float16, device=device))
    assert torch.equal(y, x)
