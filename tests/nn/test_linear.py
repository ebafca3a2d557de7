import pytest
import torch

from primer_fast import nn


def test_is_torch_linear_with_an_activation(device):
    ours = nn.Linear(24, 40, activation="gelu", device=device)
    theirs = torch.nn.Linear(24, 40, device=device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 24, device=device)
    torch.testing.assert_close(ours(x), torch.nn.functional.gelu(theirs(x)), rtol=1e-4, atol=1e-5)
    assert isinstance(ours, torch.nn.Linear)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_without_bias_and_activation(device):
    layer = nn.Linear(24, 40, bias=False, device=device, dtype=torch.bfloat16)
    x = torch.randn(7, 24, device=device, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight), rtol=2e-2, atol=2e-2)
    assert layer.bias is None


def test_same_first_weights_as_torch():
    torch.manual_seed(3)
    ours = nn.Linear(5, 7)
    torch.manual_seed(3)
    theirs = torch.nn.Linear(5, 7)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_repr_names_the_activation():
    assert (
        repr(nn.Linear(2, 3, activation="silu")) == "Linear(in_features=2, out_features=3, bias=True, activation=silu)"
    )


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"Linear: activation must be None or one of relu, .*; got 'swish'"):
        nn.Linear(2, 3, activation="swish")
