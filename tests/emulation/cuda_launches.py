"""A family's CUDA launchers as nvcc compiled them, their launches noted and then executed by the PTX emulator."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11

from tests.emulation import compilers
from tests.emulation.ptx.launch import Buffer, Launch, Report, kernels_of, run

HERE = compilers.ROOT / "tests/emulation/cuda"
#: Modules that have not all the sources of a family: those whose names these begin with.
PARTS = {
    "attention": ("attention", "cuda_forward", "cuda_sm90"),
    "attention_cached": ("attention", "cuda_cache", "cuda_decode"),
}
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def build(folder: Path, family: str) -> tuple[ModuleType, list[str]]:
    """The module <family>_launches of tests/emulation/cuda, without a CUDA runtime, and the kernels' PTX. family: a
    folder of csrc, or a name in PARTS."""
    compile_in(folder, family)
    return load(folder, family)


def compile_in(folder: Path, family: str) -> None:
    """Compiles what `load` loads. Raises AssertionError with what nvcc says."""
    name = f"{family}_launches"
    includes = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++17", "-O3", "-lineinfo", "-DLLMKERN_SM90"]
    host = ["-Xcompiler=-O1,-fPIC,-fvisibility=hidden"]
    kernels, objects, running = sources_of(family), [], []
    for source in [*kernels, HERE / f"{name}.cpp"]:
        objects.append(str(folder / f"{source.stem}.o"))
        keep = ["-keep", f"-keep-dir={folder}"] if source in kernels else []
        architecture = architecture_of(source)
        code = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
        command = [compilers.NVCC, *flags, code, *host, *includes, *keep, "-c", str(source), "-o", objects[-1]]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in running:
        told = process.communicate()[0]
        assert process.returncode == 0, told
    out = folder / f"{name}{SUFFIX}"
    subprocess.run([compilers.NVCC, "-shared", "-cudart", "none", *objects, "-o", str(out)], check=True)


def load(folder: Path, family: str) -> tuple[ModuleType, list[str]]:
    name = f"{family}_launches"
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}{SUFFIX}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, [(folder / f"{source.stem}.ptx").read_text() for source in sources_of(family)]


def sources_of(family: str) -> list[Path]:
    folder, *stems = PARTS.get(family, (family, "cuda"))
    return sorted(p for p in compilers.ROOT.glob(f"csrc/{folder}/cuda*.cu") if p.stem.startswith(tuple(stems)))


def architecture_of(source: Path) -> str:
    """What a source is compiled for: as setup.py does, the oldest, or Hopper's own where its name says so."""
    return "90a" if source.stem.startswith("cuda_sm90") else "80"


class Emulated:
    """Runs what launchers launch. options: of `run`; reports: of the launches since it was emptied, by kernel."""

    def __init__(self, module: ModuleType, sources: list[str]) -> None:
        self.module, self.options = module, {"schedule": "lockstep"}
        self.reports: list[tuple[str, Report]] = []
        self.ptx: dict[str, tuple[str, str]] = {}  # with the name there, by that without the file's namespace
        for ptx in sources:
            self.use(ptx)

    def use(self, ptx: str) -> None:
        """Takes the kernels of this PTX from here on."""
        for kernel in kernels_of(ptx).values():
            name = self.module.bare(kernel.name)
            self.ptx[name] = ptx, kernel.name
            own = sum(v.size or 0 for v in kernel.shared)
            self.module.set_sizes(name, [p.size for p in kernel.parameters], own)

    def call(self, launcher: Callable[[], Any], launch: Launch) -> None:
        """launcher: queues kernels that work on the buffers of `launch`."""
        launcher()
        for kernel, grid, block, shared, arguments in self.module.take():
            ptx, name = self.ptx[kernel]
            report = run(ptx, name, grid, block, arguments, shared_bytes=shared, launch=launch, **self.options)
            self.reports.append((kernel, report.raise_if_faulty()))

    def last(self, part: str) -> Report | None:
        """Of the last launch of a kernel with this in its name; None where there was none."""
        return next((report for kernel, report in reversed(self.reports) if part in kernel), None)


def buffer_of(address: int, size: int, name: str, read_only: bool = True) -> Buffer:
    """A copy of `size` bytes of this process's memory, as far off a multiple of 256 as they are."""
    data = np.frombuffer(ctypes.string_at(address, size), np.uint8).copy()
    return Buffer(data, name, read_only=read_only, offset=address % 256)


def copy_back(buffer: Buffer, address: int) -> None:
    ctypes.memmove(address, buffer.data.ctypes.data, buffer.data.nbytes)
