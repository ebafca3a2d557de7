"""primer-fast align: a language model learns what people prefer, by PPO and by DPO, on words or on your texts."""

import json
import time
from typing import Any

import torch

from primer_fast.cli import terminal
from primer_fast.cli.align import data as align_data
from primer_fast.cli.align import folder as align_folder
from primer_fast.cli.align import plots as align_plots
from primer_fast.cli.align import report as align_report
from primer_fast.cli.align.data import Material
from primer_fast.cli.align.stages import Alignment, align
from primer_fast.cli.console import Display
from primer_fast.cli.errors import sizes_that_fit
from primer_fast.cli.options.align import LEXICON, MATERIAL, Options, parse, to_json
from primer_fast.cli.run.folder import RunFolder, write_text, writing
from primer_fast.data.preferences import load_lexicon, read_preferences, read_ratings
from primer_fast.data.text import load_text

WHEN_INTERRUPTED = "; --resume goes on, without it the command starts anew"


def main(argv: list[str]) -> int:
    options = parse(argv)
    with Display() as display:
        with sizes_that_fit():
            result = run(options, display)
        display.print(align_report.summary(result))
        display.print(f"open {(options.out / 'index.html').resolve()}")
    return terminal.CLOSED if display.closed else 0


def load_material(options: Options) -> Material:
    """Read what the options name; errors are those that the readers of the files raise."""
    shared: dict[str, Any] = {"held_out": options.held_out, "seed": options.seed}
    texts: dict[str, Any] = {"tokenizer": options.tokenizer, "context": options.context}
    rated: dict[str, Any] = {"pairs": options.pairs, "minimum_gap": options.minimum_gap}
    running_text = None if options.text is None else load_text(options.text)
    source = options.preferences or options.ratings
    if source != LEXICON:
        read: Any = (read_ratings if options.preferences is None else read_preferences)(source)
        try:
            if options.preferences is not None:
                return align_data.pairs(read, running_text, **texts, **shared)
            return align_data.sentences(read, running_text, **texts, **rated, **shared)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    if options.text is not None:
        raise ValueError("--text is for sentences: give --ratings FILE or --preferences FILE with it")
    return align_data.words(load_lexicon(), **rated, **shared)


def run(options: Options, display: Display) -> Alignment:
    """Run every stage, and write everything into the folder ``out``.

    Raises:
        ValueError, OSError: what the options name cannot be used; says what and why.
        FloatingPointError: a training diverged.
        WriteError: a file cannot be written.
    """
    began = time.perf_counter()
    torch.manual_seed(options.seed)
    material = load_material(options)
    folder = RunFolder(options.out, "align")
    with folder.held():
        material_now = align_folder.fingerprint(material)
        if options.resume:
            if folder.read_options().get(MATERIAL) != material_now:
                raise ValueError(f"{options.out}: the run was begun with other data than there is now; start anew")
        else:
            if not folder.is_new():
                folder.read_options()  # raises for what is not a run of this command
                align_folder.forget(options.out)
            folder.begin(to_json(options) | {MATERIAL: material_now}, overwrite=True)
        result = align(material, options, display)
        _report(options, result, began)
    return result


def _report(options: Options, result: Alignment, began: float) -> None:
    seconds = max(time.perf_counter() - began, sum(result.seconds.values()))  # of all calls, where there were several
    write_text(options.out / "results.json", json.dumps(result.to_json(), indent=2) + "\n")
    with writing(options.out):
        align_plots.draw(options.out, result)
    write_text(options.out / "index.html", align_report.page_of(options.out, result, seconds))
