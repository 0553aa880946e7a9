"""What the device is and what it reaches: a measured copy and measured products, which shares of peak refer to."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

from benchmarks.gpu.sanitizer import compute_sanitizer
from benchmarks.gpu.steps import Setting, Step
from benchmarks.gpu.timing import once
from llmkern.backend import Operator
from llmkern.evaluation import machine

PEERS = ("triton", "flash_attn", "flashinfer", "liger_kernel", "torchao", "matplotlib")
#: Multiply-adds of an SM in a cycle with bf16 inputs and fp32 sums (docs/inspect.md), for the peak by the data sheet.
TENSOR_RATES = {(8, 0): 1024, (8, 6): 512, (8, 9): 512, (9, 0): 2048, (10, 0): 4096, (12, 0): 512}


def part(setting: Setting) -> Iterator[Step]:
    yield Step("what it is", lambda: description(setting))
    yield Step("what it reaches", lambda: reached(setting))
    yield Step("what serves each operator", lambda: served(setting))


def description(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {**machine.describe(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    found["packages"] = {name: _version(name) for name in PEERS}
    found["compute_sanitizer"] = compute_sanitizer()
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size", "clock_rate",
                 "memory_clock_rate", "memory_bus_width", "shared_memory_per_block_optin")  # fmt: skip
        found["device"] = {n: getattr(properties, n, None) for n in names}
        found["free_bytes"], _ = torch.cuda.mem_get_info()
        if shutil.which("nvidia-smi"):
            asked = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu,utilization.gpu"
            told = subprocess.run(
                ["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], capture_output=True, text=True
            )  # fmt: skip
            found["nvidia_smi"] = told.stdout.strip() or told.stderr.strip()
    name = found["gpu"] or found["processor"]
    return {"machine": found, "line": f"{name}, torch {found['torch']}, commit {found['commit'] or 'unknown'}"}


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@lru_cache(maxsize=1)
def rates(device: str) -> dict[str, float]:
    """Bytes per second of a copy (read and written), operations per second of products (a multiply-add counts 2)."""
    large = device == "cuda"
    block = torch.zeros((1 << 29) if large else (1 << 20), dtype=torch.int8, device=device)
    other = torch.empty_like(block)
    found = {"copy": 2.0 * block.numel() / _best(lambda: other.copy_(block), device)}
    n = 8192 if large else 64
    for short, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.items():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[short] = 2.0 * n**3 / _best(lambda a=a, b=b: a @ b, device)
    a8, b8 = (torch.randint(-127, 127, (n, n), device=device).to(torch.int8) for _ in range(2))
    try:
        found["int8"] = 2.0 * n**3 / _best(lambda: torch._int_mm(a8, b8.t()), device)
    except RuntimeError:  # older devices have none
        found["int8"] = found["bf16"]
    return found


def _best(function: Callable[[], Any], device: str) -> float:
    """Of a few calls the quickest: what slows one down is no property of the device."""
    function()
    return min(once(function, device) for _ in range(5))


def reached(setting: Setting) -> dict[str, Any]:
    found = rates(setting.device)
    peaks = by_data_sheet() if setting.device == "cuda" else {}
    products = ", ".join(f"{k} {v / 1e12:.3g}" for k, v in found.items() if k != "copy")
    return {
        "status": "measured", "rates": found, "peaks": peaks,
        "line": f"copy {found['copy'] / 1e9:.4g} GB/s; products {products} T/s",
    }  # fmt: skip


def by_data_sheet() -> dict[str, float]:
    """Peaks from the device's properties; without those that torch does not tell."""
    p = torch.cuda.get_device_properties(0)
    clock, memory = getattr(p, "clock_rate", 0), getattr(p, "memory_clock_rate", 0)
    peaks = {}
    rate = TENSOR_RATES.get((p.major, p.minor))
    if rate and clock:
        peaks["bf16"] = 2.0 * rate * p.multi_processor_count * clock * 1e3
        peaks["int8"] = 2 * peaks["bf16"]
    if memory and getattr(p, "memory_bus_width", 0):
        peaks["memory"] = 2.0 * memory * 1e3 * p.memory_bus_width / 8
    return peaks


def floor(device: str, flops: float, dtype: str, bytes: float) -> float:
    """Seconds that no version beats at the measured rates: the longer of arithmetic and moving, which go on at once."""
    found = rates(device)
    return max(flops / found[dtype], bytes / found["copy"])


def served(setting: Setting) -> dict[str, Any]:
    table = {
        f"{name} {short}": {b: reason or "serves it" for b, reason in operator.reasons(setting.device, dtype)}
        for name, operator in Operator.all.items()
        for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))
    }
    return {"backends": table}
