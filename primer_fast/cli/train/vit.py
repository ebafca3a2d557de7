"""primer-fast train vit: the vision transformer on digits."""

from primer_fast.cli.options.train.vit import SYNTAX, Options
from primer_fast.cli.options.train.vit import default_options as default_options
from primer_fast.cli.run.tasks import DigitsTask, read_digits
from primer_fast.cli.run.training import TrainCommand
from primer_fast.models.vit import ViT, ViTConfig


class DigitsForViT(DigitsTask):
    def title(self, model):
        config = model.config
        patches = f"{config.patches} patches of {config.patch} x {config.patch}"
        return f"ViT of {config.layers} layers, {config.heads} heads, width {config.width}, over {patches},"


def load_task(options: Options) -> DigitsForViT:
    return DigitsForViT(read_digits(options.data, options.train))


def make_model(options: Options, task: DigitsForViT) -> ViT:
    config = ViTConfig(
        image=(1, *task.inputs.shape[1:]), patch=options.patch, width=options.width, layers=options.layers,
        heads=options.heads, mlp_width=options.mlp_width, classes=task.outputs, pool=options.pool,
        activation=options.activation, dropout=options.dropout,
    )  # fmt: skip
    return ViT(config)


COMMAND = TrainCommand(SYNTAX, load_task, make_model)
main, run = COMMAND.main, COMMAND.run
