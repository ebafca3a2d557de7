import numpy as np
import pytest
import torch

from primer_fast.models.mlp import MLP, MLPConfig

pytestmark = pytest.mark.usefixtures("plain_path")


def relu(z):
    return np.maximum(z, 0)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize("sizes", [(2, 3, 4, 3, 1), (784, 512, 256, 10), (5, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name, act", [("relu", relu), ("sigmoid", sigmoid), ("tanh", np.tanh), (None, lambda z: z)])
def test_forward_is_the_formula(device, sizes, name, act):
    model = MLP(MLPConfig(sizes, name)).to(device)
    with torch.no_grad():
        for layer in model.layers:
            layer.bias.normal_()
    x = torch.randn(7, sizes[0], device=device)
    a = x.cpu().double().numpy().T  # columns, as the formula has them
    for i, layer in enumerate(model.layers):
        w, b = layer.weight.detach().cpu().double().numpy(), layer.bias.detach().cpu().double().numpy()
        z = w @ a + b[:, None]
        a = act(z) if i < len(model.layers) - 1 else z
    np.testing.assert_allclose(model(x).detach().cpu().numpy(), a.T, rtol=2e-4, atol=2e-4)


def test_output_activation_is_applied_to_the_last_layer_alone(device):
    logits = MLP(MLPConfig((4, 3, 2), "tanh")).to(device)
    squashed = MLP(MLPConfig((4, 3, 2), "tanh", "sigmoid")).to(device)
    squashed.load_state_dict(logits.state_dict())
    x = torch.randn(5, 4, device=device)
    torch.testing.assert_close(squashed(x), logits(x).sigmoid())


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


def test_state_dict_loads_into_torch_linear_layers():
    model = MLP(MLPConfig((3, 4, 2), "relu"))
    assert list(model.state_dict()) == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    first = torch.nn.Linear(3, 4)
    first.load_state_dict(model.layers[0].state_dict())
