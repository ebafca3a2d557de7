"""The ``primer-fast`` command: each command is one module or folder here, imported only when it is called."""

import difflib
import importlib
import sys
from typing import Any

from primer_fast import __version__
from primer_fast.cli import errors, interruption, terminal, threads  # noqa: F401, threads before any command: see there

COMMANDS = {  # words on the command line -> module, or module:object in it, what it does
    ("verify",): ("verify", "compare every kernel with its NumPy reference"),
    ("kernels",): ("kernels", "compile the kernels for any GPU, without one, and list registers and instructions"),
    ("tune",): ("tune", "search this GPU's fastest launch settings, and keep them"),
    ("train", "mlp"): ("train.mlp", "train the multilayer perceptron"),
    ("train", "cnn"): ("train.cnn", "train the convolutional network on digits"),
    ("train", "vit"): ("train.vit", "train the vision transformer on digits"),
    ("train", "gpt"): ("train.gpt", "train the transformer on text"),
    ("train", "sft"): ("train.preferences:SFT", "fine-tune a transformer on prompts and their completions"),
    ("train", "reward"): ("train.preferences:REWARD", "train a reward model on what people prefer"),
    ("train", "dpo"): ("train.preferences:DPO", "align a transformer with preferences, without a reward model"),
    ("train", "ppo"): ("train.preferences:PPO", "align a transformer with a reward model or any function"),
    ("sample",): ("sample", "print text that a trained transformer writes"),
    ("show", "convolution"): ("show.convolution", "work a convolution and a max-pool out, number by number"),
    ("show", "attention"): ("show.attention", "work a layer of attention out, number by number"),
    ("align",): ("align", "pretrain, learn what people prefer, PPO and DPO side by side, one page of results"),
    ("report",): ("report", "one page of everything measured, and what was not"),
    ("demo",): ("demo", "verify, train and write a report with pictures"),
}
HELP = {"-h", "--help"}


def usage(first: str | None = None) -> str:
    """The list of all commands, or of those whose first word is ``first``, and how to call them."""
    shown = {" ".join(words): what for words, (_, what) in COMMANDS.items() if first in (None, words[0])}
    width = max(map(len, shown))
    lines = [f"  {name:{width}}  {what}" for name, what in shown.items()]
    call = "COMMAND" if first is None else f"{first} WHAT"
    more = "; primer-fast --version" if first is None else ""
    return f"usage: primer-fast {call} [options]; primer-fast {call} --help says more{more}\n\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 0 for success, 1 for a failure it reports, 2 for a wrong call.

    A command that a signal ended gives 128 and its number; one whose output nobody reads any more gives 141.
    """
    words = sys.argv[1:] if argv is None else argv
    return terminal.run(lambda: _main(words))


def _main(argv: list[str]) -> int:
    with interruption.Ending():
        try:
            return _command(argv)
        except KeyboardInterrupt as stop:
            print("interrupted", file=sys.stderr)
            return interruption.status(stop)


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in HELP:
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"primer-fast {__version__}")
        return 0
    for words, (module, _) in COMMANDS.items():
        if tuple(argv[: len(words)]) == words:
            return _run(" ".join(words), module, argv[len(words) :])
    return _unknown(argv)


def _run(name: str, module: str, argv: list[str]) -> int:
    """Run the command of that name, or print its help; -> exit status."""
    try:
        if HELP.intersection(argv) and (status := _helped(module, argv)) is not None:
            return status
        command = _found(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("primer_fast"):
            raise
        print(f"primer-fast needs the package {error.name}: pip install 'primer-fast[cli]'", file=sys.stderr)
        return 2
    try:
        return command.main(argv)
    except errors.EXPECTED as error:
        return errors.report_end(name, error, hint=getattr(command, "WHEN_INTERRUPTED", ""))


def _found(name: str) -> Any:
    """The module of that name in this package, or the object in it that follows a colon."""
    module, _, part = name.partition(":")
    found = importlib.import_module(f"primer_fast.cli.{module}")
    return getattr(found, part) if part else found


def _helped(module: str, argv: list[str]) -> int | None:
    """Print the help of a command without importing the command; None where the call does not ask for help."""
    options = _found(f"options.{module}")
    with terminal.first_of_machine():
        try:
            options.parse(argv)
        except terminal.OutputClosed:
            raise
        except SystemExit as stop:  # tyro has printed it
            return stop.code if isinstance(stop.code, int) else 2
        except (ValueError, OSError):  # the command itself says what is wrong
            pass
    return None


def _unknown(argv: list[str]) -> int:
    """Say that there is no such command, and list those that there are; -> exit status."""
    if argv[0] in {words[0] for words in COMMANDS}:
        if argv[1:2] and argv[1] in HELP:
            print(usage(argv[0]))
            return 0
        wrong = f"unknown command {' '.join(argv[:2])!r}" if argv[1:] else f"say what to {argv[0]}"
        names, listed = [" ".join(words) for words in COMMANDS if words[0] == argv[0]], usage(argv[0])
    else:
        wrong, listed = f"unknown command {' '.join(argv[:2])!r}", usage()
        names = [" ".join(words) for words in COMMANDS] + ["--help", "--version"]
    meant = _meant(argv, names) if wrong.startswith("unknown") else ""
    print(f"primer-fast: {wrong}{meant}\n\n{listed}", file=sys.stderr)
    return 2


def _meant(argv: list[str], names: list[str]) -> str:
    """The question whether the nearest of ``names`` was meant; empty where none is near the first words of the call."""
    near: dict[str, float] = {}
    for name in names:
        right, called, last = f"{argv[0]} ", " ".join(argv[: name.count(" ") + 1]).lower(), name.rpartition(" ")[2]
        shared = len(right) if name.startswith(right) else 0  # a right first word does not make the second nearer
        likeness = difflib.SequenceMatcher(None, called[shared:], name[shared:]).ratio()
        if likeness >= 0.65 or argv[0].lower() == last:  # `gpt` means `train gpt`
            near[name] = likeness
    return f"; did you mean {max(near, key=lambda name: near[name])!r}?" if near else ""
