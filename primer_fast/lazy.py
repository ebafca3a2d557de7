"""Packages that import a member with its first use, so that importing the package itself costs next to nothing."""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy"]


def lazy(
    package: str, places: Mapping[str, Iterable[str]], unlisted: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` (PEP 562) for a package that lists every name in its ``__all__``.

    Args:
        places: modules in the package, and the names that are found in them. All other names are modules themselves.
        unlisted: modules in the package that can be reached, but are not listed.
    """
    namespace = vars(sys.modules[package])
    found_in = {name: module for module, names in places.items() for name in names}
    modules = {*namespace["__all__"], *unlisted} - found_in.keys()

    def __getattr__(name: str) -> Any:
        if name in found_in:
            value = namespace[name] = getattr(import_module(f"{package}.{found_in[name]}"), name)
            return value
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*namespace["__all__"], *(name for name in namespace if name.startswith("__"))})

    return __getattr__, __dir__
