"""Settings of direct preference optimisation."""

import math
from dataclasses import dataclass
from typing import Literal

from primer_fast.train.settings.optimizer import check_optimizer_options

OF_MARGIN = ("sigmoid", "cdpo", "robust", "ipo", "hinge")  # losses that are functions of h alone
LOSSES = (*OF_MARGIN, "apo_zero", "sppo_hard")
SMOOTHED = ("cdpo", "robust")  # that know e
NOT_BUILT = (  # that TRL has too
    "aot", "aot_pair", "aot_unpaired", "apo_down", "bco_pair", "discopop", "exo_pair", "nca_pair", "sft",
    "sigmoid_norm",
)  # fmt: skip


@dataclass(frozen=True)
class DPOConfig:
    """Settings of direct preference optimisation; the first group is its own, the rest the optimizer's."""

    loss: Literal["sigmoid", "cdpo", "robust", "ipo", "hinge", "apo_zero", "sppo_hard"] = "sigmoid"
    beta: float = 0.1  # how hard the policy is held to the reference
    label_smoothing: float = 0.0  # of cdpo and robust: how often a preference is taken to be wrong
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
        check_loss(self.loss, self.beta, self.label_smoothing)
        check_optimizer_options(self, must)


def must(holds: bool, what: str, got) -> None:
    if not holds:
        raise ValueError(f"dpo: {what}; got {got}")


def check_loss(kind: str, beta: float, label_smoothing: float, losses: tuple[str, ...] = LOSSES) -> None:
    """Raise ValueError where the loss is none of ``losses``, or a number is out of its range."""
    if kind not in losses:
        why = ", which TRL has and primer_fast has not" if kind in NOT_BUILT else ""
        raise ValueError(f"dpo: loss must be one of {', '.join(losses)}; got {kind!r}{why}")
    must(beta > 0 and math.isfinite(beta), "beta must be positive and finite", beta)
    must(0 <= label_smoothing < 0.5, "label_smoothing must be in [0, 0.5)", label_smoothing)
    must(label_smoothing == 0 or kind in SMOOTHED, "label_smoothing is cdpo's and robust's", label_smoothing)
