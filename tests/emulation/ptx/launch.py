"""The entry: `run(ptx, kernel, grid, block, args)` executes a kernel over numpy buffers and reports what it found."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tests.emulation.ptx import (  # noqa: F401  (each registers its instructions)
    asynchronous,
    atomics,
    bits,
    collective,
    compare,
    conversion,
    floating,
    integer,
    matrix,
    mbarrier,
    memory,
    publish,
    registers,
    tensor_copy,
    wgmma,
)
from tests.emulation.ptx.check import Fault, Faults
from tests.emulation.ptx.control import Code
from tests.emulation.ptx.count import Counts, Summary
from tests.emulation.ptx.machine import SCHEDULES, Machine, check_shape
from tests.emulation.ptx.memory import GlobalMemory
from tests.emulation.ptx.parse import Kernel, PtxError, Variable, parse
from tests.emulation.ptx.tensor_copy import TensorMap


class EmulationError(AssertionError):
    """A kernel had faults; the message lists them."""


@dataclasses.dataclass
class Buffer:
    """Memory of a launch. data: any array, also of a type of its own; written: False for memory that nobody has written
    yet; read_only: writing is a fault; offset: bytes by which it is off a multiple of 256."""

    data: np.ndarray
    name: str = ""
    written: bool = True
    read_only: bool = False
    offset: int = 0


@dataclasses.dataclass
class Report:
    """What a launch did. `counts` is None where it was not asked for."""

    faults: list[Fault]
    counts: Summary | None
    issued: int  #: instructions, each counted once for a warp

    def raise_if_faulty(self) -> Report:
        if self.faults:
            raise EmulationError("\n".join(map(str, self.faults)))
        return self


def empty(shape: Any, dtype: Any, name: str = "") -> Buffer:
    """A buffer that the kernel must write before anybody reads it."""
    return Buffer(np.zeros(shape, dtype), name, written=False)


@lru_cache(maxsize=64)
def kernels_of(ptx: str) -> dict[str, Kernel]:
    """The kernels of a module by name."""
    return parse(ptx)


@lru_cache(maxsize=64)
def _compiled(ptx: str, name: str) -> Code:
    return Code(kernels_of(ptx)[name])


def find(ptx: str, part: str | None = None) -> str:
    """The name of the one kernel whose name contains `part`."""
    known = kernels_of(ptx)
    names = [n for n in known if part is None or part == n] or [n for n in known if part and part in n]
    if len(names) != 1:
        raise PtxError(f"{len(names)} kernels have {part!r} in their name: {', '.join(names or known)}")
    return names[0]


class Launch:
    """Buffers of one or several launches: their addresses are known before, to stand in a struct of arguments."""

    def __init__(self) -> None:
        self.memory = GlobalMemory()
        self.buffers: list[tuple[int, Buffer]] = []

    def address(self, data: np.ndarray | Buffer, name: str = "") -> int:
        """The address of a copy of the buffer; `run` writes the results back into `data`."""
        buffer = data if isinstance(data, Buffer) else Buffer(data, name)
        where = self.memory.allocate(buffer.data.nbytes, buffer.name or f"buffer {len(self.buffers)}", buffer.offset)
        if buffer.written:
            self.memory.put(where, np.ascontiguousarray(buffer.data), buffer.read_only)
        self.buffers.append((where, buffer))
        return where

    def write_back(self) -> None:
        for where, buffer in self.buffers:
            if not buffer.read_only and buffer.data.flags.writeable:
                raw = self.memory.get(where, buffer.data.nbytes)
                buffer.data[...] = raw.view(buffer.data.dtype).reshape(buffer.data.shape)


def run(
    ptx: str, kernel: str | None, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence[Any], *,
    shared_bytes: int = 0, schedule: str = "lockstep", seed: int = 0, counts: bool = False,
    launch: Launch | None = None, threads_at_once: int = 4096, limit: int = 50_000_000,
    most_dynamic: int | None = None, init_fences: bool = True,
) -> Report:  # fmt: skip
    """Runs a kernel and writes the results into the buffers.

    kernel: its name or a part of it that no other kernel of the module has; None for the only one.
    args: one for each parameter: an array or Buffer (becomes a pointer), a number, bytes (a struct), a TensorMap.
    shared_bytes: dynamic shared memory of a block.
    schedule: "lockstep" (all warps together: the fastest), "forward", "reverse" (a warp runs until it must wait, the
        first or the last first), "random" (turns of random length; `seed`). Atomics on one address are done in the
        order of the threads, for "reverse" against it, for "random" in any.
    counts: whether to count memory traffic and bank conflicts, which costs time.
    launch: buffers whose addresses stand in structs among the arguments.
    threads_at_once: how many threads' blocks run together; blocks beyond them run afterwards.
    most_dynamic: what the kernel's cudaFuncAttributeMaxDynamicSharedMemorySize was set to, 0 if it was not: without it
        a block has at most 48 KB. None: as much as needed. The target's limit holds always.
    init_fences: whether a copy to an mbarrier without a fence behind its init is a fault, and a wgmma that adds to a
        constant which a mov brought behind the last wgmma.fence.
    limit: instructions (of a warp) after which a kernel counts as endless.

    Faults are in the report, not raised. PtxError: what cannot be executed.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    name = find(ptx, kernel)
    code = _compiled(ptx, name)
    grid, block = (_three(x) for x in (grid, block))
    check_shape(code.kernel, grid, block)
    launch = launch or Launch()
    parameters = _pack(code.kernel.parameters, args, launch)
    faults = Faults()
    orders = any(part in o for o in code.opcodes for part in ("membar", "fence.", "acq", "release"))
    messages = publish.Messages(
        orders, any("cta" in i.modifiers or "cluster" in i.modifiers for i in code.instructions)
    )
    for variable in code.kernel.module:
        where = launch.memory.allocate(variable.size or 0, variable.name)
        launch.memory.put(where, variable.data or bytes(variable.size or 0))
        messages.address_of[variable.name] = where
    offset = 0
    for variable, value in zip(code.kernel.parameters, parameters, strict=True):
        offset = (offset + variable.align - 1) // variable.align * variable.align
        messages.address_of[variable.name] = offset
        offset += len(value)
    packed = b""
    for variable, value in zip(code.kernel.parameters, parameters, strict=True):
        packed = packed.ljust(messages.address_of[variable.name], b"\0") + value
    counter = Counts(code, launch.memory) if counts else None
    issued = np.zeros(len(code.instructions), np.int64)
    launch.memory.shadow = None
    all_blocks = np.arange(grid[0] * grid[1] * grid[2])
    if schedule == "reverse":
        all_blocks = all_blocks[::-1].copy()
    elif schedule == "random":
        all_blocks = np.random.default_rng(seed).permutation(all_blocks)
    at_once = max(1, threads_at_once // (block[0] * block[1] * block[2]))
    with np.errstate(all="ignore"):
        for first in range(0, len(all_blocks), at_once):
            machine = Machine(
                code, launch.memory, all_blocks[first : first + at_once], grid, block, packed, shared_bytes, schedule,
                faults, counter, issued, messages, seed + first, limit, most_dynamic, init_fences,
            )  # fmt: skip
            machine.run()
            if any(f.kind in ("deadlock", "trap") for f in faults.list()):
                break
    launch.write_back()
    summary = counter.summary(issued) if counter is not None else None
    return Report(faults.list(), summary, int(issued.sum()))


def _three(x: int | Sequence[int]) -> tuple[int, int, int]:
    values = (x,) if isinstance(x, int) else tuple(x)
    a, b, c = (*values, 1, 1, 1)[:3]
    return a, b, c


def _pack(parameters: list[Variable], args: Sequence[Any], launch: Launch) -> list[bytes]:
    """The arguments as the bytes of the parameters."""
    if len(args) != len(parameters):
        raise TypeError(f"args: expected {len(parameters)} for {[p.name for p in parameters]}, got {len(args)}")
    packed = []
    for parameter, value in zip(parameters, args, strict=True):
        size = parameter.size or 0
        if isinstance(value, TensorMap):
            raw = value.encode(launch)
        elif isinstance(value, bytes):
            raw = value
        elif isinstance(value, np.ndarray | Buffer) and not (isinstance(value, np.ndarray) and value.ndim == 0):
            raw = struct.pack("<Q", launch.address(value, _short(parameter.name)))
        elif parameter.type[0] == "f" or isinstance(value, float | np.floating):
            raw = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(value))
        else:
            raw = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if len(raw) != size:
            raise TypeError(f"args: {parameter.name} has {size} bytes, got {len(raw)}")
        packed.append(raw)
    return packed


def _short(name: str) -> str:
    return "argument " + name.rsplit("_param_", 1)[-1]


def run_schedules(
    ptx: str, kernel: str | None, grid: Any, block: Any, make_args: Any, outputs: Any, **options: Any
) -> list[Fault]:
    """Runs a kernel under every schedule; the faults, with "non-determinism" where outputs differ in any bit.

    make_args: gives fresh arguments for a run; outputs(args): the arrays to be compared.
    """
    found: dict[str, Fault] = {}
    first: list[bytes] | None = None
    for schedule in SCHEDULES:
        args = make_args()
        report = run(ptx, kernel, grid, block, args, schedule=schedule, **options)
        for fault in report.faults:
            found.setdefault(f"{fault.kind} {fault.instruction and fault.instruction.line}", fault)
        results = [np.ascontiguousarray(x).tobytes() for x in outputs(args)]
        if first is None:
            first = results
        for i, (a, b) in enumerate(zip(first, results, strict=True)):
            if a != b:
                message = f"output {i} under the schedule {schedule} is not that under {SCHEDULES[0]}"
                found.setdefault(f"non-determinism {i}", Fault("non-determinism", message, None, 0, 0))
    return list(found.values())
