"""What `primer-fast` says before any command runs: the help of each, the version, what a mistyped word may mean."""

import subprocess
import sys

import pytest

import primer_fast
from primer_fast import cli
from primer_fast.bench import results
from primer_fast.cli.options import report, tune
from primer_fast.cli.options.train import cnn as train_cnn
from primer_fast.cli.options.train import vit as train_vit
from primer_fast.kernels import tunable
from primer_fast.models.cnn import CNNConfig
from primer_fast.models.vit import ViTConfig
from primer_fast.tuning import job

HELP = """
import sys
from primer_fast.cli import COMMANDS, main
for words in COMMANDS:
    assert main([*words, "--help"]) == main([*words, "-h"]) == 0, words
    found = {"torch", "triton", "numpy", "rich", "matplotlib"} & sys.modules.keys()
    assert not found, (words, found)
"""


def test_the_help_of_every_command_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in cli.COMMANDS:
        assert done.stdout.count(f"usage: primer-fast {' '.join(words)} [-h]") == 2, words
    assert done.stderr == ""


def test_defaults_that_options_repeat_are_those_of_what_they_configure():
    """They stand twice so that the help need not import these."""
    for options, config in ((train_cnn.Options, CNNConfig), (train_vit.Options, ViTConfig)):
        shared = options.__dataclass_fields__.keys() & config.__dataclass_fields__.keys()
        assert len(shared) >= 5
        for name in shared:
            assert options.__dataclass_fields__[name].default == config.__dataclass_fields__[name].default, name
    assert tune.Options().out == tunable.TUNED and tune.Options().jobs == job.JOBS
    assert report.Options().results == results.FOLDER


def test_only_the_first_process_of_a_machine_prints_the_help(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["train", "mlp", "--help"]) == 0
    assert capsys.readouterr().out == ""


def test_help_as_the_value_of_another_option_is_not_asked_for(capsys):
    assert cli.main(["sample", "no such folder", "--prompt=--help"]) == 2
    assert "no such folder: no such folder" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == cli.main(["-V"]) == 0
    assert capsys.readouterr().out == f"primer-fast {primer_fast.__version__}\n" * 2


@pytest.mark.parametrize("group", ["train", "show"])
def test_a_first_word_lists_what_may_follow(group, capsys):
    names = [" ".join(words) for words in cli.COMMANDS]
    for call, status in (([group, "--help"], 0), ([group, "-h"], 0), ([group], 2)):
        assert cli.main(call) == status
        said = capsys.readouterr()
        listed = said.out if status == 0 else said.err
        assert [name for name in names if f"\n  {name} " in listed] == [n for n in names if n.startswith(group)]
        assert "did you mean" not in listed
    assert f"say what to {group}" in listed


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        ("verfy", "verify"),
        ("trian gpt --data x", "train gpt"),
        ("train gtp", "train gpt"),
        ("show atention", "show attention"),
        ("gpt --data x", "train gpt"),
        ("Sample x", "sample"),
        ("--verison", "--version"),
        ("train-gpt", "train gpt"),
        ("train_gpt", "train gpt"),
        ("quantise", None),
        ("train llama", None),
    ],
)
def test_a_mistyped_command_is_answered_with_the_nearest(call, meant, capsys):
    assert cli.main(call.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"primer-fast: unknown command {' '.join(call.split()[:2])!r}")
    assert ("did you mean" in said) == (meant is not None)
    assert meant is None or f"; did you mean {meant!r}?\n" in said


def test_a_mistyped_option_is_answered_with_the_nearest(capsys):
    assert cli.main(["train", "mlp", "--data", "soccer", "--batchsize", "3"]) == 2
    assert "Perhaps you meant" in (said := capsys.readouterr().err) and "--batch-size" in said


@pytest.mark.parametrize("words", cli.COMMANDS, ids=" ".join)
def test_an_unknown_option_is_named(words, capsys):
    needed = ["run"] if words == ("sample",) else []
    assert cli.main([*words, *needed, "--no-such-option", "9"]) == 2
    said = capsys.readouterr()
    assert "--no-such-option" in said.err + said.out


@pytest.mark.parametrize("name", ["attention", "convolution"])
def test_a_picture_that_cannot_be_written_is_named(name, plain_path, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["show", name, "--out", str(tmp_path / "file" / "a.png")]) == 2
    assert f"primer-fast show {name}: " in capsys.readouterr().err


REFUSED = {  # a call that trains nothing -> what is said of it
    "verify conv9d": "op must be one of",
    "verify linear --dtype int8": "dtype must be one of float32, float16, bfloat16; got int8",
    "verify linear --case two": "case must be one of",
    "verify linear --json no/such/rows.json": "json must be a file in a folder that exists; got no/such/rows.json",
    "kernels linaer": "op must be one of",
    "kernels --target sm_70": "target must be one of gfx942, sm_100, sm_80, sm_90; got sm_70",
    "kernels --dtype float64": "dtype must be one of bfloat16, float16, float32; got float64",
    "kernels --case square": "square_4096",
    "kernels --jobs 0": "jobs must be at least 1; got 0",
    "kernels --json no/such/k.json": "json must be a file in a folder that exists; got no/such/k.json",
    "kernels --json .": "json must be a file in a folder that exists; got .",
    "tune fft --dry-run --target sm_90": "op must be one of conv2d",
    "tune --dtype float8 --dry-run --target sm_90": "dtype must be one of bfloat16",
    "tune --dry-run --target sm_70": "target must be one of sm_80",
    "tune --target sm_90": "must come with --dry-run",
    "tune --minutes -1": "minutes must be at least 0",
    "tune --jobs 0": "jobs must be at least 1",
    "report --results nowhere": "nowhere",
    "report --out .": "primer-fast report: ",
}


@pytest.mark.parametrize("call", REFUSED)
def test_a_wrong_call_ends_with_one_line(call, refused):
    assert REFUSED[call] in refused(call)
