"""torch.nn's submodules under primer_fast.nn: ``from primer_fast.nn.utils.rnn import pad_sequence``."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

__all__ = ["find_torchs_submodules"]
_HERE = "primer_fast.nn."
_OURS = {path.stem for path in Path(__file__).parent.glob("*.py")}


class _Finder(MetaPathFinder, Loader):
    """Torch's module itself, not a second one made of its file: its classes would be others."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_HERE) or fullname[len(_HERE) :].split(".")[0] in _OURS:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__[len(_HERE) :]
        theirs = "primer_fast.functional" if name == "functional" else f"torch.nn.{name}"
        try:
            sys.modules[module.__name__] = import_module(theirs)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"No module named {module.__name__!r}", name=module.__name__) from error


def find_torchs_submodules() -> None:
    """Let ``import`` find them. Calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
