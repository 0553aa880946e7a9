"""The named barriers of blocks: who waits where, and who may go on. PTX ISA 9.7.13.1."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.ptx.operands import Form, Mask, full

COUNT = 16  #: barriers of a block


class Barriers:
    def __init__(self, machine: Any) -> None:
        self.machine = machine
        shape = (machine.block_count, COUNT)
        self.arrived = np.zeros(shape, np.int64)
        self.expected = np.zeros(shape, np.int64)  #: 0: all threads that have not ended
        #: (unit, form, mask, barrier of each thread, reduction) of the waiting threads
        self.parked: list[tuple[Any, Form, np.ndarray, np.ndarray, Any]] = []
        #: What the threads that arrived know: (block, barrier) -> clocks.
        self.heard: dict[tuple[int, int], np.ndarray] = {}
        self.heard_fenced: dict[tuple[int, int], np.ndarray] = {}

    def arrive(
        self, unit: Any, mask: Mask, form: Form, number: np.ndarray, expected: Any, waits: bool, reduction: Any = None
    ) -> str | None:
        """Threads come to a barrier; "wait" where they have to stay (they go on when it is complete)."""
        active = unit.exists if mask is None else mask
        numbers = np.where(active, full(number, unit.count).astype(np.int64), 0)  # others' registers hold anything
        if (numbers >= COUNT).any():
            lane = int((numbers >= COUNT).argmax())
            unit.fault("barrier divergence", f"there is no barrier {numbers[lane]}, only 0 to 15", form.ins, lane)
            numbers = np.minimum(numbers, COUNT - 1)
        place = unit.block * COUNT + numbers
        counts = np.bincount(place[active], minlength=self.arrived.size).reshape(self.arrived.shape)
        self.arrived += counts
        if expected is not None:
            threads = full(expected, unit.count).astype(np.int64)
            wanted = self.expected.reshape(-1)[place[active]]
            if ((wanted != 0) & (wanted != threads[active])).any() or (threads[active] % 32).any():
                unit.fault(
                    "barrier divergence",
                    "threads wait at one barrier for different numbers, or for no multiple of 32",
                    form.ins,
                    int(active.argmax()),
                )
            self.expected.reshape(-1)[place[active]] = threads[active]
        if waits:
            self.parked.append((unit, form, active.copy(), numbers, reduction))
        else:
            self._remember(unit, active, numbers)
        self._too_many(unit, active, numbers, form)
        self.release()
        return "wait" if waits else None

    def _too_many(self, unit: Any, active: np.ndarray, numbers: np.ndarray, form: Form) -> None:
        bad = active & ((self.arrived > self.expected) & (self.expected > 0))[unit.block, numbers]
        if bad.any():
            lane = int(bad.argmax())
            place = unit.block[lane], numbers[lane]
            message = (
                f"{self.arrived[place]} threads come to barrier {numbers[lane]}, which expects {self.expected[place]}"
            )
            unit.fault("barrier divergence", message, form.ins, lane)

    def _remember(self, unit: Any, active: np.ndarray, numbers: np.ndarray) -> None:
        """Threads that only arrive leave what they know at the barrier."""
        clocks = self.machine.clocks
        for block, number in {(int(b), int(n)) for b, n in zip(unit.block[active], numbers[active], strict=True)}:
            rows = unit.rows[active & (unit.block == block) & (numbers == number)]
            for table, store in ((clocks.known, self.heard), (clocks.fenced, self.heard_fenced)):
                if table is not None:
                    known = table[rows].max(0)
                    store[block, number] = np.maximum(store.get((block, number), 0), known)
            clocks.advance(rows)

    def release(self) -> None:
        """Lets go the threads of every barrier that is complete."""
        alive = self.machine.alive
        wanted = np.where(self.expected > 0, self.expected, alive[:, None])
        complete = (self.arrived >= wanted) & (self.arrived > 0)
        if not complete.any():
            return
        whole = len(self.parked) == 1 and self._all_at_once(complete)
        if not whole:
            for block, number in zip(*np.nonzero(complete), strict=True):
                self._release_one(int(block), int(number))
        self.arrived[complete] = 0
        self.expected[complete] = 0
        if whole:
            return
        remaining = []
        for unit, form, mask, numbers, reduction in self.parked:
            gone = mask & complete[unit.block, numbers]
            unit.add_group(form.index + 1, gone)
            if (mask & ~gone).any():
                remaining.append((unit, form, mask & ~gone, numbers, reduction))
        self.parked = remaining

    def _all_at_once(self, complete: np.ndarray) -> bool:
        """The common case: one group of threads, all of their blocks, that leaves as one."""
        unit, form, mask, numbers, reduction = self.parked[0]
        if reduction is not None or unit.per_block != self.machine.threads or not mask.all() or self.heard:
            return False
        if not complete[unit.block, numbers].all() or (numbers != numbers[0]).any():
            return False
        self.machine.clocks.meet(unit.rows.reshape(-1, unit.per_block))
        self.parked = []
        unit.add_group(form.index + 1, mask)
        return True

    def _release_one(self, block: int, number: int) -> None:
        clocks, machine = self.machine.clocks, self.machine
        members = []
        at: dict[int, set[int]] = {}  # warp -> instructions
        for unit, form, mask, numbers, reduction in self.parked:
            mine = mask & (unit.block == block) & (numbers == number)
            if not mine.any():
                continue
            members.append((unit, form, mine, reduction))
            for warp in np.unique(unit.thread[mine] // 32):
                at.setdefault(int(warp), set()).add(form.index)
        if not members:
            return
        unit, form, mine, _ = members[0]
        if self.expected[block, number] == 0 and machine.alive[block] < machine.threads:
            ended = machine.threads - int(machine.alive[block])
            unit.fault(
                "barrier divergence", f"{ended} threads of the block ended before it", form.ins, int(mine.argmax())
            )
        parted = [warp for warp, places in at.items() if len(places) > 1]
        if parted:
            unit.fault(
                "barrier divergence",
                f"the threads of warp {parted[0]} come to it at different instructions",
                form.ins,
                int(mine.argmax()),
            )
        rows = np.concatenate([u.rows[m] for u, _, m, _ in members])
        key = (block, number)
        if key in self.heard:
            clocks.learn(rows[:1], self.heard.pop(key)[None], self.heard_fenced.pop(key, None))
        clocks.meet(rows[None])
        if members[0][3] is not None:
            votes = np.concatenate([full(r[2], u.count)[m] for u, _, m, r in members])
            for u, _, m, (put, operation, _) in members:
                result = {"popc": votes.sum(), "and": votes.all(), "or": votes.any()}[operation]
                value = np.array([result], np.uint32 if operation == "popc" else bool)
                put(u, value, m)

    def waiting(self) -> list[tuple[Any, Form, np.ndarray]]:
        return [(unit, form, mask) for unit, form, mask, _, _ in self.parked]
