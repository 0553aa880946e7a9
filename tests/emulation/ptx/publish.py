"""What threads tell each other through flags in memory: fences with strong accesses and atomics. PTX ISA 8.

A thread that fences and then writes a flag (a strong store or an atomic) has told what it knew at the fence; a thread
that reads the flag strongly and then fences has heard it. .release and .acquire do both at once. Between blocks, a
block hears as a whole, and of fences and flags alone whose scope is more than the block (PTX ISA 8.5).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.ptx.operands import Form, Mask, Run, instruction

Letter = dict[int, np.ndarray]  #: block -> clocks of its actors
EVERYBODY = -1


class Messages:
    """Shared by all blocks of a launch, also those that run one after the other."""

    def __init__(self, active: bool, scoped: bool) -> None:
        self.active = active  #: whether the kernel has fences or releases at all
        self.scoped = scoped  #: and any whose scope is the block: else what a block tells itself is part of the rest
        self.address_of: dict[str, int] = {}
        #: (address, who may read it) -> what was told there. Who: a block, or EVERYBODY.
        self.left: dict[tuple[int, int], Letter] = {}
        #: (block, thread, whether for other blocks) -> what it knew at such a fence, and what it has not fenced yet.
        self.at_fence: dict[tuple[int, int, bool], np.ndarray] = {}
        self.pending: dict[tuple[int, int, bool], Letter] = {}

    def _reaches(self, near: bool) -> tuple[bool, ...]:
        """Whom an access or a fence reaches: the own block (False), all (True)."""
        return (False,) if near else (False, True) if self.scoped else (True,)

    def told(self, machine: Any, unit: Any, address: np.ndarray, mask: Mask, releases: bool, near: bool) -> None:
        clocks = machine.clocks
        for lane in np.nonzero(unit.exists if mask is None else mask)[0]:
            row = int(unit.rows[lane])
            block, thread = int(clocks.block[row]), int(unit.thread[lane])
            for far in self._reaches(near):
                known = clocks.known[row].copy() if releases else self.at_fence.get((block, thread, far))
                if known is None:
                    continue
                letter = self.left.setdefault((int(address[lane]), EVERYBODY if far else block), {})
                letter[block] = np.maximum(letter.get(block, 0), known)
                for (mine, other), heard in list(clocks.foreign.items()) if far else []:
                    if mine == block:
                        letter[other] = np.maximum(letter.get(other, 0), heard)
        if releases:
            clocks.advance(unit.rows[unit.exists if mask is None else mask])

    def heard(self, machine: Any, unit: Any, address: np.ndarray, mask: Mask, acquires: bool, near: bool) -> None:
        for lane in np.nonzero(unit.exists if mask is None else mask)[0]:
            row = int(unit.rows[lane])
            block, thread = int(machine.clocks.block[row]), int(unit.thread[lane])
            for far in self._reaches(near):
                letter = self.left.get((int(address[lane]), EVERYBODY if far else block))
                if letter is None:
                    continue
                if acquires:
                    self._open(machine, row, letter)
                else:
                    kept = self.pending.setdefault((block, thread, far), {})
                    for other, known in letter.items():
                        kept[other] = np.maximum(kept.get(other, 0), known)

    def _open(self, machine: Any, row: int, letter: Letter) -> None:
        clocks = machine.clocks
        mine = int(clocks.block[row])
        for block, known in letter.items():
            if block == mine:
                clocks.learn(np.array([row]), known[None])
            else:
                clocks.foreign[mine, block] = np.maximum(clocks.foreign.get((mine, block), 0), known)

    def fence(self, machine: Any, unit: Any, mask: Mask, near: bool) -> None:
        clocks = machine.clocks
        for lane in np.nonzero(unit.exists if mask is None else mask)[0]:
            row = int(unit.rows[lane])
            block, thread = int(clocks.block[row]), int(unit.thread[lane])
            for far in self._reaches(near):
                if (block, thread, far) in self.pending:
                    self._open(machine, row, self.pending.pop((block, thread, far)))
            for far in self._reaches(near):
                self.at_fence[block, thread, far] = clocks.known[row].copy()
        clocks.advance(unit.rows[unit.exists if mask is None else mask])


@instruction("membar", "fence")
def fence(form: Form) -> Run:
    """membar.{cta,gl,sys}; fence{.sc,.acq_rel}.scope; fence.proxy.async; fence.mbarrier_init."""
    if form.flag("proxy"):
        return proxy_fence(form)
    if form.flag("mbarrier_init"):
        form.one_of("release")
        form.one_of("cluster")
        return fence_init
    form.flag("sc", "acq_rel", "acquire", "release")
    of_cluster = "cta" not in form.left
    near = form.scope("gl", "gpu", "sys")

    def run(unit: Any, mask: Mask) -> None:
        if of_cluster:  # not weaker than fence.mbarrier_init.release.cluster
            fence_init(unit, mask)
        unit.machine.messages.fence(unit.machine, unit, mask, near)

    return run


def fence_init(unit: Any, mask: Mask, proxy: bool = False) -> None:
    """mbarriers that threads have initialised become visible to the cluster and to copies (PTX ISA 9.7.13.4)."""
    if unit.machine.mbarriers is not None:
        unit.machine.mbarriers.fence_init(unit.rows[unit.exists if mask is None else mask], proxy)


def proxy_fence(form: Form) -> Run:
    """fence.proxy.async{.space}: what a thread knows of becomes visible to copies and wgmma (PTX ISA 9.7.13.4)."""
    if form.flag("tensormap::generic"):
        form.one_of("acquire", "release")
        form.one_of("cta", "cluster", "gpu", "sys")
        return lambda unit, mask: None
    form.one_of("async")
    spaces = {"global": slice(1, 2), "shared": slice(0, 1), "generic": slice(0, 2)}[form.space()]

    def run(unit: Any, mask: Mask) -> None:
        clocks = unit.machine.clocks
        if spaces.start == 0:
            fence_init(unit, mask, proxy=True)
        if clocks.fenced is not None:
            rows = unit.rows[unit.exists if mask is None else mask]
            clocks.fenced[rows, spaces] = np.maximum(clocks.fenced[rows, spaces], clocks.known[rows][:, None])

    return run
