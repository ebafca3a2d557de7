"""Calls of the public functions, small enough for the interpreter, that lead to every registered operator."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from primer_fast import functional as F

HALF, BF16 = torch.float16, torch.bfloat16
LAST = torch.channels_last


@dataclass(frozen=True)
class Sample:
    op: str
    why: str
    call: Callable  # of the tensors -> a tensor, or several
    make: Callable[[str], list[Tensor]]  # device -> the tensors

    def __str__(self):
        return f"{self.op}: {self.why}"


def floats(*shapes, dtype=torch.float32, frozen=()):
    """Leaves of these shapes; those numbered in ``frozen`` want no gradient."""

    def make(device):
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        return [t.requires_grad_(i not in frozen) for i, t in enumerate(values)]

    return make


def arranged(arrange, *shapes, **options):
    """The same with the first tensor in another layout."""

    def make(device):
        first, *others = floats(*shapes, **options)(device)
        return [arrange(first.detach()).requires_grad_(first.requires_grad), *others]

    return make


def indexed(high, shape, *shapes, **options):
    """Integers below ``high`` of ``shape``, then floats."""

    def make(device):
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(high, shape, generator=generator).to(device), *floats(*shapes, **options)(device)]

    return make


def channels_last(t):
    return t.contiguous(memory_format=LAST)


def _linear(why, make, **options):
    return Sample("linear", why, lambda *t: F.linear(*t, **options), make)


def _mlp(why, make, layers=2, **options):
    """Of an input, the weights and the biases, as many or none."""

    def call(x, *parameters):
        weights, biases = parameters[:layers], parameters[layers:]
        return F.mlp(x, weights, biases or None, **options)

    return Sample("mlp", why, call, make)


def _conv2d(why, make, *args, **options):
    return Sample("conv2d", why, lambda x, w, b=None: F.conv2d(x, w, b, *args, **options), make)


def _pool(why, make, *args, **options):
    return Sample("max_pool2d", why, lambda x: F.max_pool2d(x, *args, **options), make)


def _norm(why, call, make):
    return Sample("layer_norm", why, call, make)


def _embedding(why, make, call):
    return Sample("embedding", why, call, make)


def _attention(why, make, **options):
    return Sample("scaled_dot_product_attention", why, lambda *t: F.scaled_dot_product_attention(*t, **options), make)


def _masked(device):
    q, k, v = floats((1, 2, 5, 8), (1, 1, 6, 8), (1, 1, 6, 16))(device)
    return [q, k, v, torch.arange(30, device=device).view(1, 1, 5, 6) % 3 > 0]


def _lengths(device):
    numbers = [torch.tensor(n, device=device) for n in ([6, 3], [1, 0])]
    return [*floats((2, 1, 5, 8), (2, 1, 6, 8), (2, 1, 6, 8))(device), *numbers]


def _log_prob(why, make, **options):
    def call(t, x, w, b=None):
        return F.linear_log_prob(x, w, t, linear_bias=b, **options)

    return Sample("linear_log_prob_kept" if options.get("keep_logits") else "linear_log_prob", why, call, make)


def _cross_entropy(why, make, **options):
    def call(t, x, w, b=None):
        return F.linear_cross_entropy(x, w, t, linear_bias=b, **options)

    kept = options.get("keep_logits")
    return Sample("linear_cross_entropy_kept" if kept else "linear_cross_entropy", why, call, make)


QKV = ((1, 1, 5, 8), (1, 1, 6, 8), (1, 1, 6, 8))
SAMPLES = [
    _linear("bias, gelu", floats((4, 3), (5, 3), (5,)), activation="gelu"),
    _linear("relu, from the output", floats((2, 2, 3), (5, 3), (5,), dtype=BF16), activation="relu"),
    _linear("transposed rows", arranged(lambda t: t.mT, (2, 3, 4), (5, 3))),
    _linear("frozen weight", floats((4, 3), (5, 3), (5,), frozen=(1,)), activation="silu"),
    _linear("bias alone", floats((4, 3), (5, 3), (5,), dtype=HALF, frozen=(0, 1)), activation="tanh"),
    _linear("no rows", floats((0, 3), (5, 3), (5,))),
    _linear("no gradient", floats((4, 3), (5, 3), (5,), frozen=(0, 1, 2)), activation="gelu"),
    _mlp("gelu", floats((4, 3), (5, 3), (2, 5), (5,), (2,))),
    _mlp("relu, sigmoid, from the outputs", floats((4, 3), (5, 3), (2, 5), (5,), (2,), dtype=BF16), activation="relu",
         output_activation="sigmoid"),
    _mlp("three layers, the first two frozen",
         floats((2, 2, 3), (4, 3), (5, 4), (2, 5), (4,), (5,), (2,), frozen=(0, 1, 2, 4)), 3,
         activation="silu", output_activation="gelu"),
    _mlp("without biases", floats((4, 3), (5, 3), (2, 5), dtype=HALF, frozen=(1,)), activation="tanh"),
    _mlp("no rows", floats((0, 3), (5, 3), (2, 5), (5,), (2,)), output_activation="silu"),
    _mlp("no gradient", floats((4, 3), (5, 3), (2, 5), frozen=(0, 1, 2))),
    _conv2d("gelu", floats((1, 2, 5, 4), (4, 2, 3, 2), (4,)), 1, 1, activation="gelu"),
    _conv2d("strided, channels_last", arranged(channels_last, (2, 3, 6, 5), (4, 3, 3, 2), (4,), dtype=HALF), 2, 1,
            activation="relu"),
    _conv2d("1 x 1, channels_last", arranged(channels_last, (2, 3, 4, 4), (4, 3, 1, 1), (4,)), activation="silu"),
    _conv2d("depthwise", floats((1, 2, 4, 4), (2, 1, 3, 3), frozen=(0,)), groups=2),
    _conv2d("unbatched, gaps", arranged(lambda t: t[:, :, ::2], (3, 5, 8), (2, 3, 2, 2), (2,)), padding="same"),
    _conv2d("no gradient", floats((1, 3, 4, 4), (2, 3, 3, 3), frozen=(0, 1))),
    _pool("2 x 2", floats((2, 3, 4, 6)), 2),
    _pool("overlapping, channels_last, indices", arranged(channels_last, (2, 3, 5, 5), dtype=BF16), 3, 2, 1,
          return_indices=True),
    _pool("unbatched, ceil", floats((3, 5, 5)), 2, ceil_mode=True),
    _pool("dilated", floats((1, 2, 9, 8)), 3, (2, 1), 1, (1, 2)),
    _pool("no images", floats((0, 3, 4, 4)), 2),
    _pool("no gradient", floats((1, 2, 4, 4), frozen=(0,)), 2),
    _norm("affine", lambda x, w, b: F.layer_norm(x, (8,), w, b), floats((2, 3, 8), (8,), (8,))),
    _norm("residual, both results", lambda x, r, w: F.layer_norm(x, 8, w, residual=r, return_residual=True),
          floats((3, 8), (3, 8), (8,), dtype=BF16)),
    _norm("residual, the sum unused", lambda x, r: F.layer_norm(x, 8, residual=r), floats((3, 8), (3, 8), frozen=(0,))),
    _norm("bias alone", lambda x, r, b: F.layer_norm(x, (2, 4), None, b, residual=r),
          floats((3, 2, 4), (3, 2, 4), (2, 4), frozen=(0, 1))),
    _norm("float32 weights, gaps", lambda x, w: F.layer_norm(x, 8, w.float()),
          arranged(lambda t: t[:, ::2], (3, 16), (8,), dtype=HALF)),
    _norm("no rows", lambda x, w: F.layer_norm(x, 8, w), floats((0, 8), (8,))),
    _norm("no gradient", lambda x, r: F.layer_norm(x, 8, residual=r), floats((3, 8), (3, 8), frozen=(0, 1))),
    _embedding("tokens", indexed(7, (2, 3), (7, 4)), lambda i, w: F.embedding(i, w, 2)),
    _embedding("positions", indexed(7, (2, 3), (7, 4), (5, 4)), lambda i, w, p: F.embedding(i, w, position=p)),
    _embedding("position_ids", indexed(5, (2, 3), (7, 4), (5, 4), dtype=HALF),
               lambda i, w, p: F.embedding(i, w, position=p, position_ids=i[:1].flip(1))),
    _embedding("positions alone", indexed(7, (2, 3), (7, 4), (5, 4), frozen=(0,)),
               lambda i, w, p: F.embedding(i, w, position=p)),
    _embedding("no tokens", indexed(7, (0, 3), (7, 4)), lambda i, w: F.embedding(i, w)),
    _attention("causal", floats(*QKV), is_causal=True),
    _attention("queries alone", floats(*QKV, frozen=(1, 2), dtype=HALF), causal_offset=1),
    _attention("values alone", floats(*QKV, frozen=(0, 1))),
    _attention("heads after tokens", arranged(lambda t: t.transpose(1, 2), (1, 5, 2, 8), (1, 2, 6, 8), (1, 2, 6, 8)),
               window=2, softcap=3),
    Sample("scaled_dot_product_attention", "mask, grouped heads",
           lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True), _masked),
    Sample("scaled_dot_product_attention", "lengths and offsets",
           lambda q, k, v, n, o: F.scaled_dot_product_attention(q, k, v, key_lengths=n, causal_offset=o), _lengths),
    _attention("dropout", floats(*QKV), dropout_p=0.5),
    _attention("no keys", floats((1, 2, 5, 8), (1, 2, 0, 8), (1, 2, 0, 8))),
    _attention("decoding", floats((1, 1, 1, 8), (1, 1, 256, 8), (1, 1, 256, 8), frozen=(0, 1, 2))),
    _log_prob("bias", indexed(7, (3,), (3, 4), (7, 4), (7,))),
    _log_prob("entropy", indexed(7, (2, 2), (2, 2, 4), (7, 4), dtype=BF16), temperature=0.5, return_entropy=True),
    _log_prob("frozen weight", indexed(7, (3,), (3, 4), (7, 4), (7,), frozen=(1,))),
    _log_prob("kept", indexed(7, (3,), (3, 4), (7, 4), (7,)), keep_logits=True),
    _log_prob("kept, entropy, frozen input", indexed(7, (3,), (3, 4), (7, 4), dtype=BF16, frozen=(0,)),
              keep_logits=True, return_entropy=True),
    _log_prob("ignored", indexed(7, (6,), (6, 4), (7, 4), dtype=HALF), return_entropy=True, ignore_index=2),
    _log_prob("no gradient", indexed(7, (3,), (3, 4), (7, 4), frozen=(0, 1))),
    _cross_entropy("mean", indexed(7, (3,), (3, 4), (7, 4), (7,)), ignore_index=1),
    _cross_entropy("rows, smoothed", indexed(7, (2, 2), (2, 2, 4), (7, 4), dtype=HALF), label_smoothing=0.1,
                   reduction="none"),
    _cross_entropy("kept", indexed(7, (3,), (3, 4), (7, 4), (7,)), keep_logits=True),
    _cross_entropy("kept rows", indexed(7, (2, 2), (2, 2, 4), (7, 4), dtype=HALF), label_smoothing=0.1,
                   reduction="none", keep_logits=True),
    _cross_entropy("sum", indexed(7, (3,), (3, 4), (7, 4), frozen=(0,)), reduction="sum"),
]  # fmt: skip


def results(outputs) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def run(call, tensors) -> list[Tensor]:
    """Results of a call, then the gradients for upstream gradients that depend on the shapes alone."""
    outputs = results(call(*tensors))
    sources = [t for t in tensors if t.requires_grad]
    ends = [y for y in outputs if y.requires_grad]
    if not ends:
        return outputs
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in ends]
    grads = torch.autograd.grad(ends, sources, upstream, allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]
