"""Any case natively, at its real size: forward and each gradient, judged on the device that computed them.

The budget is that of numerics.py. The truth is PyTorch's own operators in float64 on exactly the values that the
tensors hold; where a result is too large for that, on parts that do not depend on each other.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from primer_fast import functional
from primer_fast.proof import verify
from primer_fast.proof.inputs import allocate
from primer_fast.proof.numerics import SLACK
from primer_fast.proof.terms import HEADS, magnitudes, row_blocks
from primer_fast.proof.verify import device
from primer_fast.reference.case import Case, arguments
from primer_fast.reference.linear_log_prob import IGNORED, LOGITS
from primer_fast.reference.ops import OPS

ATTENTION = "scaled_dot_product_attention"
_PIECE = 2**25  # elements that are compared at a time: each takes some 40 bytes meanwhile
_RATES = {"float64": 3e13, "float64 conv2d": 2e12, "float32": 4e13, "TF32": 2e14, "16 bit": 4e14}  # assumed, of an H100
_BYTES, _PASSES, _OVERHEAD = 2e12, 10, 0.1  # assumed: bytes a second, how often all is read, seconds of a unit besides
Results = dict[str, Tensor]  # outputs by the reference's names, gradients by those of their arrays
Part = tuple[int, int] | None  # an element of the batch and a key head; None: all of them


@dataclass
class CheckedTensor:
    """One comparison: a tensor of a case with its truth ("values"), or something else that must hold.

    error, budget: the largest absolute difference and what is allowed; None if not finite or not applicable.
    passed: None if nothing could be tried. reason: why it failed or was not tried. truth: dtype of the truth.
    """

    check: str
    op: str
    case: str
    dtype: str
    tensor: str = ""
    error: float | None = None
    budget: float | None = None
    plain_error: float | None = None
    passed: bool | None = False
    reason: str = ""
    seconds: float = 0.0
    truth: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def draw(op: str, case: Case, dtype: torch.dtype, where: str, seed: int = 0) -> dict[str, Tensor]:
    """The arrays of a case, drawn on the device: normal, except those for which its reference has its own values.

    The weight of a production case has the variance that it has when initialised.
    """
    generator = torch.Generator(where).manual_seed(zlib.crc32(case.name.encode()) + seed)
    own, arrays = _own_values(op, case, generator), {}
    for name, shape in case.shapes.items():
        values = own[name] if name in own else torch.randn(shape, generator=generator, device=where)
        if case.production and name.startswith("weight") and op in ("linear", "mlp", "conv2d"):
            values.mul_((shape[0] / math.prod(shape)) ** 0.5)
        layout = case.layouts.get(name)
        kind = getattr(torch, case.dtypes[name]) if name in case.dtypes else dtype
        arrays[name] = allocate(shape, layout, kind, where)
        rows = slice(1 if layout == "expanded" else None)
        (arrays[name][rows] if shape else arrays[name]).copy_(values[rows] if shape else values)
    return arrays


def _own_values(op: str, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """As ``values`` of the op's reference; those of loss heads are too many for NumPy."""
    where = generator.device
    if op not in HEADS:
        rng = np.random.default_rng(generator.initial_seed())
        drawn = OPS[op].values(case, rng)
        return {name: torch.from_numpy(np.array(values)).to(where) for name, values in drawn.items()}
    shapes, (mean, std) = case.shapes, LOGITS.get(case.name, LOGITS["flat"])
    (V, D), rows = shapes["linear_weight"], shapes["target"]
    own = {
        "linear_weight": torch.randn((V, D), generator=generator, device=where).mul_(std / max(D, 1) ** 0.5),
        "target": torch.randint(V, rows, generator=generator, device=where),
    }
    if "linear_bias" in shapes:
        own["linear_bias"] = torch.randn((V,), generator=generator, device=where).add_(mean)
    if "ignore_index" in case.options:
        ignored = IGNORED if case.options["ignore_index"] is None else case.options["ignore_index"]
        drop = torch.rand(rows, generator=generator, device=where) < (1 if case.name == "all_ignored" else 1 / 3)
        own["target"].masked_fill_(drop, ignored)
    return own


def upstream_of(outputs: tuple[Tensor, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """A random gradient for each output, in its layout."""
    if not outputs:
        return ()
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    noise = (torch.randn(y.shape, generator=generator, device=y.device) for y in outputs)
    return tuple(torch.empty_like(y.detach()).copy_(values) for y, values in zip(outputs, noise, strict=True))


def forward(
    op: str, case: Case, arrays: dict[str, Tensor], *, plain: bool = False
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The op, or PyTorch's operators, on these arrays -> outputs, and by name the leaves that they depend on."""
    function = verify.plain(op) if plain else getattr(functional, op)
    names = OPS[op].differentiable(case)
    arrays = {name: t.detach().requires_grad_(name in names) for name, t in arrays.items()}
    outputs = function(**arguments(arrays), **case.options)
    return outputs if isinstance(outputs, tuple) else (outputs,), {name: arrays[name] for name in names}


def backward(
    op: str, outputs: tuple[Tensor, ...], leaves: dict[str, Tensor], upstream: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """What ``forward`` returned -> outputs and gradients by name."""
    results = dict(zip(OPS[op].outputs, (y.detach() for y in outputs), strict=False))
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream) if leaves else ()
    return results | dict(zip(leaves, grads, strict=True))


def run(
    op: str, case: Case, arrays: dict[str, Tensor], upstream: tuple[Tensor, ...] = (), *, plain: bool = False
) -> tuple[Results, tuple[Tensor, ...]]:
    """-> outputs and gradients of the op, or of PyTorch's operators; the gradients upstream, drawn where not given."""
    outputs, leaves = forward(op, case, arrays, plain=plain)
    upstream = upstream or (upstream_of(outputs) if leaves else ())
    return backward(op, outputs, leaves, upstream), upstream


def truth(op: str, case: Case, arrays: dict[str, Tensor], upstream: tuple[Tensor, ...], dtype: torch.dtype) -> Results:
    """The op through PyTorch's operators on the same values in ``dtype``; of a loss head, some rows at a time."""
    exact = {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in arrays.items()}
    upstream = tuple(dy.to(dtype) for dy in upstream)
    if op not in HEADS:
        return run(op, case, exact, upstream, plain=True)[0]
    shapes, target = case.shapes, exact["target"].reshape(-1)
    x, w = exact["input"].reshape(len(target), -1) if len(target) else exact["input"], exact["linear_weight"]
    of_row, reduced = {name: t for name, t in exact.items() if name not in ("input", "target")}, "none"
    options, number = dict(case.options), torch.ones(())
    if op == "linear_cross_entropy":
        reduced, options["reduction"] = options.get("reduction", "mean"), "none"
        ignored = options.get("ignore_index", IGNORED)
        number = (target != (IGNORED if ignored is None else ignored)).sum()
        dy = upstream[0] / number.clamp(min=1) if reduced == "mean" else upstream[0]
        upstream = (dy.expand(shapes["target"]),)
    upstream = tuple(dy.reshape(-1) for dy in upstream)
    each, grads = [], {name: torch.zeros_like(t) for name, t in exact.items() if name in OPS[op].differentiable(case)}
    for rows in row_blocks(len(target), len(w)):
        block = replace(case, options=options)
        some, _ = run(op, block, of_row | {"input": x[rows], "target": target[rows]}, _rows(upstream, rows), plain=True)
        each.append([some.pop(name) for name in OPS[op].outputs if name in some])
        grads["input"].view(len(target), -1)[rows] = some.pop("input")
        for name, grad in some.items():
            grads[name] += grad
    columns = [torch.cat(column) for column in zip(*each, strict=True)]
    columns = columns or [x.new_zeros(0) for _ in upstream]
    results = {name: column.view(shapes["target"]) for name, column in zip(OPS[op].outputs, columns, strict=False)}
    if reduced != "none":
        total = results["output"].sum()
        results["output"] = total / number if reduced == "mean" else total
    return results | grads


def _rows(tensors: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
    return tuple(t[rows] for t in tensors)


def _truth_that_fits(op, case, arrays, upstream) -> tuple[Results, str]:
    with contextlib.suppress(torch.cuda.OutOfMemoryError):  # an error keeps the tensors alive until it is left behind
        return truth(op, case, arrays, upstream, torch.float64), "float64"
    torch.cuda.empty_cache()
    return truth(op, case, arrays, upstream, torch.float32), "float32"


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty returns NaN, so that an element which no kernel wrote shows."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, products and convolutions of float32 have torch's ``precision``; cuDNN takes TF32 if nobody objects."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    tf32 = precision != "highest"
    with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=tf32):
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def parts(op: str, case: Case, every: bool = False) -> list[Part]:
    """What of a case is judged: all at once; of attention the first, the middle and the last group of heads.

    A group is a key head of one element of the batch with its query heads. ``every``: all groups.
    """
    if op != ATTENTION or math.prod(case.shapes["query"][:-2]) == 0:
        return [None]
    batch, heads = case.shapes["key"][:2]
    groups = [(b, h) for b in range(batch) for h in range(heads)]
    return list(groups if every else dict.fromkeys((groups[0], groups[len(groups) // 2], groups[-1])))


def of_part(name: str, t: Tensor, part: Part, group: int) -> Tensor:
    """What of an array or a result of attention belongs to a part; ``group``: query heads of a key head."""
    if part is None:
        return t
    b, h = part
    queries, element = slice(h * group, (h + 1) * group), slice(b, b + 1)
    match name:
        case "query" | "output":
            return t[element, queries]
        case "key" | "value":
            return t[element, h : h + 1]
        case "attn_mask":
            t = t[..., queries, :, :] if t.dim() > 2 and t.shape[-3] > 1 else t
            return t[element] if t.dim() > 3 and len(t) > 1 else t
    return t[element] if t.numel() > 1 else t  # key_lengths, causal_offset


def check(
    op: str,
    case: Case,
    dtype: torch.dtype,
    *,
    label: str = "values",
    within: Callable[[], contextlib.AbstractContextManager] = poisoned_memory,
    every_part: bool = False,
) -> list[CheckedTensor]:
    """Run one case ``within`` a context and judge its outputs and each gradient: a row for each."""
    with float32_products("highest"):
        arrays = draw(op, case, dtype, device())
        with within():
            got, upstream = run(op, case, arrays)
        return judge(op, case, dtype, arrays, upstream, got, label=label, every_part=every_part)


def judge(op, case, dtype, arrays, upstream, got: Results, *, label="values", every_part=False) -> list[CheckedTensor]:
    """A row for each of the results ``got`` of a case on ``arrays`` with gradients ``upstream``."""
    group = case.shapes["query"][1] // max(case.shapes["key"][1], 1) if op == ATTENTION else 1
    figures: dict[str, list[Tensor]] = {name: [] for name in got}  # of each part: errors, size and magnitude
    kinds, judged = set(), parts(op, case, every_part)
    for part in judged:
        some = {name: of_part(name, t, part, group) for name, t in arrays.items()}
        dy = tuple(of_part("output", t, part, group) for t in upstream)
        plain, _ = run(op, case, some, dy, plain=True)
        want, kind = _truth_that_fits(op, case, some, dy)
        kinds.add(kind)
        for name, whole in got.items():
            t = of_part(name, whole, part, group)
            same_form = t.shape == plain[name].shape and t.dtype == plain[name].dtype
            error = worst(t, want[name]) if same_form else want[name].new_tensor(math.inf, dtype=torch.float64)
            figures[name].append(torch.stack([error, worst(plain[name], want[name]), _size(want[name])]))
        del plain, want  # what follows needs the memory
        floats = {name: t.float() if t.is_floating_point() else t for name, t in some.items()}
        with float32_products("high"):
            terms = magnitudes(op, floats, tuple(t.float() for t in dy), case.options)
        for name in got:
            figures[name][-1] = torch.cat([figures[name][-1], terms[name].double()[None]])
    table = torch.stack([torch.stack(of_parts) for of_parts in figures.values()]).tolist()
    whole = torch.stack([t.isfinite().all() for t in got.values()])
    everywhere = [True] * len(got) if len(judged) == len(parts(op, case, every=True)) else whole.tolist()
    rows = []
    for name, of_parts, finite in zip(got, table, everywhere, strict=True):
        verdicts = [_verdict(got[name].dtype, *numbers) for numbers in of_parts]
        found = max(verdicts, key=lambda verdict: (not verdict["passed"], _share(verdict)))
        if not finite:
            found |= {"error": None, "passed": False, "reason": "an element of another part is no number"}
        rows.append(CheckedTensor(label, op, case.name, str(dtype)[6:], name, **found, truth=min(kinds)))
    return rows


def _verdict(dtype: torch.dtype, error: float, plain_error: float, size: float, magnitude: float) -> dict[str, Any]:
    """Columns of a row. Where PyTorch has no number and the truth has one, its error is no measure: 0 is taken."""
    measured = plain_error if math.isfinite(plain_error) else 0.0
    allowed = SLACK * measured + torch.finfo(dtype).eps * size + 2 * torch.finfo(torch.float32).eps * magnitude
    figures = (x if math.isfinite(x) else None for x in (error, allowed, plain_error))  # JSON has no infinity
    columns = dict(zip(("error", "budget", "plain_error"), figures, strict=True))
    reason = "" if math.isfinite(error) else "of another shape or dtype, or no number where there is one"
    return {**columns, "passed": error <= allowed < math.inf, "reason": reason}


def _share(verdict: dict[str, Any]) -> float:
    """Error as a fraction of the budget."""
    error, allowed = verdict["error"], verdict["budget"]
    if error is None:
        return math.inf
    return error / allowed if allowed else math.inf if error else 0.0


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    tensors = tuple(t[None] if t.dim() == 0 else t for t in tensors)
    rows = max(_PIECE // max(tensors[0][:1].numel(), 1), 1)
    return zip(*(t.split(rows) for t in tensors), strict=True)


def seconds(op: str, case: Case, dtype: torch.dtype) -> float:
    """About how long ``check`` takes on an H100, by its floating-point operations and bytes at the rates above."""
    flops, moved = sum(OPS[op].flops(case).values()), sum(OPS[op].bytes_moved(case, 8).values())
    judged = flops
    if op == ATTENTION:  # the truth computes every score, masked or not
        *_, heads, T, D = case.shapes["query"]
        group = heads // max(case.shapes["key"][1], 1)
        judged = len(parts(op, case)) * group * 14 * T * case.shapes["key"][2] * D
        moved += len(parts(op, case)) * group * 3 * 8 * T * case.shapes["key"][2]
    elif op in HEADS:
        moved += 3 * 8 * math.prod(case.shapes["target"]) * case.shapes["linear_weight"][0]
    own = _RATES["float32" if dtype == torch.float32 else "16 bit"]
    exact = _RATES["float64 conv2d" if op == "conv2d" else "float64"]
    return _OVERHEAD + (flops + judged) / own + judged / exact + 2 * judged / _RATES["TF32"] + _PASSES * moved / _BYTES


def worst(got: Tensor, want: Tensor) -> Tensor:
    """As ``numerics.worst``, on the device: equal infinities and NaN in both places count as no difference."""
    result = torch.zeros((), dtype=torch.float64, device=want.device)
    if got.numel() == 0:
        return result
    for some, right in _pieces(got, want):
        some, right = some.double(), right.double()
        error = (some - right).abs_()
        error.masked_fill_(error.isnan(), math.inf)
        error.masked_fill_((some == right) | (some.isnan() & right.isnan()), 0.0)
        result = torch.maximum(result, error.amax())
    return result


def _size(want: Tensor) -> Tensor:
    """The largest absolute value that is finite."""
    result = torch.zeros((), dtype=torch.float64, device=want.device)
    if want.numel() == 0:
        return result
    for (piece,) in _pieces(want):
        piece = piece.abs()
        result = torch.maximum(result, piece.masked_fill_(~piece.isfinite(), 0).amax().double())
    return result
