"""primer-fast train cnn: the convolutional network on digits."""

from primer_fast.cli.cnn_tasks import DigitsForCNN
from primer_fast.cli.options.train_cnn import SYNTAX, Options
from primer_fast.cli.options.train_cnn import default_options as default_options
from primer_fast.cli.tasks import SupervisedTask, read_digits
from primer_fast.cli.training import TrainCommand
from primer_fast.models.cnn import CNN, CNNConfig


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
