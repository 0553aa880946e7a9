"""Triton kernels, compiled ahead of time: those that the families' Triton launchers list.

A family offers its own by a function `compilations()` in llmkern/<family>/triton*_launch.py, which yields a Compilation
for each kernel and configuration that its launcher uses. It may import triton; importing the launcher must not.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llmkern
from llmkern import triton
from llmkern.inspect import amd, sass, tools
from llmkern.inspect.errors import InspectError
from llmkern.inspect.limits import WARP
from llmkern.inspect.row import Row, row

PACKAGE = Path(llmkern.__file__).resolve().parent


@dataclass(frozen=True)
class Compilation:
    """A @triton.jit function and what Triton must know to compile it."""

    kernel: Any
    config: str  # what tells it from the kernel's other configurations, short
    types: dict[str, str]  # of the arguments that are no constants: "*fp16", "i32"
    constants: dict[str, Any]
    divisible: Sequence[str] = ()  # arguments that are multiples of 16
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, ...
    targets: Sequence[str] = ()  # that have this configuration; none listed: all

    @classmethod
    def of(cls, launch: triton.Launch, config: str, targets: Sequence[str] = ()) -> Compilation:
        """What a launch would compile at its call."""
        types, divisible = triton.signature(launch)
        return cls(triton.function(launch), config, types, launch.constants, divisible, launch.options, targets)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Job:
    compilation: Compilation
    target: str

    @property
    def label(self) -> str:
        return f"{self.compilation.name} ({self.compilation.config}) for {self.target}"

    def kernels(self) -> list[str]:
        return [self.compilation.name]

    def rows(self) -> list[Row]:
        return [compile_one(self.compilation, self.target)]


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def jobs(targets: list[str]) -> list[Job]:
    """Those of all families; none where Triton is not installed."""
    if not installed():
        return []
    if any(target not in amd.LIMITS for target in targets):
        tools.cuobjdump()
    made = []
    for launcher in sorted(PACKAGE.glob("*/triton*_launch.py")):
        module = importlib.import_module(f"llmkern.{launcher.parent.name}.{launcher.stem}")
        listed = getattr(module, "compilations", None)
        if listed is None:
            raise InspectError(f"{module.__name__} has no compilations(), which lists its kernels for the inspector")
        made += [
            Job(compilation, target)
            for compilation in listed()
            for target in targets
            if target in compilation.targets or not compilation.targets
        ]
    return made


def compiled(compilation: Compilation, target: str) -> Any:
    """What Triton makes of one configuration for "sm_80" and so on, or for AMD's "gfx942" and so on."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = compilation.kernel, compilation.constants
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else compilation.types[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in compilation.divisible}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    if target in amd.LIMITS:
        gpu = GPUTarget("hip", target, amd.LIMITS[target].lanes)
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), WARP)
    try:
        return compile(source, target=gpu, options=compilation.options)
    except Exception as error:
        raise InspectError(
            f"{compilation.name} ({compilation.config}) for {target} does not compile:\n  {error}"
        ) from error


def compile_one(compilation: Compilation, target: str) -> Row:
    """One configuration for one target. Its arrays are in registers, so that local memory means spills; ptxas leaves a
    stack that nothing reads or writes in some kernels, which is none."""
    made = compiled(compilation, target)
    if target in amd.LIMITS:
        threads = amd.LIMITS[target].lanes * made.metadata.num_warps
        return amd.row(
            compilation.name, compilation.config, target, int(made.metadata.shared), threads, made.asm["amdgcn"]
        )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{compilation.name}.cubin"
        cubin.write_bytes(made.asm["cubin"])
        used = dict(re.findall(r"(REG|STACK):(\d+)", tools.dump(cubin, "--dump-resource-usage")))
        code = sass.functions(tools.dump(cubin, "-sass"))[made.metadata.name]
    threads = WARP * made.metadata.num_warps
    spilled = int(used["STACK"]) if any(x.opcode in ("LDL", "STL") for x in code) else 0
    return row(
        compilation.name, "triton", compilation.config, target, int(used["REG"]), spilled, int(made.metadata.shared),
        threads, code,
    )  # fmt: skip
