"""What tests of several ops need."""

import pytest
import torch

from primer_fast.functional import logits, weighted_losses


@pytest.fixture
def far_rows():
    """(5, 2**29 + 16) float16: row 4 starts past 2**31 elements, so that row times stride must be formed in 64 bits."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # 5 GiB of NaN take their time
    try:
        return torch.empty(5, 2**29 + 16, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        pytest.skip("needs 5 GiB of memory")


@pytest.fixture(params=["torch", "kernels"])
def either(request, device):
    """The device of PyTorch's operators on a CPU, and that of the kernels."""
    if request.param == "kernels":
        return device
    request.getfixturevalue("plain_path")
    return "cpu"


@pytest.fixture
def take_path(request, monkeypatch):
    """A function of a path's name: the loss heads take that path from then on; it returns the device for tensors.

    "chunks" and "logits in memory" are PyTorch's operators; chunks are of a few rows and classes.
    """

    def take(path):
        if path != "logits in memory":
            monkeypatch.setattr(weighted_losses, "PLAIN_BYTES", 0)
            monkeypatch.setattr(weighted_losses, "CHUNK_BYTES", 2 * 20 * 4)
        if path not in ("chunks", "logits in memory"):
            return request.getfixturevalue("device")
        request.getfixturevalue("plain_path")
        monkeypatch.setattr(logits, "CHUNK_BYTES", 16 * 16 * 4)
        monkeypatch.setattr(logits, "_CHUNK_ROWS", 5)
        monkeypatch.setattr(logits, "PLAIN_BYTES", 0 if path == "chunks" else 2**24)
        return "cpu"

    return take


@pytest.fixture(params=["kernels", "chunks", "logits in memory"])
def place(request, take_path):
    """The device of each path of the loss heads."""
    return take_path(request.param)


@pytest.fixture
def small_chunks(take_path):
    """Loss heads go through PyTorch's operators, on chunks of a few rows and classes."""
    take_path("chunks")
