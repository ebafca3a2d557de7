"""What the interpreter computes after mend() is what compiled kernels compute, bfloat16 bit for bit."""

import dataclasses
import math
import operator

import pytest
import torch
import triton
import triton.language as tl

from primer_fast import backend
from primer_fast.interpreter import mend

pytestmark = pytest.mark.skipif(not backend.interpreting, reason="kernels run on the GPU here, not in the interpreter")
N = 256
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 2**-133, -(2**-130), 3.3895e38, 2**-126]


def bits(t):
    """Bit patterns, with one NaN for all."""
    return torch.where(t.isnan(), torch.tensor(float("nan"), dtype=t.dtype), t).view(torch.int16)


def assert_same_bits(got, want):
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(bits(got), bits(want)), f"{(bits(got) != bits(want)).sum()} of {got.numel()} values differ"


def random_bf16(seed, *shape):
    return torch.randn(*shape or (N,), generator=torch.Generator().manual_seed(seed)).bfloat16()


def operands():
    """Every special value against every other, then random ones."""
    special = torch.tensor(SPECIAL, dtype=torch.bfloat16)
    left, right = special.repeat_interleave(len(special)), special.repeat(len(special))
    rest = 2 * N - len(left)
    return torch.cat([left, random_bf16(1, rest)]), torch.cat([right, 50 * random_bf16(2, rest)])


@triton.jit
def _operate(x, y, OP: tl.constexpr):
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "lt":
        z = x < y
    elif OP == "ge":
        z = x >= y
    elif OP == "eq":
        z = x == y
    elif OP == "ne":
        z = x != y
    return z


@triton.jit
def _binary_kernel(out_ptr, x_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, _operate(tl.load(x_ptr + offs), tl.load(y_ptr + offs), OP))


@pytest.mark.parametrize("op", ["add", "sub", "mul", "lt", "ge", "eq", "ne"])
def test_arithmetic_rounds_once_and_compares_are_of_values(op):
    x, y = operands()
    want = getattr(operator, op)(x, y)
    out = torch.empty_like(want)
    _binary_kernel[(1,)](out, x, y, op, 2 * N)
    if want.dtype == torch.bool:
        assert torch.equal(out, want)
    else:
        assert_same_bits(out, want)


@triton.jit
def _unary_kernel(out_ptr, x_ptr, OP: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    if OP == "neg":
        y = -x
    elif OP == "scale":
        y = x * 0.3
    elif OP == "full":
        y = x + tl.full((N,), 1.7, tl.bfloat16)
    elif OP == "where":
        y = tl.where(x > 0.5, x, 0.1)
    elif OP == "exp":
        y = tl.exp(x.to(tl.float32)).to(tl.bfloat16)
    elif OP == "store":
        y = x.to(tl.float32) / 3
    elif OP == "sum2d":
        y = tl.sum(tl.reshape(x, (2, N // 2)), axis=0, keep_dims=True).broadcast_to((2, N // 2)).reshape((N,))
    tl.store(out_ptr + offs, y)


@pytest.mark.parametrize(
    ("op", "torch_op"),
    [
        ("neg", lambda x: 0 - x),  # Triton before 3.8 has no other negation: -0 stays +0
        ("scale", lambda x: x * torch.tensor(0.3, dtype=torch.bfloat16)),
        ("full", lambda x: x + torch.tensor(1.7, dtype=torch.bfloat16)),
        ("where", lambda x: torch.where(x > 0.5, x, torch.tensor(0.1, dtype=torch.bfloat16))),
        ("exp", lambda x: x.float().exp().bfloat16()),
        ("store", lambda x: (x.float() / 3).bfloat16()),
        ("sum2d", lambda x: (x[: N // 2] + x[N // 2 :]).repeat(2)),
    ],
)
def test_unary(op, torch_op):
    x = random_bf16(3)
    out = torch.empty_like(x)
    _unary_kernel[(1,)](out, x, op, N)
    assert_same_bits(out, torch_op(x))


@triton.jit
def _cast_kernel(out_ptr, x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


def float32_values():
    """Ties to both sides, a last bit above and below them, subnormals, overflow to infinity, NaN, then random."""
    bits = [
        upper << 16 | lower for upper in (0x3F80, 0x3F81, 0x0001, 0x8001, 0x7F7F) for lower in (0x7FFF, 0x8000, 0x8001)
    ]
    bits += [0x7F800000, 0xFF800000 - 2**32, 0x7FC00000, 0x7F800001, 0x0000FFFF, 0x007FFFFF, -(2**31)]
    bits = [b - 2**32 if b >= 2**31 else b for b in bits]
    made = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return torch.cat([made, torch.randn(1024 - len(bits), generator=torch.Generator().manual_seed(4))])


def test_cast_from_float32_rounds_to_nearest_even():
    x = float32_values()
    out = torch.empty(1024, dtype=torch.bfloat16)
    _cast_kernel[(1,)](out, x, 1024)
    assert_same_bits(out, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.float32], ids=str)
def test_casts_between_types(dtype):
    x = (1000 * torch.randn(N, generator=torch.Generator().manual_seed(5))).to(dtype)
    narrow, back = torch.empty(N, dtype=torch.bfloat16), torch.empty(N, dtype=dtype)
    _cast_kernel[(1,)](narrow, x, N)
    assert_same_bits(narrow, x.bfloat16())
    _cast_kernel[(1,)](back, narrow, N)
    assert torch.equal(back, narrow.to(dtype))


@triton.jit
def _fma_kernel(out_ptr, x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.fma(tl.load(x_ptr + offs), tl.load(y_ptr + offs), tl.load(z_ptr + offs)))


def test_fma_rounds_once():
    # x * y = 1.5 + 1.5 * 2**-7 lies halfway between two bfloat16; float32 would lose z = -2**-40, float64 -2**-80.
    x = torch.tensor([1 + 2**-7] * 3 + [2.0, float("inf")], dtype=torch.bfloat16)
    y = torch.tensor([1.5] * 3 + [3.0, 1.0], dtype=torch.bfloat16)
    z = torch.tensor([0.0, -(2**-40), -(2**-80), 0.5, 1.0], dtype=torch.bfloat16)
    want = torch.tensor([1.5 + 2**-6, 1.5 + 2**-7, 1.5 + 2**-7, 6.5, float("inf")], dtype=torch.bfloat16)
    pad = lambda t: torch.cat([t, torch.zeros(3, dtype=torch.bfloat16)])  # noqa: E731
    out = torch.empty(8, dtype=torch.bfloat16)
    _fma_kernel[(1,)](out, pad(x), pad(y), pad(z), 8)
    assert_same_bits(out, pad(want))


@triton.jit
def _dot_kernel(out_ptr, a_ptr, b_ptr, PRECISION: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    square = offs[:, None] * N + offs[None, :]
    acc = tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square), input_precision=PRECISION)
    tl.store(out_ptr + square, acc)


def test_dot_is_the_float32_product():
    a, b = random_bf16(6, 64, 64), random_bf16(7, 64, 64)
    out = torch.empty(64, 64)
    _dot_kernel[(1,)](out, a, b, None, 64)
    want = a.double() @ b.double()
    assert (out - want).abs().max() < 1e-5 * want.abs().max()


def test_dot_of_float32_is_tf32_unless_told_otherwise():
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (8, 9))
    cut = lambda t: (t.view(torch.int32) & ~0x1FFF).view(torch.float32)  # noqa: E731
    for precision, want in [(None, cut(a) @ cut(b)), ("tf32", cut(a) @ cut(b)), ("tf32x3", a @ b), ("ieee", a @ b)]:
        out = torch.empty(64, 64)
        _dot_kernel[(1,)](out, a, b, precision, 64)
        torch.testing.assert_close(out, want, rtol=0, atol=2e-5, msg=f"input_precision={precision}")


@triton.jit
def _reduce_kernel(out_ptr, x_ptr, OP: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    if OP == "sum":
        y = tl.sum(x, axis=0)
    elif OP == "sum of all":
        y = tl.sum(tl.reshape(x, (4, N // 4)))
    elif OP == "max":
        y = tl.reduce(x, 0, tl.standard._elementwise_max)
    elif OP == "min":
        y = tl.reduce(x, 0, tl.standard._elementwise_min)
    tl.store(out_ptr, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["sum", "sum of all"])
def test_sum_rounds_at_every_addition(op, dtype):
    """So that a kernel which forgets to sum in float32 shows the error that it has on a GPU."""
    x = torch.rand(N, generator=torch.Generator().manual_seed(4)).to(dtype)
    tree = x
    while len(tree) > 1:
        tree = tree[: len(tree) // 2] + tree[len(tree) // 2 :]
    out = torch.empty(1, dtype=dtype)
    _reduce_kernel[(1,)](out, x, op, N)
    assert out.item() == tree.item() != x.sum().item()


@pytest.mark.parametrize("op", ["max", "min"])
def test_extremes_of_negative_values(op):
    x = -random_bf16(11).abs()
    out = torch.empty(1, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](out, x, op, N)
    assert_same_bits(out, (x.min() if op == "min" else x.max()).reshape(1))


@triton.jit
def _nan_kernel(out_ptr, x_ptr):
    x = tl.load(x_ptr + tl.arange(0, 4))
    offs = tl.arange(0, 4)
    tl.store(out_ptr + offs, tl.maximum(x, 0.0))
    tl.store(out_ptr + 4 + offs, tl.minimum(x, 0.0))
    tl.store(out_ptr + 8 + offs, tl.clamp(x, -1.0, 1.0))
    tl.store(out_ptr + 12 + offs, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


def test_maximum_drops_nan_unless_told_otherwise():
    out = torch.empty(16)
    _nan_kernel[(1,)](out, torch.tensor([float("nan"), 2.0, -3.0, 0.5]))
    assert out[:12].tolist() == [0, 2, 0, 0.5, 0, 0, -3, 0, -1, 1, -1, 0.5]
    assert out[12].isnan() and out[13:].tolist() == [2, 0, 0.5]


@triton.jit
def _assert_kernel(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.device_assert(tl.load(x_ptr + offs) > 0, "x must be positive")


def test_device_assert_fires():
    _assert_kernel[(1,)](torch.ones(8), 8)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="x must be positive"):
        _assert_kernel[(1,)](torch.tensor([1.0] * 7 + [0.0]), 8)


@triton.jit
def _offset_kernel(out_ptr, x, y, OP: tl.constexpr):
    tl.store(out_ptr, _operate(x, y, OP))


@pytest.mark.parametrize(
    ("op", "largest", "beyond"),
    [
        ("mul", (2**10, 2**20), (2**11, 2**20)),
        ("add", (2**31 - 2, 1), (2**31 - 1, 1)),
        ("sub", (-(2**31) + 2, 2), (-(2**31) + 2, 3)),
    ],
)
def test_int32_overflow_is_an_error(op, largest, beyond):
    out = torch.empty(1, dtype=torch.int32)
    _offset_kernel[(1,)](out, *largest, op)
    assert out.item() == getattr(operator, op)(*largest)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="overflow"):
        _offset_kernel[(1,)](out, *beyond, op)


@triton.jit
def _random_kernel(out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.rand(2**40 + 7, offs))


def test_random_numbers_may_wrap_around():
    out = torch.empty(N)
    _random_kernel[(1,)](out, N)
    assert out.min() >= 0 and out.max() < 1 and 0.4 < out.mean() < 0.6


@triton.jit
def _count_kernel(out_ptr, bound_ptr, part, N: tl.constexpr):
    offs = tl.arange(0, N)
    count = tl.zeros((N,), tl.int32)
    for i in range(tl.load(bound_ptr)):
        count += i
    tl.store(out_ptr + offs, count, mask=(offs < N // 2) & (part == 0))


def test_loops_have_bounds_from_memory_and_masks_may_have_a_number_in_them():
    """Triton 3.6 with NumPy 2.5, and Triton 3.9, refused one of the two."""
    out = torch.full((8,), -1, dtype=torch.int32)
    _count_kernel[(1,)](out, torch.tensor([4], dtype=torch.int32), 0, 8)
    assert out.tolist() == [6] * 4 + [-1] * 4


@triton.jit
def _number_kernel(out_ptr, x_ptr, NUMBER: tl.constexpr, OP: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, _operate(NUMBER, x, OP) if FIRST else _operate(x, NUMBER, OP))


@pytest.mark.parametrize("first", [True, False])
def test_equal_numbers_of_other_types_are_told_apart(first):
    """What a number became beside a tensor is remembered; 1 == 1.0 == True, and 0.1 is another in float16."""

    def result(op, x, number):
        out = torch.empty(len(x), dtype=torch.float64)
        _number_kernel[(1,)](out, x, number, op, first, len(x))
        return out.tolist()

    tiny = torch.tensor([1.0, -2.0])
    odd = torch.tensor([2**24 + 1, 3], dtype=torch.int32)  # float32 rounds the first to 2**24
    for _ in range(2):
        assert all(map(math.isnan, result("add", tiny, math.nan)))
        assert result("add", odd, 1) == result("add", odd, True) == [2**24 + 2, 4]
        assert result("add", odd, 1.0) == [2**24, 4]
        for x in (tiny, tiny.half()):
            assert result("add", x, 0.1) == (x + 0.1).tolist()
        assert result("sub", tiny, 2) == ([1, 4] if first else [-1, -4])
        with pytest.raises(triton.runtime.errors.InterpreterError, match="300 is out of range for type int8"):
            result("add", odd.to(torch.int8), 300)


@triton.jit
def _shapes_kernel(out_ptr, x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    """One result an operation that takes [M, 1] and [1, N], and what is done with such results."""
    rows, cols = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + rows), tl.load(y_ptr + cols)
    at = out_ptr + rows * N + cols
    tl.store(at, x - y)
    tl.store(at + M * N, tl.where(x > y, x, y))
    tl.store(at + 2 * M * N, tl.where((rows < 2) & (cols > 1), 1.5, x))
    tl.store(at + 3 * M * N, tl.sum(x * y, axis=1)[:, None])
    tl.store(at + 4 * M * N, x, mask=cols < N - 1)
    tl.store(at + 5 * M * N, tl.load(x_ptr + rows + cols * 0, mask=cols < 3, other=-1.0))
    tl.store(at + 6 * M * N, tl.maximum(x, y).to(tl.int32) + rows.to(tl.int64))


def test_operands_of_two_shapes_meet_in_a_third():
    M, N = 4, 8
    x, y = torch.randn(M, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, N)
    rows, cols, left = torch.arange(M)[:, None], torch.arange(N)[None, :], x[:, None].expand(M, N)
    want = [
        left - y, torch.maximum(left, y), torch.where((rows < 2) & (cols > 1), torch.tensor(1.5), left),
        (left * y).sum(1, keepdim=True).expand(M, N), torch.where(cols < N - 1, left, torch.tensor(7.0)),
        torch.where(cols < 3, left, torch.tensor(-1.0)), torch.maximum(left, y).int() + rows,
    ]  # fmt: skip
    for _ in range(2):
        out = torch.full((len(want), M, N), 7.0)
        _shapes_kernel[(1,)](out, x, y, M, N)
        torch.testing.assert_close(out, torch.stack([w.float() for w in want]))


@pytest.mark.parametrize("lost", ["InterpreterBuilder.create_fma", "_get_np_dtype"])
def test_mend_refuses_an_interpreter_it_does_not_know(lost, monkeypatch):
    from triton.runtime import interpreter

    mend()  # already done when primer_fast.backend was imported: changes nothing
    monkeypatch.setattr(interpreter.InterpreterBuilder, "mended_by_primer_fast", False)
    monkeypatch.delattr(f"triton.runtime.interpreter.{lost}")
    with pytest.raises(RuntimeError, match=rf"Triton {triton.__version__} has no {lost}"):
        mend()


def test_mend_refuses_an_interpreter_without_debug(monkeypatch):
    from triton.runtime import interpreter

    @dataclasses.dataclass(frozen=True)
    class Options:
        arch: str = ""

    before = dict(vars(interpreter.InterpreterBuilder), mended_by_primer_fast=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", Options())
    monkeypatch.setattr(interpreter.InterpreterBuilder, "mended_by_primer_fast", False)
    with pytest.raises(RuntimeError, match="has no option `debug`"):
        mend()
    assert dict(vars(interpreter.InterpreterBuilder)) == before


# Memory: accesses stay inside the arguments, atomics add bfloat16


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
