"""compute-sanitizer over small calls of every operator: memory errors, races, barriers, uninitialised reads."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.conduct import python
from benchmarks.gpu.steps import Setting, Skipped, Step

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OPERATORS = (
    "attention", "attention backward", "attention varlen", "attention weights", "attention column sums",
    "attention int8", "decode", "rotary", "sinusoidal", "int8 linear", "int8 linear backward",
)  # fmt: skip
#: What the watched program exits with where no call was served, and compute-sanitizer where it found something.
NOTHING_RAN, FOUND = 3, 9


def compute_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def part(setting: Setting) -> Iterator[Step]:
    for tool in TOOLS:
        for operator in OPERATORS:
            for backend in setting.backends:
                yield Step(
                    f"{tool} {operator} on {backend}",
                    lambda tool=tool, operator=operator, backend=backend: watched(setting, tool, operator, backend),
                )


def watched(setting: Setting, tool: str, operator: str, backend: str) -> dict[str, Any]:
    program = python("benchmarks.gpu.contract", setting.device, backend, operator)
    if setting.tiny:
        prefix: list[str] = []  # there is nothing to watch; the program is run all the same
    else:
        found = compute_sanitizer()
        if found is None:
            raise Skipped("compute-sanitizer was not found: it is part of the CUDA toolkit (PATH or CUDA_HOME)")
        prefix = [found, "--tool", tool, "--error-exitcode", str(FOUND)]
    # Torch's allocator hands out parts of larger blocks, whose ends the tool could not see.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([*prefix, *program], env=env, capture_output=True, text=True)
    told = (done.stdout + done.stderr)[-6000:]
    if done.returncode == NOTHING_RAN:
        raise Skipped(f"{backend} serves no small call of it")
    if done.returncode:
        raise AssertionError(f"{tool} exited with status {done.returncode}:\n{told}")
    return {"line": f"nothing found ({done.stdout.strip().splitlines()[-1]})"}
