"""Settings of reward modelling."""

import math
from dataclasses import dataclass
from typing import Literal

from primer_fast.train.settings.optimizer import check_optimizer_options


@dataclass(frozen=True)
class RewardConfig:
    """Settings of reward modelling."""

    margins: bool = False  # hold the rewards of a pair apart by its margin, where that is known
    centring: float = 0.0  # weight of (r_w + r_l)^2
    lr: float = 1e-4  # peak learning rate of AdamW
    min_lr: float = 0.0  # learning rate where the cosine ends
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate, after the warm-up
    warmup_steps: int = 20  # over which the learning rate rises to its peak
    batch_size: int = 64  # pairs that an optimizer step sees
    accumulate: int = 1  # micro-batches that a batch is cut into, to save memory; the gradient is the batch's
    epochs: int = 1  # passes over the pairs
    steps: int | None = None  # stop after this many optimizer steps instead
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0  # largest norm of the gradient; None: any
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0  # of the order of the pairs
    log_every: int = 10  # steps between two rows of metrics

    def __post_init__(self):
        def must(holds: bool, what: str, got) -> None:
            if not holds:
                raise ValueError(f"reward: {what}; got {got}")

        must(0 <= self.centring < math.inf, "centring must not be negative", self.centring)
        check_optimizer_options(self, must)
