"""The blocks that run together: their memories, units, clocks, and whose turn it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.emulation.ptx import tensor_copy
from tests.emulation.ptx.barriers import Barriers
from tests.emulation.ptx.check import Clocks, Faults, Shadow
from tests.emulation.ptx.control import LONG_TURN, Code, Unit
from tests.emulation.ptx.mbarrier import Mbarriers
from tests.emulation.ptx.memory import EXISTS, WINDOWS, WRITTEN, GlobalMemory, Space
from tests.emulation.ptx.operands import full
from tests.emulation.ptx.parse import Kernel, PtxError
from tests.emulation.ptx.publish import Messages

#: What a block may have without asking the runtime for more (CUDA C++ Programming Guide, "Shared Memory").
SMALL_SHARED = 48 << 10
#: KiB of shared memory that a block may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
#: Capability"). Not taken from the library: what runs kernels imports nothing of it, so that mutants can be.
MOST_SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
#: Of a grid and of a block in each dimension; a block has no more threads in all than in its first.
MOST_BLOCKS, MOST_THREADS = ((1 << 31) - 1, 65535, 65535), (1024, 1024, 64)
SCHEDULES = ("lockstep", "forward", "reverse", "random")


def check_shared_size(kernel: Kernel, static: int, dynamic: int, most_dynamic: int | None) -> None:
    """Refuses what the assembler or the launch would. most_dynamic: as of `run`."""
    size = static + dynamic
    if static > SMALL_SHARED:
        raise PtxError(f"{kernel.name} has {static} bytes of static shared memory; at most {SMALL_SHARED} are possible")
    if most_dynamic is not None and dynamic > max(most_dynamic, SMALL_SHARED - static):
        raise PtxError(f"{kernel.name} is launched with {dynamic} bytes of shared memory; {most_dynamic} are allowed")
    target = kernel.target.rstrip("af")
    most = MOST_SHARED[target] << 10 if target in MOST_SHARED else None
    if most is not None and size > most:
        raise PtxError(f"{kernel.name} needs {size} bytes of shared memory; a block of {target} has at most {most}")


def check_shape(kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    """Refuses a grid or a block that no launch may have (CUDA C++ Programming Guide, "Technical Specifications per
    Compute Capability"), or that the kernel was not compiled for."""
    for name, shape, limits in (("grid", grid, MOST_BLOCKS), ("block", block, MOST_THREADS)):
        if any(not 1 <= n <= most for n, most in zip(shape, limits, strict=True)):
            raise PtxError(f"{kernel.name} is launched with a {name} of {shape}; from 1 to {limits} are possible")
    threads = math.prod(block)
    most = min(MOST_THREADS[0], kernel.most_threads or MOST_THREADS[0])
    if threads > most:
        raise PtxError(f"{kernel.name} is launched with {threads} threads in a block; at most {most} are possible")
    if kernel.block not in (None, block):
        raise PtxError(f"{kernel.name} is launched with a block of {block}; its .reqntid asks for {kernel.block}")


class Machine:
    def __init__(
        self, code: Code, memory: GlobalMemory, blocks: np.ndarray, grid: tuple[int, ...], block: tuple[int, ...],
        parameters: bytes, dynamic_shared: int, schedule: str, faults: Faults, counts: Any, issued: np.ndarray,
        messages: Messages, seed: int, limit: int, most_dynamic: int | None = None, init_fences: bool = True,
    ) -> None:  # fmt: skip
        self.code, self.blocks, self.grid, self.block_shape = code, blocks, grid, block
        self.block_count, self.threads = len(blocks), block[0] * block[1] * block[2]
        self.faults, self.counts, self.issued, self.messages = faults, counts, issued, messages
        self.schedule, self.random, self.limit = schedule, np.random.default_rng(seed), limit
        self.dynamic_shared, self.most_dynamic = dynamic_shared, most_dynamic
        self.parameters = np.frombuffer(parameters.ljust((len(parameters) + 15) // 16 * 16, b"\0"), np.uint8)
        self.address_of = messages.address_of
        kinds = {kind for kind in ("cp.async", "wgmma") if code.uses(kind)}
        if code.uses("cp.async.bulk") or code.uses("mbarrier") or code.uses("cp.async.mbarrier"):
            kinds.add("mbarrier")
        if any(opcode.startswith("cp.async.bulk") and "group" in opcode for opcode in code.opcodes):
            kinds |= {"bulk", "bulk write"}
        proxies = code.uses("wgmma") or code.uses("cp.async.bulk")
        self.clocks = Clocks(self, kinds, proxies)
        self._spaces(memory)
        self.alive = np.full(self.block_count, self.threads)
        self.barriers = Barriers(self)
        #: Threads that wait for a phase of an mbarrier: (unit, instruction, mask).
        self.blocked: list[tuple[Unit, int, np.ndarray]] = []
        self.init_fences = init_fences
        self.mbarriers = Mbarriers(self, init_fences) if "mbarrier" in kinds else None
        #: Registers of each warpgroup's threads, and what a block's have given up: what setmaxnreg moves.
        groups = (self.clocks.warps + 3) // 4
        self.registers = np.full((self.block_count, groups), code.kernel.registers_of_thread or 0)
        self.spare_registers = np.zeros(self.block_count, np.int64)
        #: Warpgroups that wait for registers: (unit, instruction, mask).
        self.short: list[tuple[Unit, int, np.ndarray]] = []
        #: Looks at threads that end: asynchronous copies that nobody waits for.
        self.at_end = tensor_copy.check_end if "bulk" in kinds else None
        self.steps = 0
        warps = (self.threads + 31) // 32
        # A warpgroup executes wgmma and setmaxnreg together: no schedule parts it, and its missing warps are looked at.
        groups_work = code.uses("wgmma") or code.uses("setmaxnreg")
        together = 4 if groups_work else warps if schedule == "lockstep" else 1
        self.units = [Unit(self, range(w, w + together)) for w in range(0, warps, together)]

    def _spaces(self, memory: GlobalMemory) -> None:
        code, kernel = self.code, self.code.kernel
        offset = 0
        for v in kernel.shared:
            if v.size is not None and v.name in code.symbols_used:
                offset = (offset + v.align - 1) // v.align * v.align
                self.address_of[v.name] = offset
                offset += v.size
        unsized = [v for v in kernel.shared if v.size is None]
        # The driver aligns dynamic shared memory to 16 bytes at least, and to what the kernel declares.
        align = max([16, *(v.align for v in unsized)])
        begin = (offset + align - 1) // align * align
        for v in unsized:
            self.address_of[v.name] = begin
        self.shared_size = begin + self.dynamic_shared if self.dynamic_shared else offset
        check_shared_size(kernel, offset, self.shared_size - offset, self.most_dynamic)
        self.shared_stride = (self.shared_size + 1023) // 1024 * 1024 + 1024
        readers = self.clocks.warps + self.clocks.groups
        shared = Space("shared", self.shared_stride * self.block_count, code.granules["shared"], readers)
        shared.state.reshape(-1)[: self.shared_stride * self.block_count].reshape(self.block_count, -1)[
            :, : self.shared_size
        ] = EXISTS
        shared.describe = lambda index: f"shared address {index % self.shared_stride}"  # type: ignore[method-assign]
        local = 0
        for v in kernel.local:
            local = (local + v.align - 1) // v.align * v.align
            self.address_of[v.name] = local
            local += v.size or 0
        self.local_used, self.local_size = local, (local + 15) // 16 * 16
        locals_ = Space("local", self.local_size * self.block_count * self.threads)
        locals_.state[: self.local_size * self.block_count * self.threads] = EXISTS
        constants = Space("const", sum((v.size or 0) + v.align for v in kernel.constant))
        offset = 0
        for v in kernel.constant:
            offset = (offset + v.align - 1) // v.align * v.align
            self.address_of[v.name] = offset
            data = v.data or bytes(v.size or 0)
            constants.data[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
            constants.state[offset : offset + len(data)] = EXISTS | WRITTEN
            offset += len(data)
        parameters = Space("param", len(self.parameters))
        parameters.data[: len(self.parameters)] = self.parameters
        parameters.state[: len(self.parameters)] = EXISTS | WRITTEN
        if memory.shadow is None or len(memory.shadow.write) <= len(memory.data) // code.granules["global"]:
            memory.shadow = Shadow(len(memory.data), code.granules["global"], readers)
        self.spaces: dict[str, Space] = {
            "global": memory, "shared": shared, "local": locals_, "const": constants, "param": parameters,
        }  # fmt: skip

    def window(self, space: str) -> int:
        return WINDOWS[space]

    def turn(self) -> int:
        """How many instructions a unit may execute before it is another's turn."""
        return int(self.random.integers(1, 200)) if self.schedule == "random" else LONG_TURN

    def finished(self, unit: Unit, mask: np.ndarray) -> None:
        """Threads have ended."""
        mask = mask & unit.alive
        if self.at_end is not None:
            self.at_end(unit, mask)
        unit.alive &= ~mask
        self.alive -= np.bincount(unit.block[mask], minlength=self.block_count)
        if self.barriers.parked:
            self.barriers.release()

    def wake(self) -> bool:
        """Lets threads that wait for an mbarrier look again. Whether there are any."""
        blocked, self.blocked = self.blocked, []
        for unit, at, mask in blocked:
            unit.add_group(at, mask)
        return bool(blocked)

    def registers_were_given(self) -> None:
        """Lets warpgroups that wait for registers look again."""
        short, self.short = self.short, []
        for unit, at, mask in short:
            unit.add_group(at, mask)

    def heard(self, unit: Any, place: Any, address: np.ndarray, mask: Any, acquires: bool) -> None:
        if self.messages.active:
            near = bool(self.code.near[place.site])
            self.messages.heard(self, unit, self._flags(unit, place, address), mask, acquires, near)

    def told(self, unit: Any, place: Any, address: np.ndarray, mask: Any, releases: bool) -> None:
        if self.messages.active:
            near = bool(self.code.near[place.site])
            self.messages.told(self, unit, self._flags(unit, place, address), mask, releases, near)

    def _flags(self, unit: Any, place: Any, address: np.ndarray) -> np.ndarray:
        """Addresses of flags, different ones where blocks have the same shared address."""
        address = full(address, unit.count) + WINDOWS[place.space]
        block = self.blocks[unit.block].astype(np.int64) + 1
        return np.where(address >> 44 == WINDOWS["shared"] >> 44, address + (block << 48), address)

    def run(self) -> None:
        order = self.units[::-1] if self.schedule == "reverse" else list(self.units)
        while True:
            ready = [u for u in order if u.groups or u.resting]
            if not ready:
                if self._collectives_without_the_ended():
                    continue
                self._report_deadlock()
                return
            unit = ready[int(self.random.integers(len(ready))) if self.schedule == "random" else 0]
            if unit.run():  # its turn was over while it could go on: the others' turn
                order.remove(unit)
                order.append(unit)
            if self.steps > self.limit:
                self._report_deadlock(f"no end after {self.steps} instructions of a warp")
                return

    def _collectives_without_the_ended(self) -> bool:
        """Collectives do not wait for threads that have ended since: those that wait look again."""
        moved = False
        for unit in self.units:
            for at, mask in list(unit.waiting.items()):
                key = (at, int(unit.alive.sum()))
                if unit.looked_again.get(at) != key:
                    unit.looked_again[at] = key
                    del unit.waiting[at]
                    unit.add_group(at, mask)
                    moved = True
        return moved

    def _report_deadlock(self, why: str = "nobody can go on") -> None:
        waiting = [(u, f.ins, m, "barrier") for u, f, m in self.barriers.waiting()]
        for u in self.units:
            waiting += [(u, self.code.instructions[at], m, "collective") for at, m in u.waiting.items()]
            waiting += [
                (u, self.code.instructions[at], m, "loop") for at, m in u.groups if at < len(self.code.handlers)
            ]
        waiting += [(u, self.code.instructions[at], m, "mbarrier") for u, at, m in self.blocked]
        waiting += [(u, self.code.instructions[at], m, "registers") for u, at, m in self.short]
        for unit, ins, mask, what in waiting:
            names = {
                "barrier": "threads wait at a barrier that others never reach",
                "collective": "threads wait for others of their warp or warpgroup that never come",
                "mbarrier": "threads wait for a phase of an mbarrier that is never completed",
                "registers": "warpgroups wait for registers that the block has not",
                "loop": "threads go round",
            }
            unit.fault("deadlock", f"{why}: {names[what]}", ins, int(mask.argmax()), int(mask.sum()))
