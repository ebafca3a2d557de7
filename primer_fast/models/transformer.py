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
from typing import Literal, overload

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from primer_fast import functional as F
from primer_fast import nn
from primer_fast.models.block import (
    ACTIVATIONS,
    NORMS,
    POSITIONS,
    Attention,
    Block,
    TransformerConfig,
    post_norm,
    pre_norm,
    sinusoids,
)
from primer_fast.models.kv_cache import KVCache


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
