"""Settings of proximal policy optimisation."""

import math
from dataclasses import dataclass
from typing import Literal

from primer_fast.train.settings.optimizer import check_optimizer_options

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO: rollouts, penalty, losses, and the optimizer's."""

    steps: int = 100  # rollouts, each followed by ``epochs`` passes over it
    batch_size: int = 64  # completions of a rollout
    minibatches: int = 4  # optimizer steps of a pass
    epochs: int = 4  # passes over a rollout
    accumulate: int = 1  # micro-batches that a minibatch is cut into, to save memory; the gradient is the minibatch's
    max_new_tokens: int = 53  # longest completion
    temperature: float = 0.7  # of the policy and the reference, in rollouts and in training alike
    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda of the advantage estimation
    clip: float = 0.2  # how far the ratio of a token may move before its gradient stops
    value_clip: float = 0.2  # the same of a value
    value_weight: float = 0.1  # of the value loss beside the policy loss
    kl: Literal["k1", "k2", "k3"] = "k1"  # estimator in the penalty
    kl_coefficient: float = 0.05  # beta; where kl_target is given, where it starts
    kl_target: float | None = None  # KL per completion that a controller moves beta towards; None: beta is fixed
    kl_horizon: int = 10000  # completions over which the controller acts
    stop_kl: float | None = None  # end a rollout's passes where the policy moved this far from it (approxkl)
    missing_end_penalty: float = 0.0  # taken from the score of completions that do not end
    whiten_rewards: bool = False  # divide the rewards by their deviation
    lr: float = 3e-6  # peak learning rate of AdamW
    min_lr: float = 0.0  # learning rate where the cosine ends
    schedule: Literal["cosine", "constant"] = "constant"  # of the learning rate, after the warm-up
    warmup_steps: int = 0  # rollouts over which the learning rate rises to its peak
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0  # largest norm of the gradient; None: any
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0  # of prompts, samples and minibatches
    log_every: int = 1  # rollouts between two rows of metrics
    cuda_graphs: bool | None = None  # a step is one launch on a GPU, not hundreds; None: where the model is small

    def __post_init__(self):
        def must(holds: bool, what: str, got) -> None:
            if not holds:
                raise ValueError(f"ppo: {what}; got {got}")

        check_optimizer_options(self, must)
        must(self.precision != "float16", "precision must be float32 or bfloat16", repr(self.precision))
        must(self.kl in KL_ESTIMATORS, f"kl must be one of {', '.join(KL_ESTIMATORS)}", repr(self.kl))
        must(1e-30 <= self.temperature <= 1e30, "temperature must be from 1e-30 to 1e30", self.temperature)
        for name in ("gamma", "lam"):
            must(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1]", getattr(self, name))
        must(0 < self.clip < 1, "clip must be between 0 and 1", self.clip)
        must(self.value_clip > 0, "value_clip must be positive", self.value_clip)
        for name in ("value_weight", "kl_coefficient", "missing_end_penalty"):
            must(0 <= getattr(self, name) < math.inf, f"{name} must not be negative", getattr(self, name))
        for name in ("kl_target", "stop_kl"):
            value = getattr(self, name)
            must(value is None or value > 0, f"{name} must be positive or None", value)
        for name in ("minibatches", "max_new_tokens", "kl_horizon"):
            value = getattr(self, name)
            must(type(value) is int and value >= 1, f"{name} must be a positive integer", value)
        must(self.minibatches <= self.batch_size, "minibatches must not exceed batch_size", self.minibatches)
