"""Instructions that threads execute together: who must come, and who waits for whom. PTX ISA 9.7.13.

Threads of a warp that hold the same membermask form a set, which goes on when all that it names have come, as hardware
since sm_70 does; threads that have ended are not waited for. An .aligned instruction names all threads of the warp (or
warpgroup), none of which may have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.emulation.ptx.operands import Form, Mask, Run, full

LANES = np.arange(32)
EVERYONE = np.uint32(0xFFFFFFFF)
WARPGROUP = 128
#: Threads, and those of their warps (or warpgroups) that they name.
Set = tuple[np.ndarray, np.ndarray]


def by_warps(unit: Any, values: np.ndarray) -> np.ndarray:
    return full(values, unit.count).reshape(-1, 32)


def active_of(unit: Any, mask: Mask, size: int = 32) -> np.ndarray:
    return np.ones((unit.count // size, size), bool) if mask is None else mask.reshape(-1, size)


def gathered(form: Form, run: Callable[[Any, Mask], Any], members: Any = None, size: int = 32) -> Run:
    """`run` for each set once all named threads are there; it may return threads that it makes wait for something else.

    members: reads the membermask; None for .aligned. size: of the warp or warpgroup that executes it.
    """

    def collective(unit: Any, mask: Mask) -> str | None:
        bits = None if members is None else members(unit)
        waited = unit.waiting.pop(form.index, None)
        everyone = bits is None or (bits == EVERYONE).all()
        if mask is None and not unit.waiting and everyone:
            kept = run(unit, None)
            return None if kept is None else _part(form, unit, unit.exists & ~kept, None)
        here = active_of(unit, mask, size)
        if waited is not None:  # those of other warps too, which nobody has come to meet now
            here = here | waited.reshape(-1, size)
        gone, kept = np.zeros_like(here), None
        alive = unit.alive.reshape(-1, size)
        if bits is None:
            _want_all(form, unit, here, alive)
        for threads, named in [(here, np.ones_like(here))] if everyone else _sets(form, unit, here, bits):
            ready = threads & ~(named & alive & ~here).any(1, keepdims=True)
            if ready.any():
                kept = run(unit, None if ready.all() else ready.reshape(-1))
                gone = gone | ready
        if waited is None and kept is None and (gone == here).all():
            return None
        goes_on = gone.reshape(-1) if kept is None else gone.reshape(-1) & ~kept
        return _part(form, unit, goes_on, (here & ~gone).reshape(-1))

    return collective


def _part(form: Form, unit: Any, goes_on: np.ndarray, waits: Any) -> str:
    """Some of the threads at the instruction go on, some wait here for others."""
    if waits is not None and waits.any():
        unit.waiting[form.index] = waits
    unit.add_group(form.index + 1, goes_on)
    return "wait"


def _want_all(form: Form, unit: Any, here: np.ndarray, alive: np.ndarray) -> None:
    """What an .aligned instruction asks for."""
    alone = here & ~alive.all(1, keepdims=True)
    if alone.any():
        message = f"{form.ins.opcode} is .aligned, and threads of its {'warp' if here.shape[1] == 32 else 'warpgroup'} "
        unit.fault("collective", message + "have ended, or were never there", form.ins, int(alone.argmax()))


def _sets(form: Form, unit: Any, here: np.ndarray, bits: np.ndarray) -> Iterator[Set]:
    """Of the threads here, those of each warp that hold the same membermask."""
    bits = by_warps(unit, bits)
    lacks = here & (bits >> LANES.astype(np.uint32) & np.uint32(1) == 0) & unit.alive.reshape(-1, 32)
    if lacks.any():
        lane = int(lacks.argmax())
        unit.fault("collective", f"the membermask {bits.flat[lane]:#x} lacks the thread itself", form.ins, lane)
    left = here
    while left.any():
        mask = bits[np.arange(len(bits)), left.argmax(1)][:, None]
        threads, named = left & (bits == mask), mask >> LANES.astype(np.uint32) & np.uint32(1) != 0
        left = left & ~threads
        others = here & named & ~threads & threads.any(1, keepdims=True)
        if others.any():
            lane = int(others.argmax())
            message = f"a membermask names the thread, which holds another: {bits.flat[lane]:#x}"
            unit.fault("collective", message, form.ins, lane)
        yield threads, named
