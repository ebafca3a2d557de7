"""Settings of language modelling."""

import math
from dataclasses import dataclass
from typing import Literal

from primer_fast.train.settings.optimizer import PRECISIONS


@dataclass(frozen=True)
class LanguageModelConfig:
    """Settings of training on text."""

    lr: float = 1e-3  # peak learning rate of AdamW
    min_lr: float = 1e-4  # learning rate where the cosine ends
    warmup_steps: int = 100  # over which the learning rate rises to its peak
    steps: int = 2000  # optimizer steps
    batch_size: int = 12  # windows of the context's length that an optimizer step sees
    accumulate: int = 1  # micro-batches that a batch is cut into, to save memory; the gradient is the batch's
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1  # of weights; biases and the scales of layer norm do not decay
    clip_norm: float | None = 1.0  # largest norm of the gradient; None: any
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the model's arithmetic; weights stay float32
    seed: int = 0  # of the first weights, the windows and dropout
    log_every: int = 50  # steps between two rows of metrics
    eval_every: int = 250  # steps between two validations; the last step is always one
    eval_batches: int | None = 20  # batches of a validation, spread evenly over the held-out text; None: all of it
    cuda_graphs: bool | None = None  # a step is one launch on a GPU, not hundreds; None: where the model is small

    def __post_init__(self):
        def must(holds: bool, what: str, got) -> None:
            if not holds:
                raise ValueError(f"language_model: {what}; got {got}")

        must(self.precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}", repr(self.precision))
        must(0 < self.lr < math.inf, "lr must be positive and finite", self.lr)
        must(0 <= self.min_lr <= self.lr, f"min_lr must be from 0 to lr = {self.lr}", self.min_lr)
        must(0 <= self.weight_decay < math.inf, "weight_decay must not be negative", self.weight_decay)
        must(all(0 <= b < 1 for b in self.betas), "betas must be in [0, 1)", self.betas)
        must(self.clip_norm is None or self.clip_norm > 0, "clip_norm must be positive or None", self.clip_norm)
        must(self.warmup_steps >= 0, "warmup_steps must not be negative", self.warmup_steps)
        must(0 <= self.seed < 2**63, "seed must be from 0 to 2^63 - 1", self.seed)
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "eval_batches"):
            value = getattr(self, name)
            optional = value is None and name == "eval_batches"
            must(optional or (type(value) is int and value >= 1), f"{name} must be a positive integer", value)
