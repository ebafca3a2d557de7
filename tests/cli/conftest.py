import struct

import numpy as np
import pytest

from primer_fast.cli import main


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
