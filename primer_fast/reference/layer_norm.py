"""Layer normalisation of a sum: s = input + residual, y = (s - mean) / sqrt(variance + eps) * weight + bias.

Mean and biased variance are taken over the axes of ``normalized_shape``, the last ones.
Legend: M rows (all leading axes of input together), N elements of a row (the normalised axes together).
"""

__all__ = [
    "CASES",
    "REFERENCE",
    "bytes_moved",
    "flops",
    "layer_norm",
    "layer_norm_grad",
    "layer_norm_magnitude",
    "sizes",
    "values",
]

import math

import numpy as np

from primer_fast.reference.case import Case, Reference


def _axes(normalized_shape):
    return tuple(range(-len(normalized_shape), 0)) if isinstance(normalized_shape, tuple | list) else (-1,)


def _normalize(total, axes, eps):
    """-> (s - mean) / sqrt(variance + eps), 1 / sqrt(variance + eps)."""
    if total.size == 0:
        return total, total
    centred = total - total.mean(axis=axes, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + eps)
    return centred * scale, scale


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, *, residual=None, return_residual=False):
    """input, residual (..., *normalized_shape); weight, bias of normalized_shape -> y, with s if asked for."""
    total = input if residual is None else input + residual
    y, _ = _normalize(total, _axes(normalized_shape), eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return (y, total) if return_residual else y


def layer_norm_grad(
    upstream, input, normalized_shape, weight=None, bias=None, eps=1e-5, *, residual=None, return_residual=False
):
    """Gradient at y, or those at (y, s), and the forward's arguments -> gradient of each array argument by name."""
    dy, dsum = upstream if return_residual else (upstream, 0.0)
    total = input if residual is None else input + residual
    axes = _axes(normalized_shape)
    lead = tuple(range(total.ndim - len(axes)))
    normal, scale = _normalize(total, axes, eps)
    g = dy if weight is None else dy * weight
    if total.size:
        means = (a.mean(axis=axes, keepdims=True) for a in (g, g * normal))
        g = scale * (g - next(means) - normal * next(means))
    ds = g + dsum
    grads = {"input": ds, "residual": ds, "weight": (dy * normal).sum(axis=lead), "bias": dy.sum(axis=lead)}
    there = {"input": input, "residual": residual, "weight": weight, "bias": bias}
    return {name: grad for name, grad in grads.items() if there[name] is not None}


def layer_norm_magnitude(
    upstream, input, normalized_shape, weight=None, bias=None, eps=1e-5, *, residual=None, return_residual=False
):
    """Largest sum of absolute terms behind each result by name: what a float32 sum's rounding is relative to."""
    dy, dsum = (np.abs(a) for a in (upstream if return_residual else (upstream, np.zeros(1))))
    size = np.abs(input) if residual is None else np.abs(input) + np.abs(residual)
    axes = _axes(normalized_shape)
    lead = tuple(range(size.ndim - len(axes)))
    if size.size == 0:
        return dict.fromkeys(("output", "sum", "input", "residual", "weight", "bias"), 0.0)
    normal, scale = _normalize(input if residual is None else input + residual, axes, eps)
    w, b = (default if a is None else np.abs(a) for a, default in ((weight, 1.0), (bias, 0.0)))
    # A mean is as exact as the largest of what it is of, and (s - mean) scale as that times the scale
    normal = np.abs(normal) + scale * size.mean(axis=axes, keepdims=True)
    g = dy * w
    means = [a.mean(axis=axes, keepdims=True) for a in (g, g * normal)]
    ds = scale * (g + means[0] + normal * means[1]) + dsum
    sums = {"output": normal * w + b, "sum": size, "input": ds, "residual": ds,
            "weight": (dy * normal).sum(axis=lead), "bias": dy.sum(axis=lead)}  # fmt: skip
    return {name: float(a.max(initial=0.0)) for name, a in sums.items()}


def values(case, rng):
    """Arrays that are not plain normal: rows far from 0, and rows of one value."""
    shape = case.shapes["input"]
    if case.name == "far_from_zero":
        return {"input": 1000.0 + rng.normal(size=shape)}
    if case.name == "constant_rows":
        return {"input": np.broadcast_to(np.arange(-2.0, shape[0] - 2)[:, None], shape)}
    return {}


def sizes(case):
    """Case -> M, N."""
    elements, shape = math.prod(case.shapes["input"]), case.options["normalized_shape"]
    N = math.prod(shape) if isinstance(shape, tuple | list) else shape
    return elements // N if N else 0, N


def flops(case):
    """Operations by pass: a handful for each element; the op is bound by memory."""
    M, N = sizes(case)
    return {"forward": 8 * M * N, "backward": 14 * M * N}


def bytes_moved(case, itemsize):
    """Fewest bytes to move by pass: every array read once, every result written once.

    The backward reads the upstream gradients and s, and writes the gradient of s.
    """
    M, N = sizes(case)
    residual, returned = ("residual" in case.shapes), case.options.get("return_residual", False)
    parameters = N * (("weight" in case.shapes) + ("bias" in case.shapes))
    return {
        "forward": itemsize * (M * N * (2 + residual + returned) + parameters),
        "backward": itemsize * (M * N * (3 + returned) + parameters * 2),
    }


def _case(name, why, shape, normalized_shape=None, *, affine="wb", residual=False, production=False, layouts=None,
          **options):  # fmt: skip
    axes = shape[-1] if normalized_shape is None else normalized_shape
    row = axes if isinstance(axes, tuple) else (axes,)
    shapes = {"input": shape}
    shapes |= {name: row for name, letter in (("weight", "w"), ("bias", "b")) if letter in affine}
    shapes |= {"residual": shape} if residual else {}
    return Case(name, why, shapes, {"normalized_shape": axes, **options}, layouts or {}, production)


_BOTH = {"residual": True, "return_residual": True}

CASES = (
    _case("primer", "the primer's LayerNorm(O + X): a few tokens of a small width", (2, 5, 12), residual=True),
    _case("one", "every size 1: the variance is 0", (1, 1)),
    _case("one_column", "N = 1: every row is its bias", (7, 1)),
    _case("exact_tile", "rows that a tile holds exactly", (16, 128)),
    _case("odd", "N and rows that nothing divides", (13, 147)),
    _case("above_tile", "N one past a power of two: half of a tile idle", (5, 513)),
    _case("many_rows", "short rows: several in a tile, tiles walked by one program", (1100, 24)),
    _case("long_rows", "rows that the backward reads twice", (2, 17000), **_BOTH),
    _case("long_odd_rows", "the same where each element moves on its own", (3, 4999), residual=True),
    _case("pre_norm", "input + residual normalised, and returned with its own gradient", (3, 7, 96), **_BOTH),
    _case("images", "several normalised axes", (3, 4, 5, 6), (4, 5, 6)),
    _case("no_affine", "no weight, no bias", (9, 56), affine=""),
    _case("no_bias", "weight alone", (9, 56), affine="w", residual=True),
    _case("no_weight", "bias alone", (9, 56), affine="b"),
    _case("vector", "no axis of rows", (40,)),
    _case("no_rows", "empty batch", (0, 16), **_BOTH),
    _case("no_elements", "rows of no elements", (3, 0)),
    _case("far_from_zero", "mean 1000, variance 1: E[x^2] - mean^2 would cancel", (6, 200)),
    _case("constant_rows", "variance 0: eps decides", (6, 80)),
    _case("large_eps", "eps as large as the variance", (6, 80), eps=0.5),
    _case("transposed", "rows that are not adjacent in memory: copied", (24, 40), layouts={"input": "transposed"}),
    _case("strided", "every second element", (11, 40),
          layouts=dict.fromkeys(("input", "weight", "bias"), "strided")),
    _case("expanded", "one row repeated by stride 0", (11, 40), residual=True, layouts={"residual": "expanded"}),
    _case("offset", "arrays that start off a 16-byte boundary", (11, 48), residual=True,
          layouts=dict.fromkeys(("input", "weight", "bias", "residual"), "offset")),
    _case("gpt2", "GPT-2 124M, 16 x 1024 tokens", (16384, 768), production=True),
    _case("gpt2_residual", "the same with the residual sum, pre-norm", (16384, 768), **_BOTH, production=True),
    _case("width_1024", "short rows", (4096, 1024), production=True),
    _case("width_4096", "a 7B model's width", (4096, 4096), production=True),
    _case("width_4096_post", "the same, LayerNorm(input + residual)", (4096, 4096), residual=True, production=True),
    _case("width_8192", "a 70B model's width", (4096, 8192), production=True),
    _case("width_8192_residual", "the same, pre-norm", (4096, 8192), **_BOTH, production=True),
    _case("width_32768", "long rows", (4096, 32768), production=True),
    _case("width_32768_residual", "the same, pre-norm", (4096, 32768), **_BOTH, production=True),
    _case("width_65536", "rows that no program holds: read twice, in blocks", (1024, 65536), production=True),
    _case("width_65536_residual", "the same, pre-norm", (1024, 65536), **_BOTH, production=True),
)  # fmt: skip

REFERENCE = Reference(
    "layer_norm",
    layer_norm,
    layer_norm_grad,
    layer_norm_magnitude,
    flops,
    bytes_moved,
    CASES,
    values=values,
    outputs=("output", "sum"),
    descriptors=False,  # whole rows are read in order: there is one way to load them
)
