"""The emulated AVX-512 instructions against those of the processor."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llmkern import extension

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-DLLMKERN_ISA=avx512"]
NATIVE = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16", "-mf16c", "-mfma"]
EMULATED = ["-DLLMKERN_EMULATE_AVX512", "-mavx2", "-mfma", "-mf16c", "-Wno-psabi"]


def has_avx512() -> bool:
    return extension.MISSING is None and "avx512" in extension._C.supported_isas()


@pytest.mark.skipif(not has_avx512(), reason="this processor has no AVX-512 to compare the emulation with")
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")
def test_the_emulation_does_what_the_processor_does(tmp_path):
    outputs = []
    for name, flags in (("native", NATIVE), ("emulated", EMULATED)):
        source = ROOT / "tests/emulation/simd_check.cpp"
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *FLAGS, *flags, str(source), "-o", str(tmp_path / name)], check=True)
        result = subprocess.run([str(tmp_path / name)], capture_output=True, text=True, check=True)
        outputs.append(result.stdout.splitlines())
    native, emulated = outputs
    assert len(native) == len(emulated) > 10_000
    differing = {a.split(":")[0] for a, b in zip(native, emulated, strict=True) if a != b}
    assert not differing
