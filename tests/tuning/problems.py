"""A problem of every choice, and settings that fit it and are not the default."""

from primer_fast.kernels.attention.decode import DecodeProblem, DecodeSettings
from primer_fast.kernels.attention.settings import AttentionProblem, AttentionSettings
from primer_fast.kernels.conv2d.depthwise import DepthwiseProblem, DepthwiseSettings
from primer_fast.kernels.embedding import Runs, RunSettings
from primer_fast.kernels.layer_norm.rows import Rows, RowSettings
from primer_fast.kernels.linear import BackwardProblem
from primer_fast.kernels.matmul import OperandsProblem
from primer_fast.kernels.product import MatmulSettings, Product
from primer_fast.kernels.tile_settings import Grid, GridSettings
from primer_fast.kernels.tunable import Variant

_PRODUCT = Product(4096, 4096, 4096, 2, descriptors=True), MatmulSettings(64, 128, 64, 4, 3)
_ATTENTION = AttentionProblem(64, 4096, 4096, 2, 64, True, 0, causal=True), AttentionSettings(64, 32, 4, 2)
_GRID = Grid(16384, 768, 2), GridSettings(4, 128, 2)
_DEPTHWISE = DepthwiseProblem(12544, 384, 2, True, 9), DepthwiseSettings(16, 32, 2)
PROBLEMS = {
    "matmul": _PRODUCT,
    "conv2d_gather": _PRODUCT,
    "conv2d_weight": _PRODUCT,
    "logits_statistics": _PRODUCT,
    "logits_gradient": _PRODUCT,
    "attention_forward": _ATTENTION,
    "attention_backward_kv": _ATTENTION,
    "attention_backward_q": _ATTENTION,
    "attention_decode": (DecodeProblem(64, 4, 8192, 128, 128, 2, False, False), DecodeSettings(16, 32, 7, 4, 2)),
    "layer_norm_forward": (Rows(16384, 768, 2), RowSettings(2, 1024, 2)),
    "layer_norm_backward": (Rows(16384, 768, 2), RowSettings(1, 1024, 4, 2, 77)),
    "max_pool2d_forward": _GRID,
    "max_pool2d_backward": _GRID,
    "embedding_forward": _GRID,
    "embedding_backward": (Runs(16384, 768, 2), RunSettings(8, 128, 16)),
    "conv2d_depthwise": _DEPTHWISE,
    "conv2d_depthwise_weight": _DEPTHWISE,
    "matmul_operands": (OperandsProblem(4096, 4096, 4096, 2), Variant("pointers")),
    "linear_backward": (BackwardProblem(4096, 4096, 4096, 2), Variant("fused")),
    "attention_backward": (_ATTENTION[0], Variant("deterministic")),
}
