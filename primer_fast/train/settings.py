"""The settings of every procedure, checked when they are made.

They need no torch, so that `primer-fast train dpo --help` can list them before torch could be imported.
"""

__all__ = [
    "DPO_LOSSES",
    "KL_ESTIMATORS",
    "LOSSES_OF_TRL_ALONE",
    "MARGIN_LOSSES",
    "SMOOTHED_LOSSES",
    "DPOConfig",
    "LanguageModelConfig",
    "Optimisation",
    "PPOConfig",
    "RewardConfig",
    "SFTConfig",
    "SupervisedConfig",
    "check_dpo_loss",
    "must",
]

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

FROM_0 = ("warmup_steps", "seed")  # the whole numbers that may be 0; all others are positive


def must(holds: bool, what: str, got: Any) -> None:
    """ValueError with what must hold and what came, unless it holds."""
    if not holds:
        raise ValueError(f"{what}; got {got}")


@dataclass(frozen=True)
class Optimisation:
    """What the procedures have in common: the optimizer, its schedule, the batches.

    A procedure gives a setting another default, or another comment, by declaring it again. One that does not let its
    user choose a setting declares it as a ClassVar, and it is no option then.
    """

    procedure: ClassVar[str]  # what errors call it

    lr: float = 1e-3  # peak learning rate of AdamW
    min_lr: float = 0.0  # learning rate where the cosine ends
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate, after the warm-up
    warmup_steps: int = 0  # over which the learning rate rises to its peak
    batch_size: int | None = 64  # samples that an optimizer step sees; None, where it is allowed: all
    accumulate: int = 1  # micro-batches that a batch is cut into, to save memory; the gradient is the batch's
    epochs: int = 1  # passes over the samples
    steps: int | None = None  # stop after this many optimizer steps instead
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0  # largest norm of the gradient; None: any
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0  # of all that is drawn
    log_every: int = 10  # steps between two rows of metrics
    cuda_graphs: bool | None = None  # a step is one launch on a GPU, not hundreds; None: where the model is small

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            allowed = get_args(field.type) or (field.type,)
            if get_origin(field.type) is Literal:
                self.must(value in allowed, f"{name} must be one of {', '.join(allowed)}", repr(value))
            elif int in allowed and name not in FROM_0:
                optional = value is None and type(None) in allowed
                self.must(optional or (type(value) is int and value >= 1), f"{name} must be a positive integer", value)
        self.must(0 < self.lr < math.inf, "lr must be positive and finite", self.lr)
        self.must(0 <= self.min_lr <= self.lr, f"min_lr must be from 0 to lr = {self.lr}", self.min_lr)
        self.must(0 <= self.weight_decay < math.inf, "weight_decay must not be negative", self.weight_decay)
        self.must(all(0 <= b < 1 for b in self.betas), "betas must be in [0, 1)", self.betas)
        self.must(self.clip_norm is None or self.clip_norm > 0, "clip_norm must be positive or None", self.clip_norm)
        self.must(self.warmup_steps >= 0, "warmup_steps must not be negative", self.warmup_steps)
        self.must(0 <= self.seed < 2**63, "seed must be from 0 to 2^63 - 1", self.seed)

    def must(self, holds: bool, what: str, got: Any) -> None:
        """ValueError in the name of the procedure, unless it holds."""
        must(holds, f"{self.procedure}: {what}", got)


@dataclass(frozen=True)
class SupervisedConfig(Optimisation):
    """Settings of supervised training, on pairs of inputs and targets."""

    procedure = "supervised"

    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"  # binary: one logit, targets 0 or 1
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: w <- w - lr * gradient, with momentum if it is not 0
    momentum: float = 0.0  # of sgd
    label_smoothing: float = 0.0  # share of the target spread evenly over the classes
    augmentation: Literal["none", "shift"] = "none"  # shift: images move by up to two pixels each way
    lr: float = 2e-3  # peak learning rate
    warmup_steps: int = 100  # over which the learning rate rises to its peak
    batch_size: int | None = 256  # samples an optimizer step sees; None: the whole data set
    epochs: int = 20  # passes over the training data
    betas: tuple[float, float] = (0.9, 0.999)  # of adamw
    weight_decay: float = 0.01  # of weights; biases do not decay
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the model's arithmetic; weights stay float32
    seed: int = 0  # of the first weights, the order of the samples and the augmentation
    log_every: int = 50  # steps between two rows of metrics; the last step of an epoch is always one of them

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must(0 <= self.momentum < 1, "momentum must be in [0, 1)", self.momentum)
        self.must(self.momentum == 0 or self.optimizer == "sgd", "momentum must be 0 for adamw", self.momentum)
        self.must(0 <= self.label_smoothing < 1, "label_smoothing must be in [0, 1)", self.label_smoothing)
        smooth = self.label_smoothing == 0 or self.loss == "cross_entropy"
        self.must(smooth, "label_smoothing must be 0 for binary_cross_entropy", self.label_smoothing)


@dataclass(frozen=True)
class LanguageModelConfig(Optimisation):
    """Settings of training on text."""

    procedure = "language_model"
    schedule: ClassVar = "cosine"  # type: ignore[misc]
    epochs: ClassVar = 1  # type: ignore[misc]

    min_lr: float = 1e-4  # learning rate where the cosine ends
    warmup_steps: int = 100  # over which the learning rate rises to its peak
    batch_size: int = 12  # windows of the context's length that an optimizer step sees
    steps: int = 2000  # optimizer steps
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1  # of weights; biases and the scales of layer norm do not decay
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the model's arithmetic; weights stay float32
    seed: int = 0  # of the first weights, the windows and dropout
    log_every: int = 50  # steps between two rows of metrics
    eval_every: int = 250  # steps between two validations; the last step is always one
    eval_batches: int | None = 20  # batches of a validation, spread evenly over the held-out text; None: all of it


@dataclass(frozen=True)
class SFTConfig(Optimisation):
    """Settings of supervised fine-tuning."""

    procedure = "sft"
    cuda_graphs: ClassVar = False  # type: ignore[misc]

    min_lr: float = 1e-4  # learning rate where the cosine ends
    warmup_steps: int = 50  # over which the learning rate rises to its peak
    batch_size: int = 64  # completions that an optimizer step sees
    epochs: int = 1  # passes over the completions
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    seed: int = 0  # of the order of the completions


@dataclass(frozen=True)
class RewardConfig(Optimisation):
    """Settings of reward modelling."""

    procedure = "reward"
    cuda_graphs: ClassVar = False  # type: ignore[misc]

    margins: bool = False  # hold the rewards of a pair apart by its margin, where that is known
    centring: float = 0.0  # weight of (r_w + r_l)^2
    lr: float = 1e-4  # peak learning rate of AdamW
    warmup_steps: int = 20  # over which the learning rate rises to its peak
    batch_size: int = 64  # pairs that an optimizer step sees
    epochs: int = 1  # passes over the pairs
    weight_decay: float = 0.01
    seed: int = 0  # of the order of the pairs

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must(0 <= self.centring < math.inf, "centring must not be negative", self.centring)


MarginLoss = Literal["sigmoid", "cdpo", "robust", "ipo", "hinge"]  # a function of h alone
DPOLoss = Literal["sigmoid", "cdpo", "robust", "ipo", "hinge", "apo_zero", "sppo_hard"]
MARGIN_LOSSES, DPO_LOSSES = get_args(MarginLoss), get_args(DPOLoss)
SMOOTHED_LOSSES = ("cdpo", "robust")  # the losses that label_smoothing is for
LOSSES_OF_TRL_ALONE = (
    "aot", "aot_pair", "aot_unpaired", "apo_down", "bco_pair", "discopop", "exo_pair", "nca_pair", "sft",
    "sigmoid_norm",
)  # fmt: skip


@dataclass(frozen=True)
class DPOConfig(Optimisation):
    """Settings of direct preference optimisation."""

    procedure = "dpo"

    loss: DPOLoss = "sigmoid"
    beta: float = 0.1  # how hard the policy is held to the reference
    label_smoothing: float = 0.0  # of cdpo and robust: how often a preference is taken to be wrong
    lr: float = 1e-6  # peak learning rate of AdamW
    batch_size: int = 16  # pairs that an optimizer step sees
    epochs: int = 1  # passes over the pairs
    seed: int = 0  # of the order of the pairs

    def __post_init__(self) -> None:
        check_dpo_loss(self.loss, self.beta, self.label_smoothing)
        super().__post_init__()


def check_dpo_loss(kind: str, beta: float, label_smoothing: float, losses: tuple[str, ...] = DPO_LOSSES) -> None:
    """Raise ValueError where the loss is none of ``losses``, or a number is out of its range."""
    why = ", which TRL has and primer_fast has not" if kind in LOSSES_OF_TRL_ALONE else ""
    must(kind in losses, f"dpo: loss must be one of {', '.join(losses)}", f"{kind!r}{why}")
    must(beta > 0 and math.isfinite(beta), "dpo: beta must be positive and finite", beta)
    must(0 <= label_smoothing < 0.5, "dpo: label_smoothing must be in [0, 0.5)", label_smoothing)
    smooth = label_smoothing == 0 or kind in SMOOTHED_LOSSES
    must(smooth, f"dpo: label_smoothing must be 0 but for {' and '.join(SMOOTHED_LOSSES)}", label_smoothing)


KLEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS = get_args(KLEstimator)


@dataclass(frozen=True)
class PPOConfig(Optimisation):
    """Settings of PPO: rollouts, penalty, losses, and the optimizer's."""

    procedure = "ppo"

    lr: float = 3e-6  # peak learning rate of AdamW
    schedule: Literal["cosine", "constant"] = "constant"  # of the learning rate, after the warm-up
    warmup_steps: int = 0  # rollouts over which the learning rate rises to its peak
    batch_size: int = 64  # completions of a rollout
    accumulate: int = 1  # micro-batches that a minibatch is cut into, to save memory; the gradient is the minibatch's
    epochs: int = 4  # passes over a rollout
    steps: int = 100  # rollouts, each followed by ``epochs`` passes over it
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0  # of prompts, samples and minibatches
    log_every: int = 1  # rollouts between two rows of metrics
    minibatches: int = 4  # optimizer steps of a pass
    max_new_tokens: int = 53  # longest completion
    temperature: float = 0.7  # of the policy and the reference, in rollouts and in training alike
    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda of the advantage estimation
    clip: float = 0.2  # how far the ratio of a token may move before its gradient stops
    value_clip: float = 0.2  # the same of a value
    value_weight: float = 0.1  # of the value loss beside the policy loss
    kl: KLEstimator = "k1"  # estimator in the penalty
    kl_coefficient: float = 0.05  # beta; where kl_target is given, where it starts
    kl_target: float | None = None  # KL per completion that a controller moves beta towards; None: beta is fixed
    kl_horizon: int = 10000  # completions over which the controller acts
    stop_kl: float | None = None  # end a rollout's passes where the policy moved this far from it (approxkl)
    missing_end_penalty: float = 0.0  # taken from the score of completions that do not end
    whiten_rewards: bool = False  # divide the rewards by their deviation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.must(1e-30 <= self.temperature <= 1e30, "temperature must be from 1e-30 to 1e30", self.temperature)
        for name in ("gamma", "lam"):
            self.must(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1]", getattr(self, name))
        self.must(0 < self.clip < 1, "clip must be between 0 and 1", self.clip)
        self.must(self.value_clip > 0, "value_clip must be positive", self.value_clip)
        for name in ("value_weight", "kl_coefficient", "missing_end_penalty"):
            self.must(0 <= getattr(self, name) < math.inf, f"{name} must not be negative", getattr(self, name))
        for name in ("kl_target", "stop_kl"):
            value = getattr(self, name)
            self.must(value is None or value > 0, f"{name} must be positive or None", value)
        self.must(self.minibatches <= self.batch_size, "minibatches must not exceed batch_size", self.minibatches)
