"""Run by test_devices.py in a process that compiles: prints as JSON which GPU each launcher chose settings for.

A driver stands in for two kinds of GPU. The current one is number 0; tensors without memory say that they are on 1.
"""

import contextlib
import json

import torch
import triton
from triton.runtime.jit import JITFunction

from primer_fast.kernels.attention_backward import attention_backward
from primer_fast.kernels.attention_decode import attention_decode
from primer_fast.kernels.attention_forward import attention_forward
from primer_fast.kernels.attention_mask import Band
from primer_fast.kernels.attention_onepass import attention_bwd_onepass, chosen, supported
from primer_fast.kernels.attention_tile import Scoring
from primer_fast.kernels.conv2d import Geometry, conv2d_bwd, conv2d_bwd_input, conv2d_bwd_weight, conv2d_fwd
from primer_fast.kernels.device import forget_chip
from primer_fast.kernels.embedding import embedding_bwd, embedding_bwd_axis, embedding_fwd
from primer_fast.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from primer_fast.kernels.linear import linear_bwd, linear_fwd
from primer_fast.kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from primer_fast.kernels.max_pool2d import max_pool2d_bwd, max_pool2d_fwd
from primer_fast.proof.targets import TARGETS, StandInDriver


class TwoGPUs(StandInDriver):
    """An A100, current at first, and an H100; remembers whose properties were asked for."""

    def __init__(self):
        self.utils, self.current, self.asked = self, 0, []

    @property
    def target(self):
        return TARGETS["sm_90" if self.current else "sm_80"]

    def get_current_device(self):
        return self.current

    def set_current_device(self, device):
        self.current = device

    def get_device_properties(self, device):
        self.asked.append(device)
        return StandInDriver(TARGETS["sm_90" if device else "sm_80"]).get_device_properties(device)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


driver, launched = TwoGPUs(), []


@contextlib.contextmanager
def device_of(x):
    before, driver.current = driver.current, x.get_device()
    yield
    driver.current = before


triton.runtime.driver.set_active(driver)
torch.Tensor.is_cuda, torch.Tensor.get_device = True, lambda x: 1
torch.cuda.current_device = driver.get_current_device
torch.cuda.device_of = device_of
JITFunction.run = lambda self, *args, **options: launched.append(driver.current)

images, filters, each = empty(8, 64, 32, 32), empty(64, 64, 3, 3), empty(64, 1, 3, 3)
same, apart = (Geometry((1, 1), (1, 1), (1, 1), groups, (32, 32)) for groups in (1, 64))
heads, lse, ids = empty(2, 4, 512, 64), empty(2, 4, 512, dtype=torch.float32), empty(64, 64, dtype=torch.int64)
rows, square, vector = empty(4096, 1024), empty(1024, 1024), empty(1024)
numbers, pair = empty(4096, dtype=torch.float32), empty(2, 4096, dtype=torch.float32)
classes, pooled = empty(4096, dtype=torch.int64), empty(8, 64, 16, 16, dtype=torch.int8)
ALL = (True, True, True)

CALLS = {
    "attention_forward": lambda: attention_forward(heads, heads, heads, Band(), Scoring(0.1), "highest", True),
    "attention_backward": lambda: attention_backward(
        heads, heads, heads, heads, heads, lse, Band(), Scoring(0.1), "highest"
    ),
    "attention_decode": lambda: attention_decode(
        heads[:, :, :1],
        heads,
        heads,
        scale=0.1,
        causal=False,
        causal_offset=None,
        window=None,
        softcap=None,
        key_lengths=None,
        mask=None,
        precision="highest",
    ),
    "attention_onepass": lambda: (
        supported(heads, heads, heads),
        chosen(heads, heads, True),
        attention_bwd_onepass(heads, heads, heads, heads, heads, lse, scale=0.1, causal=True),
    ),
    "conv2d_gather": lambda: conv2d_fwd(images, filters, None, same, None, False, "highest", True),
    "conv2d_transposed": lambda: conv2d_bwd_input(images, images, filters, same, "highest"),
    "conv2d_weight": lambda: conv2d_bwd_weight(images, images, filters, same, "highest"),
    "conv2d_bwd": lambda: conv2d_bwd(images, images, images, filters, same, "gelu", ALL, "highest"),
    "conv2d_few": lambda: conv2d_fwd(images[:, :3], filters[:, :3], None, same, None, False, "highest", True),
    "conv2d_depthwise": lambda: conv2d_fwd(images, each, None, apart, None, False, "highest", True),
    "conv2d_depthwise_weight": lambda: conv2d_bwd(images, None, images, each, apart, None, ALL, "highest"),
    "embedding_fwd": lambda: embedding_fwd(ids, square, None, None, 64),
    "embedding_bwd": lambda: embedding_bwd(empty(64, 64, 128), ids, 1024, torch.bfloat16),
    "embedding_bwd_axis": lambda: embedding_bwd_axis(empty(64, 64, 128), 64, torch.bfloat16),
    "layer_norm_fwd": lambda: layer_norm_fwd(rows, None, vector, vector, 1024, 1e-5),
    "layer_norm_bwd": lambda: layer_norm_bwd(
        rows, None, rows, numbers, numbers, vector, 1024, dtype=torch.bfloat16, dweight=torch.bfloat16
    ),
    "linear_fwd": lambda: linear_fwd(rows, square, None, "gelu", True, "highest"),
    "linear_bwd": lambda: linear_bwd(rows, rows, rows, square, "gelu", ALL, "highest"),
    "max_pool2d_fwd": lambda: max_pool2d_fwd(images, (2, 2), (2, 2), (0, 0), (1, 1), (16, 16), True, False),
    "max_pool2d_bwd": lambda: max_pool2d_bwd(images[:, :, ::2, ::2], pooled, (2, 2), (2, 2), (0, 0), (1, 1), (32, 32)),
    "logits_fwd": lambda: linear_cross_entropy_fwd(rows, square, None, classes, -100, 0.0, "highest"),
    "logits_bwd": lambda: linear_cross_entropy_bwd(numbers, rows, square, vector, classes, pair, 0.0, ALL, "highest"),
}

seen = {}
for name, call in CALLS.items():
    forget_chip()
    driver.asked.clear()
    launched.clear()
    call()
    assert driver.current == 0
    seen[name] = {"asked": sorted(set(driver.asked)), "launched": sorted(set(launched))}
print(json.dumps(seen))
