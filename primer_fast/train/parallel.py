"""The processes that share each batch: what a collective is for each of them, and how they begin and end together.

One process is a world of size 1, in which every method does nothing or the plain thing.
Source: torch.distributed; `torchrun` starts the processes and tells each its rank in the environment.
"""

__all__ = [
    "ALONE",
    "EVERY",
    "PATIENCE",
    "MicroBatch",
    "World",
    "is_sharded",
    "joined",
    "local",
    "placed_like",
    "started",
    "whole",
]

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FAILED, REPORTERS, HEARD = (f"primer_fast/{key}" for key in ("failed", "reporters", "heard"))  # keys of the store
PATIENCE = timedelta(seconds=10)  # of a process that ends, with another that says why or that has yet to hear of it
EVERY = 0.5  # seconds between two looks at whether another process failed


class MicroBatch(NamedTuple):
    """The rows of a micro-batch that this process takes.

    Where there are fewer rows than processes, some take a row that is another's, since each forward and backward may
    be a collective that all must take part in. ``empty`` is true there: the row must not count.
    """

    rows: slice
    empty: bool

    def counted(self, x: Tensor) -> Tensor:
        """``x``, a sum over ``rows``, if they count; else 0."""
        return x * 0 if self.empty else x


@dataclass(frozen=True)
class World:
    """Rank ``rank`` of ``size`` processes; ``store`` is what they share outside of collectives."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    def part(self, count: int) -> slice:
        """The adjacent rows, of ``count``, that are this process's: as many as another's, or one more or less."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def micro_batches(self, count: int, accumulate: int) -> Iterator[MicroBatch]:
        """``count`` rows are cut into up to ``accumulate`` micro-batches; yields this process's rows of each.

        Every process has as many of them.
        """
        micro = -(-count // accumulate)
        for start in range(0, count, micro):
            part = self.part(min(micro, count - start))
            empty = part.start == part.stop
            yield MicroBatch(slice(start + part.start, start + part.stop + empty), empty)

    def sum(self, **values: Tensor) -> dict[str, Tensor]:  # () each, on the model's device
        """Each value summed over the processes; one collective, and no wait for a GPU."""
        if self.size == 1:
            return values
        total = torch.stack([value.double() for value in values.values()])
        dist.all_reduce(total)
        return {name: x.to(value.dtype) for (name, value), x in zip(values.items(), total, strict=True)}

    def sum_tensor(self, x: Tensor) -> Tensor:
        """``x`` summed over the processes, element by element and in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, rows: Tensor, count: int) -> Tensor:  # this process's part(count) (n, ...) -> (count, ...)
        """All rows, in every process the same bits."""
        if self.size == 1:
            return rows
        if rows.dtype == torch.bool:
            return self.gather(rows.byte(), count).bool()
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[self.part(count)] = rows
        return self.sum_tensor(whole)

    def collect(self, value: Any) -> list[Any]:
        """Every process's, by rank, in every process."""
        found = [value]
        if self.size > 1:
            found *= self.size
            dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process. It is the CPUs that agree: no GPU is waited for."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def first(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` in the first process alone; all return or raise what it returned or raised there."""
        if self.size == 1:
            return action()
        return self.together(action if self.rank == 0 else lambda: None, share=True)

    def together(self, action: Callable[[], Any], *, share: bool = False) -> Any:
        """What ``action`` returns here; if it raised anywhere, all raise what it raised in the lowest rank of these.

        Args:
            share: return what it returned in the first process.
        """
        if self.size == 1:
            return action()
        mine: tuple[Any, Exception | None]
        try:
            mine = action(), None
        except Exception as error:
            mine = None, error
        found = self.collect(mine if share or mine[1] else (None, None))
        for rank, (_, raised) in enumerate(found):
            if raised is not None:
                raise raised if mine[1] is None or rank != self.rank else mine[1]
        return found[0][0] if share else mine[0]

    def fail(self, tell: Callable[[], int]) -> NoReturn:
        """End this process, of several, with the status that ``tell`` returns, and with it all the others.

        The first process to fail calls ``tell``; the others wait for it and say nothing: they fail alike, or because
        the first is gone. None is shut down in order: a pending collective could hold that up for ever.
        """
        store = self.store
        if store is None:
            raise ValueError("World.fail: there must be several processes; got one")
        first, code = False, 1
        with contextlib.suppress(RuntimeError):  # the store is gone with its process, or nobody told in time
            first = store.add(REPORTERS, 1) == 1
            if not first:
                store.wait([FAILED], PATIENCE)
                code = int(store.get(FAILED))
        if first:
            with contextlib.suppress(OSError, SystemExit):  # nothing can be told where nobody reads it
                code = tell()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        if first:
            with contextlib.suppress(RuntimeError):
                store.set(FAILED, str(code))
        _leave(store, self.rank, self.size, code)


ALONE = World()


def started(name: str, default: int) -> int:
    """What `torchrun` told this process: its RANK, its LOCAL_RANK on this machine, their WORLD_SIZE ..."""
    return int(os.environ.get(name, default))


@contextmanager
def joined(device: str, *, alone: bool = False) -> Iterator[World]:
    """The world of the processes that `torchrun` started, with nccl between GPUs and gloo between CPUs.

    After an exception in the body of one process it calls ``World.fail``, which ends the others within a second or so,
    wherever they wait.

    Args:
        device: "cuda" or "cpu"; a GPU is the one of the local rank, and becomes the current one.
        alone: a world of one process although others may have been started.

    Raises:
        ValueError: fewer GPUs than processes on this machine.
    """
    if alone:
        yield World()
        return
    if device == "cuda":
        processes, gpus = started("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
        if processes > gpus:
            raise ValueError(f"there must be a GPU for each process of this machine; got {processes} and {gpus}")
        torch.cuda.set_device(started("LOCAL_RANK", 0))
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    ended = threading.Event()
    world = World(rank, size, store)
    watch = threading.Thread(target=_watch, args=(store.clone(), world, ended), daemon=True)
    watch.start()
    try:
        yield world
        world.any(False)  # waits for all: the first process may have the store, which the others need up to here
        ended.set()
        watch.join()
        dist.destroy_process_group()
    finally:
        ended.set()


def _watch(store: dist.Store, world: World, ended: threading.Event) -> None:
    """End this process, wherever it waits, once another one has failed."""
    while not ended.wait(EVERY):
        try:
            if not store.check([FAILED]):
                continue
            code = int(store.get(FAILED))
        except RuntimeError:  # the process that has the store is gone
            code = 1
        if not ended.is_set():
            _leave(store, world.rank, world.size, code)


def _leave(store: dist.Store, rank: int, size: int, code: int) -> NoReturn:
    """End this process. The first one may have the store, so it waits until the others have read the status there."""
    try:
        store.set(f"{HEARD}/{rank}", "")
        if rank == 0:
            store.wait([f"{HEARD}/{other}" for other in range(1, size)], PATIENCE)
    except RuntimeError:  # another one was killed
        pass
    finally:
        os._exit(code)


def is_sharded(t: Tensor) -> "TypeGuard[DTensor]":
    """Whether each process has a part of the tensor alone."""
    return hasattr(t, "full_tensor")  # a DTensor, whose module is not imported where there is none


def local(t: Tensor) -> Tensor:
    """What this process holds of ``t``."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Tensor) -> Tensor:
    """All of ``t``; where it is sharded, all processes call this."""
    return t.full_tensor() if is_sharded(t) else t


def placed_like(model: Tensor, t: Tensor) -> Tensor:
    """``t``, a whole tensor, laid out as ``model``: where that is sharded, this process's part of ``t``."""
    if not is_sharded(model) or is_sharded(t):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
