"""The same math in NumPy float64, with no blocks and no masks: the oracle of tests, verification and benchmarks."""

from primer_fast.lazy import lazy

__all__ = [
    "activation",
    "case",
    "conv2d",
    "embedding",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_log_prob",
    "max_pool2d",
    "mlp",
    "ops",
    "scaled_dot_product_attention",
]
__getattr__, __dir__ = lazy(__name__, {})
