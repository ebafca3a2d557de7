"""Everything that tests of the proof compile, in one process: prints as JSON what came of it.

``small``: what offline() did with kernels of this file. ``production``: rows of the production cases, some of them
compiled. ``elsewhere``: a few with other dtypes and targets. ``sweep``, ``decode``: random calls, and decoding steps
that larger tiles would spill.

    python tests/proof/compile_probe.py TABLE [whole]     TABLE: the committed one
"""

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from primer_fast import backend
from primer_fast.proof import resources, sweep
from primer_fast.proof.offline import offline
from primer_fast.proof.production import CaseOnTarget, cases_to_compile, compile_unit
from primer_fast.proof.targets import TARGETS
from primer_fast.reference.case import Case


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
def _product_kernel(
    out_ptr, a_ptr, b_ptr, saved_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, FUSED: tl.constexpr
):
    """FUSED: (a * saved) in place of a, an operand that is computed, so that it comes from registers."""
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs_k[None, :])
        if FUSED:
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


def copy(target, x, n=4096, warps=4):
    with offline(target) as launches:
        _copy_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]), 2)](empty(4096), x, n, BLOCK=1024, num_warps=warps)
    (launch,) = launches
    told = ("grid", "programs", "constexprs", "options", "code")
    return asdict(launch.resources()) | {name: getattr(launch, name) for name in told}


def code_with(factor):
    """The code of a launch whose kernel calls a function of another file that multiplies by ``factor``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scaled.py"
        path.write_text(SCALED.replace("FACTOR", str(factor)))
        spec = importlib.util.spec_from_file_location("scaled", path)
        scaled = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(scaled)
        with offline("sm_90", compiling=lambda launch: False) as launches:
            scaled.kernel[(1,)](empty(16), 16)
    return launches[0].code


SCALED = """import triton
import triton.language as tl

@triton.jit
def scale(x):
    return x * FACTOR

@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(x_ptr + offs, scale(tl.load(x_ptr + offs)))
"""


def centre(target, warps):
    """A row that stays in registers; one warp of an AMD GPU holds twice as many values as one of NVIDIA's."""
    size, dtype = (32768, torch.float32) if target == "gfx942" else (16384, torch.bfloat16)
    with offline(target) as launches:
        _centre_kernel[(1,)](empty(size, dtype=dtype), empty(size, dtype=dtype), size, num_warps=warps)
    return asdict(launches[0].resources()) | {"spills": launches[0].resources().spills}


def launched_product(target, dtype, BLOCK, BLOCK_K, num_stages, fused=False, keep_going=True):
    with offline(target, keep_going=keep_going) as launches:
        x, out = empty(BLOCK, 4096, dtype=dtype), empty(BLOCK, BLOCK, dtype=torch.float32)
        options = {"num_warps": 8, "num_stages": num_stages}
        _product_kernel[(1,)](out, x, x, x, 4096, BLOCK, BLOCK_K, fused, **options)
    return launches[0]


def product(*arguments, **options):
    launch = launched_product(*arguments, **options)
    return asdict(launch.resources()) | {"error": launch.error}


def waiting(fused):
    """A product of 128 x 128 in steps of 64, plain or fused, and what ptxas says of it."""
    found = launched_product("sm_90", torch.bfloat16, 128, 64, 3, fused).resources()
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
        target = driver.get_current_target()
        properties = driver.utils.get_device_properties(driver.get_current_device())
    return [target.backend, target.arch, properties["multiprocessor_count"], properties["max_shared_mem"]]


def small():
    return {
        "aligned": {target: copy(target, empty(4096)) for target in ("sm_90", "sm_100")},
        "misaligned": {target: copy(target, empty(4097)[1:]) for target in ("sm_90", "sm_100")},
        "no multiple of 16": copy("sm_90", empty(4096), n=4095),
        "again": copy("sm_90", empty(4096)),
        "more warps": copy("sm_90", empty(4096), warps=8),
        "codes": [code_with(factor) for factor in (2, 2, 3)],
        "centre": {f"{target} {warps}": centre(target, warps) for target in ("sm_90", "gfx942") for warps in (1, 16)},
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


def marks(launch):
    """What decides which code a kernel has, but for sizes: which of its flags are set; an activation is one of them."""
    flags = {(name, bool(value)) for name, value in launch.constexprs.items() if type(value) is not int}
    return {(launch.kernel, flag) for flag in (None, *flags)}


def production(table, whole):
    """Rows of every production case in bfloat16 on sm_90.

    Compiled is the first launch of each op; of the others, those whose code the committed table does not have, until
    each mark of a kernel has been. With ``whole``, all of them.
    """
    codes = {row["code"] for row in json.loads(Path(table).read_text())["rows"]}
    known, ops = set(), set()

    def wanted(launch, op):
        new = set() if launch.code in codes else marks(launch) - known
        first = op not in ops
        known.update(new)
        ops.add(op)
        return whole or first or bool(new)

    return [
        row.as_dict()
        for unit in cases_to_compile(dtypes=["bfloat16"])
        for row in compile_unit(unit, lambda launch, op=unit.op: wanted(launch, op))
    ]


def by_command(*arguments):
    """Rows that `primer-fast kernels` writes; its exit status fits them. None where its packages are missing."""
    if not all(importlib.util.find_spec(package) for package in ("tyro", "rich")):
        return []
    from primer_fast.cli import kernels

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "kernels.json"
        status = kernels.main([*arguments, "--json", str(path)])
        rows = json.loads(path.read_text())["rows"]
    assert status == any(row["error"] is not None for row in rows)
    return rows


def elsewhere():
    """A product that is fused both ways, a decoding step's, and pooling, with the other dtypes and targets.

    float16 on the targets whose own unit it shows, float32, which is split into parts, on a GPU of each way to load.
    """
    square = "linear", "max_pool2d", "--case", "square_4096", "stem", "--dtype"
    rows = by_command(*square, "float16", "--target", "sm_80", "sm_100", "gfx942", "--jobs", "1")
    rows += by_command(*square, "float32", "--jobs", "1")
    decode = "linear", "--case", "decode", "--dtype", "float32", "--target", "sm_80"
    return rows + by_command(*decode)  # in a process of its own, as many as there are units


def swept():
    """A call of each op: the printed lines and the exit status."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = sweep.main(["--seed", "4", "--launches", "30"])
    return status, printed.getvalue()


def decoding():
    """Float32 of narrow heads, of part of a tile, of wide ones; masks whose elements have addresses of their own."""
    found = []
    for dtype, D, T, mask in (
        ("float32", 16, 1, False), ("float32", 80, 4, True), ("float32", 192, 1, False), ("float16", 64, 1, True)
    ):  # fmt: skip
        shapes = {"query": (2, 8, T, D), "key": (2, 1, 4097, D), "value": (2, 1, 4097, D)}
        shapes |= {"attn_mask": (2, 1, T, 4097)} if mask else {}
        case = Case("decode", "", shapes, {"is_causal": False, "enable_gqa": True}, {}, False, {}, False)
        unit = CaseOnTarget("scaled_dot_product_attention", case, dtype, "sm_90")
        found += [[r.kernel, r.spill_bytes, r.failure] for r in sweep.results(unit)]
    return found


if __name__ == "__main__":  # processes that compile import this file again
    before = state()
    parts = {"small": small, "sweep": swept, "decode": decoding, "elsewhere": elsewhere}
    seen = {name: part() for name, part in parts.items()}
    seen["production"] = production(sys.argv[1], whole="whole" in sys.argv)
    json.dump(seen, sys.stdout)
