"""The methods of Triton's interpreter that are replaced, each beside the function that makes its replacement."""

__all__ = ["BUILDER", "replacements", "replaces"]

from collections.abc import Callable

BUILDER = "InterpreterBuilder"  # the class whose methods carry out what a kernel calls
replacements: dict[tuple[str, str], Callable] = {}  # (class, method) -> function from the method to its replacement


def replaces(owner: str, *methods: str):
    """The decorated function takes the method that was there and returns the one that takes its place."""

    def register(replace):
        replacements.update({(owner, method): replace for method in methods})
        return replace

    return register
