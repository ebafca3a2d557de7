"""The machine and the versions behind a figure."""

import datetime
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch
import triton

import primer_fast
from primer_fast import bench, kernels
from primer_fast.kernels.tunable import TUNED

STAND_IN = "Stand-in"  # the device's name in a rehearsal, see stages/rehearsal.py
_OF_A_RUN = ("device", "kind", "torch", "source", "small")


def describe(device: str, small: bool = False) -> dict:
    """What a report's header says of "cpu" or "cuda" and the software; an entry that cannot be found out is None.

    small: whether sizes are those of a rehearsal, which the header then says.
    """
    name, details = _gpu() if device == "cuda" else _cpu()
    return {
        "device": name,
        "kind": device,
        "details": details,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "commit": commit(),
        "source": source(),
        "tuned": tuned(),
    } | ({"small": True} if small else {})


def same_run(header: dict, other: dict) -> bool:
    """Whether what stands behind two headers may stand in one file: of one machine and source, of equal sizes."""
    return all(header.get(key) == other.get(key) for key in _OF_A_RUN)


def source() -> str:
    """A digest of the package's own Python files: names the code that was measured where there is no git."""
    digest = hashlib.sha256()
    for package in (bench, kernels, primer_fast):
        folder = Path(package.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package.__name__} {path.relative_to(folder).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tuned(folder: Path = TUNED) -> str | None:
    """A digest of the settings that measurement has chosen; None where there are none."""
    files = sorted(folder.glob("*.json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16] if files else None


def commit(repository: Path = Path(__file__).parent) -> str | None:
    """The commit measured, with "+changes" where tracked files differ from it; None outside a checkout."""
    found = _first_line("git", "-C", str(repository), "rev-parse", "--short=12", "HEAD")
    changed = _first_line("git", "-C", str(repository), "status", "--porcelain", "--untracked-files=no")
    return f"{found}+changes" if found and changed else found


def _gpu() -> tuple[str, str]:
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    details = (
        f"sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors, "
        f"{found.total_memory / 2**30:.0f} GiB, {found.L2_cache_size / 2**20:.0f} MiB L2"
    )
    return found.name, details


def _cpu() -> tuple[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine(), (
        f"{torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    )


def said(*command: str) -> list[str]:
    """The lines that a command prints; none where it fails, or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _first_line(*command: str) -> str | None:
    return next((line.strip() for line in said(*command) if line.strip()), None)
