"""cp.async: copies of a thread into shared memory, in groups. PTX ISA 9.7.9.25.3.

The bytes are copied at once, by an actor of their own: whoever reads them without having waited is reported. The copies
of an mbarrier and of the tensor memory accelerator are in tensor_copy.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.ptx.memory import Place
from tests.emulation.ptx.operands import Form, Mask, Run, full, instruction


@instruction("cp")
def copy(form: Form) -> Run:
    """cp.async{.ca,.cg}.shared.global, .commit_group, .wait_group, .wait_all, .mbarrier.arrive; cp.async.bulk."""
    from tests.emulation.ptx import tensor_copy

    if form.flag("reduce"):
        raise form.error("cp.reduce is not known")
    form.one_of("async")
    if form.flag("bulk"):
        return tensor_copy.make(form)
    if form.flag("commit_group"):
        return _commit
    if form.flag("wait_all"):
        return _wait(None)
    if form.flag("wait_group"):
        return _wait(int(form.operands[0], 0))
    if form.flag("mbarrier"):
        return _arrive(form)
    return _copy(form)


def _copy(form: Form) -> Run:
    """[to], [from], size{, size of the source (the rest becomes zeros) or a predicate that ignores it}{, policy}."""
    cached_globally = form.one_of("ca", "cg") == "cg"
    if form.space() != "shared" or form.space() != "global":
        raise form.error("expected .shared.global")
    operands = list(form.operands)
    if form.flag("L2::cache_hint"):
        operands.pop()
    form.flag("L2::64B", "L2::128B", "L2::256B")
    size = int(operands[2], 0)
    if size not in ((16,) if cached_globally else (4, 8, 16)):
        raise form.error(f"a size of {size} bytes is not known")
    by_predicate = len(operands) > 3 and form.kernel.registers.get(operands[3].lstrip("!")) == 1
    rest = form.read(operands[3], "pred" if by_predicate else "u32") if len(operands) > 3 else None
    target, source = form.address(operands[0]), form.address(operands[1])
    to = Place(form, "shared", size)
    parts = (size,) if rest is None or by_predicate else (16, 8, 4, 2, 1)
    pieces = {n: Place(form, "global", n, align=size) for n in parts if n <= size}

    def run(unit: Any, mask: Mask) -> None:
        machine = unit.machine
        active = np.ones(unit.count, bool) if mask is None else mask
        take = np.full(unit.count, size)
        if rest is not None:
            given = full(rest(unit), unit.count)
            take = np.where(given, 0, size) if by_predicate else np.minimum(given, size).astype(np.int64)
        words = np.zeros((size // 4, unit.count), np.uint32)
        begin = full(source(unit), unit.count)
        odd = active & (take == 0) & (begin % size != 0)  # asked of the address also where nothing is read
        if odd.any():
            message = f"cp.async that reads nothing, from an address that is no multiple of {size}"
            machine.faults.add("misaligned", message, form.ins, 0, int(unit.thread[odd.argmax()]), int(odd.sum()))
        for n in np.unique(take[active]):
            some = active & (take == n)
            if n in pieces:
                width = min(4, int(n))
                read = pieces[n].load(unit, begin, some, width)
                if width == 4:
                    words[: n // 4] |= read
                else:
                    words[0] |= read[0]
            elif n:
                machine.faults.add("misaligned", f"cp.async of {n} bytes is not known", form.ins, 0, 0)
        actor = machine.clocks.actor_stamp(unit.rows, "cp.async", unit.thread, unit.group["cp.async"])
        to.store(unit, target(unit), mask, list(words), 4, actor)

    return run


def _commit(unit: Any, mask: Mask) -> None:
    unit.group["cp.async"] = unit.group["cp.async"] + (1 if mask is None else mask)


def _wait(pending: int | None) -> Run:
    """Waits until at most `pending` of the committed groups run; None: for all, committed or not."""

    def run(unit: Any, mask: Mask) -> None:
        if pending is None:
            _commit(unit, mask)
        clocks = unit.machine.clocks
        active = unit.exists if mask is None else mask
        rows, column = unit.rows[active], clocks.first["cp.async"] + unit.thread[active]
        done = unit.group["cp.async"][active] - 1 - (pending or 0)
        clocks.known[rows, column] = np.maximum(clocks.known[rows, column], done)

    return run


def _arrive(form: Form) -> Run:
    """cp.async.mbarrier.arrive{.noinc}.shared.b64 [barrier]: arrives when all copies of the thread so far are done."""
    form.one_of("arrive")
    counted = form.flag("noinc")
    form.type()
    if form.space() not in ("shared", "generic"):
        raise form.error("expected .shared")
    address = form.address(form.operands[0])
    place = Place(form, "shared", 8, strong=True, mbarrier=True)

    def run(unit: Any, mask: Mask) -> None:
        clocks = unit.machine.clocks
        active = unit.exists if mask is None else mask
        rows = unit.rows[active]
        copies = clocks.first["cp.async"] + unit.thread[active]
        before = clocks.known[rows, copies].copy()
        clocks.known[rows, copies] = unit.group["cp.async"][active]  # what the arrival tells, the thread does not know
        unit.machine.mbarriers.arrive(unit, active, place, address(unit), 1, 0, extra_pending=not counted)
        clocks.known[rows, copies] = before

    return run
