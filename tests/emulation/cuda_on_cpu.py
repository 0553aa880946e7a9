"""CUDA kernels run on the CPU: their sources compiled by the host's compiler against tests/emulation/cuda.

These are the cuda.cu of each family. What is written in instructions that only a GPU has stands in other files
(cuda_*.cu), whose PTX is executed instead.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/emulation/cuda"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path) -> ModuleType:
    """The module of all emulated kernels, compiled into the folder. Its memory errors abort the process."""
    includes = [f"-I{p}" for p in (HERE, pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DLLMKERN_ISA=portable"]
    path = folder / f"emulated_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = ["-x", "c++", *map(str, sorted(ROOT.glob("csrc/*/cuda.cu"))), str(HERE / "module.cpp")]
    command = [
        str(compiler()),
        *flags,
        "-Wall",
        "-Wno-unknown-pragmas",
        *includes,
        "-shared",
        *sources,
        "-o",
        str(path),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spec = importlib.util.spec_from_file_location("emulated_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
