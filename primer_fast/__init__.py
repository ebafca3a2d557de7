"""Hand-written Triton kernels, the modules and models built on them, and how to train those."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from primer_fast.attention import register_attention as register_attention
    from primer_fast.attention import sdpa as sdpa
    from primer_fast.replace import replace_modules as replace_modules
    from primer_fast.restore import restore_modules as restore_modules

if find_spec("primer_fast.kernels") is None:
    raise ImportError("primer_fast.kernels is missing: run `pip install -e .` in the repository root")

__version__ = "0.1.0"
_PLACES = {
    "replace_modules": "replace",
    "restore_modules": "restore",
    "sdpa": "attention",
    "register_attention": "attention",
}


def __getattr__(name):  # torch and Triton are imported with the first use
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"primer_fast.{_PLACES[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *_PLACES})
