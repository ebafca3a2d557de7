"""Other projects' and the vendor's own implementations of our ops, by op: what the table puts beside ours and eager.

A peer is called like the op. It raises NotAvailable (or ModuleNotFoundError) where it cannot run or does not apply; the
harness reports that, and compares everything else with eager before it times it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as torch_F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from primer_fast.bench.report import FAILED, NOT_AVAILABLE, OURS, ProgramRow
from primer_fast.bench.units import check_device, first_line, one_line
from primer_fast.functional.activation import apply_plain
from primer_fast.functional.linear_log_prob import linear_log_prob_plain
from primer_fast.functional.scaled_dot_product_attention import scaled_dot_product_attention_plain

FLASH, EFFICIENT, CUDNN, MATH = "flash", "efficient", "cuDNN", "math"  # of torch; on CUDA flash is FlashAttention 2
LIGER, CCE, CHUNKED = "liger", "cut-cross-entropy", "torch, chunked"
CUBLAS_EPILOGUE, CUDNN_RELU, CUDNN_SEARCHED = "cuBLAS, fused epilogue", "cuDNN, fused ReLU", "cuDNN, searched"
MOST_SCORES = 8 << 30  # bytes of attention's scores that "math" may hold


class NotAvailable(Exception):
    """A provider that cannot run here or does not compute this; the message says why."""


def failure(error: Exception, device: str = "cpu") -> tuple[str, str]:
    """Status and reason of a provider that raised.

    Raises:
        DeviceLost: the GPU takes no more work.
    """
    if device == "cuda":
        check_device(one_line(error))
    if isinstance(error, NotAvailable):
        return NOT_AVAILABLE, first_line(error)
    if isinstance(error, ModuleNotFoundError):
        return NOT_AVAILABLE, f"not installed: {first_line(error)}"
    return FAILED, one_line(error)


@contextlib.contextmanager
def noted(row: ProgramRow, device: str) -> Iterator[None]:
    """What is raised inside is noted in the row of the provider that raised it; ours raises on."""
    try:
        yield
    except Exception as error:
        row.status, row.reason = failure(error, device)
        if row.provider == OURS:
            raise


def on_cuda(tensor: Tensor, who: str) -> None:
    if not tensor.is_cuda:
        raise NotAvailable(f"{who} needs a CUDA tensor")


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def cublas_epilogue(input, weight, bias=None, *, activation=None):
    """cublasLt adds the bias and applies ReLU or the tanh approximation of GELU on the way out; forward alone."""
    on_cuda(input, "cuBLAS")
    if activation not in ("relu", "gelu_tanh") or bias is None or input.dim() != 2:
        raise NotAvailable("cublasLt's epilogues are a bias with relu or gelu_tanh, of two axes")
    if _differentiated(input, weight, bias):
        raise NotAvailable("torch._addmm_activation has no derivative")
    return torch._addmm_activation(bias, input, weight.t(), use_gelu=activation == "gelu_tanh")


def cudnn_relu(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation=None):
    """cuDNN's convolution with bias and ReLU in one call; forward alone."""
    on_cuda(input, "cuDNN")
    if activation != "relu" or isinstance(padding, str):
        raise NotAvailable("cuDNN's fused convolution is that with ReLU, with numbers for padding")
    if _differentiated(input, weight, bias):
        raise NotAvailable("torch.cudnn_convolution_relu has no derivative")
    pairs = [[n, n] if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
    return torch.cudnn_convolution_relu(input, weight, bias, *pairs, groups)


def cudnn_searched(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation=None):
    """cuDNN's fastest algorithm for this shape, found at the first call, and the activation after it."""
    on_cuda(input, "cuDNN")
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
        return apply_plain(torch_F.conv2d(input, weight, bias, stride, padding, dilation, groups), activation)


def sdpa(backend: SDPBackend) -> Callable:
    """torch's attention on one backend alone."""

    def attend(query, key, value, **options):
        if backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            on_cuda(query, f"the backend {backend.name}")
        if backend is SDPBackend.MATH:
            scores = math.prod(query.shape[:-1]) * key.shape[-2] * query.element_size()
            if scores > MOST_SCORES:
                raise NotAvailable(f"its scores alone would take {scores / 2**30:.0f} GiB")
        with sdpa_kernel(backend):
            return scaled_dot_product_attention_plain(query, key, value, **options)

    return attend


def liger_layer_norm(input, normalized_shape, weight, bias, eps=1e-5, *, residual=None, return_residual=False):
    """Liger's layer norm, which adds no residual: torch does before it."""
    on_cuda(input, "Liger")
    from liger_kernel.ops import LigerLayerNormFunction  # the implementation that it prefers on this GPU

    total = input if residual is None else input + residual
    y = LigerLayerNormFunction.apply(total, weight, bias, eps)
    return (y, total) if return_residual else y


def liger_embedding(input, weight, padding_idx=None, *, position=None, position_ids=None):
    """Liger's gather and atomic scatter; torch adds the positions."""
    on_cuda(input, "Liger")
    from liger_kernel.ops import LigerEmbeddingFunction

    if padding_idx is not None or position_ids is not None:
        raise NotAvailable("Liger's embedding has neither padding_idx nor positions by index")
    y = LigerEmbeddingFunction.apply(weight, input)
    return y if position is None else y + position[: input.shape[-1]]


def torch_chunked_cross_entropy(input, linear_weight, target):
    """PyTorch's own answer to the memory of logits."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise NotAvailable(f"torch {torch.__version__} has no linear_cross_entropy in chunks")
    options = torch.nn.LinearCrossEntropyOptions()
    return torch_F.linear_cross_entropy(input, linear_weight, target, options=options)


def liger_cross_entropy(input, linear_weight, target):
    on_cuda(input, "Liger")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(input, linear_weight, target).to(input.dtype)


def cut_cross_entropy(input, linear_weight, target):
    on_cuda(input, "cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy as cce

    return cce(input, linear_weight, target).to(input.dtype)


def torch_chunked_log_prob(input, linear_weight, target, **options):
    """What RLHF trainers do: 1024 rows at a time, their logits made again in the backward."""
    parts = [
        checkpoint(linear_log_prob_plain, x, linear_weight, t, use_reentrant=False, **options)
        for x, t in zip(input.split(1024), target.split(1024), strict=True)
    ]
    if options.get("return_entropy"):
        return tuple(map(torch.cat, zip(*parts, strict=True)))
    return torch.cat(parts)


def cut_log_prob(input, linear_weight, target, *, temperature=1.0, return_entropy=False):
    """The loss of each row, negated; the temperature divides the rows before."""
    on_cuda(input, "cut-cross-entropy")
    if return_entropy:
        raise NotAvailable("cut-cross-entropy has no entropy")
    from cut_cross_entropy import linear_cross_entropy as cce

    rows = input if temperature == 1 else input / temperature
    return -cce(rows, linear_weight, target, reduction="none").float()


PEERS: dict[str, dict[str, Callable]] = {
    "linear": {CUBLAS_EPILOGUE: cublas_epilogue},
    "conv2d": {CUDNN_SEARCHED: cudnn_searched, CUDNN_RELU: cudnn_relu},
    "scaled_dot_product_attention": {
        FLASH: sdpa(SDPBackend.FLASH_ATTENTION),
        CUDNN: sdpa(SDPBackend.CUDNN_ATTENTION),
        EFFICIENT: sdpa(SDPBackend.EFFICIENT_ATTENTION),
        MATH: sdpa(SDPBackend.MATH),
    },
    "layer_norm": {LIGER: liger_layer_norm},
    "embedding": {LIGER: liger_embedding},
    "linear_cross_entropy": {CHUNKED: torch_chunked_cross_entropy, LIGER: liger_cross_entropy, CCE: cut_cross_entropy},
    "linear_log_prob": {CHUNKED: torch_chunked_log_prob, CCE: cut_log_prob},
}
