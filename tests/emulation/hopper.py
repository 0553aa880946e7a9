"""What the compiler makes of a kernel with a producer and consumers in registers of their own (setmaxnreg)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.emulation import compilers


def roles_keep_registers(source: Path, folder: Path, kernels: int, threads: int) -> str:
    """Asserts of so many kernels of a file that nothing is spilled and that each role keeps to the registers that it
    has taken. Returns what ptxas said."""
    cubin = folder / "sm90.cubin"
    command = [compilers.NVCC, "-arch=sm_90a", "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", source, "-o", cubin]
    said = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stderr
    assert "serialized" not in said and "setmaxnreg" not in said, said
    assert re.findall(r"(\d+) bytes spill", said) == ["0"] * (2 * kernels)  # stores and loads
    at_launch = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(at_launch) == kernels and all(n * threads <= 65536 for n in at_launch)
    triton = pytest.importorskip("triton", reason="Triton brings the disassembler")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    code = subprocess.run([str(tool), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"\n\.text\..*:\n", code)[1:]
    assert len(parts) == kernels
    for text in parts:
        # The producer's part stands behind the instruction by which it gives registers up.
        before, producer = text.split("USETMAXREG.DEALLOC.CTAPOOL")
        taken = int(re.search(r"USETMAXREG.TRY_ALLOC.CTAPOOL \S+, (0x\w+)", before)[1], 16)
        left = int(re.match(r" (0x\w+)", producer)[1], 16)
        assert (left + 2 * taken) * 128 <= 65536
        highest = lambda part: max(int(n) for n in re.findall(r"\bR(\d+)\b", part))  # noqa: E731
        assert highest(before) < taken, "the consumers"
        assert highest(producer[: producer.rindex("EXIT")]) < left, "the producer"
    return said
