"""Settings of direct preference optimisation."""

import math
from dataclasses import dataclass
from typing import Literal

from primer_fast.train.settings.optimizer import check_optimizer_options

LOSSES = ("sigmoid", "cdpo", "ipo")


@dataclass(frozen=True)
class DPOConfig:
    """Settings of direct preference optimisation; the first group is its own, the rest the optimizer's."""

    loss: Literal["sigmoid", "cdpo", "ipo"] = "sigmoid"
    beta: float = 0.1  # how hard the policy is held to the reference
    label_smoothing: float = 0.0  # of cdpo: how often a preference is taken to be wrong
    lr: float = 1e-6  # peak learning rate of AdamW
    min_lr: float = 0.0  # learning rate where the cosine ends
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate, after the warm-up
    warmup_steps: int = 0  # over which the learning rate rises to its peak
    batch_size: int = 16  # pairs that an optimizer step sees
    accumulate: int = 1  # micro-batches that a batch is cut into, to save memory; the gradient is the batch's
    epochs: int = 1  # passes over the pairs
    steps: int | None = None  # stop after this many optimizer steps instead
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0  # largest norm of the gradient; None: any
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0  # of the order of the pairs
    log_every: int = 10  # steps between two rows of metrics
    cuda_graphs: bool | None = None  # a step is one launch on a GPU, not hundreds; None: where the model is small

    def __post_init__(self):
        def must(holds: bool, what: str, got) -> None:
            if not holds:
                raise ValueError(f"dpo: {what}; got {got}")

        must(self.loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}", repr(self.loss))
        must(self.beta > 0 and math.isfinite(self.beta), "beta must be positive and finite", self.beta)
        must(0 <= self.label_smoothing < 0.5, "label_smoothing must be in [0, 0.5)", self.label_smoothing)
        must(self.label_smoothing == 0 or self.loss == "cdpo", "label_smoothing is cdpo's", self.label_smoothing)
        check_optimizer_options(self, must)
