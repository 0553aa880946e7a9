"""Parts of a warp with membermasks of their own; .aligned instructions, which want all of a warp or warpgroup."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation.ptx.launch import empty, run
from tests.emulation.ptx.machine import SCHEDULES
from tests.emulation.snippets import execute, kernel, kinds
from tests.emulation.test_ptx_wgmma import plain_case

ALL = pytest.mark.parametrize("schedule", SCHEDULES)
LANE = np.arange(32)
LOW = LANE < 16
#: %m: 0xffff in the lower half of the warp, 0xffff0000 in the upper one.
HALVES = """
.shared .align 16 .b8 s[128]; .reg .b32 %m, %d, %h, %at, %w; .reg .pred %p, %e; .reg .b64 %q; and.b32 %h, %t, 16;
setp.ne.u32 %p, %h, 0; selp.b32 %m, 0xffff0000, 0xffff, %p; mov.u32 %at, s;
"""
STORE = "mad.wide.u32 %q, %t, 4, %a0; st.global.b32 [%q], %d; ret;"


def found(body: str, schedule: str = "lockstep", threads: int = 32) -> set[str]:
    return kinds(execute(f"{HALVES} {body}", [np.zeros(threads, np.uint32)], threads, schedule=schedule))


@ALL
@pytest.mark.parametrize(("instruction", "low", "high"), [
    ("redux.sync.add.u32 %d, %t, %m;", sum(range(16)), sum(range(16, 32))),
    ("vote.sync.ballot.b32 %d, 1, %m;", 0xFFFF, 0xFFFF0000),
    ("match.any.sync.b32 %d, 5, %m;", 0xFFFF, 0xFFFF0000),
    ("match.all.sync.b32 %d|%e, 5, %m;", 0xFFFF, 0xFFFF0000),
    ("elect.sync %d|%e, %m;", 0, 16),
])  # fmt: skip
def test_halves_of_a_warp_work_apart(instruction, low, high, schedule):
    """At one instruction, and at the same time, each with its own membermask."""
    out = empty(32, np.uint32)
    execute(f"{HALVES} {instruction} {STORE}", [out], schedule=schedule).raise_if_faulty()
    assert (out.data == np.where(LOW, low, high)).all()


def test_sets_that_match_any_makes():
    out = empty(32, np.uint32)
    body = f"{HALVES} and.b32 %h, %t, 3; match.any.sync.b32 %m, %h, -1; redux.sync.add.u32 %d, %t, %m; {STORE}"
    execute(body, [out]).raise_if_faulty()
    assert (out.data == [sum(range(lane % 4, 32, 4)) for lane in LANE]).all()


def test_every_lane_agrees_or_none_does():
    """match.all.sync with a predicate, over the lanes of the membermask alone."""
    out = empty(32, np.uint32)
    body = f"{HALVES} max.u32 %h, %t, 16; match.all.sync.b32 %d|%e, %h, %m; @%e add.u32 %d, %d, 1; {STORE}"
    execute(body, [out]).raise_if_faulty()
    assert (out.data == np.where(LOW, 0x10000, 0)).all()


@ALL
def test_a_half_does_not_meet_the_other(schedule):
    body = """
    mad.lo.u32 %w, %t, 4, %at; st.shared.b32 [%w], %t; bar.warp.sync {mask}; xor.b32 %w, %t, 16;
    mad.lo.u32 %w, %w, 4, %at; ld.shared.b32 %d, [%w]; ret;
    """
    assert found(body.format(mask="-1"), schedule) == set()
    assert found(body.format(mask="%m"), schedule) == {"race"}


def test_membermasks_that_do_not_agree():
    assert found("shfl.sync.bfly.b32 %d, %t, 8, 31, %m; ret;") == set()
    assert found("shfl.sync.bfly.b32 %d, %t, 16, 31, %m; ret;") == {"collective"}  # from outside of the own mask
    assert found("selp.b32 %m, -1, 0xffff, %p; redux.sync.add.u32 %d, %t, %m; ret;") == {"collective"}
    assert found("redux.sync.add.u32 %d, %t, 0xffff; ret;") == {"collective"}


ENDS = "setp.ge.u32 %p, %t, {}; @%p ret; "
MATRICES = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%d,%h,%m,%w}, {%d,%d,%d,%d}, {%d,%d}, {%d,%d,%d,%d};",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%d}, [%at];",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%at], {%d};",
    "movmatrix.sync.aligned.m8n8.trans.b16 %d, %m;",
)


@pytest.mark.parametrize("instruction", MATRICES)
def test_aligned_instructions_want_the_whole_warp(instruction):
    write = "mov.u32 %d, 0; st.shared.v4.b32 [%at], {%d, %d, %d, %d}; bar.warp.sync -1;"
    assert found(f"{write} {instruction} ret;") == set()
    assert "collective" in found(f"{write} {ENDS.format(16)} {instruction} ret;")
    assert "collective" in found(f"{write} {instruction} ret;", threads=16)
    assert found(f"{ENDS.format(32)} {write} {instruction} ret;", threads=64) == set()


def test_wgmma_wants_the_whole_warpgroup():
    ends = ".reg .pred %e; setp.ge.u32 %e, %t, 96; @%e ret; wgmma.fence.sync.aligned;"
    assert "collective" in kinds(plain_case(wgmma_fence=ends)[1])


@ALL
def test_setmaxnreg_wants_the_whole_warpgroup(schedule):
    def found(body: str, threads: int = 256) -> set[str]:
        body = f".reg .b32 %t; .reg .pred %p; mov.u32 %t, %tid.x; {body} end: ret;"
        ptx = kernel(body).replace("entry k()", "entry k()\n.maxntid 256\n")
        return {f.kind for f in run(ptx, "k", 2, threads, [], schedule=schedule).faults}

    give, less = (f"setmaxnreg.dec.sync.aligned.u32 {n};" for n in (24, 40))
    assert found(give) == set()
    assert found(f"setp.ge.u32 %p, %t, 128; @%p bra end; {give}") == set()
    for count in (7, 32, 160):
        assert found(f"setp.ge.u32 %p, %t, {count}; @%p bra end; {give}") == {"collective"}
    assert found(give, threads=96) == {"collective"}
    different = f"and.b32 %t, %t, 64; setp.ne.u32 %p, %t, 0; @%p bra other; {give} bra end; other: {less}"
    assert found(different) == {"deadlock"}
