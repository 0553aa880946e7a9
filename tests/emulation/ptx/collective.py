"""Instructions that threads execute together: barriers, shuffles, votes; and the ends of threads.

PTX ISA 9.7.13 (bar, barrier, bar.warp.sync, vote, match, activemask, redux, elect), 9.7.9.6 (shfl), 9.7.12 (control).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.ptx.gather import LANES, active_of, by_warps, gathered
from tests.emulation.ptx.operands import Form, Mask, Run, instruction
from tests.emulation.ptx.values import UNSIGNED, decode


@instruction("bra", "brx")
def branch(form: Form) -> Run:
    """Executed by Unit, which knows the groups of threads."""
    form.flag("uni")
    if form.ins.opcode == "brx":
        form.one_of("idx")
        form.choice = form.read(form.operands[0], "u32")
    return lambda unit, mask: None


@instruction("ret", "exit")
def end(form: Form) -> Run:
    form.flag("uni")

    def run(unit: Any, mask: Mask) -> str:
        unit.machine.finished(unit, np.ones(unit.count, bool) if mask is None else mask)
        return "gone"

    return run


@instruction("trap")
def trap(form: Form) -> Run:
    def run(unit: Any, mask: Mask) -> str:
        unit.fault("trap", "a thread has stopped the kernel", form.ins, 0 if mask is None else int(mask.argmax()))
        unit.machine.finished(unit, np.ones(unit.count, bool) if mask is None else mask)
        return "gone"

    return run


@instruction("bar", "barrier")
def barrier(form: Form) -> Run:
    """bar{.cta}.sync/.arrive/.red, barrier the same; bar.warp.sync."""
    if form.flag("warp"):
        form.one_of("sync")
        members = form.read(form.operands[0], "b32")

        def meet(unit: Any, mask: Mask) -> None:
            active = active_of(unit, mask)
            rows = unit.rows.reshape(-1, 32)
            complete = active.all(1) & unit.exists.reshape(-1, 32).all(1)
            if complete.any():
                unit.machine.clocks.meet(rows[complete])
            for w in np.nonzero(active.any(1) & ~complete)[0]:
                unit.machine.clocks.meet(rows[w][active[w]][None])

        return gathered(form, meet, members)
    form.flag("cta")
    form.flag("aligned")
    kind = form.one_of("sync", "arrive", "red")
    operands = list(form.operands)
    put = operation = predicate = None
    if kind == "red":
        operation = form.one_of("popc", "and", "or")
        put = form.write(operands.pop(0), form.type())
        predicate = form.read(operands.pop(), "pred")
    number = form.read(operands[0], "b32")
    count = form.read(operands[1], "b32") if len(operands) > 1 else None
    if kind == "arrive" and count is None:
        raise form.error("arrive needs a number of threads")

    def run(unit: Any, mask: Mask) -> str | None:
        reduction = (put, operation, predicate(unit)) if predicate is not None else None
        expected = None if count is None else count(unit)
        return unit.machine.barriers.arrive(unit, mask, form, number(unit), expected, kind != "arrive", reduction)

    return run


@instruction("shfl")
def shuffle(form: Form) -> Run:
    """shfl.sync.{up,down,bfly,idx}.b32 d|p, a, b, c, membermask. PTX ISA 9.7.9.6."""
    t = form.type()
    if not form.flag("sync"):
        raise form.error("expected .sync")
    mode = form.one_of("up", "down", "bfly", "idx")
    puts = [form.write(o, k) for o, k in zip(form.operands[0].split("|"), (t, "pred"), strict=False)]
    a, b, c = (form.read(o, "b32") for o in form.operands[1:4])
    members = form.read(form.operands[4], "b32")

    def run(unit: Any, mask: Mask) -> None:
        values = by_warps(unit, a(unit))
        by, clamp = (by_warps(unit, r(unit)).astype(np.int64) for r in (b, c))
        by, bound, segment = by & 31, clamp & 31, clamp >> 8 & 31
        last = LANES & segment | bound & ~segment
        source = {
            "up": LANES - by,
            "down": LANES + by,
            "bfly": LANES ^ by,
            "idx": LANES & segment | by & ~segment,
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, LANES)
        active = active_of(unit, mask)
        asleep = active & ~np.take_along_axis(active, source, 1)
        if asleep.any():
            lane = int(asleep.reshape(-1).argmax())
            unit.fault("collective", "shfl reads a lane that does not take part", form.ins, lane, int(asleep.sum()))
        puts[0](unit, np.take_along_axis(values, source, 1).reshape(-1), mask)
        if len(puts) > 1:
            puts[1](unit, inside.reshape(-1), mask)

    return gathered(form, run, members)


@instruction("vote")
def vote(form: Form) -> Run:
    """vote.sync.{all,any,uni,ballot}."""
    t = form.type()
    if not form.flag("sync"):
        raise form.error("expected .sync")
    mode = form.one_of("all", "any", "uni", "ballot")
    put = form.write(form.operands[0], t)
    predicate, members = form.read(form.operands[1], "pred"), form.read(form.operands[2], "b32")

    def run(unit: Any, mask: Mask) -> None:
        active, p = active_of(unit, mask), by_warps(unit, predicate(unit))
        if mode == "ballot":
            result = ((active & p) * (1 << LANES)).sum(1).astype(np.uint32)
        elif mode == "any":
            result = (active & p).any(1)
        else:
            result = (~active | p).all(1)
            if mode == "uni":
                result |= (~active | ~p).all(1)
        put(unit, np.repeat(result, 32), mask)

    return gathered(form, run, members)


@instruction("match")
def match(form: Form) -> Run:
    """match.{any,all}.sync d{|p}, a, membermask: the mask of lanes with the same value."""
    t = form.type()
    mode = form.one_of("any", "all")
    form.one_of("sync")
    puts = [form.write(o, k) for o, k in zip(form.operands[0].split("|"), ("b32", "pred"), strict=False)]
    a, members = form.read(form.operands[1], t), form.read(form.operands[2], "b32")

    def run(unit: Any, mask: Mask) -> None:
        active, values = active_of(unit, mask), by_warps(unit, a(unit))
        same = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        bits = (same * (1 << LANES)).sum(2).astype(np.uint32)
        if mode == "all":
            everyone = (active * (1 << LANES)).sum(1).astype(np.uint32)[:, None]
            agree = bits == everyone
            bits = np.where(agree, everyone, np.uint32(0))
            if len(puts) > 1:
                puts[1](unit, agree.reshape(-1), mask)
        puts[0](unit, bits.reshape(-1), mask)

    return gathered(form, run, members)


@instruction("activemask")
def active_mask(form: Form) -> Run:
    put = form.write(form.operands[0], form.type())

    def run(unit: Any, mask: Mask) -> None:
        put(unit, np.repeat((active_of(unit, mask) * (1 << LANES)).sum(1).astype(np.uint32), 32), mask)

    return run


@instruction("redux")
def reduce_warp(form: Form) -> Run:
    """redux.sync.{add,min,max,and,or,xor} over the lanes of the membermask."""
    t = form.type()
    form.one_of("sync")
    operation = form.one_of("add", "min", "max", "and", "or", "xor")
    put, a, members = (
        form.write(form.operands[0], t),
        form.read(form.operands[1], t),
        form.read(form.operands[2], "b32"),
    )
    functions = {
        "add": (np.add, 0), "min": (np.minimum, "most"), "max": (np.maximum, "least"),
        "and": (np.bitwise_and, -1), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    }  # fmt: skip
    function, neutral = functions[operation]

    def run(unit: Any, mask: Mask) -> None:
        values = decode(t, by_warps(unit, a(unit)))
        info = np.iinfo(values.dtype)
        start = {"most": info.max, "least": info.min, -1: -1 if info.min < 0 else info.max}.get(neutral, neutral)
        masked = np.where(active_of(unit, mask), values, values.dtype.type(start))
        result = function.reduce(masked, axis=1, dtype=masked.dtype)
        put(unit, np.repeat(result.view(UNSIGNED[32]), 32), mask)

    return gathered(form, run, members)


@instruction("elect")
def elect(form: Form) -> Run:
    """elect.sync d|p, membermask: p is true for one lane, here the lowest; d is its number."""
    form.one_of("sync")
    chosen, p = form.operands[0].split("|")
    put, put_p = form.write(chosen, "b32"), form.write(p, "pred")
    members = form.read(form.operands[1], "b32")

    def run(unit: Any, mask: Mask) -> None:
        active = active_of(unit, mask)
        first = active.argmax(1)
        put(unit, np.repeat(first, 32).astype(np.uint32), mask)
        put_p(unit, (active & (first[:, None] == LANES)).reshape(-1), mask)

    return gathered(form, run, members)
