"""A terminal that cannot show every character, and one that is gone, neither end nor damage what a command does."""

import io
import os
import sys

import pytest

from primer_fast import cli
from primer_fast.cli import console, terminal
from primer_fast.cli.run.folder import read_safetensors
from primer_fast.cli.train.gpt_tasks import TextTask

WORDS = "Grüße, naïve café, λ → x ✓ 日本語 "  # none of them but the spaces and some letters are ASCII
GPT = [
    "--steps", "2", "--context", "16", "--width", "16", "--layers", "1", "--heads", "2", "--eval-every", "1",
    "--log-every", "1", "--eval-batches", "1", "--sample-tokens", "60",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(WORDS * 60, encoding="utf-8")
    return tmp_path


@pytest.fixture
def outputs(monkeypatch):
    """``outputs(stream)`` makes it the standard output: in the test itself, as pytest sets its own before each."""
    yield lambda stream, name="stdout": monkeypatch.setattr(sys, name, stream)
    monkeypatch.undo()


def ascii_only():
    """A stream as PYTHONIOENCODING=ascii makes the standard ones."""
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", newline="")


@pytest.fixture
def closed():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        yield stream


@pytest.mark.usefixtures("plain_path")
def test_a_terminal_without_these_characters_shows_others(folder, outputs, monkeypatch):
    shown = ascii_only()
    outputs(shown)
    outputs(ascii_only(), "stderr")
    monkeypatch.setattr(TextTask, "draw", lambda self, out, model, *rest: [])
    assert cli.main(["train", "gpt", "--data", "text.txt", "--out", "run", *GPT]) == 0
    (folder / "run" / "model.safetensors").unlink()
    assert cli.main(["train", "gpt", "--out", "run", "--resume"]) == 0
    assert cli.main(["sample", "run", "--tokens", "40", "--seed", "0", "--prompt", "café"]) == 0
    assert cli.main(["train", "gpt", "--data", "ü.txt", "--out", "other"]) == 2  # there is no such file
    text = shown.buffer.getvalue().decode("ascii")
    assert text.count("it writes\n") == 2 and "caf?" in text
    assert "ü" in (folder / "run" / "tokenizer.json").read_text(encoding="utf-8")
    assert sys.stdout.errors == sys.stderr.errors == "strict", "as it was before"


@pytest.mark.parametrize("call", ["--help", "--version", "train --help"])
def test_what_nobody_reads_ends_quietly(call, closed, outputs, capfd):
    outputs(closed)
    assert cli.main(call.split()) == terminal.CLOSED == 141
    closed.flush()  # as Python does when it shuts down
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("plain_path")
def test_a_run_that_nobody_watches_is_saved_and_ends(folder, closed, outputs, capfd):
    outputs(closed)
    assert cli.main(["train", "mlp", "--data", "soccer", "--out", "run", "--epochs", "100", "--log-every", "5"]) == 141
    assert "step" in read_safetensors(folder / "run" / "checkpoint.safetensors")[1]["progress"]
    assert not (folder / "run" / "model.safetensors").exists() and capfd.readouterr().err == ""


def test_an_error_message_that_nobody_reads_is_no_other_error(folder, closed, outputs):
    outputs(closed, "stderr")
    assert cli.main(["sample", "nothing"]) == 141


def test_work_goes_on_where_a_terminal_was_closed():
    """Its writes fail with EIO, which says nothing of the work."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    for terminal_or_file in (True, False):
        with console.Display(console.Console(file=Gone(), force_terminal=terminal_or_file)) as display:
            display.print("lost")
            display.task("training", total=2)(1, "lost too")
            display.print("lost as well")
        assert not display.closed


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_may_be_missing(name, outputs):
    """As after `>&-`."""
    outputs(None, name)
    assert cli.main(["--version"]) == 0 and cli.main(["verfiy"]) == 2
    assert getattr(sys, name) is None
