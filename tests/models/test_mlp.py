import numpy as np
import pytest
import torch
from parity import varied

from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.proof.numerics import exact
from primer_fast.reference.mlp import mlp

pytestmark = pytest.mark.usefixtures("plain_path")


@pytest.mark.parametrize("sizes", [(2, 3, 4, 3, 1), (784, 512, 256, 10), (5, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "activation, last", [("relu", None), ("sigmoid", None), ("tanh", "sigmoid"), (None, None)], ids=str
)
def test_forward_is_the_formula(device, sizes, activation, last):
    model = varied(MLP(MLPConfig(sizes, activation, last)), 0.1).to(device)
    x = torch.randn(7, sizes[0], device=device)
    weights, biases = ([exact(getattr(layer, name)) for layer in model.layers] for name in ("weight", "bias"))
    want = mlp(exact(x), weights, biases, activation=activation, output_activation=last)
    np.testing.assert_allclose(exact(model(x)), want, rtol=2e-4, atol=2e-4)


def test_images_are_flattened(device):
    model = MLP(MLPConfig((12, 5))).to(device)
    x = torch.randn(3, 2, 3, 2, device=device)
    torch.testing.assert_close(model(x), model(x.reshape(3, 12)), rtol=0, atol=0)
    assert model(x[:0]).shape == (0, 5)


def test_sizes_may_be_a_list():
    assert MLPConfig([2, 3, 1]) == MLPConfig((2, 3, 1))


@pytest.mark.parametrize(
    "activation, variance",
    [("relu", 2 / 400), ("gelu", 2 / 400), ("tanh", 2 / 1000), ("sigmoid", 16 * 2 / 1000), (None, 2 / 1000)],
)
def test_first_weights_have_the_variance_of_the_source(activation, variance):
    torch.manual_seed(0)
    layer = MLP(MLPConfig((400, 600, 10), activation)).layers[0]
    assert layer.weight.var().item() == pytest.approx(variance, rel=0.02)  # 240,000 draws: 3 in 1000
    assert layer.bias.abs().max() == 0


def test_signal_keeps_its_size_through_ten_layers():
    torch.manual_seed(0)
    model = MLP(MLPConfig((256,) * 11, "relu"))
    assert 0.3 < model(torch.randn(64, 256)).square().mean().item() < 5.0


def test_names_in_the_state_dict():
    model = MLP(MLPConfig((3, 4, 2), "relu"))
    assert list(model.state_dict()) == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
