"""The most memory that a call needs beyond what was there before it, as the system or the GPU's allocator counts it."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """Of one call on "cpu" or "cuda", results included; None where the system does not say.

    Call the function before: what it keeps, such as a library's buffers, counts the first time.
    """
    before = begin(device)
    kept = function()
    peak = end(device, before)
    del kept
    return peak


def begin(device: str) -> int | None:
    """Forget the peak so far; what ``end`` needs to tell how much was needed since.

    On a CPU that is the peak of the process's resident pages, which Linux can be told to forget (proc(5), clear_refs).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # pages freed but kept would be used again unseen
        _CLEAR.write_text("5", encoding="utf-8")
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def end(device: str, before: int | None) -> int | None:
    if before is None:
        return None
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(0, _resident("VmHWM") - before)


def _resident(entry: str) -> int:
    return int(re.search(rf"{entry}:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))[1]) * 1024
