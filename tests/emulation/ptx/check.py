"""Who knows of whose accesses: races, missing waits and missing fences, and the list of faults that were found.

Every thread has a clock, and knows how far each other thread's clock had come when it last heard of it: by a barrier,
an mbarrier, a wait. An access is in order where the thread knows of the access before it; the rest are races, whatever
the schedule was (vector clocks: Lamport 1978, Mattern 1988; the epochs kept for each address: Flanagan and Freund 2009,
"FastTrack"). Copies and matrix products that run by themselves (PTX ISA 9.7.9.25: cp.async, 9.7.15: wgmma) count as
actors with clocks of their own, which threads get to know by waiting.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tests.emulation.ptx.parse import Instruction

#: An epoch: block + 1, actor, clock, strong, site + 1, from the top.
SITE_BITS, CLOCK_SHIFT, ACTOR_SHIFT, BLOCK_SHIFT = 16, 17, 34, 47
STRONG = np.int64(1 << SITE_BITS)
CLOCK_MASK, ACTOR_MASK = (1 << (ACTOR_SHIFT - CLOCK_SHIFT)) - 1, (1 << (BLOCK_SHIFT - ACTOR_SHIFT)) - 1
#: Actors beside the threads of a block: how many there are for n threads, and what a thread calls to wait for them.
ACTORS = {
    "cp.async": (lambda n: n, "cp.async.wait_group (or wait_all) of the thread that copied"),
    "bulk": (lambda n: n, "cp.async.bulk.wait_group of the thread that copied"),
    "wgmma": (lambda n: (n + 127) // 128, "wgmma.wait_group"),
    "mbarrier": (lambda n: 64, "a wait for the phase of its mbarrier"),
}


@dataclasses.dataclass
class Fault:
    """kind: "out of bounds", "misaligned", "uninitialised", "read-only", "race", "missing wait", "missing fence",
    "barrier divergence", "deadlock", "mbarrier", "collective", "trap". count: how often it was seen there."""

    kind: str
    message: str
    instruction: Instruction | None
    block: int
    thread: int
    count: int = 1

    def __str__(self) -> str:
        where = f" at {self.instruction.where()}: {self.instruction.text}" if self.instruction else ""
        times = f" (and {self.count - 1} more)" if self.count > 1 else ""
        return f"{self.kind}: {self.message}; block {self.block}, thread {self.thread}{where}{times}"


class Faults:
    """The faults of a launch, one for each kind and instruction."""

    def __init__(self) -> None:
        self.by_place: dict[tuple[str, int, str], Fault] = {}

    def add(self, kind: str, message: str, ins: Instruction | None, block: int, thread: int, count: int = 1) -> None:
        key = (kind, ins.line, ins.text) if ins else (kind, 0, message)
        if key in self.by_place:
            self.by_place[key].count += count
        else:
            self.by_place[key] = Fault(kind, message, ins, block, thread, count)

    def list(self) -> list[Fault]:
        return list(self.by_place.values())


class Clocks:
    """The clocks of the blocks that run together: `rows` (block, thread), columns the actors of the row's block."""

    def __init__(self, machine: Any, kinds: set[str], proxies: bool) -> None:
        n = machine.threads
        self.first: dict[str, int] = {}
        columns = n
        for kind in ACTORS:
            if kind in kinds:
                self.first[kind] = columns
                columns += ACTORS[kind][0](n)
        self.columns = columns
        #: Actors below work through the generic proxy: threads and their cp.async (PTX ISA 9.7.9.25.2).
        self.generic = n + (n if "cp.async" in self.first else 0)
        rows = machine.block_count * n
        self.known = np.zeros((rows, columns), np.int32)
        self.thread = np.tile(np.arange(n), machine.block_count)
        self.known[np.arange(rows), self.thread] = 1
        #: What of the generic proxy's writes is visible to the asynchronous one.
        self.fenced = np.zeros_like(self.known) if proxies else None
        self.block = np.repeat(machine.blocks, n)
        self.base = (self.block + 1 << BLOCK_SHIFT) + (self.thread << ACTOR_SHIFT)
        self.stamp = self.base + (1 << CLOCK_SHIFT)  #: epoch of each thread now, without a site
        #: Other blocks' accesses that a block knows of: (block, other block) -> clocks of the other's actors.
        self.foreign: dict[tuple[int, int], np.ndarray] = {}

    def advance(self, rows: np.ndarray) -> None:
        """The threads' next accesses are later than what anybody has heard of them so far."""
        own = self.known[rows, self.thread[rows]] + 1
        self.known[rows, self.thread[rows]] = own
        self.stamp[rows] = self.base[rows] + (own.astype(np.int64) << CLOCK_SHIFT)

    def meet(self, rows: np.ndarray) -> None:
        """rows (groups, members): the members of each group learn all that one of them knows (a barrier)."""
        for table in (self.known, self.fenced):
            if table is not None:
                table[rows] = table[rows].max(1, keepdims=True)
        self.advance(rows.reshape(-1))

    def learn(self, rows: np.ndarray, clocks: np.ndarray, fenced: np.ndarray | None = None) -> None:
        self.known[rows] = np.maximum(self.known[rows], clocks)
        if self.fenced is not None and fenced is not None:
            self.fenced[rows] = np.maximum(self.fenced[rows], fenced)

    def actor_stamp(self, rows: np.ndarray, kind: str, which: np.ndarray, clock: np.ndarray) -> np.ndarray:
        """The epoch of an asynchronous actor that these threads set going."""
        actor = (self.first[kind] + which).astype(np.int64)
        return (self.block[rows] + 1 << BLOCK_SHIFT) + (actor << ACTOR_SHIFT) + (clock.astype(np.int64) << CLOCK_SHIFT)

    def unordered(self, epochs: np.ndarray, rows: np.ndarray, table: np.ndarray | None = None) -> np.ndarray:
        """Which epochs the threads do not know of. epochs (..., n), rows (n,)."""
        actor = epochs >> ACTOR_SHIFT & ACTOR_MASK
        clock = epochs >> CLOCK_SHIFT & CLOCK_MASK
        known = (self.known if table is None else table).reshape(-1)[rows * self.columns + actor]
        other = (epochs >> BLOCK_SHIFT) - 1 != self.block[rows]
        bad = (epochs != 0) & ((known < clock) | other)
        if other.any():
            foreign = bad & other
            for at in zip(*np.nonzero(foreign), strict=True):
                pair = (int(self.block[rows[at[-1]]]), int(epochs[at] >> BLOCK_SHIFT) - 1)
                heard = self.foreign.get(pair)
                if heard is not None and heard[actor[at]] >= clock[at]:
                    bad[at] = False
        return bad

    def name(self, epoch: int, threads: int) -> tuple[str, str | None]:
        """The actor of an epoch in words, and what waits for it (None for a thread)."""
        actor = int(epoch >> ACTOR_SHIFT & ACTOR_MASK)
        if actor < threads:
            return f"thread {actor} of block {int(epoch >> BLOCK_SHIFT) - 1}", None
        for kind, first in reversed(self.first.items()):
            if actor >= first:
                what = {"cp.async": "cp.async of thread", "bulk": "bulk copy of thread", "wgmma": "wgmma of warpgroup"}
                return f"{what.get(kind, 'bulk copy to the mbarrier in slot')} {actor - first}", ACTORS[kind][1]
        raise AssertionError(actor)


class Shadow:
    """The last write and two last reads of each `granule` bytes of a memory, as epochs."""

    def __init__(self, size: int, granule: int) -> None:
        self.granule = granule
        self.shift = granule.bit_length() - 1
        n = size // granule + 2
        self.write = np.zeros(n, np.int64)
        self.read = np.zeros(n, np.int64)
        self.other_read = np.zeros(n, np.int64)

    def clear(self, begin: int, end: int) -> None:
        """Forgets what happened to bytes [begin, end)."""
        for epochs in (self.write, self.read, self.other_read):
            epochs[begin >> self.shift : end + self.granule - 1 >> self.shift] = 0


class Access:
    """One look at shadowed memory: `index` (n,) first bytes of `size` bytes each, by the threads in `rows`."""

    def __init__(self, machine: Any, space: Any, ins: Instruction, site: int, index: np.ndarray, size: int) -> None:
        self.machine, self.space, self.ins, self.site = machine, space, ins, site
        self.shadow: Shadow = space.shadow
        self.cells = index >> self.shadow.shift
        if size > self.shadow.granule:
            self.cells = self.cells + np.arange(size >> self.shadow.shift)[:, None]

    def reads(self, rows: np.ndarray, stamp: np.ndarray, strong: bool = False, proxy: bool = False) -> None:
        shadow, cells = self.shadow, self.cells
        last = shadow.write[cells]
        if last.any():
            self._judge(last, rows, strong, "written", proxy)
        mine = np.broadcast_to(stamp + (self.site + 1) + (STRONG if strong else 0), cells.shape)
        before = shadow.read[cells]
        if before.any():
            others = (before ^ mine) >> ACTOR_SHIFT != 0
            shadow.other_read[cells] = np.where(others & (before != 0), before, shadow.other_read[cells])
        shadow.read[cells] = mine
        lost = shadow.read[cells] != mine
        if lost.any():
            shadow.other_read[cells[lost]] = mine[lost]

    def writes(
        self, rows: np.ndarray, stamp: np.ndarray, strong: bool = False, proxy: bool = False, harmless: Any = None
    ) -> None:
        shadow, cells = self.shadow, self.cells
        for epochs, what in ((shadow.write, "written"), (shadow.read, "read"), (shadow.other_read, "read")):
            last = epochs[cells]
            if last.any():
                self._judge(last if harmless is None else np.where(harmless, 0, last), rows, strong, what, proxy)
        shadow.write[cells] = stamp + (self.site + 1) + (STRONG if strong else 0)
        shadow.read[cells] = 0
        shadow.other_read[cells] = 0

    def _judge(self, last: np.ndarray, rows: np.ndarray, strong: bool, what: str, proxy: bool) -> None:
        clocks: Clocks = self.machine.clocks
        bad = clocks.unordered(last, rows)
        if strong:
            bad &= last & STRONG == 0
        if bad.any():
            self._report(bad, last, rows, what)
        elif proxy and what == "written":
            actor = last >> ACTOR_SHIFT & ACTOR_MASK
            unseen = clocks.unordered(last, rows, clocks.fenced) & (actor < clocks.generic)
            if unseen.any():
                self._report(unseen, last, rows, what, fence=True)

    def _report(self, bad: np.ndarray, last: np.ndarray, rows: np.ndarray, what: str, fence: bool = False) -> None:
        at = tuple(i[0] for i in np.nonzero(bad))
        epoch, row = int(last[at]), int(rows[at[-1]])
        clocks: Clocks = self.machine.clocks
        who, wait = clocks.name(epoch, self.machine.threads)
        other = self.machine.code.instructions[(epoch & (int(STRONG) - 1)) - 1]
        address = self.space.describe(int(self.cells[at]) << self.shadow.shift)
        what += f" by {who} at {other.where()} ({other.text})"
        if fence:
            kind, message = "missing fence", f"{address} was {what} without fence.proxy.async behind it"
        elif wait:
            kind, message = "missing wait", f"{address} is {what}, which needs {wait}"
        else:
            kind, message = "race", f"{address} was {what} with no barrier between"
        self.machine.faults.add(
            kind, message, self.ins, int(clocks.block[row]), int(clocks.thread[row]), int(bad.sum())
        )
