"""The folder of a training run: config.json, metrics.jsonl, checkpoint.safetensors, model.safetensors, pictures.

A run that needs more to be used, as a tokenizer, has it in files of their own, from the beginning on.

Every file but the metrics is written under a temporary name, flushed to the disk and renamed, so that a run that is
killed leaves the file before. Nothing here is unpickled. A run holds its folder by a lock on the file ``.lock``, which
the kernel releases however the process ends; where a file system has no locks, as some network file systems, nothing
keeps two runs apart.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import primer_fast
from primer_fast.cli.errors import WriteError as WriteError
from primer_fast.files import replace_file

fcntl: Any  # None where there is none
try:
    import fcntl
except ImportError:  # not POSIX: nothing keeps two runs apart
    fcntl = None

_STEP = re.compile("checkpoint-[0-9]{1,18}")
TEMPORARY = ".tmp"  # added to a file's name while it is written
_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: "make room on that disk", errno.EDQUOT: "make room in the quota",
    errno.EFBIG: "raise the limit of the size of files", errno.EROFS: "choose an --out that can be written to",
    errno.EACCES: "choose an --out that can be written to", errno.EPERM: "choose an --out that can be written to",
    errno.ENOENT: "its folder is gone; choose another --out",
    errno.ENOTDIR: "a part of this path is a file; choose another --out",
}  # fmt: skip


class RunFolder:
    """The run of ``command`` ("train mlp") in ``path``.

    Raises (any method):
        ValueError: the folder or a file in it is not what it should be; the message names it and says what is wrong.
        WriteError: a file cannot be written.
    """

    def __init__(self, path: str | Path, command: str):
        self.path, self.command = Path(path), command
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.weights = self.path / "model.safetensors"  # written at the end: its presence says that the run is finished
        self.lock = self.path / ".lock"
        self._held: int | None = None  # descriptor of the lock

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep it for this run as long as the block lasts.

        Raises:
            ValueError: another run that is alive holds it.
        """
        if fcntl is None or (self.path.exists() and not self.path.is_dir()):
            yield
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with writing(self.lock):
            held = self._acquire()
        try:
            self._held = held
            yield
        finally:
            self._held = None
            if held is not None:
                with contextlib.suppress(OSError):
                    if _same_file(held, self.lock):
                        self.lock.unlink()
                os.close(held)

    def _acquire(self) -> int | None:
        """The descriptor of the lock; None on a file system without locks."""
        while True:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip() or "process unknown"
                os.close(descriptor)
                raise ValueError(
                    f"{self.path}: another run is writing here ({holder}); wait for its end, or choose another --out"
                ) from None
            except OSError:
                os.close(descriptor)
                return None
            if _same_file(descriptor, self.lock):  # not one that its holder has just removed
                with contextlib.suppress(OSError):  # a full disk is the next writer's to report
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
            os.close(descriptor)

    def _must_be_there(self) -> None:
        if self._held is not None and not _same_file(self._held, self.lock):
            raise WriteError(f"{self.path}: the folder was removed or replaced while the run wrote to it; start anew")

    def begin(self, options: dict, *, overwrite: bool) -> None:
        """Make the folder for a new run; an earlier run of the same command goes if ``overwrite`` says so."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: is a file, not a folder; choose another --out")
        if not self.is_new():
            self.read_options()  # raises for what is not a run of this command
            if not overwrite:
                state = "a finished run" if self.weights.exists() else "an unfinished run"
                raise ValueError(
                    f"{self.path}: holds {state}; --resume goes on with it, --overwrite starts anew, "
                    "--out names another folder"
                )
            results = (*self.path.glob("*.png"), self.path / "sample.txt", *self.path.glob(f"*{TEMPORARY}"))
            shapes = (self.path / "transformer.json", self.path / "tokenizer.json")  # of another model than the new one
            with writing(self.path):
                for file in (self.metrics, self.checkpoint, self.weights, *results, *shapes):
                    file.unlink(missing_ok=True)
                for sharded in (*sharded_checkpoints(self.path), self.path / "checkpoint.partial"):
                    shutil.rmtree(sharded, ignore_errors=True)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        content = {"command": self.command, "primer_fast": primer_fast.__version__, "options": options}
        write_text(self.config, json.dumps(content, indent=2) + "\n")

    def is_new(self) -> bool:
        """Whether the folder holds nothing, or only what a run leaves that is killed before it has begun."""
        leftovers = {self.lock.name, self.config.name + TEMPORARY}
        return not self.path.is_dir() or all(file.name in leftovers for file in self.path.iterdir())

    def write_files(self, files: dict[str, str], *, keep: bool = False) -> None:
        """Write text files into the folder, name -> content; ``keep``: only those that are not there."""
        for name, content in files.items():
            if not (keep and (self.path / name).exists()):
                write_text(self.path / name, content)

    def read_options(self) -> dict:
        """The options that the run was begun with."""
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder, so there is no run to go on with")
        if not self.config.is_file():
            raise ValueError(f"{self.path}: not the folder of a run (it has no config.json); choose another --out")
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
            command, options = content["command"], dict(content["options"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.config}: not the configuration of a run, or damaged ({error!r})") from error
        if command != self.command:
            raise ValueError(
                f"{self.path}: holds a run of `primer-fast {command}`, not of `primer-fast {self.command}`"
            )
        return options

    def log(self, row: dict[str, float]) -> None:
        """Append one line of metrics; a value that is not finite is written as null."""
        line = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._must_be_there()
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rows(self, last_step: int | None = None) -> list[dict]:
        """The metrics, oldest first, up to ``last_step``; a line cut short by a kill ends them."""
        rows = []
        content = self.metrics.read_text(encoding="utf-8", errors="replace") if self.metrics.exists() else ""
        for line in content.splitlines():
            try:
                row = json.loads(line)
                if last_step is not None and row["step"] > last_step:
                    break
            except (KeyError, TypeError, ValueError, RecursionError):
                break
            rows.append(row)
        return rows

    def cut_metrics(self, last_step: int) -> None:
        """Drop the metrics of steps after ``last_step``, which the run that goes on from there makes again."""
        lines = [json.dumps(row) + "\n" for row in self.rows(last_step)]
        write_text(self.metrics, "".join(lines))

    def save_checkpoint(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self._must_be_there()
        if self.metrics.exists():  # a power cut must not take rows of steps that the checkpoint is beyond
            with writing(self.metrics), self.metrics.open("rb") as file:
                os.fsync(file.fileno())
        write_bytes(self.checkpoint, safetensors.torch.save(tensors, metadata))

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return read_safetensors(self.checkpoint)

    def save_weights(self, state_dict: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        self._must_be_there()
        tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state_dict.items()}
        write_bytes(self.weights, safetensors.torch.save(tensors, {"format": "pt"} | (metadata or {})))


def sharded_checkpoints(folder: Path) -> list[Path]:
    """The ``checkpoint-<step>`` in a run's folder, earliest step first; what else a user put there is left alone."""
    found = [path for path in folder.glob("checkpoint-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file by ``content`` in one step: after a crash it is the old or the new one, whole.

    Raises:
        WriteError: the file before is left as it was.
    """
    with writing(path):
        replace_file(path, content, TEMPORARY)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside becomes a WriteError that names ``path``."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "")
        why = error.strerror or str(error)
        raise WriteError(f"{path}: cannot be written ({why})" + (f"; {remedy}" if remedy else "")) from error


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


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
    except OSError as error:  # a folder, a device, a file that may not be read
        raise ValueError(f"{path}: cannot be read ({error})") from error


def load_weights(model: torch.nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """``model.load_state_dict``; ValueError in one line, which begins with ``what``, if they do not fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        wrong = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{what} ({wrong[0][:200] if wrong else error}{more})") from error
