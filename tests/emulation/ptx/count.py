"""What a launch moved and did: sectors of global memory, bank conflicts, instructions for each pipe.

A request is one instruction of one warp. Global memory is moved in sectors of 32 bytes; a request needs as many as it
touches, and at least its bytes / 32. Shared memory has 32 banks of 4 bytes: a request takes as many wavefronts as the
bank with most different words has, 8-byte accesses half a warp at a time and 16-byte ones a quarter. Caches are not
modelled: `sectors` is what requests ask of the caches, `touched` what the kernel must move at least once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tests.emulation.ptx.control import Code
from tests.emulation.ptx.memory import GlobalMemory

SECTOR, BANKS = 32, 32
PIPES = {
    "matrix": ("mma", "wgmma"),
    "special": ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"),
    "memory": (
        "ld", "st", "ldmatrix", "stmatrix", "atom", "red", "cp", "prefetch", "shfl", "mbarrier", "tensormap",
    ),
    "control": ("bra", "brx", "ret", "exit", "bar", "barrier", "membar", "fence", "trap", "setmaxnreg"),
    "warp": ("vote", "match", "redux", "elect", "activemask"),
}  # fmt: skip
OF_OPCODE = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes}
MULTIPLY_ADD = ("fma", "mul", "add", "sub", "mad")


@dataclasses.dataclass
class Site:
    """An instruction's traffic, summed over requests. fewest: sectors or wavefronts that it could have been."""

    text: str
    line: int
    source: tuple[str, int] | None
    space: str
    writes: bool
    requests: int = 0
    bytes: int = 0
    units: int = 0  #: sectors of global memory, wavefronts of shared
    fewest: int = 0


@dataclasses.dataclass
class Summary:
    """sectors, fewest: of all global requests, [loads, stores]. touched: different sectors, [read, written]; these
    times 32 are the bytes that no version of the kernel avoids. wavefronts, conflicts: of shared memory. issued:
    instructions of warps by pipe. matrix: matrix instructions (of warps; wgmma: of warpgroups) by kind and shape."""

    sectors: list[int]
    fewest: list[int]
    touched: list[int]
    wavefronts: int
    conflicts: int
    issued: dict[str, int]
    matrix: dict[str, int]
    sites: list[Site]


class Counts:
    def __init__(self, code: Code, memory: GlobalMemory) -> None:
        self.code, self.memory = code, memory
        self.sites: dict[tuple[int, str, bool], Site] = {}
        self.touched = [np.zeros(0, bool), np.zeros(0, bool)]

    def _site(self, index: int, space: str, writes: bool) -> Site:
        key = (index, space, writes)
        if key not in self.sites:
            ins = self.code.instructions[index]
            self.sites[key] = Site(ins.text, ins.line, ins.source, space, writes)
        return self.sites[key]

    def access(self, place: Any, unit: Any, space: Any, lanes: Any, index: np.ndarray, writes: bool) -> None:
        """Requests of warps: `index` (threads,) of `place.size` bytes each."""
        warps = (np.arange(unit.count) if lanes is None else lanes) // 32
        self.requests(place.site, space.name, writes, warps, index, place.size)

    def requests(self, site: int, space: str, writes: bool, warps: np.ndarray, index: np.ndarray, size: int) -> None:
        entry = self._site(site, space, writes)
        entry.requests += len(np.unique(warps))
        entry.bytes += size * len(index)
        if space == "global":
            self._global(entry, warps, index, size, writes)
        elif space == "shared":
            self._shared(entry, warps, index, size)

    def _global(self, entry: Site, warps: np.ndarray, index: np.ndarray, size: int, writes: bool) -> None:
        sectors = index // SECTOR
        key = np.unique(warps * (1 << 40) + sectors)
        entry.units += len(key)
        # Threads that read the same bytes need them once.
        different = np.unique(warps * (1 << 44) + index)
        per_warp = np.unique(different >> 44, return_counts=True)[1] * size
        entry.fewest += int((-(-per_warp // SECTOR)).sum())
        self.touch(key & ((1 << 40) - 1), writes)

    def touch(self, sectors: np.ndarray, writes: bool) -> None:
        seen = self.touched[int(writes)]
        if len(seen) * SECTOR < len(self.memory.data):
            seen = np.concatenate([seen, np.zeros(len(self.memory.data) // SECTOR + 1 - len(seen), bool)])
            self.touched[int(writes)] = seen
        seen[sectors] = True

    def _shared(self, entry: Site, warps: np.ndarray, index: np.ndarray, size: int) -> None:
        words = index // 4 if size <= 4 else (index // 4)[:, None] + np.arange(size // 4)
        # A phase is a warp, half of it or a quarter: consecutive active threads.
        first = np.searchsorted(warps, warps)
        phase = warps * 4 + (np.arange(len(warps)) - first) // (32 * 4 // max(size, 4))
        if words.ndim == 2:
            phase = np.broadcast_to(phase[:, None], words.shape)
        key = np.unique((phase.astype(np.int64) << 40) + words)
        phases, number = np.unique(key >> 40, return_inverse=True)
        depth = np.bincount(number * BANKS + (key & ((1 << 40) - 1)) % BANKS, minlength=len(phases) * BANKS)
        entry.units += int(depth.reshape(-1, BANKS).max(1).sum())
        entry.fewest += int((-(-np.bincount(number) // BANKS)).sum())

    def summary(self, issued: np.ndarray) -> Summary:
        sites = sorted(self.sites.values(), key=lambda s: s.line)
        total = lambda what, writes: sum(getattr(s, what) for s in sites if s.space == "global" and s.writes == writes)  # noqa: E731
        shared = [s for s in sites if s.space == "shared"]
        pipes: dict[str, int] = {}
        matrix: dict[str, int] = {}
        for ins, count in zip(self.code.instructions, issued.tolist(), strict=True):
            if not count:
                continue
            pipe = OF_OPCODE.get(ins.opcode, "integer")
            if pipe == "integer" and ins.modifiers and ins.modifiers[-1] in ("f32", "f16x2", "bf16x2", "f16", "bf16"):
                pipe = "multiply-add" if ins.opcode in MULTIPLY_ADD else "float"
            elif ins.modifiers and ins.modifiers[-1] == "f64":
                pipe = "double"
            if ins.opcode == "cvt":
                pipe = "conversion"
            pipes[pipe] = pipes.get(pipe, 0) + count
            if pipe == "matrix" and ins.modifiers[0] in ("sync", "mma_async"):
                kind = ".".join([ins.opcode, *(m for m in ins.modifiers if m not in ("sync", "aligned", "row", "col"))])
                each = 4 if ins.opcode == "wgmma" else 1
                matrix[kind] = matrix.get(kind, 0) + count // each
        return Summary(
            [total("units", w) for w in (False, True)],
            [total("fewest", w) for w in (False, True)],
            [int(t.sum()) for t in self.touched],
            sum(s.units for s in shared),
            sum(s.units - s.fewest for s in shared),
            pipes,
            matrix,
            sites,
        )
