"""The commands that work an example out, number by number: ``primer-fast show <name>``."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

Example = TypeVar("Example")


@dataclass(frozen=True)
class Command(Generic[Example]):
    """What distinguishes one such command from the others."""

    name: str
    parse: Callable[[list[str]], Any]  # the words of a call -> options with ``out``, the file of the picture
    compute: Callable[[], Example]
    report: Callable[[Example, Console], None]  # in the terminal
    draw: Callable[[Path, Example], None]
    columns: int  # of the terminal, that the tables need


def main(command: Command, argv: list[str]) -> int:
    """Run ``command``; 0 if the picture is there, 2 for a wrong call or a file that cannot be written."""
    try:
        options = command.parse(argv)
        example = command.compute()
        console = Console(highlight=False, soft_wrap=True)
        console.width = max(console.width, command.columns)
        command.report(example, console)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        command.draw(options.out, example)
    except SystemExit as stop:  # tyro has printed the help, or what is wrong with the arguments
        return stop.code if isinstance(stop.code, int) else 2
    except (ValueError, OSError) as error:
        print(f"primer-fast show {command.name}: {error}", file=sys.stderr)
        return 2
    console.print(f"drawn in {options.out}", markup=False)
    return 0
