"""Settings that measurement can overrule: a file for each GPU, in which a problem looks up the bucket it falls into.

tuned/<gpu>.json: {"gpu", "date", "torch", "triton", "settings": {choice: {bucket: {**settings, "seconds",
"default_seconds"}}}}. A bucket is sizes, each rounded to a power of two, and flags that must be equal, for example
"4096x4096 item2". An entry serves the problems of exactly its bucket; all others get the default. An entry without
settings says that nothing beat the default. What cannot be read is ignored with one warning: a user's run never fails
for a file that an editor or another version left.

There are two kinds of choices. Settings are numbers: tile sizes, warps, stages. Variants are ways to compute the same,
and their only setting is a name: {"variant": "prepass"}. The seconds of settings are those of the launches made with
them. The seconds of a variant are those of the whole op, forward and backward: ways also differ in copies and in how
many kernels they launch.
"""

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .launch.prepared import forget, unprepared

TUNED = Path(__file__).parent / "tuned"
FIGURES = ("seconds", "default_seconds")  # of an entry, beside the settings


def bucket_of(*sizes: int, **flags: int) -> str:
    """The bucket of a problem: its sizes, each to the nearest power of two, then the flags in the order given."""
    rounded = "x".join(str(2 ** round(math.log2(max(n, 1)))) for n in sizes)
    return " ".join((rounded, *(f"{name}{int(value)}" for name, value in flags.items())))


class Choice:
    """One place where a launcher chooses settings for a problem: ``choice(gpu, problem)``.

    Args:
        name: in the files.
        settings: the NamedTuple of them.
        bucket: problem -> its bucket, see ``bucket_of``.
        fits: (gpu, problem, settings) -> whether they can be launched for this problem and leave none of it idle.
            Asked of settings from a file, as a bucket holds a range of sizes.
        default: (gpu, problem) -> settings, where no file has better.
    """

    def __init__(self, name: str, settings: type, bucket: Callable, fits: Callable, default: Callable):
        self.name, self.settings = name, settings
        self.bucket, self.fits, self.default = bucket, fits, default
        self.chosen = functools.lru_cache(maxsize=4096)(self._choose)
        self.tuned = functools.cache(self._tuned)
        _choices.append(self)

    def __call__(self, gpu, problem):
        return self.chosen(gpu, problem) if _watcher is None else _watcher(self, gpu, problem)

    def _choose(self, gpu, problem):
        """The tuned settings of the problem's bucket where they fit the problem, otherwise the default."""
        tuned = self.tuned(gpu.name, self.bucket(problem))
        return tuned if tuned is not None and self.fits(gpu, problem, tuned) else self.default(gpu, problem)

    def _tuned(self, gpu_name: str, bucket: str):
        """The settings that a file has for a bucket; None where it has none, or says that nothing beat the default."""
        entry = _file(gpu_name).get(self.name, {}).get(bucket, {})
        try:
            return self._parse(entry)
        except ValueError as error:
            _warn(_path(gpu_name), f"{self.name} {bucket}: {error}")
            return None

    def _parse(self, entry):
        if not isinstance(entry, dict):
            raise ValueError(f"an entry must be an object; got {entry}")
        values = {name: value for name, value in entry.items() if name not in FIGURES}
        if not values:
            return None
        if set(values) != set(self.settings._fields) or not all(map(self._allowed, values.values())):
            raise ValueError(
                f"settings must be {', '.join(self.settings._fields)}, {self._what_is_allowed}; got {values}"
            )
        return self.settings(**values)

    _what_is_allowed = "whole numbers"

    @staticmethod
    def _allowed(value) -> bool:
        return isinstance(value, int) and value >= 0


class Variant(NamedTuple):
    """The settings that ``Variants`` give: the name of a way."""

    variant: str


class Variants(Choice):
    """One place where a launcher chooses between ways to compute the same: ``variants(gpu, problem).variant``.

    Args:
        ways: name -> (gpu, problem) -> whether the problem can be computed that way.
        default: (gpu, problem) -> the name of a way that can, where no file has better.
        name, bucket: see Choice.
    """

    def __init__(self, name: str, bucket: Callable, ways: dict[str, Callable], default: Callable):
        self.ways = ways
        super().__init__(
            name, Variant, bucket, lambda gpu, problem, s: ways[s.variant](gpu, problem),
            lambda gpu, problem: Variant(default(gpu, problem)),
        )  # fmt: skip
        self._what_is_allowed = f"one of {', '.join(ways)}"

    def _allowed(self, value) -> bool:
        return isinstance(value, str) and value in self.ways


_choices: list[Choice] = []
_watcher: Callable | None = None


@contextlib.contextmanager
def watching(watcher: Callable):
    """Inside, settings are what ``watcher(choice, gpu, problem)`` returns; ``choice.chosen`` gives the usual ones."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        with unprepared():  # a prepared launcher asks for no settings
            yield
    finally:
        _watcher = before


def forget_tuned() -> None:
    """Forget what was read and chosen, as a file has changed."""
    _file.cache_clear()
    for choice in _choices:
        choice.chosen.cache_clear()
        choice.tuned.cache_clear()
    forget()


def _path(gpu_name: str) -> Path:
    return TUNED / f"{gpu_name}.json"


@functools.cache
def _file(gpu_name: str) -> dict:
    """The "settings" of a GPU's file; empty where there is none or none that can be read."""
    path = _path(gpu_name)
    try:
        return read_tuned(path)["settings"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(path, str(error))
        return {}


def read_tuned(path: Path) -> dict:
    """The content of a file, its form checked.

    Raises:
        ValueError: it is not JSON, or has another form.
        OSError: it cannot be read.
    """
    content = json.loads(path.read_text(encoding="utf-8"))  # JSONDecodeError, UnicodeDecodeError are ValueErrors
    sections = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ValueError('it must hold {"settings": {choice: {bucket: {...}}}}')
    return content


def _warn(path: Path, why: str) -> None:
    warnings.warn(f"tuned settings in {path} are ignored: {why}", stacklevel=2)
