"""Writing kernels/tuned/<gpu>.json; kernels/tunable.py reads it and says what stands in it."""

import datetime
import json
from pathlib import Path

import torch
import triton

from primer_fast.files import replace_file
from primer_fast.kernels.tunable import read_tuned
from primer_fast.tuning.problems import Decision
from primer_fast.tuning.search import Fastest


def load(path: Path) -> dict[str, dict[str, dict]]:
    """Choice -> bucket -> entry. A file that cannot be read is moved to <name>.broken first: nothing is lost.

    Raises:
        OSError: the file is there and cannot be opened or moved.
    """
    try:
        return read_tuned(path)["settings"]
    except FileNotFoundError:
        return {}
    except ValueError:
        path.replace(path.with_name(path.name + ".broken"))
        return {}


def entry(outcome: Fastest, default: tuple) -> dict:
    """What is written of an outcome: no settings where the default was not beaten."""
    figures = {"seconds": float(f"{outcome.seconds:.4g}"), "default_seconds": float(f"{outcome.default_seconds:.4g}")}
    return figures if outcome.settings == default else outcome.settings._asdict() | figures


def add(path: Path, gpu_name: str, decision: Decision, made: dict) -> None:
    """Add one entry to what the file holds now, under a temporary name that is then renamed.

    Raises:
        OSError: the file cannot be written; what was there is as before.
    """
    sections = load(path)
    sections.setdefault(decision.choice, {})[decision.bucket] = made
    content = {
        "gpu": gpu_name,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "settings": {name: dict(sorted(section.items())) for name, section in sorted(sections.items())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=1) + "\n")
