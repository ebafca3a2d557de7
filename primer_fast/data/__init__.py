"""Data sets as tensors, one file per kind."""

from typing import TYPE_CHECKING

from primer_fast.lazy import lazy

__all__ = [
    "completions",
    "digits",
    "drawn_digits",
    "lines",
    "preferences",
    "prompts",
    "soccer",
    "text",
    "tokenizers",
]

if TYPE_CHECKING:
    from primer_fast.data import (
        completions,
        digits,
        drawn_digits,
        lines,
        preferences,
        prompts,
        soccer,
        text,
        tokenizers,
    )
else:
    __getattr__, __dir__ = lazy(__name__, {})
