"""What the settings of most procedures have in common: the optimizer, its schedule, the batches."""

import math
from collections.abc import Callable
from typing import Protocol

PRECISIONS = ("float32", "bfloat16", "float16")


class OptimizerOptions(Protocol):
    """The part of a configuration that these procedures have in common; the classes say what each is."""

    # fmt: off
    @property
    def lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip_norm(self) -> float | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    # fmt: on


def check_optimizer_options(config: OptimizerOptions, must: Callable[[bool, str, object], None]) -> None:
    """``must(holds, what must hold, what came)`` raises."""
    must(config.precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}", repr(config.precision))
    must(config.schedule in ("cosine", "constant"), "schedule must be cosine or constant", repr(config.schedule))
    must(0 < config.lr < math.inf, "lr must be positive and finite", config.lr)
    must(0 <= config.min_lr <= config.lr, f"min_lr must be from 0 to lr = {config.lr}", config.min_lr)
    must(0 <= config.weight_decay < math.inf, "weight_decay must not be negative", config.weight_decay)
    must(all(0 <= b < 1 for b in config.betas), "betas must be in [0, 1)", config.betas)
    must(config.clip_norm is None or config.clip_norm > 0, "clip_norm must be positive or None", config.clip_norm)
    must(config.warmup_steps >= 0, "warmup_steps must not be negative", config.warmup_steps)
    must(0 <= config.seed < 2**63, "seed must be from 0 to 2^63 - 1", config.seed)
    for name in ("batch_size", "accumulate", "epochs", "steps", "log_every"):
        value = getattr(config, name)
        optional = value is None and name == "steps"
        must(optional or (type(value) is int and value >= 1), f"{name} must be a positive integer", value)
