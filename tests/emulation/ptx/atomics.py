"""Atomics: atom and red on shared and global memory. PTX ISA 9.7.13.12 and .13.

Threads that meet at one address follow one another: in the order of threads, against it under the schedule "reverse",
in any order under "random". Sums of floats then differ between schedules, as they do between runs on hardware.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.ptx.memory import WRITTEN, Place
from tests.emulation.ptx.operands import Form, Mask, Run, full, instruction
from tests.emulation.ptx.parse import width_of
from tests.emulation.ptx.values import PACKED, UNSIGNED, decode, encode, halves, is_float, odd_sum, pack

OPERATIONS = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")


def _combine(operation: str, t: str, old: np.ndarray, b: np.ndarray, c: np.ndarray | None) -> np.ndarray:
    """The new bits of type t."""
    if t in PACKED:
        parts = zip(halves(old), halves(b), strict=True)
        return pack(*(_combine(operation, PACKED[t], p, q, None) for p, q in parts))
    if operation == "exch":
        return b
    if operation == "cas":
        assert c is not None
        return np.where(old == b, c, old)
    if operation in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[operation](old, b)
    if operation == "inc":
        return np.where(old >= b, np.uint32(0), old + np.uint32(1))
    if operation == "dec":
        return np.where((old == 0) | (old > b), b, old - np.uint32(1))
    x, y = decode(t, old), decode(t, b)
    if operation == "add":
        if is_float(t) and t not in ("f32", "f64"):
            return encode(t, odd_sum(x.astype(np.float64), y.astype(np.float64)))
        return encode(t, x + y)
    if is_float(t):
        return encode(t, np.fmin(x, y) if operation == "min" else np.fmax(x, y))
    return encode(t, np.minimum(x, y) if operation == "min" else np.maximum(x, y))


def rounds(index: np.ndarray, machine: Any) -> list[np.ndarray]:
    """Positions in `index` so that no address comes twice in one round: the order in which accesses take place."""
    order = np.arange(len(index))
    if machine.schedule == "reverse":
        order = order[::-1]
    elif machine.schedule == "random":
        order = machine.random.permutation(len(index))
    sorted_order = order[np.argsort(index[order], kind="stable")]
    found = index[sorted_order]
    begins = np.concatenate([[True], found[1:] != found[:-1]])
    rank = np.arange(len(found)) - np.maximum.accumulate(np.where(begins, np.arange(len(found)), 0))
    return [sorted_order[rank == r] for r in range(int(rank.max()) + 1)] if len(found) else []


@instruction("atom", "red")
def atomic(form: Form) -> Run:
    """atom{.sem}{.scope}{.space}.op.type d, [a], b{, c}; red without d."""
    t = form.type()
    form.flag("noftz")
    operation = form.one_of(*OPERATIONS)
    order = form.one_of("relaxed", "acquire", "release", "acq_rel", default="relaxed")
    form.code.near[form.index] = form.scope("gpu", "sys", "")
    vector = int(form.one_of("v2", "v4", "v8", default="v1")[1])
    form.left = [m for m in form.left if not m.startswith("L2::")]
    space = form.space()
    width = width_of(t) // 8
    returns = form.ins.opcode == "atom"
    operands = form.operands[1:] if returns else form.operands
    puts = [form.write(o, t) for o in form.vector(form.operands[0])] if returns else None
    place, address = Place(form, space, width * vector, strong=True), form.address(operands[0])
    reads = [form.read(o, t) for o in form.vector(operands[1])]
    third = form.read(operands[2], t) if operation == "cas" else None
    if len(operands) > (3 if operation == "cas" else 2):
        raise form.error("too many operands")

    def run(unit: Any, mask: Mask) -> None:
        machine = unit.machine
        at = full(address(unit), unit.count)
        if order in ("release", "acq_rel", "relaxed"):
            machine.told(unit, place, at, mask, order != "relaxed")
        old = np.zeros((vector, unit.count), UNSIGNED[8 * width])
        for memory, lanes, index in place.resolve(unit, at, mask, True, True):
            if len(index) == 0:
                continue
            lanes = np.arange(unit.count) if lanes is None else lanes
            place.observe(unit, memory, lanes, index, writes=True)
            view = memory.data.view(UNSIGNED[8 * width])
            values = [full(r(unit), unit.count)[lanes] for r in reads]
            extra = None if third is None else full(third(unit), unit.count)[lanes]
            for chosen in rounds(index, machine):
                for i, value in enumerate(values):
                    cells = index[chosen] // width + i
                    before = view[cells]
                    old[i, lanes[chosen]] = before
                    view[cells] = _combine(
                        operation, t, before, value[chosen], None if extra is None else extra[chosen]
                    )
            memory.state.view(UNSIGNED[8 * width])[index // width] |= UNSIGNED[8 * width](
                WRITTEN * int.from_bytes(bytes([1] * width), "little")
            )
        if puts is not None:
            for put, value in zip(puts, old, strict=True):
                put(unit, value, mask)
        if order in ("acquire", "acq_rel", "relaxed"):
            machine.heard(unit, place, at, mask, order != "relaxed")

    return run
