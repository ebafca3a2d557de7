"""Every op that there is a reference of, by name: whoever goes through all ops goes through these."""

__all__ = ["OPS"]

from primer_fast.reference import (
    conv2d,
    embedding,
    layer_norm,
    linear,
    linear_cross_entropy,
    linear_log_prob,
    max_pool2d,
    mlp,
    scaled_dot_product_attention,
)
from primer_fast.reference.case import Reference

OPS: dict[str, Reference] = {
    module.REFERENCE.name: module.REFERENCE
    for module in (
        conv2d, embedding, layer_norm, linear, linear_cross_entropy, linear_log_prob, max_pool2d, mlp,
        scaled_dot_product_attention,
    )
}  # fmt: skip
