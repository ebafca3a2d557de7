"""What the commands that train share: options, the run and its folder, resume, comparison."""

import contextlib
import functools
import os
import shlex
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch

from primer_fast.cli import interruption, terminal
from primer_fast.cli.console import Display, summary
from primer_fast.cli.errors import EXPECTED, report_end, sizes_that_fit
from primer_fast.cli.interruption import Interruption
from primer_fast.cli.options.train.training import Syntax, TrainOptions, data_name, to_json
from primer_fast.cli.run import checkpoint
from primer_fast.cli.run.compare_torch import Comparison
from primer_fast.cli.run.folder import RunFolder, WriteError, writing
from primer_fast.cli.run.tasks import SupervisedTask, Task
from primer_fast.train.parallel import ALONE, World, joined, started
from primer_fast.train.scoring import RewardError
from primer_fast.train.state import Model, TrainState, distribute, generator


@dataclass(frozen=True)
class TrainCommand:
    """``primer-fast train <model>``: what distinguishes one such command from the others."""

    syntax: Syntax
    load_task: Callable[[Any], Task]  # options -> data; ValueError where they do not fit each other
    make_model: Callable[[Any, Any], torch.nn.Module]  # options, task; ValueError where they do not fit each other

    def main(self, argv: list[str]) -> int:
        """Run the command; 0 if it finished, 1 if training or its reward failed, 2 for a wrong call.

        A run that a signal stopped gives 128 and its number, 130 for Ctrl-C and 143 for SIGTERM.

        Of the processes that `torchrun` started only the first prints; an error is printed once, by the first to meet
        it, and a wrong call once on each machine.
        """
        try:
            with terminal.first_of_machine():
                options = self.syntax.parse(argv)
            strategy = _strategy(options)
            with joined(options.torch_device, alone=strategy == "none") as world:
                try:
                    return _call(self, options, argv, world)
                except BaseException as error:
                    if world.size == 1:
                        raise
                    world.fail(functools.partial(_told, self, error))
        except EXPECTED as error:
            with terminal.first_of_machine():
                return _told(self, error)

    def run(self, options: TrainOptions, display: Display, world: World = ALONE) -> "RunResult":
        """Train as ``options`` say, or go on; write everything into the folder of the run.

        All processes of ``world`` call it; the first writes, and of a model that is sharded each its part.

        Raises:
            ValueError, OSError: what the options name cannot be used; says what and why.
            FloatingPointError: training diverged; the last checkpoint is kept.
            RewardError: a reward could not be had; the state of before it is saved.
            WriteError: a file of the run cannot be written; the last checkpoint is kept.
        """
        config, folder = options.train, RunFolder(self.syntax.folder(options), self.syntax.name)
        if options.resume and options.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        if options.resume and options.compares:
            raise ValueError("--compare-torch trains both models from the start; it cannot be combined with --resume")
        if options.compares and world.size > 1:
            raise ValueError(f"--compare-torch is for one process; got {world.size}")
        device = options.torch_device
        task = self.load_task(options)
        torch.manual_seed(config.seed)
        model = self.make_model(options, task).to(device)
        state = task.start(model, config)
        distribute(state, world, "none" if world.store is None else _strategy(options))
        if world.rank:  # the first process draws its dropout as a single one does
            torch.manual_seed(generator(config.seed, 5, world.rank).initial_seed())
        with folder.held() if world.rank == 0 else contextlib.nullcontext():
            return _run(self, options, display, folder, task, state)


@dataclass
class RunResult(Generic[Model]):
    """What a call did: the rows of metrics, where the files are, how the last row reads, its exit status."""

    folder: Path
    rows: list[dict[str, float]]
    finished: bool
    result: str  # one line
    comparison: Comparison | None
    model: Model
    status: int = 0  # of a run that was stopped: 130 by Ctrl-C, 143 by SIGTERM, 141 as nobody reads what it prints


def _call(command: TrainCommand, options: TrainOptions, argv: list[str], world: World) -> int:
    with Display(quiet=world.rank > 0) as display:
        with sizes_that_fit():
            outcome = command.run(options, display, world)
        display.print(outcome.result)
        if not outcome.finished:
            again = [word for word in argv if word not in ("--resume", "--overwrite", "--compare-torch")]
            display.print(f"go on with: primer-fast {command.syntax.name} {shlex.join(again)} --resume")
    return outcome.status or (terminal.CLOSED if display.closed else 0)


def _told(command: TrainCommand, error: BaseException) -> int:
    """Print what went wrong, in a line where it is an error that users meet; -> exit status."""
    if isinstance(error, EXPECTED):
        return report_end(command.syntax.name, error, failure=RewardError)
    traceback.print_exception(error)
    return 1


def _strategy(options: TrainOptions) -> str:
    """That of the call, or what the processes that were started ask for."""
    size = started("WORLD_SIZE", 1)
    if options.strategy == "auto":
        return "ddp" if size > 1 else "none"
    if options.strategy == "none" and size > 1:
        raise ValueError(f"--strategy none is for one process; ddp or fsdp for the {size} that were started")
    if options.strategy != "none" and "RANK" not in os.environ:
        raise ValueError(
            f"--strategy {options.strategy} is for processes that torchrun starts: "
            "torchrun --nproc-per-node 2 -m primer_fast.cli train ..."
        )
    return options.strategy


def _run(
    command: TrainCommand, options: TrainOptions, display: Display, folder: RunFolder, task: Task, state: TrainState
) -> RunResult:
    config, world, model = options.train, state.world, state.model
    files = task.files(model)
    if options.resume:
        checkpoint.restore(folder, state)
        world.first(lambda: folder.cut_metrics(state.step))
    else:
        world.first(lambda: folder.begin(to_json(options), overwrite=options.overwrite))
    world.first(lambda: folder.write_files(files, keep=options.resume))

    steps = task.steps(config)
    comparison = None
    if options.compares and isinstance(task, SupervisedTask):
        comparison = Comparison(state, task, config)
    advance = display.task(f"{command.syntax.model} on {data_name(options.data)}", steps, state.step)

    def save() -> None:
        checkpoint.save(folder, state, to_json(options), task.epoch(state.step, config))

    try:
        with Interruption(display.print) as asked:
            # All processes ask after each step, so that they stop after the same one, whichever of them was asked to.
            rows = task.train(state, config, lambda: world.any(asked.requested() or display.closed))
            for row in comparison.beside(rows) if comparison else rows:
                world.first(functools.partial(folder.log, row))
                due = task.is_saved(state.step, config)
                if due:
                    save()
                advance(state.step, summary(row))
                if due:
                    shown = state.whole()
                    if world.rank == 0:
                        with contextlib.suppress(FloatingPointError):  # training itself says at which step, and why
                            if remark := task.remark(shown, row):
                                display.print(remark)
            if state.step < steps:
                save()
    except (FloatingPointError, WriteError) as error:
        kept = f"the checkpoint in {folder.path} is of an earlier step and kept" if checkpoint.last(folder) else ""
        raise type(error)(f"{error}; {kept or 'no checkpoint had been written yet'}") from error
    except RewardError as error:
        save()
        raise RewardError(f"{error}; the run is saved as of step {state.step}: --resume goes on from there") from error
    if state.step < steps:
        result = f"stopped at step {state.step} of {steps} and saved in {folder.path}"
        mine = interruption.status(asked.stop()) if asked.requested() else terminal.CLOSED * display.closed
        status = max(world.collect(mine))
        return RunResult(folder.path, world.first(folder.rows), False, result, None, model, status)

    model = state.whole()
    task.finish(model)
    world.first(lambda: folder.save_weights(task.weights(model)))
    rows = world.first(folder.rows)
    seconds = sum(row["train/seconds"] for row in rows)
    result = f"{task.describe(model, config)}; trained in {seconds:.1f} s"
    pictures = world.first(lambda: _draw(folder, task, model, config, rows))
    saved = world.first(lambda: checkpoint.last(folder))
    written = [folder.config.name, *files, folder.metrics.name, saved.name, folder.weights.name, *pictures]
    display.print(f"{folder.path}: {', '.join(written)}")
    if comparison:
        display.print(comparison.report())
    return RunResult(folder.path, rows, True, result, comparison, model)


def _draw(folder: RunFolder, task: Task, model: torch.nn.Module, config: Any, rows: list[dict]) -> list[str]:
    with writing(folder.path):
        return task.draw(folder.path, model, config, rows)
