"""Random calls of every op, compiled ahead of time for sm_90: each launch must compile, fit and neither spill nor wait.

``python -m primer_fast.proof.sweep --seed N --launches N`` draws shapes, dtypes, layouts and options, and compiles what
the launchers launch forward and backward. With ``--op`` only the draws of one op count. A failure comes with the line
that repeats it; the exit status is 1 then.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from primer_fast.kernels.activation import ACTIVATIONS
from primer_fast.proof.production import CaseOnTarget, compiled_launches
from primer_fast.proof.resources import are_serialized, registers_and_spills, warnings_of
from primer_fast.reference.case import Case

TARGET = "sm_90"
PARKED = 16  # bytes per thread that no tile takes: ptxas parks a few addresses around a loop
_DTYPES = ("bfloat16", "bfloat16", "float16", "float32")
_ACTIVATIONS = (None, *ACTIVATIONS)
_Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class SweptLaunch:
    """One launch.

    spill_bytes: per thread. serialized: see ``production.CompiledLaunch``. error: why it cannot be compiled.
    """

    unit: CaseOnTarget
    kernel: str
    settings: dict  # tile sizes, warps and stages
    spill_bytes: int = 0
    error: str | None = None
    serialized: bool = False

    @property
    def failure(self) -> str | None:
        """What is wrong with it, or None."""
        if self.error is not None:
            return self.error
        if self.spill_bytes > PARKED:
            return f"spills {self.spill_bytes} bytes per thread"
        if self.serialized and self.unit.dtype != "float32":  # whose parts are split in registers, and wait in any case
            return "each product waits for the one before it"
        return None


def draw(seed: int, number: int) -> CaseOnTarget:
    """Draw ``number`` of a seed; the ops take turns, attention twice."""
    rng = random.Random(f"{seed} {number}")
    op = _OPS[number % len(_OPS)]
    shapes, options, layouts, dtypes, gradients = _DRAWS[op](rng)
    case = Case(f"{seed}/{number}", "drawn", shapes, options, layouts, False, dtypes, gradients)
    return CaseOnTarget(op, case, rng.choice(_DTYPES), TARGET)


def results(unit: CaseOnTarget) -> Iterator[SweptLaunch]:
    """The launches of one call; an error of the op itself is a result without a kernel."""
    launches, _, error = compiled_launches(unit)
    for launch in launches:
        settings = {k: v for k, v in launch.constexprs.items() if k.startswith(("BLOCK", "SPLITS", "COLUMNS"))}
        settings |= {k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages")}
        if launch.error:
            yield SweptLaunch(unit, launch.kernel, settings, error=launch.error)
        else:
            _, spill_bytes = registers_and_spills(launch.compiled, launch.target)
            waits = are_serialized(warnings_of(launch.compiled, launch.target))
            yield SweptLaunch(unit, launch.kernel, settings, spill_bytes, None, waits)
    if error is not None:
        yield SweptLaunch(unit, "", {}, error=error)


def sweep(seed: int, launches: int, op: str | None = None) -> Iterator[SweptLaunch]:
    """Results of one draw after another, of one op if named, until there are so many launches."""
    number = 0
    while launches > 0:
        unit = draw(seed, number)
        for result in results(unit) if op in (None, unit.op) else ():
            launches -= 1
            yield result
        number += 1


def described(unit: CaseOnTarget) -> str:
    """The call in one line."""
    arrays = (
        f"{name}{list(shape)}{unit.case.dtypes.get(name, '')}{unit.case.layouts.get(name, '')}"
        for name, shape in unit.case.shapes.items()
    )
    options = (f"{name}={value!r}" for name, value in unit.case.options.items())
    return f"{unit.op} {unit.dtype} {' '.join(arrays)} {' '.join(options)}".rstrip()


def _linear(rng):
    M, N, K = (rng.choice((1, 17, 64, 128, 300, 768, 1000, 2048, 4096, 5000)) for _ in range(3))
    shapes = {"input": (M, K), "weight": (N, K)} | ({"bias": (N,)} if rng.random() < 0.7 else {})
    layouts = _some(rng, ("input", "weight"), ("transposed", "offset", "strided"), 0.25)
    return shapes, {"activation": rng.choice(_ACTIVATIONS)}, layouts, {}, rng.random() < 0.8


def _mlp(rng):
    rows, *sizes = (rng.choice((1, 17, 64, 300, 768, 1000, 2048, 3072)) for _ in range(rng.choice((3, 4))))
    shapes: _Shapes = {"input": (rows, sizes[0])}
    shapes |= {f"weights.{i}": size for i, size in enumerate(zip(sizes[1:], sizes, strict=False))}
    if rng.random() < 0.7:
        shapes |= {f"biases.{i}": (n,) for i, n in enumerate(sizes[1:])}
    options = {"activation": rng.choice(_ACTIVATIONS), "output_activation": rng.choice((None, *_ACTIVATIONS))}
    return shapes, options, {}, {}, rng.random() < 0.8


def _conv2d(rng):
    kind = rng.choice(("plain", "plain", "plain", "groups", "depthwise"))
    kernel, stride, dilation = rng.choice((1, 3, 5, 7)), rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2))
    size = rng.choice((14, 28, 31, 56))
    C = rng.choice((32, 64, 96, 128, 256) if kind != "plain" else (1, 3, 8, 32, 48, 64, 128, 256))
    groups = {"plain": 1, "groups": 4, "depthwise": C}[kind]
    O = C if kind == "depthwise" else rng.choice((8, 32, 64, 96, 256, 512))
    shapes: _Shapes = {"input": (rng.choice((1, 3, 32)), C, size, rng.choice((size, size + 3)))}
    shapes |= {"weight": (O, C // groups, kernel, kernel)} | ({"bias": (O,)} if rng.random() < 0.7 else {})
    options = {"stride": stride, "padding": rng.choice((0, kernel // 2)), "dilation": dilation, "groups": groups}
    layout = rng.choice(("channels_last", "channels_last", None))
    layouts = {} if layout is None else dict.fromkeys(("input", "weight"), layout)
    activation = rng.choice(_ACTIVATIONS)
    return shapes, {**options, "activation": activation}, layouts, {}, rng.random() < 0.8


def _attention(rng):
    D = rng.choice((16, 32, 40, 64, 64, 72, 80, 96, 112, 128, 128, 160, 192, 224, 256))
    DV = rng.choice((D, D, D, 64, 128))
    B, H, HK = 2, 8, rng.choice((8, 8, 2, 1))
    decodes = rng.random() < 0.2
    T = 1 if decodes else rng.choice((128, 257, 1024))
    S = rng.choice((1024, 4097)) if decodes else rng.choice((T, T + 64, 1000))
    shapes: _Shapes = {"query": (B, H, T, D), "key": (B, HK, S, D), "value": (B, HK, S, DV)}
    options, dtypes = {"is_causal": not decodes and rng.random() < 0.5, "enable_gqa": True}, {}
    for name, value in (("softcap", 30.0), ("window", 100), ("dropout_p", 0.1)):
        if rng.random() < (0.1 if decodes else 0.2):
            options[name] = value
    if rng.random() < 0.25:
        shapes["attn_mask"] = rng.choice(((B, 1, T, S), (T, S), (B, 1, 1, S), (B, H, T, S)))
        if rng.random() < 0.5:
            dtypes["attn_mask"] = "bool"
    if rng.random() < 0.25:
        shapes["key_lengths"], dtypes["key_lengths"] = (B,), "int64"
    layouts = dict.fromkeys(("query", "key", "value"), "heads_last") if rng.random() < 0.3 else {}
    return shapes, options, layouts, dtypes, not decodes and rng.random() < 0.8


def _max_pool2d(rng):
    kernel, size = rng.choice((2, 3, 5)), rng.choice((14, 28, 57, 112))
    shapes = {"input": (rng.choice((1, 8, 64)), rng.choice((3, 16, 64, 192)), size, rng.choice((size, size + 2)))}
    options = {
        "kernel_size": kernel, "stride": rng.choice((None, 1, 2)), "padding": rng.choice((0, kernel // 2)),
        "dilation": rng.choice((1, 1, 2)), "ceil_mode": rng.random() < 0.3,
    }  # fmt: skip
    return shapes, options, _some(rng, ("input",), ("channels_last", "strided"), 0.6), {}, True


def _layer_norm(rng):
    rows, columns = rng.choice((1, 64, 1000, 16384)), rng.choice((48, 100, 768, 1024, 4096, 5000, 8192, 32768, 65536))
    shapes: _Shapes = {"input": (rows, columns)}
    names = [name for name in ("weight", "bias") if rng.random() < 0.8]
    shapes |= dict.fromkeys(names, (columns,))
    options = {"normalized_shape": columns}
    if rng.random() < 0.5:
        shapes["residual"] = (rows, columns)
        options["return_residual"] = rng.random() < 0.5
    return shapes, options, _some(rng, ("input",), ("offset", "strided"), 0.25), {}, True


def _embedding(rng):
    B, T = rng.choice((1, 16)), rng.choice((1, 100, 1024))
    V, D = rng.choice((65, 1000, 50257)), rng.choice((14, 64, 768, 1000, 4096))
    shapes, dtypes = {"input": (B, T), "weight": (V, D)}, {"input": rng.choice(("int64", "int32"))}
    if rng.random() < 0.6:
        shapes["position"] = (max(T, 16), D)
        if rng.random() < 0.5:
            shapes["position_ids"], dtypes["position_ids"] = (B, T), dtypes["input"]
    return shapes, {"padding_idx": rng.choice((None, 0))}, _some(rng, ("weight",), ("offset",), 0.2), dtypes, True


def _head(rng) -> tuple[_Shapes, dict, dict]:
    N, D = rng.choice((1, 100, 1024, 8192, 20000)), rng.choice((32, 100, 384, 768, 2048, 4096))
    V = rng.choice((65, 1000, 32128, 50257, 131072))
    shapes: _Shapes = {"input": (N, D), "linear_weight": (V, D), "target": (N,)}
    if rng.random() < 0.4:
        shapes["linear_bias"] = (V,)
    return shapes, _some(rng, ("input", "linear_weight"), ("transposed", "offset"), 0.2), {"target": "int64"}


def _linear_cross_entropy(rng):
    shapes, layouts, dtypes = _head(rng)
    options = {"reduction": rng.choice(("mean", "sum", "none")), "label_smoothing": rng.choice((0.0, 0.0, 0.1))}
    return shapes, {**options, "ignore_index": rng.choice((-100, None))}, layouts, dtypes, rng.random() < 0.8


def _linear_log_prob(rng):
    shapes, layouts, dtypes = _head(rng)
    options = {"temperature": rng.choice((1.0, 0.7)), "return_entropy": rng.random() < 0.5}
    return shapes, options, layouts, dtypes, rng.random() < 0.8


def _some(rng, names, layouts, share) -> dict[str, str]:
    return {name: rng.choice(layouts) for name in names if rng.random() < share}


_DRAWS = {
    "linear": _linear, "conv2d": _conv2d, "scaled_dot_product_attention": _attention, "max_pool2d": _max_pool2d,
    "layer_norm": _layer_norm, "embedding": _embedding, "linear_cross_entropy": _linear_cross_entropy,
    "linear_log_prob": _linear_log_prob, "mlp": _mlp,
}  # fmt: skip
_OPS = (*_DRAWS, "scaled_dot_product_attention")


def main(argv: list[str] | None = None) -> int:
    """The exit status is 1 where a launch failed, waits or spills."""
    parser = argparse.ArgumentParser(prog="python -m primer_fast.proof.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launches", type=int, default=60, help="stop after so many")
    parser.add_argument("--op", choices=list(_DRAWS), help="of this op alone")
    parser.add_argument("--only", type=int, metavar="N", help="compile draw N of the seed alone")
    options = parser.parse_args(argv)
    if options.only is None:
        found = sweep(options.seed, options.launches, options.op)
    else:
        found = results(draw(options.seed, options.only))
    failed = parked = total = 0
    for result in found:
        total += 1
        parked += 0 < result.spill_bytes <= PARKED
        if result.failure is not None:
            failed += 1
            seed, number = result.unit.case.name.split("/")
            print(f"{result.kernel} {result.settings}: {result.failure}\n  {described(result.unit)}")
            print(f"  python -m primer_fast.proof.sweep --seed {seed} --only {number}", flush=True)
    print(f"{total} launches, {failed} failed, {parked} parked an address")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
