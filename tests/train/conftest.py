import pytest
import torch


@pytest.fixture
def plain_path(monkeypatch):
    """CPU tensors take plain PyTorch, as they do outside the tests; the interpreter would take minutes to train.

    One thread: models this small gain nothing from more, and lose much where another process has the cores.
    """
    monkeypatch.setattr("primer_fast.backend.interpreting", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
