"""PTX for the tests: of CUDA sources by nvcc, of Triton kernels by Triton's compiler; neither needs a GPU."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.emulation.ptx import launch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "tests/emulation/ptx_kernels"
NVCC = shutil.which("nvcc")
Changes = tuple[tuple[str, str], ...]  # of a source: each old text becomes the new one
NO_NVCC = "there is no nvcc to compile with"


@lru_cache(maxsize=64)
def nvcc(source: Path, architecture: str = "80", changes: Changes = ()) -> str:
    """The PTX of a .cu file with line information. changes: (old, new) texts of the source, or of headers beside it
    that it includes, each found exactly once."""
    texts = {source.name: source.read_text()}
    if changes:
        waiting = [source.name]
        while waiting:
            for name in re.findall(r'^#include "(\w+\.\w+)"', texts[waiting.pop()], re.MULTILINE):
                if name not in texts and (source.parent / name).exists():
                    texts[name] = (source.parent / name).read_text()
                    waiting.append(name)
    for old, new in changes:
        found = sum(text.count(old) for text in texts.values())
        assert found == 1, f"{old!r} stands {found} times in {source.name}"
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = source
        if changes:
            path = Path(folder) / source.name
            for name, text in texts.items():
                (Path(folder) / name).write_text(text)
        out = Path(folder) / "out.ptx"
        flags = [f"-arch=sm_{architecture}", "-std=c++17", "-O3", "-lineinfo", "-ptx"]
        # For quoted includes alone: a family's cuda.h is not the toolkit's.
        flags += ["-Xcompiler", f"-iquote,{source.parent}"]
        subprocess.run([NVCC, *flags, str(path), "-o", str(out)], check=True, capture_output=True)
        return out.read_text()


@dataclasses.dataclass
class TritonKernel:
    """A compiled kernel: its PTX, the shared memory that it needs, its threads, bytes of scratch memory a block, and of
    each argument that is a descriptor what a launch must know to make its tensor map."""

    ptx: str
    shared: int
    threads: int
    scratch: int
    descriptors: tuple[dict[str, Any], ...] = ()

    def run(self, grid: tuple[int, ...], args: Sequence[Any], **options: Any) -> launch.Report:
        """args: those that are no constants. Triton adds scratch memory in global memory, and that of the profiler."""
        blocks = int(np.prod(grid))
        # Blocks find their part of the scratch memory by their number.
        scratch = launch.empty((max(self.scratch * blocks, 1),), np.uint8, "scratch")
        arguments = [*args, scratch, 0]
        return launch.run(self.ptx, None, grid, self.threads, arguments, shared_bytes=self.shared, **options)


def triton(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int = 4, stages: int = 3,
    divisible: Sequence[str] = (), **options: Any,
) -> TritonKernel:  # fmt: skip
    """Compiles a @triton.jit function. types: of the other arguments ("*fp16", "i32"); divisible: those by 16."""
    import triton as package
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages, **options}
    compiled = package.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    data = compiled.metadata
    return TritonKernel(
        compiled.asm["ptx"], data.shared, 32 * data.num_warps, getattr(data, "global_scratch_size", 0) or 0,
        tuple(getattr(data, "tensordesc_meta", None) or ()),
    )  # fmt: skip
