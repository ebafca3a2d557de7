"""The interpreter's memory after mend(): accesses stay inside the arguments, atomics add bfloat16."""

import pytest
import torch
import triton
import triton.language as tl

from primer_fast import backend

pytestmark = pytest.mark.skipif(not backend.interpreting, reason="kernels run on the GPU here, not in the interpreter")


def random_bf16(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@triton.jit
def _atomic_kernel(out_ptr, x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.atomic_add(out_ptr + offs // 2, tl.load(x_ptr + offs), mask=offs < N - 2)


def test_atomic_add_with_shared_addresses():
    N = 256
    x = random_bf16(12, N)
    out = torch.ones(N // 2, dtype=torch.bfloat16)
    _atomic_kernel[(1,)](out, x, N)
    want = (1 + x[::2]) + x[1::2]
    want[-1] = 1
    assert torch.equal(out, want)


@triton.jit
def _descriptor_add_kernel(out_ptr, x_ptr, R, N: tl.constexpr):
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    out = tl.make_tensor_descriptor(out_ptr, shape=[R, N], strides=[N, 1], block_shape=[N, N])
    out.atomic_add([0, 0], tl.load(x_ptr + square))


def test_descriptor_atomic_add_stays_inside():
    x = random_bf16(13, 16, 16)
    out = torch.ones(16, 16, dtype=torch.bfloat16)
    _descriptor_add_kernel[(1,)](out, x, 10, 16)
    assert torch.equal(out[:10], 1 + x[:10])
    assert (out[10:] == 1).all()


@triton.jit
def _copy_kernel(out_ptr, x_ptr, n, MASKED: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0) if MASKED else tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x, mask=offs < n)


def test_reads_and_writes_stay_in_the_arguments():
    storage = torch.arange(32.0)
    x, out = storage[3:13], torch.zeros(10)
    _copy_kernel[(1,)](out, x, 10, True, 16)
    assert torch.equal(out, x)
    error = triton.runtime.errors.InterpreterError
    with pytest.raises(error, match=r"load: 6 of 16 addresses .* by 4 bytes from x_ptr"):
        _copy_kernel[(1,)](out, x, 10, False, 16)
    with pytest.raises(error, match=r"store: 1 of 11 .* by 4 bytes from out_ptr"):
        _copy_kernel[(1,)](out, storage, 11, True, 16)
