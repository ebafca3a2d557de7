"""torch's ModuleList itself, which a type checker is told the members of."""

__all__ = ["ModuleList"]

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import torch

if TYPE_CHECKING:
    Item = TypeVar("Item", bound=torch.nn.Module)

    class ModuleList(torch.nn.ModuleList, Generic[Item]):
        def __init__(self, modules: Iterable[Item] | None = None) -> None: ...

        def __iter__(self) -> Iterator[Item]: ...

        @overload
        def __getitem__(self, idx: slice) -> "ModuleList[Item]": ...
        @overload
        def __getitem__(self, idx: int) -> Item: ...
        def __getitem__(self, idx): ...

else:
    ModuleList = torch.nn.ModuleList
