"""Calls that once did something wrong, off the GPU: torch's own operators crash on some, and take others for right."""

import pytest
import torch

from primer_fast import functional as F

pytestmark = pytest.mark.usefixtures("plain_path")


def test_the_gradient_of_a_dilated_window_past_the_image_stays_in_it():
    """torch writes it past the end of the gradient."""
    for shape, kernel, stride in (((2, 17, 1, 11), 2, None), ((1, 1, 2, 1), (3, 2), 4)):
        x = torch.randn(shape, requires_grad=True)
        y = F.max_pool2d(x, kernel, stride, 1, 2, True)  # taps at -1 and 1 of an axis that has only 0
        assert y.numel() > 0 and torch.isneginf(y).all()
        assert torch.autograd.grad(y, x, torch.ones_like(y))[0].abs().sum() == 0
    x = torch.tensor([[[1.0, 5.0, 3.0, 4.0]] * 3], requires_grad=True)
    y, indices = F.max_pool2d(x, 2, 1, 1, 2, return_indices=True)
    assert torch.equal(indices, torch.nn.functional.max_pool2d(x, 2, 1, 1, 2, return_indices=True)[1])
    assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], counts(indices))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_a_stride_beyond_the_image(ceil_mode, monkeypatch):
    """Its square was more than 32 bits hold."""
    monkeypatch.undo()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(1, 2, 5, 4, device=device, requires_grad=True)
    y, want = (pool(x, 3, 10**6, 1, 1, ceil_mode) for pool in (F.max_pool2d, torch.nn.functional.max_pool2d))
    assert torch.equal(y, want)
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(t, x, dy)[0] for t in (y, want)))


def counts(indices):
    return torch.bincount(indices.flatten(), minlength=12).view(1, 3, 4).float()


def test_a_dilation_of_a_single_tap_means_nothing():
    """oneDNN crashes on it in float16."""
    x, w = torch.randn(2, 6, 2, 2).half(), torch.randn(15, 2, 1, 1).half()
    for _ in range(20):
        y = F.conv2d(x, w, None, (1, 3), (0, 1), (1, 3), 3)
    torch.testing.assert_close(y, F.conv2d(x, w, None, (1, 3), (0, 1), 1, 3))


def test_attention_to_no_sequence_has_no_result():
    """torch returns memory that nobody wrote."""
    q = torch.randn(1, 1, 3, 4)
    assert F.scaled_dot_product_attention(q, q, q[:0]).shape == (0, 1, 3, 4)


def test_indices_outside_the_table_are_named():
    with pytest.raises(IndexError, match=r"^embedding: input must be in \[0, 3\); got 5"):
        F.embedding(torch.tensor([1, 5]), torch.randn(3, 2))
    with pytest.raises(IndexError, match=r"^embedding: position_ids must be in \[0, 2\); got -1"):
        F.embedding(torch.tensor([1]), torch.randn(3, 2), position=torch.randn(2, 2), position_ids=torch.tensor([-1]))


def test_a_float32_bias_alone_has_a_gradient_beside_16_bits():
    x, bias = torch.randn(3, 8).half(), torch.randn(8, requires_grad=True)
    y = F.layer_norm(x, 8, None, bias)
    assert y.dtype == torch.float16
    assert torch.autograd.grad(y, bias, torch.ones_like(y))[0].tolist() == [3.0] * 8
