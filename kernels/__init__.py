"""Triton kernels and their launchers; installed as ``primer_fast.kernels``."""

if __name__ != "primer_fast.kernels":
    raise ImportError(
        "this folder is the source of `primer_fast.kernels`, not the `kernels` package of PyPI; "
        "run `pip install -e .` in the repository root and import `primer_fast.kernels`"
    )
