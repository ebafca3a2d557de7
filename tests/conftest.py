"""Without a GPU the kernels run in Triton's interpreter, on CPU tensors."""

import importlib.util
import os
import signal
import sys
import tempfile

import pytest

from primer_fast.cli import threads  # noqa: F401

# isort: split

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers take over the environment of the process that starts them
        compiled_kernels = tempfile.TemporaryDirectory(prefix="primer_fast_kernels_")  # removed when this process ends
        os.environ["TRITON_CACHE_DIR"] = compiled_kernels.name  # for all processes of one run of tests that compile
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch's deterministic mode asks of cuBLAS

from primer_fast.kernels.launch import prepared

sys.modules.setdefault("kernels", None)  # transformers looks for PyPI's package of that name; our folder is not it

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited from a shell's background; Ctrl-C is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)


OPTIONAL = {  # packages that a test may need, by the names they are imported by; all but the tests' own
    "tyro", "rich", "matplotlib", "safetensors", "tokenizers", "transformers", "mlxtend", "vaderSentiment", "trl",
    "datasets", "expecttest", "liger_kernel", "cut_cross_entropy",
}  # fmt: skip


def missing_package(error):
    """The optional package whose absence raised this error, or None."""
    while error is not None:
        name = (getattr(error, "name", None) or "").split(".")[0]
        if isinstance(error, ModuleNotFoundError) and name in OPTIONAL and importlib.util.find_spec(name) is None:
            return name
        error = error.__cause__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file of tests that imports an optional package is skipped, with the package's name, where it is missing."""
    report = yield
    return skipped_where_missing(report, report.call.excinfo, collector.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that imports one is skipped likewise."""
    report = yield
    return skipped_where_missing(report, call.excinfo, item.path)


def skipped_where_missing(report, excinfo, path):
    if report.failed and excinfo is not None and (name := missing_package(excinfo.value)):
        report.outcome, report.longrepr = "skipped", (str(path), 0, f"Skipped: {name} is not installed")
    return report


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that an element which no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def no_plans():
    """Each test's calls are prepared anew: it may look at launchers, or put others in their place."""
    prepared.forget()


@pytest.fixture
def device():
    torch.manual_seed(0)
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def plain_path(monkeypatch):
    """CPU tensors take plain PyTorch, as they do outside the tests; the interpreter would take minutes to train.

    One thread: models this small gain nothing from more, and lose much where another process has the cores.
    """
    monkeypatch.setattr("primer_fast.backend.interpreting", False)
    monkeypatch.setattr("primer_fast.backend.stand_in", None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
