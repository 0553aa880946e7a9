"""The bytes of an mbarrier, which belong to it alone; what a wait for bulk stores tells, with .read and without."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation.ptx.launch import Report, empty
from tests.emulation.ptx.machine import SCHEDULES
from tests.emulation.snippets import execute, kinds
from tests.emulation.test_ptx_wgmma import plain_case

ALL = pytest.mark.parametrize("schedule", SCHEDULES)
#: An mbarrier at %bar, one more at %other, and zeros at %near.
MADE = """
.shared .align 128 .b8 s[256]; .reg .b32 %bar, %other, %near, %v; .reg .b64 %state, %g; .reg .pred %done;
mov.u32 %bar, s; add.u32 %near, %bar, 16; add.u32 %other, %bar, 128; mov.u32 %v, 0;
st.shared.v4.b32 [%near], {%v, %v, %v, %v}; mbarrier.init.shared.b64 [%bar], 1; mbarrier.init.shared.b64 [%other], 1;
"""
ARRIVE = "mbarrier.arrive.shared.b64 %state, [%bar];"
INIT, INVAL = "mbarrier.init.shared.b64 [%bar], 1;", "mbarrier.inval.shared.b64 [%bar];"


def found(body: str) -> set[str]:
    return kinds(execute(f"{MADE} {body} ret;", [np.zeros(4, np.uint32)], 1))


@pytest.mark.parametrize("access", [
    "st.shared.b32 [{at}], %v;", "st.shared.b32 [{at}+4], %v;", "st.shared.u8 [{at}+7], %v;",
    "ld.shared.b32 %v, [{at}];", "ld.shared.v4.b32 {{%v, %v, %v, %v}}, [{at}];", "atom.shared.add.u32 %v, [{at}], 1;",
    "cp.async.ca.shared.global [{at}], [%a0], 4; cp.async.wait_all;",
    "cvt.u64.u32 %g, {at}; cvta.shared.u64 %g, %g; st.b32 [%g], %v;",
])  # fmt: skip
def test_the_bytes_of_an_mbarrier_are_its_own(access):
    assert found(access.format(at="%near") + ARRIVE) == set()
    assert "mbarrier" in found(access.format(at="%bar") + ARRIVE)


def test_an_mbarrier_is_made_and_given_up_once():
    assert found(ARRIVE) == set() == found(f"{INVAL} {INIT} {ARRIVE}")
    assert found(f"{INIT} {ARRIVE}") == {"mbarrier"}
    assert kinds(execute(f"{MADE} ret;", [], 2)) == {"mbarrier"}  # both threads
    assert found(f"{INVAL} st.shared.b32 [%bar], %v; st.shared.b32 [%bar+4], %v; {INIT} {ARRIVE}") == set()
    assert found(f"{INVAL} st.shared.b32 [%bar], %v; ld.shared.b32 %v, [%bar];") == set()
    assert found(f"{INVAL} ld.shared.b32 %v, [%bar];") == {"uninitialised"}


@pytest.mark.parametrize("fence", ["fence.proxy.async.shared::cta;", "fence.mbarrier_init.release.cluster;"])
def test_a_bulk_copy_over_an_mbarrier_is_found(fence):
    def copy(to):
        return f"""
        {fence} mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 16;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [%a0], 16, [%bar];
        wait: mbarrier.try_wait.parity.shared.b64 %done, [%bar], 0; @!%done bra wait;
        """

    if "proxy" in fence:
        assert found(copy("%near")) == set()
    assert "mbarrier" in found(copy("%other"))


def test_a_matrix_over_an_mbarrier_is_found():
    init = "setp.eq.u32 %p, %t, 0; @%p mbarrier.init.shared.b64 [%dyn+64], 1; fence.proxy.async; bar.sync 0;"
    assert "mbarrier" in kinds(plain_case(wgmma_fence=f"{init} wgmma.fence.sync.aligned;")[1])


def test_bytes_that_an_mbarrier_can_count():
    """From -(2^20 - 1) to 2^20 - 1 (PTX ISA 9.7.13.15.2)."""

    def bytes_of(count, kind="expect_tx"):
        return f"mov.u32 %v, {count}; mbarrier.{kind}.relaxed.cta.shared::cta.b64 [%bar], %v;"

    most = (1 << 20) - 1
    assert found(bytes_of(most)) == set() == found(bytes_of(most, "complete_tx"))
    assert found(bytes_of(most + 1)) == {"mbarrier"} == found(bytes_of(most + 1, "complete_tx"))
    assert found(bytes_of(most) + bytes_of(1)) == {"mbarrier"}
    assert found(f"mbarrier.arrive.expect_tx.shared.b64 _, [%bar], {most + 1};") == {"mbarrier"}


def test_bytes_expected_and_completed_apart_from_an_arrival():
    """The phase ends when both have come to nothing, whatever comes first."""
    expect, complete = (
        f"mbarrier.{kind}.relaxed.cta.shared::cta.b64 [%bar], 48;" for kind in ("expect_tx", "complete_tx")
    )
    wait = "wait: mbarrier.test_wait.shared.b64 %done, [%bar], %state; @!%done bra wait;"
    assert found(f"{expect} {ARRIVE} {complete} {wait}") == set() == found(f"{expect} {complete} {ARRIVE} {wait}")
    assert kinds(execute(f"{MADE} {expect} {ARRIVE} {wait} ret;", [], 1, limit=20_000)) == {"deadlock"}


# ---- bulk stores


def read_back(wait: str) -> Report:
    """One thread stores 128 bytes by a bulk copy, waits, and all read them from global memory."""
    body = f"""
    .shared .align 16 .b8 s[256]; .reg .b32 %at, %v; .reg .pred %p; .reg .b64 %q; mov.u32 %at, s;
    mad.lo.u32 %at, %t, 4, %at; st.shared.b32 [%at], %t; fence.proxy.async.shared::cta; bar.sync 0;
    setp.ne.u32 %p, %t, 0; @%p bra go; cp.async.bulk.global.shared::cta.bulk_group [%a0], [%at], 128;
    cp.async.bulk.commit_group; {wait} go: bar.sync 0; st.shared.b32 [%at], 7;
    mad.wide.u32 %q, %t, 4, %a0; ld.global.b32 %v, [%q]; mad.wide.u32 %q, %t, 4, %a1; st.global.b32 [%q], %v; ret;
    """.replace("st.shared.b32 [%at], 7;", "mov.u32 %v, 7; st.shared.b32 [%at], %v;")
    out = empty(32, np.uint32)
    report = execute(body, [empty(32, np.uint32), out])
    assert (out.data == np.arange(32)).all()
    return report


def test_read_says_nothing_of_what_was_written():
    assert read_back("cp.async.bulk.wait_group 0;").faults == []
    (fault,) = read_back("cp.async.bulk.wait_group.read 0;").faults
    assert fault.kind == "missing wait" and "without .read" in str(fault) and fault.instruction.opcode == "ld"
    assert {f.instruction.opcode for f in read_back("").faults} >= {"st", "ld"}


@ALL
def test_groups_of_bulk_stores(schedule):
    """Two stores to the same place need the whole wait between them; from the same place, none."""

    def found(first, second, wait):
        body = f"""
        .shared .align 16 .b8 s[64]; .reg .b32 %at, %v; mov.u32 %at, s; mov.u32 %v, 5;
        st.shared.v4.b32 [%at], {{%v, %v, %v, %v}}; fence.proxy.async.shared::cta;
        cp.async.bulk.global.shared::cta.bulk_group [{first}], [%at], 16; cp.async.bulk.commit_group; {wait}
        cp.async.bulk.global.shared::cta.bulk_group [{second}], [%at], 16; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 0; ret;
        """
        return kinds(execute(body, [empty(8, np.uint32)], 1, schedule=schedule))

    assert found("%a0", "%a0+16", "") == set() == found("%a0", "%a0", "cp.async.bulk.wait_group 0;")
    assert found("%a0", "%a0", "cp.async.bulk.wait_group.read 0;") == {"missing wait"}
    assert found("%a0", "%a0", "cp.async.bulk.wait_group 1;") == {"missing wait"}
