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
BELOW_ACTOR = (1 << ACTOR_SHIFT) - 1
LANE_BITS = 31 << ACTOR_SHIFT
#: What epochs of lanes of a warp at one clock have in common.
SAME_WARP = np.int64(~(LANE_BITS | (1 << SITE_BITS) - 1))
LANES = np.arange(32)
#: Actors beside the threads of a block: how many there are for n threads, and what a thread calls to wait for them.
ACTORS = {
    "cp.async": (lambda n: n, "cp.async.wait_group (or wait_all) of the thread that copied"),
    "bulk": (lambda n: n, "cp.async.bulk.wait_group of the thread that copied"),  # what its stores read
    "bulk write": (lambda n: n, "cp.async.bulk.wait_group, without .read, of the thread that copied"),
    "wgmma": (lambda n: (n + 127) // 128, "wgmma.wait_group"),
    "mbarrier": (lambda n: 64, "a wait for the phase of its mbarrier"),
}


@dataclasses.dataclass
class Fault:
    """kind: "out of bounds", "misaligned", "uninitialised", "read-only", "race", "missing wait", "missing fence",
    "barrier divergence", "deadlock", "mbarrier", "collective", "registers", "trap". count: how often it was seen."""

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
        self.warps = (n + 31) // 32
        columns = self.first_actor = 32 * self.warps  # the last warp's missing lanes have columns too
        for kind in ACTORS:
            if kind in kinds:
                self.first[kind] = columns
                columns += ACTORS[kind][0](n)
        self.columns = columns
        #: Actors below work through the generic proxy: threads and their cp.async (PTX ISA 9.7.9.25.2).
        self.generic = self.first_actor + (n if "cp.async" in self.first else 0)
        rows = machine.block_count * n
        self.known = np.zeros((rows, columns), np.int32)
        self.thread = np.tile(np.arange(n), machine.block_count)
        self.known[np.arange(rows), self.thread] = 1
        self.known[:, n : self.first_actor] = np.iinfo(np.int32).max  # of them, everything is known
        self.warp = np.repeat(np.arange(machine.block_count), n) * self.warps + self.thread // 32
        self.bit = np.uint32(1) << (self.thread % 32).astype(np.uint32)
        self.groups = ACTORS["wgmma"][0](n) if "wgmma" in kinds else 0
        #: What of the generic proxy's writes is visible to the asynchronous one: in shared and in global memory.
        self.fenced = np.zeros((rows, 2, columns), np.int32) if proxies else None
        self.block = np.repeat(machine.blocks, n)
        self.base = (self.block + 1 << BLOCK_SHIFT) + (self.thread << ACTOR_SHIFT)
        self.stamp = self.base + (1 << CLOCK_SHIFT)  #: epoch of each thread now, without a site
        #: Other blocks' accesses that a block knows of: (block, other block) -> clocks of the other's actors.
        self.foreign: dict[tuple[int, int], np.ndarray] = {}

    def advance(self, rows: np.ndarray) -> None:
        """The next accesses of these threads, and of their warps, are later than what anybody has heard of them.

        A warp's clocks are always the same, so that accesses of its lanes can be kept together.
        """
        warps = np.zeros(self.warp[-1] + 1, bool)
        warps[self.warp[rows]] = True
        rows = np.nonzero(warps[self.warp])[0]
        own = self.known[rows, self.thread[rows]] + 1
        self.known[rows, self.thread[rows]] = own
        self.stamp[rows] = self.base[rows] + (own.astype(np.int64) << CLOCK_SHIFT)

    def column(self, rows: np.ndarray, actor: int) -> Any:
        """Where a Shadow keeps reads of these threads, or of an actor that one of them set going; None: nowhere."""
        if actor < self.first_actor:
            return self.thread[rows] // 32
        if self.groups and 0 <= actor - self.first["wgmma"] < self.groups:
            return self.warps + actor - self.first["wgmma"]
        return None

    def known_of_warps(self, rows: np.ndarray) -> np.ndarray:
        """(n, columns of a Shadow): the clock up to which each thread knows of all lanes of each warp."""
        same = rows.strides == (0,)
        known = self.known[rows[:1] if same else rows]
        by_warp = known[:, : self.first_actor].reshape(len(known), self.warps, 32).min(2)
        if self.groups:
            first = self.first["wgmma"]
            by_warp = np.concatenate([by_warp, known[:, first : first + self.groups]], 1)
        return by_warp

    def unknown_lanes(self, epochs: np.ndarray, lanes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of reads by lanes of a warp at these epochs, the lanes whose reads the threads in `rows` do not know of."""
        actor = epochs >> ACTOR_SHIFT & ACTOR_MASK
        thread = actor < self.first_actor
        each = np.where(
            thread[:, None], (epochs & ~np.int64(LANE_BITS))[:, None] | LANES << ACTOR_SHIFT, epochs[:, None]
        )
        bits = (lanes[:, None] >> LANES.astype(np.uint32) & 1).astype(bool)
        unknown = bits & self.unordered(np.where(bits, each, 0).T, rows).T
        return (unknown * (np.int64(1) << LANES)).sum(1).astype(np.uint32)

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

    def unordered(self, epochs: np.ndarray, rows: np.ndarray, fenced: int | None = None) -> np.ndarray:
        """Which epochs the threads do not know of. epochs (..., n), rows (n,). fenced: 0 or 1, by that part of it."""
        actor = epochs >> ACTOR_SHIFT & ACTOR_MASK
        clock = epochs >> CLOCK_SHIFT & CLOCK_MASK
        if fenced is None:
            known = self.known.reshape(-1)[rows * self.columns + actor]
        else:
            assert self.fenced is not None
            known = self.fenced.reshape(-1)[(2 * rows + fenced) * self.columns + actor]
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
                what = {"cp.async": "cp.async of thread", "wgmma": "wgmma of warpgroup"}
                what |= {"bulk": "bulk copy of thread", "bulk write": "bulk copy of thread"}
                return f"{what.get(kind, 'bulk copy to the mbarrier in slot')} {actor - first}", ACTORS[kind][1]
        raise AssertionError(actor)


class Shadow:
    """The last write of each `granule` bytes of a memory, and the reads since then that a write must come after.

    Reads by threads are kept by warp (`columns` of a block; behind the warps, the warpgroups whose wgmma reads): the
    epoch of the last one, and the lanes that read then; reads of other lanes from before, that these do not know of,
    are put aside. A memory that several blocks share has the warps of the block that read last. `read` and `other_read`
    are two reads by what has no column: copies, and threads of other blocks.
    """

    def __init__(self, size: int, granule: int, columns: int) -> None:
        self.granule = granule
        self.shift = granule.bit_length() - 1
        self.cells = size // granule + 2
        self.write = np.zeros(self.cells, np.int64)
        self.read = np.zeros(self.cells, np.int64)
        self.other_read = np.zeros(self.cells, np.int64)
        self.by_warp = np.zeros((columns, self.cells), np.int64)
        self.lanes = np.zeros((columns, self.cells), np.uint32)
        self.aside: dict[int, set[int]] = {}  #: cell -> epochs of threads

    def keep(self, cells: np.ndarray, epochs: np.ndarray) -> None:
        """Reads by what has no column."""
        before = self.read[cells]
        if before.any():
            others = (before ^ epochs) >> ACTOR_SHIFT != 0
            self.other_read[cells] = np.where(others & (before != 0), before, self.other_read[cells])
        self.read[cells] = epochs
        lost = self.read[cells] != epochs
        if lost.any():
            self.other_read[cells[lost]] = epochs[lost]

    def put_aside(self, cells: np.ndarray, epochs: np.ndarray, lanes: np.ndarray) -> None:
        """Reads at epochs of a warp by some of its lanes."""
        for cell, epoch, some in zip(cells.tolist(), epochs.tolist(), lanes.tolist(), strict=True):
            kept = self.aside.setdefault(cell, set())
            for lane in range(32):
                if some >> lane & 1:
                    own = epoch & ~LANE_BITS | lane << ACTOR_SHIFT
                    old = {e for e in kept if (e ^ own) & ~BELOW_ACTOR == 0 and e & int(STRONG) == own & int(STRONG)}
                    kept -= old
                    kept.add(own)

    def forget_reads(self, cells: np.ndarray) -> None:
        self.read[cells] = 0
        self.other_read[cells] = 0
        self.by_warp[:, cells] = 0
        if self.aside:
            for cell in set(self.aside) & set(cells.reshape(-1).tolist()):
                del self.aside[cell]


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
        if not len(rows):
            return
        clocks: Clocks = self.machine.clocks
        last = shadow.write[cells]
        if last.any():
            self._judge(last, rows, strong, "written", proxy)
        mine = stamp + (self.site + 1) + (STRONG if strong else 0)
        column = clocks.column(rows, int(stamp[0] >> ACTOR_SHIFT & ACTOR_MASK))
        if column is None:
            shadow.keep(cells, np.broadcast_to(mine, cells.shape))
        elif isinstance(column, int):  # wgmma: whoever has waited for a later one has waited for an earlier one
            shadow.by_warp[column, cells] = mine
            shadow.lanes[column, cells] = 1
        else:
            self._keep_by_warp(rows, mine, column, clocks.bit[rows])

    def _keep_by_warp(self, rows: np.ndarray, mine: np.ndarray, column: Any, bits: np.ndarray) -> None:
        shadow = self.shadow
        at = self.cells + column * shadow.cells
        shape = at.shape
        epochs, lanes = shadow.by_warp.reshape(-1), shadow.lanes.reshape(-1)
        before = epochs[at]
        new = (before ^ mine) & SAME_WARP != 0
        old: Any = None
        if new.any():
            at_new = at[new]
            found = before[new] != 0
            if found.any():
                old = (at_new[found], before[new][found], lanes[at_new[found]])
                old_rows = np.broadcast_to(rows, shape)[new][found]
                old_mine = np.broadcast_to(mine, shape)[new][found]
            lanes[at_new] = 0
            epochs[at] = mine
            won = (epochs[at] ^ mine) & SAME_WARP == 0
            if not won.all():  # read by several blocks at once
                shadow.keep(self.cells[~won], np.broadcast_to(mine, shape)[~won])
                np.bitwise_or.at(lanes, at[won], np.broadcast_to(bits, shape)[won])
            else:
                np.bitwise_or.at(lanes, at, np.broadcast_to(bits, shape))
        else:
            np.bitwise_or.at(lanes, at, np.broadcast_to(bits, shape))
        if old is not None:
            self._keep_older(*old, old_rows, old_mine)

    def _keep_older(
        self, at: np.ndarray, before: np.ndarray, lanes: np.ndarray, rows: np.ndarray, mine: np.ndarray
    ) -> None:
        """What of the reads that new ones of the same column took the place of must be kept."""
        shadow = self.shadow
        clocks: Clocks = self.machine.clocks
        cells = at % shadow.cells
        foreign = (before ^ mine) >> BLOCK_SHIFT != 0
        if foreign.any():
            shadow.keep(cells[foreign], before[foreign])
        weaker = (before & STRONG == 0) & (mine & STRONG != 0)
        left = np.where(weaker, lanes, lanes & ~shadow.lanes.reshape(-1)[at])
        open_ = ~foreign & (left != 0) & (before >> ACTOR_SHIFT & ACTOR_MASK < clocks.first_actor)
        if open_.any():
            left = clocks.unknown_lanes(before[open_], left[open_], rows[open_])
            some = left != 0
            shadow.put_aside(cells[open_][some], before[open_][some], left[some])

    def writes(
        self, rows: np.ndarray, stamp: np.ndarray, strong: bool = False, proxy: bool = False, harmless: Any = None
    ) -> None:
        shadow, cells = self.shadow, self.cells
        for epochs, what in ((shadow.write, "written"), (shadow.read, "read"), (shadow.other_read, "read")):
            last = epochs[cells]
            if last.any():
                self._judge(last if harmless is None else np.where(harmless, 0, last), rows, strong, what, proxy)
        self._judge_warps(rows, strong, proxy, harmless)
        if strong and self.space.name == "global" and self.machine.code.near[self.site]:
            self._judge_each_other(rows)
        if shadow.aside:
            self._judge_aside(rows, strong, proxy, harmless)
        shadow.write[cells] = stamp + (self.site + 1) + (STRONG if strong else 0)
        if harmless is None or not harmless.any():
            shadow.forget_reads(cells)
        elif not harmless.all():
            shadow.forget_reads(cells[..., ~harmless])

    def _judge_warps(self, rows: np.ndarray, strong: bool, proxy: bool, harmless: Any) -> None:
        clocks: Clocks = self.machine.clocks
        last = self.shadow.by_warp[:, self.cells]
        if not last.any():
            return
        clock = last >> CLOCK_SHIFT & CLOCK_MASK
        known = clocks.known_of_warps(rows).T
        if last.ndim == 3:
            known = known[:, None]
        bad = (last != 0) & (clock > known)
        if self.space.name == "global":
            bad |= (last != 0) & ((last >> BLOCK_SHIFT) - 1 != clocks.block[rows])
        if strong:
            bad &= self._weak(last, rows)
        if harmless is not None:
            bad &= ~harmless
        if not bad.any():
            return
        where = np.nonzero(bad)
        epochs, row = last[bad], np.broadcast_to(rows, bad.shape[1:])[where[1:]]
        cells = self.cells[where[1:]]
        lanes = self.shadow.lanes[where[0], cells]
        own = (lanes == clocks.bit[row]) & (epochs >> ACTOR_SHIFT == clocks.stamp[row] >> ACTOR_SHIFT)
        lanes[own] = 0  # what the thread has read itself
        if not lanes.any():
            return
        lanes = clocks.unknown_lanes(epochs, lanes, row)
        some = lanes != 0
        if some.any():
            lane = np.log2(lanes[some] & -lanes[some].astype(np.int64)).astype(np.int64)
            threads = epochs[some] >> ACTOR_SHIFT & ACTOR_MASK < clocks.first_actor
            named = np.where(threads, epochs[some] & ~LANE_BITS | lane << ACTOR_SHIFT, epochs[some])
            self._report(np.ones(len(named), bool), named, row[some], "read", cells=cells[some])

    def _judge_each_other(self, rows: np.ndarray) -> None:
        """Strong writes of one instruction by several blocks, which its scope does not hold together."""
        cells, wide = self.cells.reshape(-1), np.broadcast_to(rows, self.cells.shape).reshape(-1)
        order = np.argsort(cells, kind="stable")
        block = self.machine.clocks.block[wide[order]]
        bad = (np.diff(cells[order]) == 0) & (np.diff(block) != 0)
        if bad.any():
            at = int(order[bad.argmax()])
            address = self.space.describe(int(cells[at]) << self.shadow.shift)
            message = f"several blocks write {address}, and the scope of this access is the block"
            thread = int(self.machine.clocks.thread[wide[at]])
            self.machine.faults.add("race", message, self.ins, int(block[bad.argmax()]), thread, int(bad.sum()))

    def _judge_aside(self, rows: np.ndarray, strong: bool, proxy: bool, harmless: Any) -> None:
        wide = np.broadcast_to(rows, self.cells.shape).reshape(-1)
        skip = None if harmless is None else np.broadcast_to(harmless, self.cells.shape).reshape(-1)
        for i, cell in enumerate(self.cells.reshape(-1).tolist()):
            if cell in self.shadow.aside and not (skip is not None and skip[i]):
                last = np.array(sorted(self.shadow.aside[cell]), np.int64)
                row = np.full(len(last), wide[i])
                bad = self.machine.clocks.unordered(last, row)
                if strong:
                    bad &= self._weak(last, row)
                if bad.any():
                    self._report(bad, last, row, "read", cells=np.full(len(last), cell))

    def _weak(self, last: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Which accesses a strong one races with: weak ones, and of other blocks also where a scope is the block."""
        near = self.machine.code.near
        weak = last & STRONG == 0
        if not near.any() or self.space.name != "global":
            return weak
        foreign = (last >> BLOCK_SHIFT) - 1 != self.machine.clocks.block[rows]
        return weak | foreign & (near[self.site] | near[(last & (int(STRONG) - 1)) - 1])

    def _judge(self, last: np.ndarray, rows: np.ndarray, strong: bool, what: str, proxy: bool) -> None:
        clocks: Clocks = self.machine.clocks
        bad = clocks.unordered(last, rows)
        if strong:
            bad &= self._weak(last, rows)
        if bad.any():
            self._report(bad, last, rows, what)
        elif proxy and what == "written":
            actor = last >> ACTOR_SHIFT & ACTOR_MASK
            unseen = clocks.unordered(last, rows, int(self.space.name == "global")) & (actor < clocks.generic)
            if unseen.any():
                self._report(unseen, last, rows, what, fence=True)

    def _report(
        self, bad: np.ndarray, last: np.ndarray, rows: np.ndarray, what: str, fence: bool = False, cells: Any = None
    ) -> None:
        at = tuple(i[0] for i in np.nonzero(bad))
        epoch, row = int(last[at]), int(rows[at[-1]])
        clocks: Clocks = self.machine.clocks
        who, wait = clocks.name(epoch, self.machine.threads)
        other = self.machine.code.instructions[(epoch & (int(STRONG) - 1)) - 1]
        address = self.space.describe(int((self.cells if cells is None else cells)[at]) << self.shadow.shift)
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
