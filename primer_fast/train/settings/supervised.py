"""Settings of training on pairs of inputs and targets."""

import math
from dataclasses import dataclass
from typing import Literal

from primer_fast.train.settings.optimizer import PRECISIONS

LOSSES = ("cross_entropy", "binary_cross_entropy")


@dataclass(frozen=True)
class SupervisedConfig:
    """Settings of supervised training."""

    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"  # binary: one logit, targets 0 or 1
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: w <- w - lr * gradient, with momentum if it is not 0
    lr: float = 2e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate where the cosine ends
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate, after the warm-up
    warmup_steps: int = 100  # over which the learning rate rises to its peak
    weight_decay: float = 0.01  # of weights; biases do not decay
    betas: tuple[float, float] = (0.9, 0.999)  # of adamw
    momentum: float = 0.0  # of sgd
    batch_size: int | None = 256  # samples an optimizer step sees; None: the whole data set
    accumulate: int = 1  # micro-batches that a batch is cut into, to save memory; the gradient is the batch's
    epochs: int = 20  # passes over the training data
    steps: int | None = None  # stop after this many optimizer steps instead
    clip_norm: float | None = 1.0  # largest norm of the gradient; None: any
    label_smoothing: float = 0.0  # share of the target spread evenly over the classes
    augmentation: Literal["none", "shift"] = "none"  # shift: images move by up to two pixels each way
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the model's arithmetic; weights stay float32
    seed: int = 0  # of the first weights, the order of the samples and the augmentation
    log_every: int = 50  # steps between two rows of metrics; the last step of an epoch is always one of them
    cuda_graphs: bool | None = None  # a step is one launch on a GPU, not hundreds; None: where the model is small

    def __post_init__(self):
        def must(holds: bool, what: str, got) -> None:
            if not holds:
                raise ValueError(f"supervised: {what}; got {got}")

        must(self.loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}", repr(self.loss))
        must(self.optimizer in ("adamw", "sgd"), "optimizer must be adamw or sgd", repr(self.optimizer))
        must(self.schedule in ("cosine", "constant"), "schedule must be cosine or constant", repr(self.schedule))
        must(self.augmentation in ("none", "shift"), "augmentation must be none or shift", repr(self.augmentation))
        must(self.precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}", repr(self.precision))
        must(0 < self.lr < math.inf, "lr must be positive and finite", self.lr)
        must(0 <= self.min_lr <= self.lr, f"min_lr must be from 0 to lr = {self.lr}", self.min_lr)
        must(0 <= self.weight_decay < math.inf, "weight_decay must not be negative", self.weight_decay)
        must(0 <= self.momentum < 1, "momentum must be in [0, 1)", self.momentum)
        must(self.momentum == 0 or self.optimizer == "sgd", "momentum must be 0 for adamw", self.momentum)
        must(all(0 <= b < 1 for b in self.betas), "betas must be in [0, 1)", self.betas)
        must(self.clip_norm is None or self.clip_norm > 0, "clip_norm must be positive or None", self.clip_norm)
        must(0 <= self.label_smoothing < 1, "label_smoothing must be in [0, 1)", self.label_smoothing)
        smooth = self.label_smoothing == 0 or self.loss == "cross_entropy"
        must(smooth, "label_smoothing must be 0 for binary_cross_entropy", self.label_smoothing)
        must(self.warmup_steps >= 0, "warmup_steps must not be negative", self.warmup_steps)
        must(0 <= self.seed < 2**63, "seed must be from 0 to 2^63 - 1", self.seed)
        for name in ("batch_size", "accumulate", "epochs", "steps", "log_every"):
            value = getattr(self, name)
            optional = value is None and name in ("batch_size", "steps")
            must(optional or (type(value) is int and value >= 1), f"{name} must be a positive integer", value)
