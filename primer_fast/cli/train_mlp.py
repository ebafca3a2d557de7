"""primer-fast train mlp: the multilayer perceptron on digits or on the soccer players."""

from primer_fast.cli.mlp_tasks import load_task
from primer_fast.cli.options.train_mlp import SYNTAX, Options
from primer_fast.cli.options.train_mlp import default_options as default_options
from primer_fast.cli.tasks import SupervisedTask
from primer_fast.cli.training import TrainCommand
from primer_fast.models.mlp import MLP, MLPConfig


def make_model(options: Options, task: SupervisedTask) -> MLP:
    config = MLPConfig(options.sizes, options.activation)
    if (config.sizes[0], config.sizes[-1]) != (task.features, task.outputs):
        raise ValueError(
            f"--sizes must begin with {task.features} and end with {task.outputs} for this data; "
            f"got {' '.join(map(str, config.sizes))}"
        )
    return MLP(config)


COMMAND = TrainCommand(SYNTAX, lambda options: load_task(options.data, options.train), make_model)
main, run = COMMAND.main, COMMAND.run
