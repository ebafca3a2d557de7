"""primer-fast train cnn: the convolutional network on digits, and the pictures of what it has learned."""

import torch

from primer_fast import functional as F
from primer_fast.cli.options.train.cnn import SYNTAX, Options
from primer_fast.cli.options.train.cnn import default_options as default_options
from primer_fast.cli.run.tasks import DigitsTask, SupervisedTask, read_digits
from primer_fast.cli.run.training import TrainCommand
from primer_fast.cli.train import cnn_plots
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.train.supervised import predict, scaled


class DigitsForCNN(DigitsTask):
    def title(self, model):
        config = model.config
        convolutions = "-".join(map(str, config.channels))
        perceptron = "-".join(map(str, model.mlp.config.sizes))
        return f"CNN {convolutions}, kernels {config.kernel_size} x {config.kernel_size}, then MLP {perceptron},"

    def draw(self, folder, model, config, rows):
        names = super().draw(folder, model, config, rows)
        weights = [layer.weight.detach().float().cpu().numpy() for layer in model.convolutions]
        cnn_plots.kernels(folder / "kernels.png", weights, "Learned kernels: blue adds, orange takes away")

        digit, truth = self.test[0][:1], int(self.test[1][0])  # (1, H, W)
        probability = predict(model, digit, config)[0].softmax(dim=0).cpu().numpy()
        with torch.no_grad():
            maps = model.feature_maps(scaled(digit.to(next(model.parameters()).device)))
            before = max(maps["conv1"][0], key=lambda m: m.var().item())  # the map with the most to see
            after, kept = F.max_pool2d(before[None], model.config.pool, return_indices=True)
        maps = {name: m[0].float().cpu().numpy() for name, m in maps.items()}
        title = "Feature maps of the first test digit, layer by layer (darker is larger)"
        cnn_plots.feature_maps(folder / "feature_maps.png", maps, probability, truth, title)
        cnn_plots.max_pool(
            folder / "max_pool.png", digit[0].numpy(), before.cpu().numpy(), after[0].cpu().numpy(),
            kept[0].cpu().numpy(), model.config.pool, "What max-pool keeps of a feature map of the first convolution",
        )  # fmt: skip
        return [*names, "kernels.png", "feature_maps.png", "max_pool.png"]


def load_task(options: Options) -> DigitsForCNN:
    return DigitsForCNN(read_digits(options.data, options.train))


def make_model(options: Options, task: SupervisedTask) -> CNN:
    config = CNNConfig(
        image=(1, *task.inputs.shape[1:]), channels=options.channels, kernel_size=options.kernel_size,
        pool=options.pool, hidden=options.hidden, classes=task.outputs, activation=options.activation,
    )  # fmt: skip
    return CNN(config)


COMMAND = TrainCommand(SYNTAX, load_task, make_model)
main, run = COMMAND.main, COMMAND.run
