import json
import os

import pytest
import safetensors.torch
import torch

from primer_fast.cli.run import sharded_checkpoint
from primer_fast.cli.run.folder import RunFolder, read_safetensors


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run", "train mlp")
    folder.begin({"lr": 0.1}, overwrite=False)
    return folder


def test_an_earlier_run_is_only_overwritten_on_request(run):
    run.log({"step": 1})
    (run.path / "curves.png").write_bytes(b"old")
    (run.path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"run: holds an unfinished run; --resume goes on with it, --overwrite starts"):
        run.begin({"lr": 0.2}, overwrite=False)
    run.save_weights({"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds a finished run"):
        run.begin({"lr": 0.2}, overwrite=False)
    assert run.read_options() == {"lr": 0.1}
    run.begin({"lr": 0.2}, overwrite=True)
    assert run.read_options() == {"lr": 0.2}
    assert sorted(file.name for file in run.path.iterdir()) == ["config.json", "notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"not the folder of a run \(it has no config.json\); choose another --out"):
        RunFolder(tmp_path, "train mlp").begin({}, overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file, not a folder"):
        RunFolder(tmp_path / "thesis.tex", "train mlp").begin({}, overwrite=overwrite)


DAMAGED = [
    b"", b"{", b"\xff\0", b"[" * 100_000, b"[]", b'{"command": "train mlp"}', b'{"command": "train mlp", "options": 3}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:50]))
def test_a_damaged_config_is_named(run, content):
    run.config.write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json: not the configuration of a run, or damaged"):
        run.read_options()


def test_metrics_are_cut_at_a_step_and_at_a_torn_line(run):
    for step in (5, 10, 15):
        run.log({"step": step, "train/loss": 1 / step, "train/grad_norm": float("inf")})
    with run.metrics.open("a") as file:
        file.write('{"step": 20, "train/lo')
    assert [row["step"] for row in run.rows()] == [5, 10, 15]
    assert run.rows()[0] == {"step": 5, "train/loss": 0.2, "train/grad_norm": None}
    run.cut_metrics(10)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [5, 10]
    run.log({"step": 11})
    assert [row["step"] for row in run.rows()] == [5, 10, 11]


@pytest.mark.parametrize(
    "damage",
    [lambda d: b"", lambda d: d[:5], lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: os.urandom(500),
     lambda d: b"\x80\x02}q\x00."],
    ids=["empty", "header cut", "a byte less", "half", "random", "pickle"],
)  # fmt: skip
def test_a_file_that_is_not_safetensors_is_named(tmp_path, damage):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(safetensors.torch.save({"w": torch.randn(64)})))
    with pytest.raises(ValueError, match=r"checkpoint.safetensors: not a safetensors file, or a truncated or damaged"):
        read_safetensors(path)
    with pytest.raises(ValueError, match="none: no such file"):
        read_safetensors(tmp_path / "none")


def test_what_is_no_checkpoint_stays_where_it_is(run):
    for name in ("checkpoint-8", "checkpoint-12", "checkpoint-mine", "checkpoint-1_000", "checkpoint-"):
        (run.path / name).mkdir()
    assert sharded_checkpoint.newest(run.path) == run.path / "checkpoint-12"
    sharded_checkpoint.remove(run.path, but=run.path / "checkpoint-12")
    run.begin({}, overwrite=True)
    assert sorted(file.name for file in run.path.iterdir()) == [
        "checkpoint-", "checkpoint-1_000", "checkpoint-mine", "config.json"
    ]  # fmt: skip
    assert sharded_checkpoint.newest(run.path) is None
