"""A process that compiles kernels instead of interpreting them."""

import os
import subprocess
import sys
from pathlib import Path


def printed_where_kernels_compile(*arguments: str) -> str:
    """What ``python ARGUMENTS`` prints, from the root of the checkout; it must end well."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
