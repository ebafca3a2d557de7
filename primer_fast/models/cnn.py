"""Convolutional network: convolution, activation and max-pool by turns, then a multilayer perceptron.

    M_0 = X        M_i = maxpool(act(K_i * M_{i-1} + b_i))        i = 1..L,        logits = MLP(flatten(M_L))

K_i * M slides every kernel over the image without padding, as a cross-correlation: see functional/conv2d.py.
Source: LeCun, Bottou, Bengio & Haffner 1998, "Gradient-based learning applied to document recognition".
Legend: B batch, C channels, H x W pixels, K kernel size, P pool size, L convolutions.
"""

__all__ = ["CNN", "CNNConfig", "Shape"]

from dataclasses import dataclass

import torch
from torch import Tensor

from primer_fast import nn
from primer_fast.functional.activation import check_activation
from primer_fast.models.mlp import MLP, MLPConfig, reset_layer

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class CNNConfig:
    """Sizes of a convolutional network, and how its first weights are drawn."""

    image: Shape = (1, 28, 28)  # C, H, W of an input
    channels: tuple[int, ...] = (32, 64)  # kernels of each convolution, the channels of its output
    kernel_size: int = 5  # lines and columns of a kernel
    pool: int = 2  # lines and columns of a window of which max-pool keeps the largest; 1: no pooling
    hidden: tuple[int, ...] = (128,)  # widths of the perceptron's hidden layers
    classes: int = 10
    activation: str | None = "relu"  # of the convolutions and the hidden layers

    def __post_init__(self):
        for name in ("image", "channels", "hidden"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not all(type(n) is int and n > 0 for n in values):
                raise ValueError(f"CNN: {name} must be positive integers; got {list(values)}")
        if len(self.image) != 3:
            raise ValueError(f"CNN: image must be channels, height and width; got {list(self.image)}")
        if not self.channels:
            raise ValueError("CNN: channels must name at least one convolution; got []")
        for name in ("kernel_size", "pool", "classes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"CNN: {name} must be a positive integer; got {value!r}")
        check_activation("CNN", self.activation)
        self.shapes()

    def shapes(self) -> dict[str, Shape]:
        """C, H, W of what each layer makes, by the names of ``CNN.feature_maps``.

        Raises:
            ValueError: a layer would make an empty map; names the first that does.
        """
        shapes = {"input": self.image}
        _, height, width = self.image
        for i, channels in enumerate(self.channels, 1):
            for name, size, step in ((f"conv{i}", self.kernel_size, 1), (f"pool{i}", self.pool, self.pool)):
                if min(height, width) < size:
                    raise ValueError(
                        f"CNN: every layer must leave at least one pixel; {name} would leave none, because its window "
                        f"of {size} x {size} does not fit into {height} x {width} "
                        f"(image {' x '.join(map(str, self.image))})"
                    )
                height, width = (height - size) // step + 1, (width - size) // step + 1
                shapes[name] = (channels, height, width)
        return shapes


class CNN(nn.Module):
    """The network of ``config``: inputs (B, C, H, W), or (B, H, W) of one channel -> logits (B, classes).

    Weights start as those of MLP do, where the fan of a kernel is the pixels it sees: He et al. 2015. Kernels and maps
    are channels_last in memory: an epoch on MNIST through PyTorch's CPU convolution is faster so.

    Raises:
        ValueError: an input of another shape.
    """

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = config
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, config.kernel_size, activation=config.activation)
            for inputs, outputs in zip((config.image[0], *config.channels), config.channels, strict=False)
        )
        self.pool = nn.MaxPool2d(config.pool)
        channels, height, width = list(config.shapes().values())[-1]
        self.mlp = MLP(MLPConfig((channels * height * width, *config.hidden, config.classes), config.activation))
        for layer in self.convolutions:
            reset_layer(layer)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) or (B, H, W) -> (B, classes)
        x = self._images(x)
        for convolution in self.convolutions:
            x = self.pool(convolution(x))  # (B, C_i, H_i, W_i)
        return self.mlp(x)

    def feature_maps(self, x: Tensor) -> dict[str, Tensor]:
        """Every layer's output (B, C_i, H_i, W_i) before the perceptron: "input", "conv1", "pool1", "conv2", ..."""
        maps = {"input": self._images(x)}
        last = maps["input"]
        for i, convolution in enumerate(self.convolutions, 1):
            maps[f"conv{i}"] = convolution(last)
            maps[f"pool{i}"] = last = self.pool(maps[f"conv{i}"])
        return maps

    def _images(self, x: Tensor) -> Tensor:  # -> (B, C, H, W)
        channels, height, width = self.config.image
        if channels == 1 and x.shape[1:] == (height, width):
            x = x[:, None]
        if x.ndim != 4 or x.shape[1:] != self.config.image:
            either = f" or (B, {height}, {width})" if channels == 1 else ""
            raise ValueError(f"CNN: input must be (B, {channels}, {height}, {width}){either}; got {tuple(x.shape)}")
        return x
