"""Losses reduced to one number and their gradient back at the rows, each in one launch."""

import pytest
import torch

from primer_fast.kernels.logits import row_losses

IGNORED = -100


def rows(N, device, ignored=True):
    generator = torch.Generator().manual_seed(N)
    target = torch.randint(7, (N,), generator=generator)
    if ignored:
        target[torch.rand(N, generator=generator) < 0.3] = IGNORED
    losses = torch.rand(N, generator=generator) + 0.5
    return torch.where(target == IGNORED, 0.0, losses).to(device), target.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1, 63, 4096, 4097, 9000])
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
def test_reduced(N, mean, dtype, device):
    losses, target = rows(N, device)
    loss, number = row_losses.reduce_losses(losses, target, IGNORED, mean, dtype)
    count = (target != IGNORED).sum().item()
    assert (number is not None) == mean and (not mean or number.item() == count)
    want = losses.double().sum() / (count if mean else 1)
    assert loss.dtype == dtype and loss.shape == ()
    torch.testing.assert_close(
        loss.double(), want, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=0, equal_nan=True
    )


def test_a_mean_over_no_row_is_nan(device):
    target = torch.full((5,), IGNORED, device=device)
    loss, number = row_losses.reduce_losses(torch.zeros(5, device=device), target, IGNORED, True, torch.float32)
    assert loss.isnan() and number.item() == 0


@pytest.mark.parametrize("ignore_index", [IGNORED, 3, None])
@pytest.mark.parametrize("N", [1, 1024, 1500])
def test_spread(N, ignore_index, device):
    """Of a sum, of a mean, and of each row, also one gradient that is expanded over the rows."""
    _, target = rows(N, device, ignored=ignore_index == IGNORED)
    kept = torch.ones(N, device=device) if ignore_index is None else (target != ignore_index).float()
    dloss, number = torch.tensor(3.0, device=device), torch.tensor(7.0, device=device)
    each = torch.randn(2 * N, device=device)[::2]
    for given, divisor, want in (
        (dloss, None, dloss.expand(N)), (dloss, number, (dloss / number).expand(N)),
        (each, None, each), (dloss.expand(N), None, dloss.expand(N)), (each.bfloat16(), None, each.bfloat16().float()),
    ):  # fmt: skip
        got = row_losses.spread_gradient(given, divisor, target, ignore_index)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, -want * kept, rtol=0, atol=0)
