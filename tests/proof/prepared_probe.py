"""Run by test_prepared.py in a process that compiles: prints as JSON what plans launch, beside what launchers do.

Each launch is taken where Triton would hand it to CUDA. Addresses are told by what they are of: a tensor that was there
before the call, and how far into it. Of memory that the call takes only that is told which are equal within a launch:
what is freed within a call may be taken again.

Sizes are those of bench/programs/launchers.py, whose test compiles the same kernels.
"""

import contextlib
import copy
import gc
import json
import random
import sys
import threading

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel

from primer_fast import backend
from primer_fast import functional as F
from primer_fast.kernels.launch import prepared
from primer_fast.kernels.launch.entry import ENTRIES
from primer_fast.proof.stubbed import stubbed

LAUNCHES: list[tuple] = []
OLD = hasattr(nvidia, "make_launcher")  # Triton 3.6: arguments one by one
BEFORE = 13 if OLD else 15  # what comes before the kernel's own arguments


DEVICES: list[int] = []  # on which the launches were


def launched(*arguments):
    LAUNCHES.append(arguments)
    DEVICES.append(triton.runtime.driver.active.get_current_device())


def kernel_arguments(launch):
    """What kernels are given, but for the arguments that are constants, which the launcher leaves out."""
    return list(launch[BEFORE:] if OLD else launch[-1])


def named(launch, tensors):
    """A launch in which addresses have names."""
    others: dict[int, str] = {}

    def name(value):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        elif isinstance(value, tuple) and value[:1] == ("descriptor",):
            return ("descriptor", name(value[1]), value[2])
        if type(value) is not int or value < 2**20:
            return repr(value)
        for i, t in enumerate(tensors):
            start = t.data_ptr()
            if start <= value < start + t.untyped_storage().nbytes() - t.storage_offset() * t.element_size():
                return f"tensor {i} + {value - start}"
        return others.setdefault(value, f"other {len(others)}")

    grid, function = launch[:3], launch[4]
    return [grid, function, [name(v) for v in kernel_arguments(launch)]]


def bf16(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype)


def off(t):
    """The same off its 16-byte boundary."""
    return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def linear():
    kind = random.choice(("aligned", "unaligned", "transposed", "float32", "rows"))
    x, w, b = bf16(64, 128), bf16(512, 128), bf16(512)
    if kind == "unaligned":
        x = off(x)
    elif kind == "transposed":
        w = bf16(128, 512).T
    elif kind == "float32":
        x, w, b = x.float(), w.float(), b.float()
    elif kind == "rows":
        x = bf16(2, 16, 128)
    return (x, w, b), lambda x, w, b: F.linear(x, w, b, activation="gelu")


def conv2d():
    last = random.choice((torch.channels_last, torch.contiguous_format))
    image, kernel = (bf16(*shape).contiguous(memory_format=last) for shape in ((2, 64, 14, 14), (64, 64, 3, 3)))
    return (image, kernel, bf16(64)), lambda x, w, b: F.conv2d(x, w, b, padding=1, activation="relu")


def attention():
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    causal, heads, mask = random.choice(((True, 2, None), (False, 4, None), (False, 2, mask)))
    tensors = bf16(2, heads, 128, 64), bf16(2, 2, 128, 64), bf16(2, 2, 128, 64)
    return tensors, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)


def layer_norm():
    x = random.choice((bf16(64, 128), bf16(64, 256)[:, ::2]))
    return (x, bf16(128), bf16(128)), lambda x, w, b: F.layer_norm(x, (128,), w, b)


def cross_entropy():
    target, reduction = torch.randint(512, (64,)), random.choice(("mean", "none"))
    return (bf16(64, 128), bf16(512, 128)), lambda x, w: F.linear_cross_entropy(x, w, target, reduction=reduction)


OPS = {f.__name__: f for f in (linear, conv2d, attention, layer_norm, cross_entropy)}


def sequence(draw, seed, calls=16):
    """What a sequence of calls launches: a list for each forward and each backward."""
    random.seed(seed)
    torch.manual_seed(seed)
    found = []
    for _ in range(calls):
        tensors, call = draw()
        LAUNCHES.clear()
        y = call(*[t.requires_grad_() for t in tensors])
        found.append([named(launch, tensors) for launch in LAUNCHES])
        dy = torch.ones_like(y)
        LAUNCHES.clear()
        torch.autograd.grad(y, tensors, dy)
        found.append([named(launch, [*tensors, y, dy]) for launch in LAUNCHES])
    return found


def plans():
    return sum(len(function.plans) for function in prepared._functions)


def sequences():
    seen = {}
    for name, draw in OPS.items():
        got, count = sequence(draw, 3), plans()
        with prepared.unprepared():
            prepared.forget()
            seen[name] = {"same": got == sequence(draw, 3), "launches": sum(map(len, got)), "plans": count}
    return seen


def repeated(call, times=4):
    """Launches of the last of so many equal calls."""
    for _ in range(times):
        LAUNCHES.clear()
        call()
    return list(LAUNCHES)


def hooks(x, w):
    """What Triton is given where a hook looks on, before and after."""
    place = 11 if OLD else 9  # of the hook that is called before a launch; what it is called with comes before
    call = lambda: F.linear(x, w)  # noqa: E731
    usual = repeated(call)[0]
    chain, look = knobs.runtime.launch_enter_hook, lambda metadata: None
    chain.add(look)
    watched = repeated(call)[0]
    chain.remove(look)
    after = repeated(call)[0]
    return {
        "usual": usual[place] is None, "after": after[place] is None,
        "hook": watched[place] is chain,
        "metadata": watched[place - 1] is not None,
    }  # fmt: skip


def drivers(x, w):
    """Plans of another driver are forgotten."""
    repeated(lambda: F.linear(x, w))
    before, here = plans(), list(LAUNCHES)
    with stubbed("sm_80", launched):
        other = repeated(lambda: F.linear(x, w), 1)
    repeated(lambda: F.linear(x, w))
    driver = triton.runtime.driver.active
    triton.runtime.driver.set_active(copy.copy(driver))  # by somebody who tells nobody
    F.linear(x, w)
    after = plans()
    triton.runtime.driver.set_active(driver)
    return {"before": before, "another kernel": here[0][4] != other[0][4], "after": after}


class OtherGPU:
    """Tensors are the second GPU's, and the first is the current one."""

    current = entered = 0

    @contextlib.contextmanager
    def device(self, to):
        before, self.current, self.entered = self.current, 1, self.entered + 1
        yield
        self.current = before


def second_gpu(x, w):
    gpus, driver = OtherGPU(), triton.runtime.driver.active
    driver.get_current_device = lambda: gpus.current
    torch.Tensor.is_cuda, torch.Tensor.get_device = True, lambda t: 1
    torch.cuda.current_device = lambda: gpus.current
    torch.cuda.device = torch.cuda.device_of = gpus.device
    DEVICES.clear()
    for _ in range(5):
        F.linear(x, w)
    gpus.entered = 0
    for _ in range(5):
        F.linear(x[:0], w)  # takes memory there, though it launches nothing
    return {"devices": DEVICES, "plans": plans(), "entered": gpus.entered}


def threads(x, w, times=200):
    """Calls from threads while another forgets all plans."""
    failed, done = [], threading.Event()

    def work(rows):
        try:
            for _ in range(times):
                assert F.linear(x[:rows], w).shape == (rows, len(w))
        except Exception as error:
            failed.append(repr(error))

    workers = [threading.Thread(target=work, args=(16 * (i + 1),)) for i in range(4)]

    def forgetful():
        while not done.is_set():
            prepared.forget()

    other = threading.Thread(target=forgetful)
    LAUNCHES.clear()
    for thread in (*workers, other):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    other.join()
    return {"failed": failed, "launches": len(LAUNCHES), "calls": times * len(workers)}


def kept(x, w):
    """Whether a plan keeps its kernel, which may be unloaded once nobody has it."""
    prepared.forget()
    for _ in range(3):
        F.linear(x, w)
    for kernel in ENTRIES:
        kernel.device_caches.clear()
    gc.collect()
    return sum(type(t) is CompiledKernel for t in gc.get_objects()) == 1


def limit(x, w):
    prepared.forget()
    before, prepared.LIMIT = prepared.LIMIT, 2
    for rows in (16, 32, 48, 64) * 3:
        for _ in range(3):
            F.linear(x[:rows], w)
    prepared.LIMIT, most = before, max(len(function.plans) for function in prepared._functions)
    return most


def outside():
    return triton.runtime.driver._active, backend.stand_in, nvidia.__dict__.get("make_launcher")


def main():
    x, w, before = bf16(64, 128), bf16(512, 128), outside()
    with stubbed("sm_90", launched):
        seen = {"sequences": sequences(), "hooks": hooks(x, w), "drivers": drivers(x, w), "limit": limit(x, w)}
        seen["threads"], seen["kept"] = threads(x, w), kept(x, w)
        seen["imported"] = "torch._dynamo" in sys.modules
    with stubbed("sm_90", launched, tensors="meta"):
        meta = [t.to("meta") for t in (x, w)]
        got = [len(repeated(lambda: F.linear(*meta), n)) for n in (1, 3)]
        seen["meta"] = {"launches": got, "plans": plans()}
    with stubbed("sm_90", launched):
        seen["second GPU"] = second_gpu(x, w)
    seen["outside"] = outside() == before
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
