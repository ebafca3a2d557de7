"""Differentiable functions with torch.nn.functional's names, one file per kernel file."""

import torch.fx

from primer_fast.functional.conv2d import conv2d as conv2d
from primer_fast.functional.embedding import embedding as embedding
from primer_fast.functional.layer_norm import layer_norm as layer_norm
from primer_fast.functional.linear import linear as linear
from primer_fast.functional.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from primer_fast.functional.linear_log_prob import linear_log_prob as linear_log_prob
from primer_fast.functional.max_pool2d import max_pool2d as max_pool2d
from primer_fast.functional.mlp import mlp as mlp
from primer_fast.functional.scaled_dot_product_attention import (
    fast_attention_backward as fast_attention_backward,
)
from primer_fast.functional.scaled_dot_product_attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)

for _name in (
    "conv2d", "embedding", "layer_norm", "linear", "linear_cross_entropy", "linear_log_prob", "max_pool2d", "mlp",
    "scaled_dot_product_attention",
):  # fmt: skip
    torch.fx.wrap(_name)  # a call is one node of the graph that torch.fx.symbolic_trace makes
