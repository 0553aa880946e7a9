"""The NEON operations of csrc/common/simd against the portable ones, on AArch64 under QEMU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CROSS = "aarch64-linux-gnu-g++"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.skipif(not shutil.which(CROSS), reason="needs g++-aarch64-linux-gnu")
@pytest.mark.skipif(not QEMU, reason="needs qemu-user-static")
def test_neon_computes_what_portable_code_does(tmp_path):
    outputs = []
    for isa in ("neon", "portable"):
        flags = ["-std=c++17", "-O2", "-static", "-ffp-contract=off", f"-DLLMKERN_ISA={isa}"]
        subprocess.run([CROSS, *flags, ROOT / "tests/emulation/simd_check.cpp", "-o", tmp_path / isa], check=True)
        result = subprocess.run([QEMU, tmp_path / isa], capture_output=True, text=True, check=True)
        outputs.append(result.stdout.splitlines())
    neon, portable = outputs
    assert len(neon) == len(portable) > 10_000
    differing = {a.split(":")[0] for a, b in zip(neon, portable, strict=True) if a != b}
    # Those may round otherwise; they are shown once more where there is nothing to round.
    assert differing <= {"sum", "fma", "dot bf16"}
