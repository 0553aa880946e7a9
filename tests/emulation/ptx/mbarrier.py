"""mbarrier: barriers in shared memory that also count the bytes of copies. PTX ISA 9.7.13.15.

A phase is complete when all expected arrivals have come and no bytes are outstanding; the next one begins at once. The
bytes of the object itself stay opaque; its state is kept here, by block and address. From its init to its inval they
are marked, so that any other access to them is found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.ptx.memory import MBARRIER, WRITTEN, Place
from tests.emulation.ptx.operands import Form, Mask, Run, full, instruction

SLOTS = 64  #: mbarriers of a block
LARGEST_COUNT = (1 << 20) - 1  #: of arrivals, and of outstanding bytes (PTX ISA 9.7.13.15.2)
MADE = np.uint64((MBARRIER | WRITTEN) * 0x0101010101010101)


class Mbarriers:
    def __init__(self, machine: Any, init_fences: bool) -> None:
        self.machine, self.init_fences = machine, init_fences
        shape = (machine.block_count, SLOTS)
        self.slots: dict[int, int] = {}  #: shared address -> slot
        self.valid = np.zeros(shape, bool)
        #: The row of the thread whose init no fence has followed yet, -1 for none, and its clock then.
        self.unfenced, self.init_clock = np.full(shape, -1), np.zeros(shape, np.int64)
        self.count, self.pending, self.bytes, self.phase = (np.zeros(shape, np.int64) for _ in range(4))
        columns = machine.clocks.columns
        #: What those know who have arrived in this phase, and in the complete ones.
        self.heard = np.zeros((*shape, columns), np.int32)
        self.told = np.zeros((*shape, columns), np.int32)
        fenced = machine.clocks.fenced is not None
        self.heard_fenced = np.zeros((*shape, 2, columns), np.int32) if fenced else None
        self.told_fenced = np.zeros((*shape, 2, columns), np.int32) if fenced else None

    def slot(self, address: int) -> int:
        if address not in self.slots:
            if len(self.slots) == SLOTS:
                raise ValueError(f"more than {SLOTS} mbarriers in a block")
            self.slots[address] = len(self.slots)
        return self.slots[address]

    def find(self, unit: Any, active: np.ndarray, place: Place, address: np.ndarray, needs: bool = True):
        """(lanes, block, slot) of the active threads whose address is a valid mbarrier, if `needs`."""
        address = full(address, unit.count)
        found = []
        for space, lanes, index in place.resolve(unit, address, active, False, True):
            if space.name == "shared" and len(index):
                place.observe(unit, space, lanes, index, writes=not needs)
                found.append(lanes)
        lanes = np.concatenate(found) if found else np.zeros(0, np.int64)
        offsets = address[lanes] & ((1 << 44) - 1)
        slots = np.array([self.slot(int(a)) for a in offsets], np.int64)
        blocks = unit.block[lanes]
        if needs:
            bad = ~self.valid[blocks, slots]
            if bad.any():
                where = int(offsets[bad.argmax()])
                lane = int(lanes[bad.argmax()])
                unit.fault("mbarrier", f"there is no mbarrier at shared address {where}", place.ins, lane)
                lanes, blocks, slots = lanes[~bad], blocks[~bad], slots[~bad]
        return lanes, blocks, slots

    def mark(self, unit: Any, lanes: np.ndarray, address: np.ndarray, made: bool) -> None:
        """Their bytes belong to an mbarrier from here on; or to none, and hold nothing."""
        index = (full(address, unit.count)[lanes] & ((1 << 44) - 1)) + unit.shared_offset[lanes]
        state = unit.machine.spaces["shared"].state.view(np.uint64)
        state[index >> 3] = state[index >> 3] | MADE if made else state[index >> 3] & ~MADE

    def fence_init(self, rows: np.ndarray, proxy: bool) -> None:
        """Threads fence their inits; or, by a fence between the proxies, all those that they know of."""
        clocks = self.machine.clocks
        for block, slot in zip(*np.nonzero(self.unfenced >= 0), strict=True):
            row = int(self.unfenced[block, slot])
            mine = rows[rows // self.machine.threads == block]
            known = clocks.known[mine, clocks.thread[row]] >= self.init_clock[block, slot]
            if (known if proxy else mine == row).any():
                self.unfenced[block, slot] = -1

    def check_init_fence(self, unit: Any, ins: Any, lane: int, slot: int) -> None:
        """The asynchronous proxy must have been told of an mbarrier before it uses it."""
        block = int(unit.block[lane])
        if self.init_fences and self.unfenced[block, slot] >= 0:
            message = "the mbarrier was initialised without fence.mbarrier_init or fence.proxy.async behind it"
            unit.fault("missing fence", message, ins, lane)
            self.unfenced[block, slot] = -1

    def arrive(
        self, unit: Any, active: np.ndarray, place: Place, address: np.ndarray, arrivals: Any, expected: Any,
        extra_pending: bool = False, tells: bool = True,
    ) -> np.ndarray:  # fmt: skip
        """Threads arrive `arrivals` times, and expect as many more bytes. Returns each thread's phase before.

        tells: whether those who wait know then what these threads know; .relaxed orders nothing.
        """
        lanes, blocks, slots = self.find(unit, active, place, address)
        phase = np.zeros(unit.count, np.int64)
        phase[lanes] = self.phase[blocks, slots]
        arrivals = full(np.atleast_1d(arrivals), unit.count)[lanes]
        expected = full(np.atleast_1d(expected), unit.count)[lanes]
        np.add.at(self.bytes, (blocks, slots), expected)
        if arrivals.any():
            if tells:
                self._hear(unit.rows[lanes], blocks, slots)
            if not extra_pending:  # without .noinc the arrival had been added to the expected ones just before
                np.subtract.at(self.pending, (blocks, slots), arrivals)
        self.complete(unit, place.ins, np.unique(blocks * SLOTS + slots))
        return phase

    def _hear(self, rows: np.ndarray, blocks: np.ndarray, slots: np.ndarray) -> None:
        clocks = self.machine.clocks
        places = blocks * SLOTS + slots
        for place in np.unique(places):
            block, slot, those = place // SLOTS, place % SLOTS, rows[places == place]
            np.maximum(self.heard[block, slot], clocks.known[those].max(0), out=self.heard[block, slot])
            if self.heard_fenced is not None:
                fenced = self.heard_fenced[block, slot]
                np.maximum(fenced, clocks.fenced[those].max(0), out=fenced)
        clocks.advance(np.unique(rows))

    def transferred(self, unit: Any, ins: Any, block: int, slot: int, count: int) -> None:
        """`count` bytes of copies to this mbarrier are there."""
        self.bytes[block, slot] -= count
        column = self.machine.clocks.first["mbarrier"] + slot
        self.heard[block, slot, column] = self.phase[block, slot] + 1
        self.complete(unit, ins, np.array([block * SLOTS + slot]))

    def complete(self, unit: Any, ins: Any, places: np.ndarray) -> None:
        """Begins the next phase of those barriers whose phase is complete."""
        pending, outstanding = self.pending.reshape(-1)[places], self.bytes.reshape(-1)[places]
        if (np.abs(outstanding) > LARGEST_COUNT).any():
            unit.fault("mbarrier", f"{outstanding.max()} bytes are outstanding, at most {LARGEST_COUNT} may be", ins, 0)
        if (pending < 0).any():
            slot = int(places[(pending < 0).argmax()]) % SLOTS
            address = next(a for a, s in self.slots.items() if s == slot)
            unit.fault("mbarrier", f"more arrivals at {address} than its phase expects", ins, 0)
            self.pending.reshape(-1)[places] = np.maximum(pending, 0)
            pending = np.maximum(pending, 0)
        done = places[(pending == 0) & (outstanding == 0)]
        if not len(done):
            return
        blocks, slots = done // SLOTS, done % SLOTS
        self.phase[blocks, slots] += 1
        self.pending[blocks, slots] = self.count[blocks, slots]
        self.told[blocks, slots] = self.heard[blocks, slots]
        if self.told_fenced is not None:
            self.told_fenced[blocks, slots] = self.heard_fenced[blocks, slots]
        self.machine.wake()


@instruction("mbarrier")
def mbarrier(form: Form) -> Run:
    if form.type() != "b64":
        raise form.error("expected .b64")
    space = form.space()
    if space not in ("shared", "generic"):
        raise form.error("expected .shared")
    kind = form.one_of("init", "inval", "arrive", "expect_tx", "complete_tx", "test_wait", "try_wait")
    relaxed = form.flag("relaxed")
    form.flag("release", "acquire")
    form.flag("cta", "cluster")
    if kind == "init":
        return _init(form, space)
    if kind == "inval":
        return _invalidate(form, space)
    if kind in ("test_wait", "try_wait"):
        return _wait(form, kind, space, relaxed)
    place = Place(form, space, 8, strong=True, mbarrier=True)
    if kind in ("expect_tx", "complete_tx"):
        address, count = form.address(form.operands[0]), form.read(form.operands[1], "u32")
        sign = 1 if kind == "expect_tx" else -1

        def expect(unit: Any, mask: Mask) -> None:
            active = unit.exists if mask is None else mask
            amount = count(unit).astype(np.int64) * sign
            unit.machine.mbarriers.arrive(unit, active, place, address(unit), 0, amount)

        return expect
    with_bytes = form.flag("expect_tx")
    # The remote form has no result.
    operands = form.operands if not form.operands[0].startswith("[") else ["_", *form.operands]
    put, address = form.write(operands[0], "b64"), form.address(operands[1])
    number = form.read(operands[2], "u32") if len(operands) > 2 else None

    def arrive(unit: Any, mask: Mask) -> None:
        active = unit.exists if mask is None else mask
        amount = number(unit).astype(np.int64) if number is not None else 1
        arrivals, expected = (1, amount) if with_bytes else (amount, 0)
        phase = unit.machine.mbarriers.arrive(unit, active, place, address(unit), arrivals, expected, tells=not relaxed)
        put(unit, phase.astype(np.uint64), mask)

    return arrive


def _init(form: Form, space: str) -> Run:
    address, count = form.address(form.operands[0]), form.read(form.operands[1], "u32")
    place = Place(form, space, 8, mbarrier=True)

    def run(unit: Any, mask: Mask) -> None:
        m: Mbarriers = unit.machine.mbarriers
        clocks = unit.machine.clocks
        at = address(unit)
        lanes, blocks, slots = m.find(unit, unit.exists if mask is None else mask, place, at, needs=False)
        places = blocks * SLOTS + slots
        if m.valid[blocks, slots].any() or len(np.unique(places)) < len(places):
            unit.fault("mbarrier", "the mbarrier is there already: it needs mbarrier.inval first", place.ins, lanes[0])
        m.mark(unit, lanes, at, True)
        numbers = full(count(unit), unit.count)[lanes].astype(np.int64)
        if ((numbers < 1) | (numbers > LARGEST_COUNT)).any():
            unit.fault("mbarrier", f"a count of {numbers.min()} is not from 1 to {LARGEST_COUNT}", place.ins, 0)
        m.valid[blocks, slots] = True
        m.unfenced[blocks, slots] = unit.rows[lanes]
        m.init_clock[blocks, slots] = clocks.known[unit.rows[lanes], unit.thread[lanes]]
        m.count[blocks, slots] = m.pending[blocks, slots] = numbers
        m.bytes[blocks, slots] = 0
        m.phase[blocks, slots] = 0
        for table in (m.heard, m.told):
            table[blocks, slots] = 0

    return run


def _invalidate(form: Form, space: str) -> Run:
    address, place = form.address(form.operands[0]), Place(form, space, 8, mbarrier=True)

    def run(unit: Any, mask: Mask) -> None:
        m: Mbarriers = unit.machine.mbarriers
        at = address(unit)
        lanes, blocks, slots = m.find(unit, unit.exists if mask is None else mask, place, at, needs=False)
        m.valid[blocks, slots] = False
        m.mark(unit, lanes, at, False)

    return run


def _wait(form: Form, kind: str, space: str, relaxed: bool) -> Run:
    """{try,test}_wait{.parity} p, [barrier], parity or state: whether that phase is complete.

    try_wait waits for it up to a time limit of the system, after which it returns false.
    """
    parity = form.flag("parity")
    put, address = form.write(form.operands[0], "pred"), form.address(form.operands[1])
    phase = form.read(form.operands[2], "u32" if parity else "b64")
    place = Place(form, space, 8, strong=True, mbarrier=True)

    def run(unit: Any, mask: Mask) -> str | None:
        m: Mbarriers = unit.machine.mbarriers
        active = unit.exists if mask is None else mask
        lanes, blocks, slots = m.find(unit, active, place, address(unit))
        wanted = full(phase(unit), unit.count)[lanes].astype(np.int64)
        now = m.phase[blocks, slots]
        done = (now & 1) != (wanted & 1) if parity else now != wanted
        late = _out_of_time(unit)
        if late is not None:  # a look in time would have found those complete of which the thread has not heard
            news = (m.told[blocks, slots] > unit.machine.clocks.known[unit.rows[lanes]]).any(1)
            done &= ~(late[lanes] & news)
        complete = np.zeros(unit.count, bool)
        complete[lanes[done]] = True
        clocks = unit.machine.clocks
        rows = unit.rows[lanes[done]]
        fenced = None if m.told_fenced is None else m.told_fenced[blocks[done], slots[done]]
        if not relaxed:
            clocks.learn(rows, m.told[blocks[done], slots[done]], fenced)
        goes_on = complete if late is None else complete | late
        if kind == "test_wait" or goes_on[active].all():
            put(unit, complete, mask)
            return None
        put(unit, complete, active & goes_on)
        unit.add_group(form.index + 1, active & goes_on)
        unit.machine.blocked.append((unit, form.index, active & ~goes_on))
        return "wait"

    return run


def _out_of_time(unit: Any) -> np.ndarray | None:
    """Under the schedule "random", the threads of warps whose time limit is over before they see the phase complete."""
    if unit.machine.schedule != "random":
        return None
    return np.repeat(unit.machine.random.random(unit.count // 32) < 0.5, 32)
