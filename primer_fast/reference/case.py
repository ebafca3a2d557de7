"""One configuration of an op that is worth checking or timing, declared once for tests, verification and benchmarks."""

__all__ = ["Case", "arguments"]

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    name: str
    why: str  # what it would catch, or whose layer it is
    shapes: dict[str, tuple[int, ...]]  # array arguments of the op, in order; "weights.0": see ``arguments``
    options: dict = field(default_factory=dict)  # keyword arguments of the op
    layouts: dict[str, str] = field(default_factory=dict)  # array -> a layout of proof/inputs.py: "transposed", ...
    production: bool = False  # a GPU's size: compiled ahead of time and timed, too large to interpret
    dtypes: dict[str, str] = field(default_factory=dict)  # array -> "int64" or "bool"; the rest are floats
    gradients: bool = True  # False: only the forward, without a graph

    def __str__(self) -> str:
        return self.name


def arguments(arrays: dict) -> dict:
    """Arrays by the names of a case -> the op's arguments: "weights.0", "weights.2" are elements of a list ``weights``.

    Where a list has no array of some number, there stands None.
    """
    made: dict = {}
    for name, array in arrays.items():
        argument, _, number = name.partition(".")
        if number:
            given = made.setdefault(argument, [])
            given += [None] * (int(number) + 1 - len(given))
            given[int(number)] = array
        else:
            made[name] = array
    return made
