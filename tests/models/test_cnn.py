import numpy as np
import pytest
import torch
from parity import varied

from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.proof.numerics import exact
from primer_fast.reference.conv2d import conv2d
from primer_fast.reference.max_pool2d import max_pool2d
from primer_fast.reference.mlp import mlp
from primer_fast.train import supervised
from primer_fast.train.supervised import SupervisedConfig

SMALL = CNNConfig(image=(3, 11, 10), channels=(4, 5), kernel_size=3, pool=2, hidden=(6,), classes=7)


def formula(model, x):
    """The layers' outputs by name and the logits, in float64 by the NumPy references."""
    config = model.config
    maps = {"input": exact(x)}
    a = maps["input"]
    for i, layer in enumerate(model.convolutions, 1):
        maps[f"conv{i}"] = conv2d(a, exact(layer.weight), exact(layer.bias), activation=config.activation)
        maps[f"pool{i}"] = a = max_pool2d(maps[f"conv{i}"], config.pool)
    weights, biases = ([exact(getattr(layer, name)) for layer in model.mlp.layers] for name in ("weight", "bias"))
    return maps, mlp(a.reshape(len(a), -1), weights, biases, activation=config.activation)


CONFIGS = {
    "small": SMALL,
    "one channel": CNNConfig(image=(1, 12, 12), channels=(2, 3), kernel_size=3),
    "five by five": CNNConfig(image=(1, 16, 17), channels=(3, 2), kernel_size=5, hidden=(4, 3)),
    "one convolution, no hidden layer": CNNConfig((2, 7, 8), (3,), 2, 3, (), 2, "tanh"),
    "three convolutions without pooling": CNNConfig((1, 7, 7), (2, 2, 2), 3, 1, (4,), 3, None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_is_the_formula(plain_path, device, name):
    config = CONFIGS[name]
    model = varied(CNN(config), 0.1).to(device)
    x = torch.randn(3, *config.image, device=device)
    maps, logits = formula(model, x)
    got = model.feature_maps(x)
    assert list(got) == list(maps) and {k: tuple(m.shape[1:]) for k, m in got.items()} == config.shapes()
    for layer in maps:
        np.testing.assert_allclose(exact(got[layer]), maps[layer], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(exact(model(x)), logits, rtol=1e-4, atol=1e-4)


def test_lists_are_taken_and_the_smallest_image_works(plain_path):
    config = CNNConfig([1, 16, 16], [2, 2], hidden=[3])
    assert config == CNNConfig((1, 16, 16), (2, 2), hidden=(3,)) and config.shapes()["pool2"] == (2, 1, 1)
    assert CNN(config)(torch.zeros(1, 16, 16)).shape == (1, 10)


def test_first_weights_have_the_variance_of_the_source():
    torch.manual_seed(0)
    model = CNN(CNNConfig((1, 32, 32), (128, 256), 5, hidden=(500,)))
    for layer, fan in ((model.convolutions[0], 25), (model.convolutions[1], 128 * 25), (model.mlp.layers[0], 6400)):
        assert layer.weight.var().item() == pytest.approx(2 / fan, rel=0.1 if fan == 25 else 0.01)  # 3,200 draws: 3 %
        assert layer.bias.abs().max() == 0


def test_kernels_and_maps_are_channels_last(plain_path):
    model = CNN(SMALL)
    maps = model.feature_maps(torch.randn(2, 3, 11, 10))
    for t in (*(layer.weight for layer in model.convolutions), maps["conv1"], maps["pool1"], maps["conv2"]):
        assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def test_names_in_the_state_dict():
    names = ["convolutions.0", "convolutions.1", "mlp.layers.0", "mlp.layers.1"]
    assert list(CNN(SMALL).state_dict()) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def test_learns_where_a_bar_points_wherever_it_is(plain_path):
    """A lying or an upright bar anywhere: half of the places are never trained on."""
    torch.manual_seed(0)
    images, labels = torch.zeros(2, 10, 10, 14, 14), torch.arange(2)[:, None, None].expand(2, 10, 10)
    for i in range(10):
        for j in range(10):
            images[0, i, j, i + 2, j + 1 : j + 4] = 1
            images[1, i, j, i + 1 : i + 4, j + 2] = 1
    even = (torch.arange(10)[:, None] + torch.arange(10)) % 2 == 0
    train, test = ((images[:, mask].flatten(0, 1), labels[:, mask].flatten()) for mask in (even, ~even))
    model = CNN(CNNConfig((1, 14, 14), (4, 8), 3, hidden=(), classes=2))
    config = SupervisedConfig(epochs=50, batch_size=20, lr=0.01, warmup_steps=5)
    state = supervised.start(model, config)
    rows = list(supervised.train(state, *train, config, test=test))
    assert rows[-1]["test/accuracy"] > 0.97
    assert rows[-1]["train/loss"] < 0.05 < rows[0]["train/loss"]
