"""Run by test_offline.py in a process that compiles: prints as JSON what offline() did with small kernels."""

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from primer_fast import backend
from primer_fast.proof import resources
from primer_fast.proof.offline import offline
from primer_fast.proof.targets import TARGETS


@triton.jit
def _copy_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit
def _centre_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x - tl.sum(x, axis=0) / BLOCK)


@triton.jit
def _product_kernel(out_ptr, a_ptr, b_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs_k[None, :])
        b = tl.load(b_ptr + offs[:, None] * K + k + offs_k[None, :])
        acc = tl.dot(a, b.T, acc)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def _fused_kernel(out_ptr, a_ptr, saved_ptr, b_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same with (a * saved) in place of a: an operand that is computed, so that it comes from registers."""
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs_k[None, :])
        a *= tl.load(saved_ptr + offs[:, None] * K + k + offs_k[None, :])
        b = tl.load(b_ptr + offs[:, None] * K + k + offs_k[None, :])
        acc = tl.dot(a, b.T, acc)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def _refused_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 4096, "BLOCK is too small")
    tl.store(x_ptr, 0.0)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def copy(target, x, n=4096):
    with offline(target) as launches:
        _copy_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]), 2)](empty(4096), x, n, BLOCK=1024, num_warps=4)
    (launch,) = launches
    return {
        "grid": launch.grid,
        "programs": launch.programs,
        "constexprs": launch.constexprs,
        "options": launch.options,
        **asdict(launch.resources()),
    }


def centre(target, warps):
    """A row that stays in registers; one warp of an AMD GPU holds twice as many values as one of NVIDIA's."""
    size, dtype = (32768, torch.float32) if target == "gfx942" else (16384, torch.bfloat16)
    with offline(target) as launches:
        _centre_kernel[(1,)](empty(size, dtype=dtype), empty(size, dtype=dtype), size, num_warps=warps)
    return asdict(launches[0].resources()) | {"spills": launches[0].resources().spills}


def product(target, dtype, BLOCK, BLOCK_K, num_stages, keep_going=True):
    with offline(target, keep_going=keep_going) as launches:
        x = empty(BLOCK, 4096, dtype=dtype)
        _product_kernel[(1,)](
            empty(BLOCK, BLOCK, dtype=torch.float32), x, x, 4096, BLOCK, BLOCK_K, num_warps=8, num_stages=num_stages
        )
    (launch,) = launches
    return asdict(launch.resources()) | {"error": launch.error}


def waiting(fused):
    """A product of 128 x 128 in steps of 64, plain or fused, and what ptxas says of it."""
    with offline("sm_90") as launches:
        x, out = empty(128, 4096), empty(128, 128, dtype=torch.float32)
        options = {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
        if fused:
            _fused_kernel[(1,)](out, x, x, x, 4096, **options)
        else:
            _product_kernel[(1,)](out, x, x, 4096, **options)
    found = launches[0].resources()
    return asdict(found) | {"serialized": found.serialized}


def waiting_from_cache():
    """The same once more, when this process has forgotten what it read and Triton's cache has the kernel."""
    resources._read.cache_clear()
    resources._warnings.cache_clear()
    return waiting(fused=True)


def raised(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def state():
    return [triton.runtime.driver._active, JITFunction.run, backend.stand_in, dict(_copy_kernel.device_caches)]


def leave_by_an_error():
    with offline("sm_80"):
        _copy_kernel[(4,)](empty(4096), empty(4096), 4096, BLOCK=1024)
        inside = state()
        raise KeyError(all(now is not then for now, then in zip(inside, before, strict=True)))


def refused(keep_going):
    with offline("sm_90", keep_going=keep_going) as launches:
        _refused_kernel[(1,)](empty(16), 1024)
        _copy_kernel[(4,)](empty(4096), empty(4096), 4096, BLOCK=1024)
    return [launch.error for launch in launches]


def what_a_launcher_sees(target):
    with offline(target):
        driver = triton.runtime.driver.active
        target, properties = (
            driver.get_current_target(),
            driver.utils.get_device_properties(driver.get_current_device()),
        )
    return [target.backend, target.arch, properties["multiprocessor_count"], properties["max_shared_mem"]]


before = state()
seen = {
    "aligned": {target: copy(target, empty(4096)) for target in TARGETS},
    "misaligned": {target: copy(target, empty(4097)[1:]) for target in TARGETS},
    "no multiple of 16": copy("sm_90", empty(4096), n=4095),
    "centre": {f"{target} {warps}": centre(target, warps) for target in TARGETS for warps in (1, 16)},
    "product": {target: product(target, torch.bfloat16, 128, 32, 2) for target in TARGETS},
    "plain product": waiting(fused=False),
    "fused product": waiting(fused=True),
    "fused product from Triton's cache": waiting_from_cache(),
    "too much shared memory": product("sm_90", torch.float32, 128, 64, 5),
    "too much, raised": raised(lambda: product("sm_90", torch.float32, 128, 64, 5, keep_going=False)),
    "refused, raised": raised(lambda: refused(keep_going=False)),
    "refused": refused(keep_going=True),
    "unknown target": raised(lambda: offline("sm_70").__enter__()),
    "left by": raised(leave_by_an_error),
    "restored": all(now is then or now == then for now, then in zip(state(), before, strict=True)),
    "driver": {target: what_a_launcher_sees(target) for target in TARGETS},
}
json.dump(seen, sys.stdout)
