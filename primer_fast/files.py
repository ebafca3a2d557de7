"""Replacing files: whoever reads one finds the old content or the new, whole, whenever the writer was killed."""

__all__ = ["flush_names", "replace_file", "replace_files"]

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


def replace_file(path: str | Path, content: str | bytes, suffix: str | None = None) -> None:
    """``replace_files`` of one."""
    replace_files({Path(path): content}, suffix)


def replace_files(contents: Mapping[Path, str | bytes], suffix: str | None = None) -> None:
    """Write all under temporary names and flush them to the disk before the first is renamed. A str becomes UTF-8.

    Args:
        suffix: what the temporary names end with. None: an ending that no other process uses.

    Raises:
        OSError: a file cannot be written; none has changed, unless the renaming itself failed.
    """
    suffix = f".{os.getpid()}.tmp" if suffix is None else suffix
    temporary = {path: path.with_name(path.name + suffix) for path in contents}
    try:
        for path, content in contents.items():
            with temporary[path].open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path, written in temporary.items():
            os.replace(written, path)
    except BaseException:
        for written in temporary.values():
            with contextlib.suppress(OSError):
                written.unlink()  # a full disk has better use for it
        raise
    for folder in dict.fromkeys(path.parent for path in contents):
        flush_names(folder)


def flush_names(folder: Path) -> None:
    """Have what was renamed in ``folder`` reach the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
