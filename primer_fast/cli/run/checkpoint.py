"""The checkpoint of a run, in one file or, where no process has all of the model, in a part by each."""

from pathlib import Path

from torch import Tensor

from primer_fast.cli.run import sharded_checkpoint
from primer_fast.cli.run.folder import RunFolder, read_safetensors
from primer_fast.train.state import TrainState, pack, unpack


def save(folder: RunFolder, state: TrainState, options: dict, epoch: float) -> None:
    """Write the checkpoint of ``state``; the one before goes. All processes call it."""
    if state.is_sharded:
        sharded_checkpoint.save(folder.path, state, options, epoch)
        state.world.first(lambda: folder.checkpoint.unlink(missing_ok=True))
        return
    content = pack(state, options, epoch)

    def write() -> None:
        folder.save_checkpoint(*content)
        sharded_checkpoint.remove(folder.path)

    state.world.first(write)


def last(folder: RunFolder) -> Path | None:
    """The checkpoint to go on from. There are two where a run ended before it removed the older one: then the newer."""
    paths = [path for path in (folder.checkpoint, sharded_checkpoint.newest(folder.path)) if path and path.exists()]
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)


def load(path: Path, state: TrainState | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a checkpoint; of a tensor that is sharded in ``state``, this process's part.

    Raises:
        ValueError: the checkpoint is damaged; names it.
    """
    return read_safetensors(path) if path.suffix else sharded_checkpoint.load(path, state)


def restore(folder: RunFolder, state: TrainState) -> None:
    """Load the last checkpoint, if one was written, whatever number of processes and strategy wrote it.

    Raises:
        ValueError: it is damaged, or of another model, optimizer or precision; names it.
    """
    path = last(folder)
    if path is None:
        return
    content = load(path, state)
    try:
        unpack(state, *content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
