"""Whether a value read from JSON is of the type that an option is declared with."""

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any


def wrong_field(options: type, values: dict[str, Any]) -> str | None:
    """What is wrong with the first of ``values`` that is not of its field's type; None where all are."""
    hints = typing.get_type_hints(options)
    for field in fields(options):
        if field.name in values and not fits(values[field.name], hints[field.name]):
            return f"{field.name} must be {_name(hints[field.name])}; got {values[field.name]!r}"
    return None


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of type ``hint``: str, int, float, bool, None, Literal, or a tuple or union of these."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return type(value) is int
    if hint in (str, bool):
        return isinstance(value, hint)
    return not is_dataclass(hint) or isinstance(value, dict | hint)


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
