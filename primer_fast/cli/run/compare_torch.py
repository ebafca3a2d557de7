"""The same model from torch.nn, trained beside ours: same weights, same samples in the same order, in turns."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from primer_fast.bench.programs.torch_twin import torch_twin
from primer_fast.cli.run.tasks import SupervisedTask
from primer_fast.train import supervised
from primer_fast.train.state import TrainState
from primer_fast.train.supervised import SupervisedConfig


class Comparison:
    """Trains a twin from torch.nn in turns with ``state.model``; which of the two begins changes with every window."""

    def __init__(self, state: TrainState, task: SupervisedTask, config: SupervisedConfig):
        self.log_every = config.log_every
        twin = supervised.start(torch_twin(state.model), config)
        self.theirs = supervised.train(twin, task.inputs, task.targets, config, test=task.test)
        self.pairs: list[tuple[dict, dict]] = []  # rows of ours and of the twin's

    def beside(self, ours: Iterator[dict]) -> Iterator[dict]:
        """The rows of ``ours``; for each, the twin trains on the same samples."""
        while True:
            their_row = next(self.theirs, None) if len(self.pairs) % 2 else None
            row = next(ours, None)
            if row is None:  # finished, or stopped
                return
            self.pairs.append((row, their_row or next(self.theirs)))
            yield row

    def report(self) -> str:
        """Both times and both results, in three lines."""
        rows, their_rows = zip(*self.pairs, strict=True)
        ours, theirs = seconds_per_epoch(rows), seconds_per_epoch(their_rows)
        ratios = [other["train/seconds"] / row["train/seconds"] for row, other in self.pairs]
        low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        key = "test/accuracy" if "test/accuracy" in rows[-1] else "train/accuracy"
        apart = max(abs(row["train/loss"] - other["train/loss"]) for row, other in self.pairs)
        return (
            f"seconds per epoch, median of {len(ours)}, trained in turns of {self.log_every} steps:\n"
            f"  primer_fast {statistics.median(ours):.4g}, torch.nn {statistics.median(theirs):.4g}: "
            f"{ratio:.3f} times as fast (median of {len(ratios)} turns; the middle half is {low:.2f} to {high:.2f})\n"
            f"  {key} {rows[-1][key]:.2%} and {their_rows[-1][key]:.2%}, train/loss at most {apart:.2g} apart"
        )


def seconds_per_epoch(rows: Sequence[dict]) -> list[float]:
    """Training time of each epoch, or where a row covers several, their mean."""
    seconds, end = [], 0.0
    for _, group in itertools.groupby(rows, key=lambda row: math.ceil(row["epoch"])):
        windows = list(group)
        seconds.append(sum(row["train/seconds"] for row in windows) / (windows[-1]["epoch"] - end))
        end = windows[-1]["epoch"]
    return seconds
