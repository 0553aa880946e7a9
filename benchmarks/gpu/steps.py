"""What a part of the suite is made of: steps, each with a result of its own, run one after another in a process."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkern.backend import BackendError


@dataclass(frozen=True)
class Setting:
    """device: "cuda", or "cpu", where every line runs at tiny sizes with llmkern's CPU kernels, to try the suite."""

    device: str
    quick: bool
    seed: int = 0

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    @property
    def backends(self) -> tuple[str, ...]:
        return ("cpu",) if self.tiny else ("cuda", "triton")


class Skipped(Exception):
    """A step has nothing to do here; the message says why."""


@dataclass(frozen=True)
class Step:
    """One case. run: returns what the row holds besides; raises where it fails, and Skipped where it has no place."""

    name: str
    run: Callable[[], dict[str, Any]]


Part = Callable[[Setting], Iterator[Step]]

#: What the process exits with once CUDA's context is lost: later calls of it would fail too, of a new one would not.
CONTEXT_LOST = 17


def run_steps(part: Part, setting: Setting, rows: Path, done: Set[str], until: float) -> int:
    """Runs the steps that are not in `done`, and appends a JSON line to `rows` before and behind each.

    until: the time (time.time()) after which no step begins. Returns the status to exit with.
    """
    for step in part(setting):
        if step.name in done:
            continue
        if time.time() > until:
            _append(rows, {"step": step.name, "status": "not reached"})
            continue
        _append(rows, {"step": step.name, "status": "started"})
        row, lost = run_step(step)
        _append(rows, row)
        if lost:
            return CONTEXT_LOST
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def run_step(step: Step) -> tuple[dict[str, Any], bool]:
    """The step's row, and whether CUDA's context is lost."""
    row: dict[str, Any] = {"step": step.name}
    begin, lost = time.perf_counter(), False
    try:
        row |= {"status": "passed", **step.run()}
    except (Skipped, BackendError) as reason:
        row |= {"status": "skipped", "reason": str(reason)}
    except torch.OutOfMemoryError as error:
        row |= {"status": "failed", "reason": f"out of memory: {_first_line(error)}"}
    except Exception as error:
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}
        row["traceback"] = traceback.format_exc()
        lost = context_lost(error)
    return {**row, "wall_seconds": round(time.perf_counter() - begin, 3)}, lost


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def context_lost(error: BaseException) -> bool:
    """After an error within a kernel every later call of this process fails."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return "illegal memory access" in str(error) or "unspecified launch failure" in str(error)


def _append(rows: Path, row: dict[str, Any]) -> None:
    with open(rows, "a") as file:
        file.write(json.dumps(row, default=str) + "\n")


def read(rows: Path) -> list[dict[str, Any]]:
    """The rows so far; a last line that a killed process wrote half of is left out."""
    found = []
    for line in rows.read_text().splitlines() if rows.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
