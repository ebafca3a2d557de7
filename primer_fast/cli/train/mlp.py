"""primer-fast train mlp: the multilayer perceptron on digits or on the soccer players."""

import numpy as np
import torch

from primer_fast.cli import plots
from primer_fast.cli.options.train.mlp import SYNTAX, Options
from primer_fast.cli.options.train.mlp import default_options as default_options
from primer_fast.cli.run.tasks import DigitsTask, SupervisedTask, check_loss, read_digits
from primer_fast.cli.run.training import TrainCommand
from primer_fast.data.soccer import Soccer, load_soccer
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train.supervised import correct_count, evaluate, predict


class DigitsForMLP(DigitsTask):
    def title(self, model):
        return f"MLP {_sizes(model)}"


class SoccerTask(SupervisedTask):
    def __init__(self, soccer: Soccer):
        self.soccer = soccer
        super().__init__(soccer.standardise(soccer.players), soccer.drafted, None, features=2, outputs=1)

    def describe(self, model, config):
        loss, _ = evaluate(model, self.inputs, self.targets, config)
        logits = predict(model, self.inputs, config)
        right = correct_count(logits, self.targets.to(logits.device)).item()
        return f"{right} of {self.samples} players classified right ({right / self.samples:.2%}), loss {loss:.4f}"

    def draw(self, folder, model, config, rows):
        players, truth = self.soccer.players.numpy(), self.soccer.drafted.numpy().astype(int)
        predicted = (predict(model, self.inputs, config)[:, 0] > 0).cpu().numpy().astype(int)
        low, high = players.min(axis=0) - 4, players.max(axis=0) + 4
        juggles, weight = (np.linspace(low[i], high[i], 200, dtype=np.float32) for i in range(2))
        grid = torch.from_numpy(np.stack(np.meshgrid(juggles, weight), axis=-1)).view(-1, 2)
        probability = predict(model, self.soccer.standardise(grid), config)[:, 0].sigmoid().cpu().view(200, 200).numpy()
        plots.curves(folder / "curves.png", rows, f"MLP {_sizes(model)} on {self.samples} soccer players")
        names = ["not drafted", "drafted"]
        plots.confusion_matrix(folder / "confusion.png", truth, predicted, names, "Players trained on")
        plots.decision_surface(
            folder / "surface.png", juggles, weight, probability, players, truth,
            labels=("juggles in a row", "weight (kg)"), classes=("not drafted", "drafted"),
            title=f"Who is drafted, as the MLP {_sizes(model)} sees it",
        )  # fmt: skip
        return ["curves.png", "confusion.png", "surface.png"]


def load_task(options: Options) -> SupervisedTask:
    if options.data == "soccer":
        check_loss("binary_cross_entropy", options.train)
        return SoccerTask(load_soccer())
    return DigitsForMLP(read_digits(options.data, options.train))


def _sizes(model: MLP) -> str:
    return "-".join(map(str, model.config.sizes))


def make_model(options: Options, task: SupervisedTask) -> MLP:
    config = MLPConfig(options.sizes, options.activation)
    if (config.sizes[0], config.sizes[-1]) != (task.features, task.outputs):
        raise ValueError(
            f"--sizes must begin with {task.features} and end with {task.outputs} for this data; "
            f"got {' '.join(map(str, config.sizes))}"
        )
    return MLP(config)


COMMAND = TrainCommand(SYNTAX, load_task, make_model)
main, run = COMMAND.main, COMMAND.run
