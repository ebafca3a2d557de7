"""Options as JSON has them: each value of the type that its option is declared with, and back as an object."""

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any


def made(options: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass ``options`` from what ``dataclasses.asdict`` and JSON made of one.

    Raises:
        TypeError, ValueError: a value is not of its field's type, or there is no such field.
    """
    hints, given = typing.get_type_hints(options), dict(values)
    for field in fields(options):
        hint, value = hints[field.name], given.get(field.name)
        if field.name in given and not fits(value, hint):
            raise ValueError(f"{field.name} must be {_name(hint)}; got {value!r}")
        if isinstance(value, list):
            given[field.name] = tuple(value)
    given |= {name: made(hints[name], v) for name, v in given.items() if isinstance(v, dict) and name in hints}
    return options(**given)


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of type ``hint``: str, int, float, bool, None, Literal, or a tuple or union of these."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
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


def must_agree(folder: Any, new: dict, old: dict, *, instead: str = "") -> None:
    """Raise ValueError where a call asks for other options than those that the run in ``folder`` was begun with."""
    other = [f"{key} {old[key]} (now {new[key]})" for key in new if new[key] != old[key]]
    if other:
        raise ValueError(f"{folder}: the run was begun with {', '.join(other)}; leave them out to go on{instead}")
