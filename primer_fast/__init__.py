"""Hand-written Triton kernels, the modules and models built on them, and how to train those.

functional: the ops, beside all else of torch.nn.functional.
nn: the modules, beside all else of torch.nn.
models, train, data: models, the procedures that train them, what they are trained on.
replace_modules, restore_modules: our modules in the place of torch's in a model that exists, and back.
sdpa, register_attention: our attention for code that calls torch's or transformers'.
reference: the ops in NumPy, in float64.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from primer_fast.lazy import lazy

__all__ = [
    "data",
    "functional",
    "models",
    "nn",
    "reference",
    "register_attention",
    "replace_modules",
    "restore_modules",
    "sdpa",
    "train",
]
__version__ = "0.1.0"

if find_spec("primer_fast.kernels") is None:
    raise ImportError("primer_fast.kernels is missing: run `pip install -e .` in the repository root")

if TYPE_CHECKING:
    from primer_fast import data, functional, models, nn, reference, train
    from primer_fast.adopt.attention import register_attention, sdpa
    from primer_fast.adopt.replace import replace_modules, restore_modules
else:  # torch and Triton are imported with the first use
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "adopt.attention": ["register_attention", "sdpa"],
            "adopt.replace": ["replace_modules", "restore_modules"],
        },
        unlisted=["bench", "cli", "kernels", "proof", "tuning"],
    )
