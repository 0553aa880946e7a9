"""The emulated AVX-512 and AMX instructions against those of the processor."""

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


def lacks(isa: str) -> bool:
    return extension.MISSING is not None or isa not in extension._C.supported_isas()


pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")


@pytest.mark.skipif(lacks("avx512"), reason="this processor has no AVX-512 to compare the emulation with")
def test_the_emulation_does_what_the_processor_does(tmp_path):
    compare(tmp_path, ROOT / "tests/emulation/simd_check.cpp", NATIVE, EMULATED, 10_000)


@pytest.mark.skipif(lacks("amx"), reason="this processor has no AMX to compare the emulation with")
def test_emulated_tiles_hold_what_the_processors_do(tmp_path):
    native = [*NATIVE, "-mamx-tile", "-mamx-int8"]
    compare(tmp_path, ROOT / "tests/emulation/amx_check.cpp", native, ["-DLLMKERN_EMULATE_AMX"], 100)


def compare(tmp_path: Path, source: Path, native_flags: list[str], emulated_flags: list[str], least: int) -> None:
    outputs = []
    for name, flags in (("native", native_flags), ("emulated", emulated_flags)):
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *FLAGS, *flags, str(source), "-o", str(tmp_path / name)], check=True)
        result = subprocess.run([str(tmp_path / name)], capture_output=True, text=True, check=True)
        outputs.append(result.stdout.splitlines())
    native, emulated = outputs
    assert len(native) == len(emulated) > least
    differing = {a.split(":")[0] for a, b in zip(native, emulated, strict=True) if a != b}
    assert not differing
