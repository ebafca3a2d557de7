"""One configuration of an op that is worth checking or timing, declared once for tests, verification and benchmarks."""

__all__ = ["Case", "Reference", "arguments"]

from collections.abc import Callable
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


@dataclass(frozen=True)
class Reference:
    """What is known of an op without its kernels: its maths in NumPy, its cases, and how they are to be checked.

    ``function(**arrays, **options)`` returns the output, or a tuple of outputs. ``gradient`` and ``magnitude`` take the
    gradient of the output, or a tuple of them, before these arguments. They return by name the gradient of each array,
    and for each output and gradient the largest sum of absolute terms behind an element.

    Raises:
        ValueError: two cases share a name, or an array is named that no case has.
    """

    name: str
    function: Callable
    gradient: Callable
    magnitude: Callable
    flops: Callable[[Case], dict[str, float]]
    bytes_moved: Callable[[Case, int], dict[str, float]]
    cases: tuple[Case, ...]
    drawn: tuple[Case, ...] = ()  # their results are random: compiled as the others, compared with nothing
    values: Callable[..., dict] = lambda case, rng: {}  # arrays of a case that are not plain normal
    outputs: tuple[str, ...] = ("output",)  # names of all that the op may return, in order
    descriptors: bool = True  # False: there is one way to load operands
    without_gradient: tuple[str, ...] = ()  # arrays of floats that get none

    def __post_init__(self) -> None:
        names = [case.name for case in (*self.cases, *self.drawn)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{self.name}: cases must have names of their own; got twice {', '.join(sorted(twice))}")
        arrays = {array for case in self.cases for array in case.shapes}
        if unknown := set(self.without_gradient) - arrays:
            raise ValueError(f"{self.name}: without_gradient must name arrays of its cases; got {', '.join(unknown)}")

    def case(self, name: str) -> Case:
        """The case of this name.

        Raises:
            ValueError: there is none.
        """
        for case in self.cases:
            if case.name == name:
                return case
        raise ValueError(f"{self.name}: case must be one of {', '.join(map(str, self.cases))}; got {name!r}")

    def differentiable(self, case: Case) -> list[str]:
        """Names of a case's arrays that have a gradient."""
        arrays = [name for name in case.shapes if name not in case.dtypes and name not in self.without_gradient]
        return arrays if case.gradients else []


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
