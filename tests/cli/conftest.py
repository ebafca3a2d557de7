import json
import signal
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from primer_fast.cli import main
from primer_fast.cli.run_folder import RunFolder


@pytest.fixture
def digits_folder(tmp_path):
    """Four IDX files: 60 images of 6 x 6 pixels to train on and 30 to test, whose class is a bright row or column."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "digits"
    folder.mkdir()
    for part, count in (("train", 60), ("t10k", 30)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = rng.integers(0, 60, (count, 6, 6), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            (image if label < 5 else image.T)[label % 5] = 250
        for kind, array in (("images", images), ("labels", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-idx{array.ndim}-ubyte").write_bytes(header + array.tobytes())
    return folder


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A folder with data of every kind, and with ``base``, a small transformer; made once for a file of tests."""
    from cli import soak

    folder = tmp_path_factory.mktemp("base")
    with soak.base_in(folder):
        return folder


@pytest.fixture
def refused(capsys):
    """``refused(call)``: the one line that a call ends with, which is wrong; -> the line."""

    def refused(call, status=2):
        assert main(call.split() if isinstance(call, str) else call) == status
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "Traceback" not in message, message
        return message

    return refused


def metrics(folder, times=False):
    """The rows of a run, without what depends on the machine's speed unless ``times`` says so."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows if times else [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture
def stop_and_resume(tmp_path, monkeypatch, capsys):
    """Train whole, and into tmp_path/run with a signal after a step; then resume, which must give the same.

    -> what the stopped run printed, its white space made single
    """

    def call(main, argv, step, by=signal.SIGTERM, between=lambda run: None):
        run, whole = tmp_path / "run", tmp_path / "whole"
        assert main([*argv, "--out", str(whole)]) == 0
        log = RunFolder.log

        def log_and_stop(self, row):
            log(self, row)
            if row["step"] == step:
                signal.raise_signal(by)

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "log", log_and_stop)
            assert main([*argv, "--out", str(run)]) == 128 + by
        printed = " ".join(capsys.readouterr().out.split())
        assert f"stopped at step {step} of" in printed and "go on with: primer-fast train" in printed
        between(run)
        assert main(["--out", str(run), "--resume"]) == 0
        assert metrics(run) == metrics(whole)
        for file in ("checkpoint.safetensors", "model.safetensors"):
            ours, theirs = (safetensors.torch.load_file(folder / file) for folder in (run, whole))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
        return printed

    return call
