"""Parts of attention that its kernels rely on: what the backward reads of a query, masks in aligned rows, no block."""

import math

import pytest
import torch

from primer_fast import functional as F
from primer_fast.kernels.attention.backward import attention_statistics
from primer_fast.kernels.attention.tile import Scoring, strides_of
from primer_fast.kernels.device import assume_chip
from primer_fast.proof.verify import PATHS


def test_statistics_are_clean_and_padded(device):
    """lse is infinite where a query sees nothing and past the last one, delta 0 there, for one more block too."""
    out, dout = torch.randn(2, 2, 3, 37, 24, device=device)
    lse = torch.randn(2, 3, 37, device=device)
    lse[1, 2, 5] = -math.inf
    got = attention_statistics(dout, out, lse, 16)
    assert got.shape == (2, 3, 4, 2, 16)
    got = got.transpose(2, 3).reshape(2, 3, 2, 64)
    clean = torch.where(lse == -math.inf, math.inf, lse)
    assert torch.equal(got[:, :, 0, :37], clean) and (got[:, :, 0, 37:] == math.inf).all()
    torch.testing.assert_close(got[:, :, 1, :37], (dout * out).sum(-1))
    assert (got[:, :, 1, 37:] == 0).all()


@pytest.mark.parametrize("mask", [
    torch.randn(2, 1, 20, 50), torch.rand(1, 2, 20, 48).expand(2, 2, 20, 48) < 0.5, torch.randn(2, 1, 48, 20).mT,
    torch.randn(20, 1).expand(20, 48)[None, None], torch.randn(2, 1, 20, 64)[..., 1:49],
], ids=["short rows", "aligned", "transposed", "one key", "off a boundary"])  # fmt: skip
def test_masks_are_read_in_aligned_rows(mask, device, request):
    mask = mask.to(device).expand(2, 2, 20, mask.shape[3])
    scoring = Scoring(1.0, mask=mask)
    got = scoring.aligned().mask
    assert (got is mask) == ("aligned" in request.node.callspec.id)
    assert torch.equal(got[..., : mask.shape[3]], mask)
    assert got.stride(3) == 1 and all(n % 16 == 0 for n in (*got.stride()[:3], got.shape[3]))
    assert [n == 0 for n in got.stride()[:3]] == [n == 0 for n in mask.stride()[:3]], "expanded axes are not copied"


@pytest.mark.parametrize("path", PATHS)
def test_queries_that_see_nothing_read_nothing(path, device):
    """The one step that their loops take is past the keys: what stands in memory does not reach them."""
    dtype = torch.bfloat16 if path == "descriptors" else torch.float32
    q = torch.randn(1, 1, 40, 16, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.full((1, 1, 70, 16), math.nan, device=device, dtype=dtype) for _ in range(2))
    with assume_chip(PATHS[path]):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, causal_offset=-40)
        (grad,) = torch.autograd.grad(y, q, torch.ones_like(y))
    assert (y == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("dtype, D, unit", [
    (torch.float32, 40, 4), (torch.bfloat16, 40, 8), (torch.float32, 16, 1), (torch.float32, 18, 1),
    (torch.bfloat16, 20, 1),
])  # fmt: skip
def test_strides_that_16_bytes_divide_say_so(dtype, D, unit):
    """In elements where 16 of them divide all, or 16 bytes do not divide one."""
    even, odd = torch.empty(2, 3, 5, 16, dtype=dtype), torch.empty(2, 3, 5, D, dtype=dtype)
    strides, found = strides_of((even, odd, None), (False,) * 3)
    assert found == unit
    assert strides[1:] == ((15 * D // unit, 5 * D // unit, D // unit), (1, 1, 1))


def test_strides_that_a_descriptor_carries_are_no_arguments():
    """Triton makes a constant of a one; and what a descriptor carries does not decide the unit of the rest."""
    t, odd = torch.empty(2, 3, 5, 16, dtype=torch.bfloat16), torch.empty(2, 3, 5, 40, dtype=torch.bfloat16)
    assert strides_of((t, odd), (True, True)) == (((1, 1, 1), (1, 1, 1)), 1)
    assert strides_of((t, odd), (False, True)) == (((240, 80, 16), (1, 1, 1)), 1)
    assert strides_of((t, odd), (True, False)) == (((1, 1, 1), (75, 25, 5)), 8)


@pytest.mark.parametrize("DV", [40, 20])
def test_strides_in_units_reach_the_same_rows(DV, device):
    """Of several batch elements and heads, forward and backward: as with strides in elements."""
    q, k, v = (torch.randn(2, heads, 18, d, device=device) for heads, d in ((4, 20), (2, 20), (2, DV)))
    assert strides_of((q, k, v), (False,) * 3)[1] == 4

    def attend(*tensors):
        leaves = [t.requires_grad_() for t in tensors]
        y = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    apart = [torch.empty(*t.shape[:3], t.shape[3] + 1, device=device)[..., :-1].copy_(t) for t in (q, k, v)]
    assert strides_of(apart, (False,) * 3)[1] == 1
    with assume_chip(PATHS["pointers"]):
        got, want = attend(q, k, v), attend(*apart)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
