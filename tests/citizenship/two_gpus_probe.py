"""Run by test_devices.py in a process that compiles: prints as JSON which GPU each kernel was set up and launched for.

A driver stands in for two kinds of GPU. The current one is number 0; tensors without memory say that they are on 1.
Every case of every op is called, forward and backward, and attention's backward in one pass besides.
"""

import contextlib
import json
import sys

import torch
import triton
from triton.runtime.jit import JITFunction

sys.path.insert(0, "tests")

from citizenship.meta_probe import both_ways

from primer_fast import functional as F
from primer_fast.kernels.device import forget_chip
from primer_fast.proof.offline import offline
from primer_fast.proof.targets import TARGETS, StandInDriver
from primer_fast.reference.ops import OPS


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


driver, launched = TwoGPUs(), []


@contextlib.contextmanager
def device_of(x):
    before, driver.current = driver.current, x.get_device()
    yield
    driver.current = before


def one_pass():
    q, k, v = (torch.empty(2, 4, 512, 64, dtype=torch.bfloat16, device="meta").requires_grad_() for _ in range(3))
    with F.fast_attention_backward():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), torch.empty_like(y))


calls = [lambda op=op, case=case: both_ways(op, case) for op in OPS for case in OPS[op].cases]
seen = {}
with offline("sm_90"):
    triton.runtime.driver.set_active(driver)
    torch.Tensor.is_cuda, torch.Tensor.get_device = True, lambda x: 1
    torch.cuda.current_device, torch.cuda.device_of = driver.get_current_device, device_of
    JITFunction.run = lambda self, *args, **options: launched.append((self.__name__, driver.current))
    for call in (*calls, one_pass):
        forget_chip()
        driver.asked.clear()
        launched.clear()
        call()
        assert driver.current == 0
        for kernel, device in launched:
            seen.setdefault(kernel, set()).update((device, *driver.asked))
print(json.dumps({kernel: sorted(devices) for kernel, devices in seen.items()}))
