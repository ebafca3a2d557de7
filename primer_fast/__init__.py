"""Hand-written Triton kernels, the modules and models built on them, and how to train those."""

from importlib.util import find_spec

if find_spec("primer_fast.kernels") is None:
    raise ImportError("primer_fast.kernels is missing: run `pip install -e .` in the repository root")

__version__ = "0.1.0"
