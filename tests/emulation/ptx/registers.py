"""setmaxnreg: warpgroups of a block give up registers, or wait for them. PTX ISA 9.7.19.5.

How many registers the code needs is not looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.ptx.gather import WARPGROUP, gathered
from tests.emulation.ptx.operands import Form, Mask, Run, instruction


@instruction("setmaxnreg")
def share_registers(form: Form) -> Run:
    """setmaxnreg.{inc,dec}.sync.aligned.u32 count. Without a number of registers at the launch nothing is shared."""
    count = int(form.operands[0], 0)
    takes = form.one_of("inc", "dec") == "inc"
    form.one_of("sync")
    form.one_of("aligned")
    form.type()
    if count % 8 or not 24 <= count <= 256:
        raise form.error("expected a multiple of 8 from 24 to 256")

    def run(unit: Any, mask: Mask) -> np.ndarray | None:
        machine = unit.machine
        active = unit.exists if mask is None else mask
        if not machine.code.kernel.registers_of_thread:
            return None
        short = np.zeros((unit.count // WARPGROUP, WARPGROUP), bool)
        for g in np.nonzero(active.reshape(-1, WARPGROUP).any(1))[0]:
            lane = WARPGROUP * int(g)
            block, group = int(unit.block[lane]), int(unit.thread[lane]) // WARPGROUP
            more = count - int(machine.registers[block, group])
            if (more < 0) if takes else (more > 0):
                message = f"the warpgroup has {count - more} registers a thread, and asks for {count}"
                unit.fault("registers", message, form.ins, lane)
            elif more > machine.spare_registers[block]:
                short[g] = True
            else:
                machine.spare_registers[block] -= more
                machine.registers[block, group] = count
        if not takes:
            machine.registers_were_given()
        if not short.any():
            return None
        kept = short.reshape(-1) & active
        machine.short.append((unit, form.index, kept))
        return kept

    return gathered(form, run, size=WARPGROUP)
