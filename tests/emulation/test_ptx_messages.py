"""Flags in memory: fences, releases, acquires, and how far their scopes reach. PTX ISA 8."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation.ptx import control, machine
from tests.emulation.ptx.launch import Report, empty
from tests.emulation.ptx.machine import SCHEDULES
from tests.emulation.snippets import execute, kinds

ALL = pytest.mark.parametrize("schedule", SCHEDULES)
WIDE = [("membar.gl;", "relaxed.gpu"), ("fence.acq_rel.gpu;", "relaxed.sys"), ("fence.sc.sys;", "relaxed.gpu"),
        ("membar.sys;", "volatile")]  # fmt: skip
NEAR = [("membar.cta;", "relaxed.cta"), ("fence.acq_rel.cta;", "relaxed.gpu"), ("membar.cta;", "volatile"),
        ("membar.gl;", "relaxed.cta"), ("fence.acq_rel.cluster;", "relaxed.cluster")]  # fmt: skip


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    """Whoever waits for a flag lets the others go on sooner, and the tests end sooner."""
    for module in (control, machine):
        monkeypatch.setattr(module, "LONG_TURN", 200)


def message(
    give: str, take: str, store: str = "st.relaxed.gpu", load: str = "ld.relaxed.gpu", place: str = "%b",
    schedule: str = "lockstep",
) -> tuple[np.ndarray, Report]:  # fmt: skip
    """One leaves a value and raises a flag, by `give` and `store`; the other waits for it and takes the value.

    place: what is 0 for the one and not for the other: %b, two blocks; %w, two warps of each block.
    """
    threads, blocks = (1, 2) if place == "%b" else (64, 2)
    out = empty(blocks * threads, np.uint32)
    body = f"""
    .reg .b32 %v, %i, %w, %lane; .reg .pred %p, %first; .reg .b64 %q, %flag, %value; mad.lo.u32 %i, %b, {threads}, %t;
    mad.wide.u32 %q, %i, 4, %a2; shr.u32 %w, %t, 5; and.b32 %lane, %t, 31; setp.eq.u32 %first, %lane, 0;
    mov.b64 %value, %a0; mov.b64 %flag, %a1;
    {"" if place == "%b" else "mad.wide.u32 %value, %b, 4, %a0; mad.wide.u32 %flag, %b, 4, %a1;"}
    mov.u32 %v, 77; @!%first bra end; setp.ne.u32 %p, {place}, 0; @%p bra take; st.global.b32 [%value], %v;
    {give} {store}.global.b32 [%flag], %v; bra end;
    take: {load}.global.b32 %v, [%flag]; setp.eq.u32 %p, %v, 0; @%p bra take; {take} ld.global.b32 %v, [%value];
    end: st.global.b32 [%q], %v; ret;
    """
    report = execute(body, [empty(2, np.uint32), np.zeros(2, np.uint32), out], threads, blocks, schedule=schedule)
    return out.data, report


@ALL
def test_messages_through_flags(schedule):
    for fence, order in WIDE:
        out, report = message(fence, fence, f"st.{order}", f"ld.{order}", schedule=schedule)
        assert report.faults == [] and (out == 77).all()
    fence = "membar.gl;"
    assert (
        kinds(message("", fence, schedule=schedule)[1]) == {"race"} == kinds(message(fence, "", schedule=schedule)[1])
    )


@ALL
def test_releases_and_acquires(schedule):
    """Of stores, loads and atomics: each is a fence and an access in one, in one direction."""
    release, acquire = "st.release.gpu", "ld.acquire.gpu"
    assert message("", "", release, acquire, schedule=schedule)[1].faults == []
    assert message("", "membar.gl;", release, schedule=schedule)[1].faults == []
    assert message("membar.gl;", "", load=acquire, schedule=schedule)[1].faults == []
    assert kinds(message("", "", release, schedule=schedule)[1]) == {"race"}
    assert kinds(message("", "", load=acquire, schedule=schedule)[1]) == {"race"}


@ALL
@pytest.mark.parametrize(("give", "take", "faults"), [
    ("red.release.gpu.global.add.u32 [%a1], 1;", "atom.acquire.gpu.global.add.u32 %f, [%a1], 0;", set()),
    ("atom.acq_rel.gpu.global.exch.b32 %f, [%a1], 1;", "atom.acq_rel.gpu.global.or.b32 %f, [%a1], 0;", set()),
    ("red.release.gpu.global.add.u32 [%a1], 1;", "atom.relaxed.gpu.global.add.u32 %f, [%a1], 0;", {"race"}),
    ("red.relaxed.gpu.global.add.u32 [%a1], 1;", "atom.acquire.gpu.global.add.u32 %f, [%a1], 0;", {"race"}),
    ("red.release.cta.global.add.u32 [%a1], 1;", "atom.acquire.gpu.global.add.u32 %f, [%a1], 0;", {"race"}),
    ("red.release.gpu.global.add.u32 [%a1], 1;", "atom.acquire.cta.global.add.u32 %f, [%a1], 0;", {"race"}),
])  # fmt: skip
def test_atomics_as_flags(give, take, faults, schedule):
    body = f"""
    .reg .b32 %v, %f; .reg .pred %p; setp.ne.u32 %p, %b, 0; @%p bra take; mov.u32 %v, 42; st.global.b32 [%a0], %v;
    {give} ret; take: {take} setp.eq.u32 %p, %f, 0; @%p bra take; ld.global.b32 %v, [%a0]; st.global.b32 [%a2], %v; ret;
    """
    arguments = [empty(1, np.uint32), np.zeros(1, np.uint32), empty(1, np.uint32)]
    assert kinds(execute(body, arguments, 1, 2, schedule=schedule)) == faults


@ALL
@pytest.mark.parametrize(("fence", "order"), NEAR)
def test_the_scope_of_a_block_ends_with_it(fence, order, schedule):
    def found(place):
        return kinds(message(fence, fence, f"st.{order}", f"ld.{order}", place, schedule)[1])

    assert found("%w") == set()
    assert found("%b") == {"race"}


def test_a_wide_scope_orders_within_the_block_too():
    for fence, order in WIDE:
        assert message(fence, fence, f"st.{order}", f"ld.{order}", "%w")[1].faults == []
    for release, acquire in (("cta", "gpu"), ("gpu", "cta"), ("cta", "cta")):
        orders = f"st.release.{release}", f"ld.acquire.{acquire}"
        assert message("", "", *orders, "%w")[1].faults == []
        assert kinds(message("", "", *orders, "%b")[1]) == {"race"}


@ALL
def test_atomics_of_a_blocks_scope_are_its_own(schedule):
    def found(scope, address="%a0", blocks=3):
        body = f".reg .b64 %q; mad.wide.u32 %q, %b, 4, %a0; red.relaxed{scope}.global.add.u32 [{address}], 1; ret;"
        return kinds(execute(body, [np.zeros(4, np.uint32)], 32, blocks, schedule=schedule))

    assert found(".gpu") == set() == found("")
    assert found(".cta") == {"race"}
    assert found(".cta", "%q") == set() == found(".cta", blocks=1)


@ALL
def test_what_one_block_heard_it_passes_on(schedule):
    """Block 0 tells block 1, which tells block 2: the value of block 0 is in order for block 2 too."""
    body = """
    .reg .b32 %v, %f; .reg .b64 %mine, %before; .reg .pred %p; mad.wide.u32 %mine, %b, 4, %a1;
    add.u64 %before, %mine, -4; setp.ne.u32 %p, %b, 0; @%p bra take; mov.u32 %v, 42; st.global.b32 [%a0], %v; bra tell;
    take: ld.acquire.gpu.global.b32 %f, [%before]; setp.eq.u32 %p, %f, 0; @%p bra take;
    setp.eq.u32 %p, %b, 1; @%p bra tell; ld.global.b32 %v, [%a0]; st.global.b32 [%a2], %v; ret;
    tell: mov.u32 %f, 1; st.release.gpu.global.b32 [%mine], %f; ret;
    """

    def found(body):
        out = empty(1, np.uint32)
        return kinds(execute(body, [empty(1, np.uint32), np.zeros(3, np.uint32), out], 1, 3, schedule=schedule))

    assert found(body) == set()
    assert found(body.replace("st.release.gpu", "st.relaxed.gpu")) == {"race"}


@ALL
@pytest.mark.parametrize(("store", "load", "faults"), [
    ("membar.cta; st.volatile.shared.b32 [%at], %f;", "ld.volatile.shared.b32 %f, [%at]; {} membar.cta;", set()),
    ("membar.cta; st.relaxed.cta.b32 [%g], %f;", "ld.volatile.shared.b32 %f, [%at]; {} membar.gl;", set()),
    ("st.release.cta.shared.b32 [%at], %f;", "ld.acquire.cta.b32 %f, [%g]; {}", set()),
    ("membar.cta; atom.shared.exch.b32 %f, [%at], %f;", "ld.relaxed.cta.shared.b32 %f, [%at]; {} membar.cta;", set()),
    ("st.volatile.shared.b32 [%at], %f;", "ld.volatile.shared.b32 %f, [%at]; {} membar.cta;", {"race"}),
    ("membar.cta; st.volatile.shared.b32 [%at], %f;", "ld.volatile.shared.b32 %f, [%at]; {}", {"race"}),
    ("membar.cta; st.shared.b32 [%at], %f;", "ld.volatile.shared.b32 %f, [%at]; {} membar.cta;", {"race"}),
])  # fmt: skip
def test_flags_in_shared_memory(store, load, faults, schedule):
    """Each block has its own, at the same address; through generic addresses too."""
    again = "setp.eq.u32 %p, %f, 0; @%p bra take;"
    body = f"""
    .shared .align 16 .b8 s[32]; .reg .b32 %at, %v, %f; .reg .b64 %g; .reg .pred %p, %first; mov.u32 %at, s;
    cvt.u64.u32 %g, %at; cvta.shared.u64 %g, %g; setp.eq.u32 %first, %t, 0; mov.u32 %f, 0;
    @%first st.shared.b32 [%at], %f; bar.sync 0; setp.eq.u32 %p, %t, 32; @%p bra take; @!%first ret;
    st.shared.b32 [%at+16], %at; mov.u32 %f, 1; {store} ret;
    take: {load.format(again)} ld.shared.b32 %v, [%at+16]; ret;
    """
    assert kinds(execute(body, [], 64, 2, schedule=schedule)) == faults
