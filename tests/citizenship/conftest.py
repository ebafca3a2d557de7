import pytest


@pytest.fixture(params=["kernels", "plain"])
def place(request, device):
    """Where an op is called: on the GPU or in the interpreter, and on a CPU through PyTorch's operators."""
    if request.param == "plain":
        request.getfixturevalue("plain_path")
        return "cpu"
    return device
