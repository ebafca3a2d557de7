"""A training step of the digit MLP and CNN beside the same model from torch.nn, in the same training procedure."""

import copy

import torch

from primer_fast.bench import goals
from primer_fast.bench.op import OURS
from primer_fast.bench.programs.torch_twin import torch_twin
from primer_fast.bench.programs.training_steps import Step, compare_steps
from primer_fast.bench.report import ProgramRow
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import supervised
from primer_fast.train.supervised import SupervisedConfig

TORCH, COMPILED = "torch.nn", "torch.nn, torch.compile"
MNIST = 60_000  # images of an epoch


def mlp(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """The perceptron of `primer-fast train mlp`: 784-512-256-10. It is small already."""
    model = MLP(MLPConfig((784, 512, 256, 10)))
    return _compare("mlp", "784-512-256-10", model, {}, device, seconds, with_compile)


def cnn(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """The network of `primer-fast train cnn`. It is small already."""
    config = CNNConfig()
    shape = f"{config.kernel_size} x {config.kernel_size} convolutions of {' and '.join(map(str, config.channels))}"
    return _compare("cnn", shape, CNN(config), {TORCH: goals.CNN}, device, seconds, with_compile)


def _compare(name, shape, first, bounds, device, seconds, with_compile) -> list[ProgramRow]:
    config = SupervisedConfig(precision="float32" if device == "cpu" else "bfloat16")
    batch, last = config.batch_size, supervised.total_steps(MNIST, config)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, batch, 28, 28, generator=generator).to(device)
    labels = torch.randint(10, (8, batch), generator=generator).to(device)
    first = first.to(device)

    def training(make) -> Step:
        state = supervised.start(make(), config)

        def step():
            i = state.step % len(images)
            supervised.train_step(state, images[i], labels[i], config, last)
            return state.window["loss"][-1]

        return step

    steps = {OURS: lambda: training(lambda: copy.deepcopy(first)), TORCH: lambda: training(lambda: torch_twin(first))}
    if with_compile:
        steps[COMPILED] = lambda: training(lambda: torch.compile(torch_twin(first)))
    setting = f"{shape}, batch {batch} of random 28 x 28 images, {config.precision}"
    return compare_steps(
        name, setting, steps, work=batch, unit="images", seconds=seconds, device=device, goals=bounds,
        tolerance=1e-4 if device == "cpu" else 2e-2,
    )  # fmt: skip
