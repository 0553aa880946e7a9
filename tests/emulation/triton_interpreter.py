"""Triton kernels run by Triton's own interpreter, on CPU tensors.

Triton chooses between compiler and interpreter for a whole process, by TRITON_INTERPRET=1 before its import:
`run_tests` runs a file of tests in such a process. The interpreter cuts fp32 off when it makes bf16 of it, where
hardware rounds to nearest, and multiplies matrices of bf16 as if their bits were integers: `round_as_hardware` puts
both right. (Other arithmetic on bf16 is wrong in it: kernels widen first, as they do for its precision anyway.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def run_tests(path: str) -> str:
    """Runs a test file with the interpreter and returns pytest's report. Raises AssertionError if a test failed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", path]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def interpret(launch: Any) -> None:
    """Stands for llmkern.triton.run in such a process."""
    from llmkern import triton

    triton.function(launch)[launch.grid](*triton.arguments(launch), **launch.constants)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bit patterns (uint16) of float32 numbers rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of bit patterns (uint16)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_as_hardware() -> None:
    """From here on, the interpreter of this process rounds from fp32 to bf16 to nearest, and multiplies bf16."""
    import triton.language as tl
    from triton.runtime import interpreter

    before = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(to_bf16(source.data), tl.bfloat16)
        return before(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast  # create_fp_trunc goes through it
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        return interpreter.TensorHandle(from_bf16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
