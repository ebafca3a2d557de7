"""The folder of a training run: config.json, metrics.jsonl, checkpoint.safetensors, model.safetensors, pictures.

A run that needs more to be used, as a tokenizer, has it in files of their own, from the beginning on.

Every file but the metrics is written under a temporary name, flushed to the disk and renamed, so that a run that is
killed leaves the file before. Nothing here is unpickled.
"""

import json
import math
import os
import shutil
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

import primer_fast


class RunFolder:
    """The run of ``command`` ("train mlp") in ``path``.

    Raises (any method):
        ValueError: the folder or a file in it is not what it should be; the message names it and says what is wrong.
    """

    def __init__(self, path: str | Path, command: str):
        self.path, self.command = Path(path), command
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.weights = self.path / "model.safetensors"  # written at the end: its presence says that the run is finished

    def begin(self, options: dict, *, overwrite: bool) -> None:
        """Make the folder for a new run; an earlier run of the same command goes if ``overwrite`` says so."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: is a file, not a folder; choose another --out")
        if self.path.is_dir() and any(self.path.iterdir()):
            self.read_options()  # raises for what is not a run of this command
            if not overwrite:
                state = "a finished run" if self.weights.exists() else "an unfinished run"
                raise ValueError(
                    f"{self.path}: holds {state}; --resume goes on with it, --overwrite starts anew, "
                    "--out names another folder"
                )
            results = (*self.path.glob("*.png"), self.path / "sample.txt")
            for file in (self.metrics, self.checkpoint, self.weights, *results):
                file.unlink(missing_ok=True)
            for sharded in (*self.path.glob("checkpoint-*"), self.path / "checkpoint.partial"):
                shutil.rmtree(sharded, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"command": self.command, "primer_fast": primer_fast.__version__, "options": options}
        write_text(self.config, json.dumps(content, indent=2) + "\n")

    def write_files(self, files: dict[str, str]) -> None:
        """Write text files into the folder, name -> content."""
        for name, content in files.items():
            write_text(self.path / name, content)

    def read_options(self) -> dict:
        """The options that the run was begun with."""
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder, so there is no run to go on with")
        if not self.config.is_file():
            raise ValueError(f"{self.path}: not the folder of a run (it has no config.json); choose another --out")
        try:
            content = json.loads(self.config.read_text())
            command, options = content["command"], dict(content["options"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.config}: not the configuration of a run, or damaged ({error!r})") from error
        if command != self.command:
            raise ValueError(
                f"{self.path}: holds a run of `primer-fast {command}`, not of `primer-fast {self.command}`"
            )
        return options

    def log(self, row: dict[str, float]) -> None:
        """Append one line of metrics; a value that is not finite is written as null."""
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, last_step: int | None = None) -> list[dict]:
        """The metrics, oldest first, up to ``last_step``; a line cut short by a kill ends them."""
        rows = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                row = json.loads(line)
                if last_step is not None and row["step"] > last_step:
                    break
            except (KeyError, TypeError, ValueError):
                break
            rows.append(row)
        return rows

    def cut_metrics(self, last_step: int) -> None:
        """Drop the metrics of steps after ``last_step``, which the run that goes on from there makes again."""
        lines = [json.dumps(row) + "\n" for row in self.rows(last_step)]
        write_text(self.metrics, "".join(lines))

    def save_checkpoint(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        write_bytes(self.checkpoint, safetensors.torch.save(tensors, metadata))

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return read_safetensors(self.checkpoint)

    def save_weights(self, state_dict: dict[str, Tensor]) -> None:
        tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state_dict.items()}
        write_bytes(self.weights, safetensors.torch.save(tensors, {"format": "pt"}))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file by ``content`` in one step: after a crash it is the old or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the rename itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, content: str) -> None:
    """``write_bytes`` of text as UTF-8."""
    write_bytes(path, content.encode())


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: there is no such file, or it is not one, or it is truncated; names the file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a truncated or damaged one ({error})") from error
