"""Training procedures, one file each: the loss as a pure function, a generator of metrics. Configs: ``settings``."""

from typing import TYPE_CHECKING

from primer_fast.lazy import lazy

__all__ = [
    "augmentation",
    "common",
    "completion_batch",
    "cuda_graphs",
    "distributed",
    "dpo",
    "epochs",
    "language_model",
    "log_probs",
    "ppo",
    "reward",
    "scoring",
    "settings",
    "sft",
    "supervised",
    "world",
]

if TYPE_CHECKING:
    from primer_fast.train import (
        augmentation,
        common,
        completion_batch,
        cuda_graphs,
        distributed,
        dpo,
        epochs,
        language_model,
        log_probs,
        ppo,
        reward,
        scoring,
        settings,
        sft,
        supervised,
        world,
    )
else:
    __getattr__, __dir__ = lazy(__name__, {})
