"""Training procedures, one file each: the loss as a pure function, a generator of metrics. Configs: ``settings``."""

from typing import TYPE_CHECKING

from primer_fast.lazy import lazy

__all__ = [
    "cuda_graphs",
    "dpo",
    "language_model",
    "log_probs",
    "parallel",
    "ppo",
    "reward",
    "scoring",
    "settings",
    "sft",
    "state",
    "steps",
    "supervised",
]

if TYPE_CHECKING:
    from primer_fast.train import (
        cuda_graphs,
        dpo,
        language_model,
        log_probs,
        parallel,
        ppo,
        reward,
        scoring,
        settings,
        sft,
        state,
        steps,
        supervised,
    )
else:
    __getattr__, __dir__ = lazy(__name__, {})
