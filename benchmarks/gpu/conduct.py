"""Runs parts, each in a process of its own with a share of the time, so that none depends on another.

A part that crashes, hangs or loses CUDA's context is started again behind the step that did it, which gets a row that
says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import CONTEXT_LOST, read

#: How often a part begins again behind a step that ended its process.
RESTARTS = 6
POLL = 0.1  # seconds
#: Seconds that a part may go on after the time at which it should begin no more steps, to end the last.
GRACE = 15.0


@dataclass(frozen=True)
class Limits:
    """Seconds of all parts together, and of one step."""

    total: float
    step: float


#: Takes a part, the file of its rows and the time until which steps may begin; gives the command to run.
Command = Callable[[str, Path, float], Sequence[str]]


def conduct(
    weights: Mapping[str, float], command: Command, folder: Path, limits: Limits, tell: Callable[[str], None] = print
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each part. weights: each part's share of the time; what one leaves over goes to those behind it."""
    end = time.time() + limits.total
    found: dict[str, list[dict[str, Any]]] = {}
    left = dict(weights)
    for number, name in enumerate(weights, 1):
        remaining = max(end - time.time(), 0.0)
        share = remaining * left[name] / sum(left.values())
        del left[name]
        tell(f"[{number}/{len(weights)}] {name}: at most {share:.0f} s")
        begin = time.time()
        found[name] = run_part(name, command, folder, begin + share, limits.step, tell)
        counts: dict[str, int] = {}
        for row in found[name]:
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        told = ", ".join(f"{n} {status}" for status, n in counts.items()) or "no step"
        tell(f"[{number}/{len(weights)}] {name}: {told}, {time.time() - begin:.0f} s")
    return found


def run_part(
    name: str, command: Command, folder: Path, until: float, step_limit: float, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    why: str | None = None
    rows, errors = folder / f"{name}.rows", folder / f"{name}.stderr"
    for _ in range(RESTARTS + 1):
        before = len(read(rows))
        why = _process(command(name, rows, until), rows, errors, until, step_limit, tell)
        found = read(rows)
        if why is None:
            break
        begun = [r["step"] for r in found if r["status"] == "started"]
        ended = {r["step"] for r in found if r["status"] != "started"}
        open_steps = [s for s in begun if s not in ended]
        with open(rows, "a") as file:
            for step in open_steps or ([] if why == "lost" else ["(the part)"]):
                row = {"step": step, "status": "failed", "reason": why, "stderr": _tail(errors)}
                file.write("\n" + json.dumps(row) + "\n")
                tell(f"  {step}: failed, {why}")
        if (not open_steps and len(found) == before) or time.time() > until:
            break
        if not open_steps and why != "lost":
            break
    ended_rows = [r for r in read(rows) if r["status"] != "started"]
    if why is not None and time.time() > until and not any(r["status"] == "not reached" for r in ended_rows):
        ended_rows.append({"step": "(the rest)", "status": "not reached", "reason": "the part's time is over"})
    return ended_rows


def _process(
    command: Sequence[str], rows: Path, errors: Path, until: float, step_limit: float, tell: Callable[[str], None]
) -> str | None:
    """Runs it to its end, or ends it. Returns why it did not end well, None where it did."""
    told = len(read(rows))
    with open(errors, "wb") as stderr:
        process = subprocess.Popen(command, stdout=stderr, stderr=stderr, start_new_session=True)
        changed = time.time()
        try:
            while process.poll() is None:
                time.sleep(POLL)
                now = read(rows)
                if len(now) > told:
                    changed = time.time()
                    for row in now[told:]:
                        _tell(row, tell)
                    told = len(now)
                if time.time() > until + GRACE:
                    return "ended: the part's time is over"
                if time.time() > changed + step_limit:
                    return f"ended: it hung for more than {step_limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    for row in read(rows)[told:]:
        _tell(row, tell)
    status = process.returncode
    if status == 0:
        return None
    if status == CONTEXT_LOST:
        return "lost"
    return f"it crashed with {signal.Signals(-status).name}" if status < 0 else f"it exited with status {status}"


def _tell(row: Mapping[str, Any], tell: Callable[[str], None]) -> None:
    if row["status"] != "started":
        reason = f": {row['reason']}" if row.get("reason") else ""
        tell(f"  {row['step']}: {row.get('line') or row['status']}{reason}")


def _tail(errors: Path, characters: int = 3000) -> str:
    return errors.read_text(errors="replace")[-characters:]


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
