"""CUDA C++ kernels, compiled by nvcc: csrc/*/cuda*.cu, whatever files are there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llmkern
from llmkern.inspect import sass, tools
from llmkern.inspect.errors import InspectError
from llmkern.inspect.row import Row, row

CSRC = Path(llmkern.__file__).resolve().parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O3"]  # those of setup.py that change machine code
OLDEST = "compute_80"  # what it makes PTX for


@dataclass(frozen=True)
class Job:
    """A source file and its targets. Files named cuda_sm90*.cu use what sm_90a alone has."""

    source: Path
    targets: Sequence[str]

    @property
    def label(self) -> str:
        return _label(self.source, self.targets)

    def kernels(self) -> list[str]:
        """Names of the kernels that the file defines."""
        text = re.sub(r"__launch_bounds__\s*\([^)]*\)(?:\))?", "", self.source.read_text())
        return re.findall(r"__global__[^;{(]*?(\w+)\s*\(", text)

    def rows(self) -> list[Row]:
        return compile_file(self.source, self.targets)


def jobs(targets: list[str]) -> list[Job]:
    files = sorted(CSRC.glob("*/cuda*.cu"))
    if not files:
        raise InspectError(f"there are no CUDA sources in {CSRC}: run in a clone of the repository")
    tools.nvcc(), tools.cuobjdump()
    made = []
    for file in files:
        if not file.name.startswith("cuda_sm90"):
            made.append(Job(file, targets))
        elif "sm_90" in targets:
            made.append(Job(file, ["sm_90a"]))
    return made


@dataclass(frozen=True)
class Resources:
    """Of a kernel, as ptxas tells. local_bytes: of a thread, for what its registers do not hold."""

    registers: int
    local_bytes: int
    shared_bytes: int


def resources(log: str) -> dict[str, Resources]:
    """The mangled name of each kernel in what `ptxas -v` prints, and what it needs.

    Spills: the most of the stores', the loads' and the stack frame's bytes, so that arrays in local memory count too.
    """
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if frame is None or used is None:
            raise InspectError(f"ptxas does not tell what {name} needs:\n{part[:400]}")
        shared = re.search(r"(\d+) bytes smem", part)
        local = max(map(int, frame.groups()))
        found[name] = Resources(int(used[1]), local, int(shared[1]) if shared else 0)
    return found


@dataclass(frozen=True)
class Entry:
    """Of a kernel, as its PTX tells; None where it does not."""

    threads: int | None  # of a block, at most
    dynamic_shared: int | None


def entries(ptx: str) -> dict[str, Entry]:
    """Each kernel of a PTX file: .maxntid or .reqntid, and what device::note_shared_bytes<n>() of device.cuh notes.

    A kernel that uses a shared array of open size without the note has None there; one that uses none has 0.
    """
    found = {}
    open_arrays = re.findall(r"^\.extern \.shared .*?(\w+)\[\];", ptx, re.M)
    for part in re.split(r"^(?:\.visible |\.weak )?\.entry ", ptx, flags=re.M)[1:]:
        name = part.split("(", 1)[0].strip()
        body = part.split("\n}\n", 1)[0]
        size = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", body)
        threads = None
        if size:
            x, y, z = (int(n or 1) for n in size.groups())
            threads = x * y * z
        noted = [int(n) for n in re.findall(r"llmkern\.shared_bytes (\d+)", body)]
        dynamic: int | None = max(noted, default=0)
        if not noted and any(re.search(rf"\b{array}\b", body) for array in open_arrays):
            dynamic = None
        found[name] = Entry(threads, dynamic)
    return found


def compile_file(source: Path, targets: Sequence[str]) -> list[Row]:
    """The kernels of one file for each target, in setup.py's way: its PTX is made once and assembled for all."""
    front = "compute_90a" if "sm_90a" in targets else OLDEST
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / f"{source.stem}.ptx"
        command = [tools.nvcc(), *FLAGS, f"-arch={front}", "-ptx", str(source), "-o", str(ptx)]
        tools.run(_label(source, targets), command)
        return [r for target in targets for r in _assemble(source, ptx, target)]


def _assemble(source: Path, ptx: Path, target: str) -> list[Row]:
    cubin = ptx.with_suffix(".cubin")
    command = [tools.nvcc(), f"-arch={target}", "-cubin", "-Xptxas", "-v", str(ptx), "-o", str(cubin)]
    _, log = tools.run(_label(source, [target]), command)
    code = sass.functions(tools.dump(cubin, "-sass"))
    rows, told = [], entries(ptx.read_text())
    for mangled, used in resources(log).items():
        kernel, config = tools.short_name(mangled)
        entry = told[mangled]
        shared = None if entry.dynamic_shared is None else used.shared_bytes + entry.dynamic_shared
        rows.append(
            row(kernel, "cuda", config, target, used.registers, used.local_bytes, shared, entry.threads, code[mangled])
        )
    return rows


def _label(source: Path, targets: Sequence[str]) -> str:
    return f"{source.parent.name}/{source.name} for {', '.join(targets)}"
