"""Transformer: blocks of multi-head attention and a perceptron on every position, decoder or encoder.

    X = E[tokens] + P        Q, K, V = X W_Q, X W_K, X W_V        O = concat_h(softmax(Q_h K_h^T / sqrt(d)) V_h) W_O

    post-LN   X = LayerNorm(O + X)      X = LayerNorm(MLP(X) + X)           logits = X E^T
    pre-LN    X = X + O(LayerNorm(X))   X = X + MLP(LayerNorm(X))           logits = LayerNorm(X) E^T

A decoder masks the scores of keys after the query; an encoder sees all.
Sources: Vaswani et al. 2017 (arXiv:1706.03762), post-LN and sinusoidal positions; Radford et al. 2019 (GPT-2), pre-LN
and learned positions; Devlin et al. 2019 (arXiv:1810.04805, BERT), the encoder.
Legend: B batch, T tokens, W width, H heads, Hk key heads, d = W / H, V vocabulary.
"""

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "POSITIONS",
    "Attention",
    "Block",
    "Transformer",
    "TransformerConfig",
    "post_norm",
    "pre_norm",
    "sinusoids",
]

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import functional as F
from primer_fast import nn
from primer_fast.models.kv_cache import KVCache
from primer_fast.nn.layers import in_turn

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
NORMS = ("post", "pre")
POSITIONS = ("sinusoidal", "learned")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and variants of a transformer; the defaults are the primer's block at GPT-2's size."""

    vocab: int
    context: int = 1024  # longest sequence: rows of the position table
    width: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None  # heads of keys and values, each shared by heads / kv_heads queries; None: heads
    mlp_width: int | None = None  # None: 4 * width
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"  # of the perceptron
    norm: Literal["post", "pre"] = (
        "post"  # "post": LayerNorm(O + X); "pre": X + O(LayerNorm(X)), and a norm before the logits
    )
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    causal: bool = True  # False: an encoder, every token sees every token
    dropout: float = 0.0  # of the embedding, the attention's weights and the residual branches
    bias: bool = True  # of the linear layers and the norms
    tied: bool = True  # logits through the transposed embedding; False: through a matrix of their own
    segments: int = 0  # rows of BERT's token-type embedding
    norm_eps: float = 1e-5
    embedding_norm: bool = False  # a norm after the embedding, as in BERT
    head_transform: bool = False  # linear, activation, norm before the logits, as in BERT's masked-language head
    head_bias: bool = False  # a bias of the logits

    def __post_init__(self):
        for name in ("vocab", "context", "width", "layers", "heads", "kv_heads", "mlp_width"):
            value = getattr(self, name)
            if value is None and name in ("kv_heads", "mlp_width"):
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"Transformer: {name} must be a positive integer; got {value!r}")
        if type(self.segments) is not int or self.segments < 0:
            raise ValueError(f"Transformer: segments must be an integer of 0 or more; got {self.segments!r}")
        for name in ("causal", "bias", "tied", "embedding_norm", "head_transform", "head_bias"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"Transformer: {name} must be True or False; got {getattr(self, name)!r}")
        for name in ("dropout", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
                raise ValueError(f"Transformer: {name} must be a number of 0 or more, and finite; got {value!r}")
        for name, choices in (("activation", ACTIVATIONS), ("norm", NORMS), ("positions", POSITIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"Transformer: {name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if self.width % self.heads:
            raise ValueError(f"Transformer: heads must divide width; got {self.heads} and {self.width}")
        if self.heads % self.key_heads:
            raise ValueError(f"Transformer: kv_heads must divide heads; got {self.kv_heads} and {self.heads}")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"Transformer: width must be even for sinusoidal positions; got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Transformer: dropout must be in [0, 1); got {self.dropout!r}")

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def sinusoids(length: int, width: int) -> Tensor:  # -> (length, width)
    """``P[t, 2i] = sin(t / 10000^(2i / width))`` and ``P[t, 2i+1] = cos`` of the same: Vaswani et al. 2017, 3.5."""
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate  # (length, width / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).view(length, width).to(torch.get_default_dtype())


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself; queries, keys and values come from one product."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.key_heads, self.head_width = config.heads, config.key_heads, config.head_width
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.key_heads) * self.head_width, config.bias)
        self.out = nn.Linear(config.width, config.width, config.bias)

    def forward(
        self, x: Tensor, visible: dict[str, Any], cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:  # (B, T, W) -> (B, T, W)
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_width))  # (B, T, H + 2 Hk, d)
        if cache is not None:
            key, value = cache.write(layer, qkv[:, :, self.heads :])
            query = qkv[:, :, : self.heads]
        else:
            query, key, value = qkv.split((self.heads, self.key_heads, self.key_heads), dim=2)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # (B, H, T, d)
        dropout = self.dropout if self.training else 0.0
        gqa = self.key_heads != self.heads
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, enable_gqa=gqa, **visible)
        return self.out(y.transpose(1, 2).flatten(2))

    def scores(self, x: Tensor) -> Tensor:  # (B, T, W) -> (B, H, T, T)
        """``Q K^T / sqrt(d)`` before any mask."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, H + 2 Hk, T, d)
        query, key, _ = qkv.split((self.heads, self.key_heads, self.key_heads), dim=1)
        key = key.repeat_interleave(self.heads // self.key_heads, dim=1)
        return query @ key.transpose(-2, -1) / math.sqrt(self.head_width)


class Block(nn.Module):
    """Attention, then the perceptron; two norms, which post_norm and pre_norm place."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden = 4 * config.width if config.mlp_width is None else config.mlp_width
        self.dropout = config.dropout
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps, bias=config.bias)
        self.up = nn.Linear(config.width, hidden, config.bias, activation=config.activation)
        self.down = nn.Linear(hidden, config.width, config.bias)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps, bias=config.bias)

    def attend(self, x: Tensor, visible: dict[str, Any], cache: KVCache | None, layer: int) -> Tensor:
        return self.drop(self.attention(x, visible, cache, layer))

    def mlp(self, x: Tensor) -> Tensor:
        return self.drop(in_turn((self.up, self.down), x))

    def drop(self, x: Tensor) -> Tensor:
        return torch_F.dropout(x, self.dropout) if self.dropout and self.training else x

    def reset_xavier(self) -> None:
        """Glorot & Bengio 2010, uniform, for each matrix: W_Q, W_K and W_V are three."""
        attention = self.attention
        rows = [n * attention.head_width for n in (attention.heads, attention.key_heads, attention.key_heads)]
        others = (layer.weight for layer in (attention.out, self.up, self.down))
        for matrix in (*attention.qkv.weight.data.split(rows), *others):
            torch.nn.init.xavier_uniform_(matrix)


def post_norm(
    blocks: Iterable[Block], x: Tensor, visible: dict[str, Any], cache: KVCache | None = None
) -> Tensor:  # (B, T, W) -> (B, T, W)
    """The primer's blocks: X <- LayerNorm(O + X), X <- LayerNorm(MLP(X) + X)."""
    for i, block in enumerate(blocks):
        x = block.attention_norm(block.attend(x, visible, cache, i), x)
        x = block.mlp_norm(block.mlp(x), x)
    return x


def pre_norm(
    blocks: Iterable[Block], norm: nn.LayerNorm, x: Tensor, visible: dict[str, Any], cache: KVCache | None = None
) -> Tensor:  # (B, T, W) -> (B, T, W)
    """With the last ``norm``. The sum of a branch and the residual is taken in the next norm's kernel."""
    branch = None
    for i, block in enumerate(blocks):
        y, x = (block.attention_norm(x), x) if branch is None else block.attention_norm(branch, x, True)
        branch = block.attend(y, visible, cache, i)
        y, x = block.mlp_norm(branch, x, True)
        branch = block.mlp(y)
    return norm(branch, x)


class Transformer(nn.Module):
    """The network of ``config``: tokens (B, T) -> logits (B, T, V).

    First weights. pre-LN: normal of deviation 0.02 at GPT-2's width of 768 and in proportion to width^-1/2 at others,
    over sqrt(2 layers) for what is added to the residual (Radford et al. 2019). post-LN: Xavier uniform for each matrix
    (Glorot & Bengio 2010), as Vaswani et al. train it, with a warm-up of the learning rate, which it needs (Xiong et
    al. 2020, arXiv:2002.04745). The embedding of post-LN or beside sinusoidal positions has deviation width^-1/2 and
    these are scaled by it: Vaswani's ``sqrt(width) E + P`` but for a common factor, in one pass, and logits of
    deviation 1.

    Raises:
        ValueError: tokens of another shape, or more than ``config.context`` of them.
    """

    positions: Tensor  # (context, W): a parameter, or the buffer of sinusoids
    head: nn.Linear | None
    head_norm: nn.LayerNorm | None
    excluded: Tensor | None  # (V,): -inf for ids that ``exclude`` was given, else 0

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        width, eps = config.width, config.norm_eps
        self.embedding = nn.Embedding(config.vocab, width)
        if config.positions == "learned":
            self.positions = torch.nn.Parameter(torch.empty(config.context, width))
        else:
            table = sinusoids(config.context, width) * self._embedding_deviation
            self.register_buffer("positions", table, persistent=False)
        self.segments = nn.Embedding(config.segments, width) if config.segments else None
        self.embedding_norm = nn.LayerNorm(width, eps) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps, bias=config.bias) if config.norm == "pre" else None
        self.head = self.head_norm = None
        if config.head_transform:
            self.head = nn.Linear(width, width, activation=config.activation)
            self.head_norm = nn.LayerNorm(width, eps)
        self.unembedding = None if config.tied else nn.Linear(width, config.vocab, bias=False)
        self.head_bias = torch.nn.Parameter(torch.empty(config.vocab)) if config.head_bias else None
        self.register_buffer("excluded", None, persistent=False)
        self.reset_parameters()

    @property
    def _embedding_deviation(self) -> float:
        gpt2 = self.config.norm == "pre" and self.config.positions == "learned"
        return 0.02 if gpt2 else self.config.width**-0.5

    def reset_parameters(self) -> None:
        init, config = torch.nn.init, self.config
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                init.zeros_(p)
            elif "norm" in name:
                init.ones_(p)
            elif name.startswith(("embedding", "positions", "segments", "unembedding")):
                init.normal_(p, std=self._embedding_deviation)
            elif config.norm == "pre":
                added = name.endswith(("out.weight", "down.weight"))
                deviation = 0.02 * math.sqrt(768 / config.width)
                init.normal_(p, std=deviation / math.sqrt(2 * config.layers) if added else deviation)
            elif name == "head.weight":
                init.xavier_uniform_(p)
        if config.norm == "post":
            for block in self.blocks:
                block.reset_xavier()

    def exclude(self, ids: Tensor) -> None:  # (N,) int64
        """From now on these ids have probability 0: they are never drawn, and no loss or log-probability counts them.

        An embedding may have more rows than there are tokens, as GPT-2's 50,257 are often padded to 50,304, and no
        text has a token for such a row. What is excluded is part of no state dict.

        Raises:
            ValueError: an id outside of the vocabulary, or none would be left.
        """
        vocab = self.config.vocab
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(f"exclude: ids must be in [0, {vocab}); got {int(ids.min())} to {int(ids.max())}")
        weight = self.embedding.weight
        bias = torch.zeros(vocab, dtype=weight.dtype, device=weight.device)
        bias[ids.to(weight.device)] = -math.inf
        if bool(bias.isinf().all()):
            raise ValueError(f"exclude: one of the {vocab} ids must be left; got all of them")
        self.excluded = bias if ids.numel() else None

    def new_cache(self, batch: int, capacity: int, *, fixed: bool = False) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens; ``fixed`` is ``KVCache``'s."""
        shape = self.config
        if capacity > shape.context:
            raise ValueError(f"Transformer: capacity must be at most the context {shape.context}; got {capacity}")
        return KVCache(shape.layers, batch, capacity, shape.key_heads, shape.head_width, fixed=fixed)

    def forward(self, tokens: Tensor, **options) -> Tensor:  # (B, T) -> (B, T, V); options as hidden()
        return self.logits(self.hidden(tokens, **options))

    def hidden(
        self,
        tokens: Tensor,  # (B, T) int64
        *,
        mask: Tensor | None = None,  # (B, T) bool: True is a token, False padding, on either side
        lengths: Tensor | None = None,  # (B,) int64: tokens from there on are padding
        segments: Tensor | None = None,  # (B, T) int64: BERT's token types; None: all 0
        cache: KVCache | None = None,  # what came before these tokens; they are appended
    ) -> Tensor:  # (B, T, W)
        """What the logits are made of, after the last norm; undefined where there is padding.

        Positions count from 0; with a ``mask`` in a decoder they count the real tokens, as GPT-2 of `transformers`
        generates. In a decoder padding on the right needs neither ``mask`` nor ``lengths``: nothing looks ahead.
        """
        positions, position_ids, visible = self._place(tokens, mask, lengths, cache)
        x = self.embedding(tokens, positions, position_ids)  # (B, T, W)
        if self.segments is not None:
            x = x + (self.segments.weight[0] if segments is None else self.segments(segments))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.config.dropout and self.training:
            x = torch_F.dropout(x, self.config.dropout)
        if self.norm is None:
            x = post_norm(self.blocks, x, visible, cache)
        else:
            x = pre_norm(self.blocks, self.norm, x, visible, cache)
        if cache is not None:
            cache.advance(tokens.shape[1], lengths)
        return x

    def _place(self, tokens, mask, lengths, cache):
        """The position table and the rows to take from it, and what attention is told of the keys it may see."""
        config = self.config
        if tokens.dim() != 2:
            raise ValueError(f"Transformer: tokens must be (B, T); got {tuple(tokens.shape)}")
        if tokens.shape[1] > config.context:
            raise ValueError(f"Transformer: at most {config.context} tokens fit the context; got {tokens.shape[1]}")
        if cache is not None:
            if not config.causal:
                raise ValueError("Transformer: only a decoder may have a cache; got causal=False")
            if mask is not None:
                raise ValueError("Transformer: beside a cache padding is given by lengths; got a mask")
            return cache.place(self.positions, tokens.shape[1])
        if mask is not None:
            if mask.shape != tokens.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"Transformer: mask must be bool {tuple(tokens.shape)}; got {mask.dtype} {tuple(mask.shape)}"
                )
            visible = {"attn_mask": mask[:, None, None, :], "is_causal": config.causal}
            return self.positions, (mask.cumsum(1) - 1).clamp_(min=0) if config.causal else None, visible
        if config.causal or lengths is None:
            return self.positions, None, {"is_causal": config.causal}
        return self.positions, None, {"key_lengths": lengths}

    def logits(self, hidden: Tensor) -> Tensor:  # (..., W) -> (..., V)
        return F.linear(self._features(hidden), self._unembedding(), self._logit_bias())

    def loss(
        self,
        tokens: Tensor,  # (B, T)
        targets: Tensor,  # (B, T): of each position, already shifted; ignore_index where there is none
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        **options,  # as hidden()
    ) -> Tensor:  # (), or (B, T) for reduction "none"
        """Cross entropy of ``targets``, in float32 where the model has 16 bits; the logits are never in memory.

        Raises:
            ValueError: ``label_smoothing`` would give a share of the target to ids that ``exclude`` was given.
        """
        if label_smoothing and self.excluded is not None:
            raise ValueError(f"Transformer: label_smoothing must be 0 where ids are excluded; got {label_smoothing}")
        features = self._features(self.hidden(tokens, **options))
        return F.linear_cross_entropy(
            features, self._unembedding(), targets, linear_bias=self._logit_bias(),
            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
            loss_dtype=torch.promote_types(features.dtype, torch.float32),
        )  # fmt: skip

    @overload
    def log_prob(
        self, tokens: Tensor, targets: Tensor, *, temperature: float = 1.0,
        return_entropy: Literal[False] = False, **options,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def log_prob(
        self, tokens: Tensor, targets: Tensor, *, temperature: float = 1.0, return_entropy: Literal[True], **options
    ) -> tuple[Tensor, Tensor]: ...
    def log_prob(
        self, tokens: Tensor, targets: Tensor, *, temperature: float = 1.0, return_entropy: bool = False, **options
    ) -> Tensor | tuple[Tensor, Tensor]:  # (B, T), (B, T) -> (B, T) float32, with return_entropy twice
        """``log p(targets)`` of each position, already shifted, and the entropy; the logits are never in memory.

        Both are 0 where the target is -100.
        """
        return self.log_prob_of(
            self.hidden(tokens, **options), targets, temperature=temperature, return_entropy=return_entropy
        )

    @overload
    def log_prob_of(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, return_entropy: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def log_prob_of(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, return_entropy: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def log_prob_of(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, return_entropy: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def log_prob_of(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, return_entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:  # (..., W), (...) -> (...) float32, with return_entropy twice
        """The same from what ``hidden()`` returned, or some of its rows."""
        return F.linear_log_prob(
            self._features(hidden), self._unembedding(), targets, linear_bias=self._logit_bias(),
            temperature=temperature, return_entropy=return_entropy,
        )  # fmt: skip

    def _features(self, hidden):
        if self.head is None or self.head_norm is None:
            return hidden
        return self.head_norm(self.head(hidden))

    def _logit_bias(self):
        if self.excluded is None or self.head_bias is None:
            return self.head_bias if self.excluded is None else self.excluded
        return self.head_bias + self.excluded

    def _unembedding(self):
        return (self.embedding if self.unembedding is None else self.unembedding).weight

    @torch.no_grad()
    def attention_weights(
        self, tokens: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None, **options
    ) -> list[Tensor]:  # (B, T) -> a layer's (B, H, T, T), T x T of queries and keys
        """Every layer's softmax, for looking at: computed plainly, a pass apart. Queries that see no key give 0."""
        inputs = []
        hooks = [
            block.attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
            for block in self.blocks
        ]
        try:
            self.hidden(tokens, mask=mask, lengths=lengths, **options)
        finally:
            for hook in hooks:
                hook.remove()
        T = tokens.shape[1]
        hidden_keys = torch.zeros(T, T, dtype=torch.bool, device=tokens.device)
        if self.config.causal:
            hidden_keys = hidden_keys.logical_not().triu(1)
        if lengths is not None:
            hidden_keys = hidden_keys | (torch.arange(T, device=tokens.device) >= lengths.view(-1, 1, 1, 1))
        if mask is not None:
            hidden_keys = hidden_keys | ~mask[:, None, None, :]
        return [
            block.attention.scores(x).masked_fill(hidden_keys, -math.inf).softmax(-1).nan_to_num(0.0)
            for block, x in zip(self.blocks, inputs, strict=True)
        ]
