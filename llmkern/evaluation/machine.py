"""What a figure must be read with: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import llmkern
from llmkern import extension

ROOT = Path(__file__).resolve().parents[2]


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this repository, with "+" where files were changed since; empty without one."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def describe() -> dict[str, Any]:
    """The machine and the software of this process, as plain values for JSON."""
    library = extension._C
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": library.active_isa() if library else "none (the compiled library is missing)",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llmkern": llmkern.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def line(machine: dict[str, Any]) -> str:
    """One line for the head of a table."""
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{machine['processor']}{gpu}, {machine['threads']} of {machine['cores']} cores, {machine['instruction_set']}, "
        f"torch {machine['torch']}, commit {machine['commit'] or 'unknown'}, {machine['date'][:10]}"
    )
