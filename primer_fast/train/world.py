"""The processes that share each batch: what a collective is for each of them, and how they begin and end together.

One process is a world of size 1, in which every method does nothing or the plain thing.
Source: torch.distributed; `torchrun` starts the processes and tells each its rank in the environment.
"""

__all__ = ["ALONE", "EVERY", "PATIENCE", "Share", "World", "joined", "started"]

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

FAILED, REPORTERS = "primer_fast/failed", "primer_fast/reporters"  # keys of the store
PATIENCE = timedelta(seconds=10)  # of a failing process that leaves it to another to say why
EVERY = 0.5  # seconds between two looks at whether another process failed


class Share(NamedTuple):
    """What one process takes of a micro-batch; ``empty``: it has none, and one row stands in that counts nothing."""

    rows: slice
    empty: bool

    def of(self, x: Tensor) -> Tensor:
        """A sum over ``rows`` as far as it counts."""
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

    def shares(self, count: int, accumulate: int) -> Iterator[Share]:
        """This process's share of each of the up to ``accumulate`` micro-batches that ``count`` rows are cut into.

        Every process has as many shares, since each forward and backward may be a collective.
        """
        micro = -(-count // accumulate)
        for start in range(0, count, micro):
            part = self.part(min(micro, count - start))
            empty = part.start == part.stop
            yield Share(slice(start + part.start, start + part.stop + empty), empty)

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
        the first is gone. It ends at once, since a pending collective may hold up any clean end.
        """
        store = self.store
        if store is None:
            raise ValueError("World.fail: there must be several processes; got one")
        if store.add(REPORTERS, 1) == 1:
            code = 1
            with contextlib.suppress(OSError, SystemExit):  # nothing can be told where nobody reads it
                code = tell()
            store.set(FAILED, str(code))
        else:
            try:
                store.wait([FAILED], PATIENCE)
                code = int(store.get(FAILED))
            except RuntimeError:  # the one to tell did not come to it
                code = 1
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


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
    watch = threading.Thread(target=_watch, args=(store.clone(), ended), daemon=True)
    watch.start()
    try:
        world = World(rank, size, store)
        yield world
        world.any(False)  # waits for all: the first process may have the store, which the others need up to here
        ended.set()
        watch.join()
        dist.destroy_process_group()
    finally:
        ended.set()


def _watch(store: dist.Store, ended: threading.Event) -> None:
    """End this process, wherever it waits, once another one has failed."""
    while not ended.wait(EVERY):
        try:
            failed = store.check([FAILED])
        except RuntimeError:  # the process that has the store is gone
            failed = True
        if failed and not ended.is_set():
            os._exit(1)
