"""One list of calls of every op, small enough for the interpreter: what holds for all ops alike is tested on them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import functional as F
from primer_fast.reference.case import arguments

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True, eq=False)
class Sample:
    """One way to call an op; its arguments have the names that a reference's cases give them, "weights.0" too."""

    op: str
    why: str
    shapes: dict[str, tuple[int, ...]]  # of the floating-point arguments, the first is the input
    options: dict = field(default_factory=dict)
    whole: dict = field(default_factory=dict)  # arguments without a gradient: a tensor, or (below what, shape)
    theirs: Callable | None = None  # of all tensors: the same through PyTorch's operators
    named: bool = True  # PyTorch has this op itself
    dtype: torch.dtype | tuple[torch.dtype, ...] = FLOAT  # one, or one for each floating-point argument
    frozen: tuple[str, ...] = ()  # floating-point arguments that want no gradient
    arrange: Callable | None = None  # lays the input out differently
    grows: tuple[int, ...] = ()  # sizes that grow with the batch

    def __str__(self) -> str:
        return f"{self.op}: {self.why}"

    @property
    def operator(self) -> str:
        return f"{self.op}_kept" if self.options.get("keep_logits") else self.op

    @functools.cached_property
    def call(self) -> Callable:
        """Of all tensors -> a tensor, or several."""
        function, names, options = getattr(F, self.op), (*self.whole, *self.shapes), self.options

        def call(*tensors):
            return function(**arguments(dict(zip(names, tensors, strict=True))), **options)

        return call

    def floats(self, dtype=None, device="cpu", seed=0) -> list[Tensor]:
        """The floating-point arguments as leaves, in one dtype or one for each; only rounding differs."""
        dtype = self.dtype if dtype is None else dtype
        dtypes = dtype if isinstance(dtype, list | tuple) else [dtype] * len(self.shapes)
        generator = torch.Generator("cpu").manual_seed(seed)
        made = []
        for (name, shape), kind in zip(self.shapes.items(), dtypes, strict=True):
            t = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device, kind)
            t = self.arrange(t) if self.arrange and not made else t
            made.append(t.requires_grad_(name not in self.frozen))
        return made

    def others(self, device="cpu") -> list[Tensor]:
        """The arguments without a gradient, which come first."""
        return [_made(self, name, torch.device(device)) for name in self.whole]

    def make(self, device, dtype=None, seed=0) -> list[Tensor]:
        return [*self.others(device), *self.floats(dtype, device, seed)]

    def ours(self, *floats):
        return self.call(*self.others(floats[0].device), *floats)

    def torchs(self, *floats):
        return self.theirs(*self.others(floats[0].device), *floats)

    def grown(self, n: int) -> "Sample":
        """The same with ``n`` more of each size that grows."""

        def more(shape):
            return tuple(size + n * (size in self.grows) for size in shape)

        whole = {name: (below, more(shape)) for name, (below, shape) in self.whole.items()}
        return replace(self, shapes={name: more(shape) for name, shape in self.shapes.items()}, whole=whole)


@functools.cache  # in a CUDA graph there is no copy from the host
def _made(sample: Sample, name: str, device: torch.device) -> Tensor:
    given = sample.whole[name]
    if isinstance(given, Tensor):
        return given.to(device)
    below, shape = given
    with torch.inference_mode(False):
        return torch.randint(below, shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(device)


def results(outputs) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def upstream(y: Tensor, seed=9) -> Tensor:
    """A random gradient of ``y`` that depends on its shape alone."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y.device, y.dtype)


def run(call, tensors) -> list[Tensor]:
    """Results of a call, then the gradients of all leaves that have one."""
    outputs = results(call(*tensors))
    sources, ends = [t for t in tensors if t.requires_grad], [y for y in outputs if y.requires_grad]
    if not ends:
        return outputs
    grads = torch.autograd.grad(ends, sources, list(map(upstream, ends)), allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]


def _layers(function, output):
    return lambda x, v, w, b, c: output(torch_F.linear(function(torch_F.linear(x, v, b)), w, c))


def _cross_entropy(t, x, w, b):
    if hasattr(torch_F, "linear_cross_entropy"):  # torch 2.11 does not have it yet
        return torch_F.linear_cross_entropy(x, w, t, linear_bias=b)
    return torch_F.cross_entropy(torch_F.linear(x, w, b), t)


def _log_prob(t, x, w, b):
    logits = torch_F.linear(x, w, b)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, t[:, None])[:, 0]


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


_LINEAR = {"input": (4, 3), "weight": (5, 3), "bias": (5,)}
_MLP = {"input": (4, 3), "weights.0": (5, 3), "weights.1": (2, 5), "biases.0": (5,), "biases.1": (2,)}
_THREE = {"input": (2, 2, 3), "weights.0": (4, 3), "weights.1": (5, 4), "weights.2": (2, 5)}
_CONV = {"input": (1, 2, 5, 4), "weight": (4, 2, 3, 2), "bias": (4,)}
_NORM = {"input": (2, 3, 8), "weight": (8,), "bias": (8,)}
_SUM = {"input": (3, 8), "residual": (3, 8)}
_TABLES = {"weight": (7, 4), "position": (5, 4)}
_QKV = {"query": (1, 1, 5, 8), "key": (1, 1, 6, 8), "value": (1, 1, 6, 8)}
_SQUARE = dict.fromkeys(("query", "key", "value"), (1, 2, 8, 16))
_HEAD = {"input": (3, 4), "linear_weight": (7, 4), "linear_bias": (7,)}
_HEADS = {"input": (2, 2, 4), "linear_weight": (7, 4)}
_IDS, _CLASSES = {"input": (7, (2, 3))}, {"target": (7, (3,))}
_AXES = {"target": (7, (2, 2))}


def _bare(shapes, *without):
    return {name: shape for name, shape in shapes.items() if name not in without}


SAMPLES = [
    Sample("linear", "plain", _LINEAR, theirs=torch_F.linear),
    Sample("linear", "gelu", _LINEAR | {"input": (2, 4, 3)}, {"activation": "gelu"}, named=False, grows=(2, 4),
           theirs=lambda *t: torch_F.gelu(torch_F.linear(*t))),
    Sample("linear", "relu, from the output", _LINEAR | {"input": (2, 2, 3)}, {"activation": "relu"}, dtype=BF16),
    Sample("linear", "transposed rows", {"input": (2, 3, 4), "weight": (5, 3)}, arrange=lambda t: t.mT),
    Sample("linear", "frozen weight", _LINEAR, {"activation": "silu"}, frozen=("weight",)),
    Sample("linear", "bias alone", _LINEAR, {"activation": "tanh"}, dtype=HALF, frozen=("input", "weight")),
    Sample("linear", "no rows", _LINEAR | {"input": (0, 3)}),
    Sample("linear", "no gradient", _LINEAR, {"activation": "gelu"}, frozen=tuple(_LINEAR)),
    Sample("mlp", "gelu", _MLP, theirs=_layers(torch_F.gelu, lambda y: y), grows=(4,)),
    Sample("mlp", "tanh, silu at the end", _MLP, {"activation": "tanh", "output_activation": "silu"}, named=False,
           theirs=_layers(torch.tanh, torch_F.silu)),
    Sample("mlp", "relu, sigmoid, from the outputs", _MLP, {"activation": "relu", "output_activation": "sigmoid"},
           dtype=BF16),
    Sample("mlp", "three layers, the first two frozen", _THREE | {"biases.0": (4,), "biases.1": (5,), "biases.2": (2,)},
           {"activation": "silu", "output_activation": "gelu"}, frozen=("input", "weights.0", "weights.1", "biases.0")),
    Sample("mlp", "without biases", _bare(_MLP, "biases.0", "biases.1"), {"activation": "tanh"}, dtype=HALF,
           frozen=("weights.0",)),
    Sample("mlp", "no rows", _MLP | {"input": (0, 3)}, {"output_activation": "silu"}),
    Sample("mlp", "no gradient", _bare(_MLP, "biases.0", "biases.1"), frozen=tuple(_MLP)),
    Sample("conv2d", "padded", _CONV, {"padding": 1}, theirs=lambda *t: torch_F.conv2d(*t, padding=1)),
    Sample("conv2d", "gelu", _CONV, {"activation": "gelu"}, named=False,
           theirs=lambda *t: torch_F.gelu(torch_F.conv2d(*t))),
    Sample("conv2d", "strided, channels_last", {"input": (2, 3, 6, 5), "weight": (4, 3, 3, 2), "bias": (4,)},
           {"stride": 2, "padding": 1, "activation": "relu"}, dtype=HALF, arrange=channels_last),
    Sample("conv2d", "1 x 1, channels_last", {"input": (2, 3, 4, 4), "weight": (4, 3, 1, 1), "bias": (4,)},
           {"activation": "silu"}, arrange=channels_last),
    Sample("conv2d", "depthwise", {"input": (1, 2, 4, 4), "weight": (2, 1, 3, 3)}, {"groups": 2}, frozen=("input",)),
    Sample("conv2d", "unbatched, gaps", {"input": (3, 5, 8), "weight": (2, 3, 2, 2), "bias": (2,)}, {"padding": "same"},
           arrange=lambda t: t[:, :, ::2]),
    Sample("conv2d", "growing", {"input": (1, 2, 5, 4), "weight": (3, 2, 3, 3), "bias": (3,)},
           {"stride": 2, "padding": 1, "activation": "relu"}, grows=(1, 5)),
    Sample("conv2d", "no gradient", {"input": (1, 3, 4, 4), "weight": (2, 3, 3, 3)}, frozen=("input", "weight")),
    Sample("max_pool2d", "2 x 2", {"input": (2, 3, 4, 6)}, {"kernel_size": 2},
           theirs=lambda x: torch_F.max_pool2d(x, 2)),
    Sample("max_pool2d", "overlapping, channels_last, indices", {"input": (2, 3, 5, 5)},
           {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": True}, dtype=BF16, arrange=channels_last),
    Sample("max_pool2d", "unbatched, ceil", {"input": (3, 5, 5)}, {"kernel_size": 2, "ceil_mode": True}),
    Sample("max_pool2d", "dilated", {"input": (1, 2, 9, 8)},
           {"kernel_size": 3, "stride": (2, 1), "padding": 1, "dilation": (1, 2)}),
    Sample("max_pool2d", "growing", {"input": (3, 2, 5, 6)}, {"kernel_size": 3, "stride": 2, "padding": 1},
           grows=(3, 5)),
    Sample("max_pool2d", "no images", {"input": (0, 3, 4, 4)}, {"kernel_size": 2}),
    Sample("max_pool2d", "no gradient", {"input": (1, 2, 4, 4)}, {"kernel_size": 2}, frozen=("input",)),
    Sample("layer_norm", "affine", _NORM, {"normalized_shape": (8,)},
           theirs=lambda x, w, b: torch_F.layer_norm(x, (8,), w, b)),
    Sample("layer_norm", "residual", _NORM | {"residual": (2, 3, 8)}, {"normalized_shape": 8}, named=False,
           theirs=lambda x, w, b, r: torch_F.layer_norm(x + r, (8,), w, b)),
    Sample("layer_norm", "residual, both results", _SUM | {"weight": (8,)},
           {"normalized_shape": 8, "return_residual": True}, dtype=BF16, grows=(3,)),
    Sample("layer_norm", "residual, the sum unused", _SUM, {"normalized_shape": 8}, frozen=("input",)),
    Sample("layer_norm", "bias alone", {"input": (3, 2, 4), "residual": (3, 2, 4), "bias": (2, 4)},
           {"normalized_shape": (2, 4)}, frozen=("input", "residual")),
    Sample("layer_norm", "float32 weights, gaps", {"input": (3, 16), "weight": (8,)}, {"normalized_shape": 8},
           dtype=(HALF, FLOAT), arrange=lambda t: t[:, ::2]),
    Sample("layer_norm", "no rows", {"input": (0, 8), "weight": (8,)}, {"normalized_shape": 8}),
    Sample("layer_norm", "no gradient", _SUM, {"normalized_shape": 8}, frozen=tuple(_SUM)),
    Sample("embedding", "tokens", {"weight": (7, 4)}, {}, _IDS, theirs=torch_F.embedding),
    Sample("embedding", "positions", _TABLES, {}, _IDS, named=False,
           theirs=lambda i, w, p: torch_F.embedding(i, w) + p[:3]),
    Sample("embedding", "padding", {"weight": (7, 4)}, {"padding_idx": 2}, _IDS),
    Sample("embedding", "position_ids", _TABLES, {}, _IDS | {"position_ids": (5, (1, 3))}, dtype=HALF),
    Sample("embedding", "growing", {"weight": (7, 4), "position": (6, 4)}, {},
           {"input": (7, (2, 3)), "position_ids": (6, (1, 3))}, grows=(2, 3)),
    Sample("embedding", "positions alone", _TABLES, {}, _IDS, frozen=("weight",)),
    Sample("embedding", "no tokens", {"weight": (7, 4)}, {}, {"input": (7, (0, 3))}),
    Sample("scaled_dot_product_attention", "causal", _SQUARE, {"is_causal": True},
           theirs=lambda q, k, v: torch_F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    Sample("scaled_dot_product_attention", "growing", _QKV, {"is_causal": True}, grows=(1, 5, 6)),
    Sample("scaled_dot_product_attention", "queries alone", _QKV, {"causal_offset": 1}, dtype=HALF,
           frozen=("key", "value")),
    Sample("scaled_dot_product_attention", "values alone", _QKV, frozen=("query", "key")),
    Sample("scaled_dot_product_attention", "heads after tokens",
           {"query": (1, 5, 2, 8), "key": (1, 2, 6, 8), "value": (1, 2, 6, 8)}, {"window": 2, "softcap": 3},
           arrange=lambda t: t.transpose(1, 2)),
    Sample("scaled_dot_product_attention", "mask, grouped heads",
           {"query": (1, 2, 5, 8), "key": (1, 1, 6, 8), "value": (1, 1, 6, 16)}, {"enable_gqa": True},
           {"attn_mask": torch.arange(30).view(1, 1, 5, 6) % 3 > 0}),
    Sample("scaled_dot_product_attention", "lengths and offsets",
           {"query": (2, 1, 5, 8), "key": (2, 1, 6, 8), "value": (2, 1, 6, 8)}, {},
           {"key_lengths": torch.tensor([6, 3]), "causal_offset": torch.tensor([1, 0])}),
    Sample("scaled_dot_product_attention", "dropout", _QKV, {"dropout_p": 0.5}),
    Sample("scaled_dot_product_attention", "no keys",
           {"query": (1, 2, 5, 8), "key": (1, 2, 0, 8), "value": (1, 2, 0, 8)}),
    Sample("scaled_dot_product_attention", "decoding",
           {"query": (1, 1, 1, 8), "key": (1, 1, 256, 8), "value": (1, 1, 256, 8)}, frozen=("query", "key", "value")),
    Sample("linear_log_prob", "bias", _HEAD, {}, _CLASSES, theirs=_log_prob, named=False),
    Sample("linear_log_prob", "entropy", _HEADS, {"temperature": 0.5, "return_entropy": True}, _AXES, dtype=BF16,
           grows=(2,)),
    Sample("linear_log_prob", "frozen weight", _HEAD, {}, _CLASSES, frozen=("linear_weight",)),
    Sample("linear_log_prob", "kept", _HEAD, {"keep_logits": True}, _CLASSES),
    Sample("linear_log_prob", "kept, entropy, frozen input", _bare(_HEAD, "linear_bias"),
           {"keep_logits": True, "return_entropy": True}, _CLASSES, dtype=BF16, frozen=("input",), grows=(3, 7)),
    Sample("linear_log_prob", "ignored", {"input": (6, 4), "linear_weight": (7, 4)},
           {"return_entropy": True, "ignore_index": 2}, {"target": (7, (6,))}, dtype=HALF),
    Sample("linear_log_prob", "no gradient", _bare(_HEAD, "linear_bias"), {}, _CLASSES,
           frozen=("input", "linear_weight")),
    Sample("linear_cross_entropy", "mean", _HEAD, {}, _CLASSES, theirs=_cross_entropy, grows=(3,)),
    Sample("linear_cross_entropy", "ignored", _HEAD, {"ignore_index": 1}, _CLASSES),
    Sample("linear_cross_entropy", "rows, smoothed", _HEADS, {"label_smoothing": 0.1, "reduction": "none"}, _AXES,
           dtype=HALF),
    Sample("linear_cross_entropy", "kept", _HEAD, {"keep_logits": True}, _CLASSES, grows=(3, 7)),
    Sample("linear_cross_entropy", "kept rows", _HEADS,
           {"label_smoothing": 0.1, "reduction": "none", "keep_logits": True}, _AXES, dtype=HALF),
    Sample("linear_cross_entropy", "sum", _bare(_HEAD, "linear_bias"), {"reduction": "sum"}, _CLASSES,
           frozen=("input",)),
]  # fmt: skip
OPS = {str(sample): sample for sample in SAMPLES if sample.theirs}
NAMED = [name for name, sample in OPS.items() if sample.named]
ATTENTION = "scaled_dot_product_attention"
GROWING = {sample.operator: sample for sample in SAMPLES if sample.grows}

_ROWS = {"input": (24, 2100), "weight": (40, 2100), "bias": (40,)}
_KEYS = dict.fromkeys(("query", "key", "value"), (2, 2, 70, 16))
_VOCABULARY, _TARGETS = {"input": (20, 24), "linear_weight": (700, 24)}, {"target": (700, (20,))}
LONG_SUMS = [  # sums that are long enough to be shared out among programs
    Sample("linear", "plain", _ROWS),
    Sample("linear", "gelu", _ROWS, {"activation": "gelu"}),
    Sample("mlp", "sigmoid at the end",
           {"input": (24, 2100), "weights.0": (24, 2100), "weights.1": (1500, 24), "biases.0": (24,),
            "biases.1": (1500,)}, {"output_activation": "sigmoid"}),
    Sample("conv2d", "many channels", {"input": (1, 32, 5, 4), "weight": (40, 32, 2, 2), "bias": (40,)},
           {"padding": 1, "activation": "gelu"}, arrange=channels_last),
    Sample("conv2d", "few channels", {"input": (2, 3, 6, 5), "weight": (20, 3, 2, 3), "bias": (20,)}, {"padding": 1},
           arrange=channels_last),
    Sample("max_pool2d", "overlapping", {"input": (2, 5, 17, 19)}, {"kernel_size": 5, "stride": 1, "padding": 2}),
    Sample("layer_norm", "residual", {"input": (600, 40), "residual": (600, 40), "weight": (40,), "bias": (40,)},
           {"normalized_shape": 40}),
    Sample("embedding", "positions", {"weight": (7, 24), "position": (40, 24)}, {}, {"input": (7, (6, 40))}),
    Sample("scaled_dot_product_attention", "causal", _KEYS, {"is_causal": True}),
    Sample("scaled_dot_product_attention", "lengths", _KEYS, {}, {"key_lengths": torch.tensor([50, 0])}),
    Sample("scaled_dot_product_attention", "dropout", _KEYS, {"dropout_p": 0.3}),
    Sample("linear_cross_entropy", "smoothed", _VOCABULARY, {"label_smoothing": 0.1}, _TARGETS),
    Sample("linear_log_prob", "entropy", _VOCABULARY, {"return_entropy": True}, _TARGETS),
]  # fmt: skip
