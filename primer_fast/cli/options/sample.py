"""Of `primer-fast sample`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Print text that a trained transformer writes."""

    run: Annotated[
        Path, tyro.conf.Positional
    ]  # folder of a `primer-fast train gpt`, or a Hugging Face GPT-2 checkpoint's
    prompt: str = ""  # what the text begins with
    tokens: int = 200  # how many to write; a text that ends itself is shorter
    temperature: float = 0.8  # 0: always the most probable token; 1: as the model has it
    top_k: int | None = None  # choose among that many most probable tokens
    top_p: float | None = None  # choose among the most probable tokens that together have this probability
    seed: int | None = None  # of the choices; None: other texts each time
    count: int = 1  # texts
    line: bool = False  # a text ends with its line, as those of models of completions do
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one


def parse(argv: list[str]) -> Options:
    return tyro.cli(Options, args=argv, prog="primer-fast sample", config=(tyro.conf.FlagCreatePairsOff,))
