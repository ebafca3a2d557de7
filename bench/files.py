"""Files of results: what stands there is the old content or the new, never half of it."""

import os
from pathlib import Path


def replace_text(path: str | Path, text: str) -> None:
    """Write under a temporary name, then rename; folders that are missing are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(path)
