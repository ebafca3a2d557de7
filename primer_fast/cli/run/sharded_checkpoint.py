"""The checkpoint of a model that no process has all of: a folder to which each process writes its parts.

``checkpoint-<step>`` holds safetensors files of torch.distributed.checkpoint and ``state.json``, under the names that
``train.state.pack`` gives. It has a temporary name until all is written, and can be loaded by any number of processes
with any strategy. Nothing here is unpickled.

``state.json`` also says how many files there are, one of each process. Where one of them is lost torch raises no error:
it leaves that share of the weights as it finds the memory. So the files are counted before they are read.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from primer_fast.cli.run.folder import sharded_checkpoints, write_text
from primer_fast.files import flush_names
from primer_fast.train.parallel import is_sharded
from primer_fast.train.state import TrainState, random_states, state_metadata, state_tensors

STATE, PARTIAL, PARTS = "state.json", "checkpoint.partial", "parts"


def save(folder: Path, state: TrainState, config: dict, epoch: float) -> None:
    """Write the checkpoint of ``state`` into the folder of a run; those of other steps go. All processes call it.

    Raises:
        OSError: in all processes, where one of them could not write.
    """
    import torch.distributed.checkpoint as dcp  # which takes half a second
    from torch.distributed.checkpoint.api import CheckpointException

    path, temporary = folder / f"checkpoint-{state.step}", folder / PARTIAL
    if state.world.first(path.exists):
        return
    state.world.first(lambda: _make_empty(temporary))
    tensors = state_tensors(state) | {f"rng.{name}": t for name, t in random_states(state.world).items()}
    tensors = {name: t.detach() for name, t in tensors.items()}
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    except CheckpointException as error:
        raise OSError(f"{temporary}: could not be written ({_cause(error)})") from error
    metadata = state_metadata(state, config, epoch) | {PARTS: str(state.world.size)}

    def seal() -> None:
        write_text(temporary / STATE, json.dumps(metadata) + "\n")
        os.replace(temporary, path)
        flush_names(folder)  # before what it replaces goes
        remove(folder, but=path)

    state.world.first(seal)


def load(path: Path, state: TrainState | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a checkpoint; of a tensor that is sharded in ``state``, this process's part.

    Raises:
        ValueError: a file is missing or damaged; names the folder.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    ours: dict[str, Tensor] = {}
    if state is not None and state.is_sharded:
        # Of the optimizer's values a new state has none; they lie as the weights do.
        ours = state_tensors(state) | {f"optimizer.{n}.": p for n, p in state.model.named_parameters()}
    try:
        metadata = dict(json.loads((path / STATE).read_text(encoding="utf-8")))
        found = len(list(path.glob("*.safetensors")))
        if found != int(metadata.get(PARTS, found)):
            raise ValueError(f"it has {found} of its {metadata[PARTS]} safetensors files")
        reader = dcp.HuggingFaceStorageReader(str(path))
        tensors = {}
        content: dict[str, Any] = reader.read_metadata().state_dict_metadata
        for name, saved in content.items():
            like = ours.get(name if name.startswith("model.") else name.rpartition(".")[0] + ".")
            if like is not None and is_sharded(like) and like.shape == saved.size:
                tensors[name] = torch.empty_like(like, dtype=saved.properties.dtype)
            else:
                tensors[name] = torch.empty(saved.size, dtype=saved.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=not ours)
    except (OSError, TypeError, ValueError, safetensors.SafetensorError, CheckpointException) as error:
        raise ValueError(f"{path}: not a checkpoint, or a damaged one ({_cause(error)})") from error
    return tensors, metadata


def newest(folder: Path) -> Path | None:
    """The checkpoint of the last step in the folder of a run; None if there is none."""
    return next(reversed(sharded_checkpoints(folder)), None)


def remove(folder: Path, but: Path | None = None) -> None:
    """Remove the checkpoints in the folder of a run, all or all but one."""
    for path in (*sharded_checkpoints(folder), folder / PARTIAL):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()


def _cause(error: BaseException) -> object:
    """The first failure of those that a CheckpointException collects, in one line."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
