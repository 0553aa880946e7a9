"""The memory that a call takes at its peak."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_RESET = Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process, of its own pages and of files it has mapped."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def installed() -> int:
    """Bytes of memory that this process may have: the machine's, or a container's limit on Linux."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole


def release() -> None:
    """Gives what is freed back to the system, so that it does not count as used."""
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library
            return


def peak(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes at the peak of a call above what was used before it; None where the system does not tell.

    Of a GPU, what torch's allocator gave out. Of a CPU, the process's resident pages (Linux): a call that finds pages
    which an earlier one left in the allocator's hands shows fewer.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    release()
    try:
        before = resident("VmRSS")
        _RESET.write_text("5")  # sets the peak back to what is used now
    except (OSError, TypeError):  # another system, or one that forbids it
        return None
    function()
    return max(0, resident("VmHWM") - before)
