"""cp.async, bulk copies, tensor copies, mbarriers: what arrives, and what is found where a wait is missing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation.ptx.launch import TensorMap, empty, run
from tests.emulation.ptx.machine import SCHEDULES
from tests.emulation.snippets import execute, kernel, kinds

ALL = pytest.mark.parametrize("schedule", SCHEDULES)


def groups(wait: str, barrier: str = "bar.sync 0;", schedule: str = "lockstep"):
    """64 threads copy 16 bytes each into two halves of shared memory, as two groups; each reads its neighbour's."""
    x, out = np.arange(512, dtype=np.uint32), empty(256, np.uint32)
    body = f"""
    .shared .align 16 .b8 s[2048]; .reg .b32 %at, %n, %v<4>; .reg .b64 %q; mov.u32 %at, s; mad.lo.u32 %at, %t, 16, %at;
    mad.wide.u32 %q, %t, 16, %a1; cp.async.cg.shared.global [%at], [%q], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%at+1024], [%q+1024], 16, 8; cp.async.commit_group; {wait} {barrier}
    xor.b32 %n, %t, 33; mov.u32 %at, s; mad.lo.u32 %at, %n, 16, %at; ld.shared.v4.b32 {{%v0, %v1, %v2, %v3}}, [%at];
    mad.wide.u32 %q, %t, 16, %a0; st.global.v4.b32 [%q], {{%v0, %v1, %v2, %v3}}; ret;
    """
    return x, out, execute(body, [out, x], 64, schedule=schedule)


@ALL
def test_groups_of_copies(schedule):
    for wait in ("cp.async.wait_group 1;", "cp.async.wait_group 0;", "cp.async.wait_all;"):
        x, out, report = groups(wait, schedule=schedule)
        assert report.faults == []
        assert (out.data.reshape(64, 4) == x[:256].reshape(64, 4)[np.arange(64) ^ 33]).all()
    for wait in ("", "cp.async.wait_group 2;"):
        assert kinds(groups(wait, schedule=schedule)[2]) == {"missing wait"}
    assert "missing wait" in kinds(groups("cp.async.wait_group 0;", barrier="", schedule=schedule)[2])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_fill_with_zeros(size):
    """The number of bytes that are read comes from a register: 0, a part, all; nothing beyond is touched."""
    x, out = np.arange(1, 1 + 16 * size, dtype=np.uint8), empty(16 * size, np.uint8)
    body = f"""
    .shared .align 16 .b8 s[256]; .reg .b32 %at, %n, %v;
    .reg .b64 %q, %o;
    mov.u32 %at, s; mad.lo.u32 %at, %t, {size}, %at;
    mad.wide.u32 %q, %t, {size}, %a1; rem.u32 %n, %t, 3; mul.lo.u32 %n, %n, {size // 2};
    cp.async.ca.shared.global [%at], [%q], {size}, %n; cp.async.wait_all; mad.wide.u32 %o, %t, {size}, %a0;
    """
    body += "".join(f"ld.shared.b32 %v, [%at+{i}]; st.global.b32 [%o+{i}], %v;" for i in range(0, size, 4)) + "ret;"
    execute(body, [out, x], 16).raise_if_faulty()
    kept = np.arange(size)[None] < (np.arange(16) % 3 * size // 2)[:, None]
    assert (out.data.reshape(16, size) == np.where(kept, x.reshape(16, size), 0)).all()


def test_copies_are_checked():
    x, out = np.zeros(64, np.uint32), empty(1, np.uint32)
    head = ".shared .align 16 .b8 s[64]; .reg .b32 %at, %none; mov.u32 %at, s; mov.u32 %none, 0; "
    for operands, kind in (
        ("[%at], [%a1+4], 16, %none", "misaligned"), ("[%at], [%a1+256], 16, %none", None),
        ("[%at], [%a1+250]", "misaligned"), ("[%at], [%a1+256]", "out of bounds"), ("[%at+64], [%a1]", "out of bounds"),
        ("[%at+8], [%a1]", "misaligned"),
    ):  # fmt: skip
        size = "" if "16," in operands else ", 16"
        report = execute(f"{head} cp.async.cg.shared.global {operands}{size}; cp.async.wait_all; ret;", [out, x], 1)
        assert kinds(report) == ({kind} if kind else set()), operands


# ---- mbarriers


def pipeline(change=lambda s: s, schedule="lockstep"):
    """Warp 1 fills a slot four times, warp 0 empties it; two mbarriers say whose turn it is."""
    out = empty(128, np.uint32)
    body = change("""
    .shared .align 8 .b8 b[16]; .shared .align 4 .b8 s[128]; .reg .b32 %full, %at, %i, %odd, %before, %v;
    .reg .pred %p, %done, %first; .reg .b64 %q; mov.u32 %full, b; mov.u32 %at, s; setp.ne.u32 %p, %t, 0; @%p bra ready;
    mbarrier.init.shared::cta.b64 [%full], 32; mbarrier.init.shared::cta.b64 [%full+8], 32;
    ready: bar.sync 0; and.b32 %v, %t, 31; mad.lo.u32 %at, %v, 4, %at; mov.u32 %i, 0; setp.ge.u32 %p, %t, 32;
    @%p bra fill;
    take: and.b32 %odd, %i, 1;
    wait1: mbarrier.try_wait.parity.shared::cta.b64 %done, [%full], %odd; @!%done bra wait1;
    ld.shared.b32 %v, [%at]; mbarrier.arrive.shared::cta.b64 _, [%full+8];
    shl.b32 %odd, %i, 5; add.u32 %odd, %odd, %t; mad.wide.u32 %q, %odd, 4, %a0; st.global.b32 [%q], %v;
    add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 4; @%p bra take; ret;
    fill: and.b32 %odd, %i, 1; xor.b32 %odd, %odd, 1;
    wait2: mbarrier.try_wait.parity.shared::cta.b64 %done, [%full+8], %odd; @!%done bra wait2;
    mad.lo.u32 %v, %i, 1000, %t; st.shared.b32 [%at], %v; mbarrier.arrive.shared::cta.b64 _, [%full];
    add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 4; @%p bra fill; ret;
    """)
    return out, execute(body, [out], 64, schedule=schedule)


@ALL
def test_mbarriers_order_a_pipeline(schedule):
    out, report = pipeline(schedule=schedule)
    assert report.faults == []
    assert (out.data.reshape(4, 32) == np.arange(4)[:, None] * 1000 + 32 + np.arange(32)).all()


def test_faults_of_a_pipeline_are_found():
    def without(old, new=""):
        def change(text):
            assert text.count(old) == 1, old
            return text.replace(old, new)

        return kinds(pipeline(change)[1])

    wait1 = "wait1: mbarrier.try_wait.parity.shared::cta.b64 %done, [%full], %odd; @!%done bra wait1;"
    wait2 = "wait2: mbarrier.try_wait.parity.shared::cta.b64 %done, [%full+8], %odd; @!%done bra wait2;"
    assert "race" in without(wait1)
    assert without(wait2)  # the phases that warp 0 waits for are over before it looks
    assert without("xor.b32 %odd, %odd, 1;") == {"deadlock"}
    assert "deadlock" in without("[%full], 32;", "[%full], 33;")
    assert without("[%full], 32;", "[%full], 16;") == {"mbarrier"}
    assert "race" in without("ready: bar.sync 0;", "ready:")
    assert "mbarrier" in without("mbarrier.init.shared::cta.b64 [%full], 32;")
    assert "mbarrier" in without("[%full], 32;", "[%full], 0;")


def test_a_wait_that_is_not_repeated_is_found():
    """The time limit of try_wait may be over before the phase is: whoever does not look at the result goes on."""

    def found(change, schedule):
        return kinds(pipeline(change, schedule)[1])

    assert found(lambda s: s.replace("@!%done bra wait1;", ""), "random")
    assert found(lambda s: s.replace("@!%done bra wait2;", ""), "random")
    assert found(lambda s: s, "random") == set()


def test_an_mbarrier_that_is_given_up_is_none():
    head = ".shared .align 8 .b8 b[8]; .reg .b32 %bar; .reg .b64 %state; mov.u32 %bar, b;"
    use = "mbarrier.arrive.shared.b64 %state, [%bar];"
    init = "mbarrier.init.shared.b64 [%bar], 1;"
    for body, faults in ((use, set()), (f"mbarrier.inval.shared.b64 [%bar]; {use}", {"mbarrier"}),
                         (f"mbarrier.inval.shared.b64 [%bar]; {init} {use}", set())):  # fmt: skip
        assert kinds(execute(f"{head} {init} {body} ret;", [], 1)) == faults


def test_relaxed_arrivals_and_waits_order_nothing():
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%full];"
    wait = "mbarrier.try_wait.parity.shared::cta.b64 %done, [%full], %odd;"

    def found(old, new):
        return kinds(pipeline(lambda s: s.replace(old, new))[1])

    assert found(arrive, "mbarrier.arrive.release.cta.shared::cta.b64 _, [%full];") == set()
    assert found(wait, "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %done, [%full], %odd;") == set()
    assert "race" in found(arrive, "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%full];")
    assert "race" in found(wait, "mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64 %done, [%full], %odd;")


def test_waits_by_state_and_copies_that_arrive():
    """cp.async.mbarrier.arrive.noinc: the phase ends when the copies have landed, and the waiting threads know it."""
    x, out = np.arange(32, dtype=np.uint32), empty(32, np.uint32)

    def body(wait="w: mbarrier.test_wait.shared.b64 %p, [%b], %state; @!%p bra w;"):
        return f"""
        .shared .align 8 .b8 bar[8]; .shared .align 16 .b8 s[128]; .reg .b32 %b, %at, %v; .reg .b64 %q, %state;
        .reg .pred %p; mov.u32 %b, bar; mov.u32 %at, s; setp.ne.u32 %p, %t, 0;
        @!%p mbarrier.init.shared.b64 [%b], 64; bar.warp.sync -1; mad.wide.u32 %q, %t, 4, %a1;
        mad.lo.u32 %v, %t, 4, %at; cp.async.ca.shared.global [%v], [%q], 4;
        cp.async.mbarrier.arrive.noinc.shared.b64 [%b]; mbarrier.arrive.shared.b64 %state, [%b]; {wait}
        xor.b32 %v, %t, 31; mad.lo.u32 %v, %v, 4, %at; ld.shared.b32 %v, [%v]; mad.wide.u32 %q, %t, 4, %a0;
        st.global.b32 [%q], %v; ret;
        """

    execute(body(), [out, x]).raise_if_faulty()
    assert (out.data == x[::-1]).all()
    assert "missing wait" in kinds(execute(body(wait=""), [out, x]))


# ---- bulk and tensor copies

LOAD = """
.shared .align 1024 .b8 s[8192]; .shared .align 8 .b8 b[8]; .reg .b32 %t, %at, %bar, %v, %k; .reg .b64 %out, %q, %m;
.reg .pred %p, %done; mov.u32 %t, %tid.x; mov.u32 %at, s; mov.u32 %bar, b; ld.param.u64 %out, [out];
setp.ne.u32 %p, %t, 0; @%p bra go; mbarrier.init.shared::cta.b64 [%bar], 1; {fence} mov.b64 %m, map;
cvta.param.u64 %m, %m; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {bytes};
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%at], [%m, {{{x}, {y}}}], [%bar];
go: bar.sync 0;
{wait}
mov.u32 %k, %t;
more: mad.lo.u32 %v, %k, 4, %at; ld.shared.b32 %v, [%v]; mad.wide.u32 %q, %k, 4, %out; st.global.b32 [%q], %v;
add.u32 %k, %k, 32; setp.lt.u32 %p, %k, {words}; @%p bra more; ret;
"""
FENCE = "fence.mbarrier_init.release.cluster;"
WAIT = "wait: mbarrier.try_wait.parity.shared::cta.b64 %done, [%bar], 0; @!%done bra wait;"


@pytest.mark.parametrize("x,y", [(0, 0), (8, 3), (40, 18), (-8, -2)])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_tensor_loads(swizzle, x, y):
    """A box of a tensor (20, 48); outside of it are zeros; chunk c of row r lies at c xor r / (128 / span)."""
    tensor = np.arange(1, 1 + 20 * 48, dtype=np.uint16).reshape(20, 48)
    inner = {0: 16, 32: 16, 64: 32, 128: 64}[swizzle]
    rows, size = 16, inner * 2
    out = empty((rows, inner), np.uint16)
    body = LOAD.format(bytes=rows * size, x=x, y=y, wait=WAIT, fence=FENCE, words=rows * size // 4)
    ptx = kernel(body, [".u64 out", ".align 64 .b8 map[128]"])
    run(ptx, "k", 1, 32, [out, TensorMap(tensor, (rows, inner), swizzle)]).raise_if_faulty()
    expected = np.zeros((rows, inner), np.uint16)
    for r in range(rows):
        for c in range(inner):
            if 0 <= y + r < 20 and 0 <= x + c < 48:
                chunk = c // 8 ^ r // (128 // swizzle) % (swizzle // 16) if swizzle else c // 8
                expected[r, chunk * 8 + c % 8] = tensor[y + r, x + c]
    assert (out.data == expected).all()


def test_faults_of_tensor_loads_are_found():
    tensor = np.ones((16, 16), np.uint16)

    def found(bytes=512, wait=WAIT, at="[%at]", fence=FENCE, **options):
        body = LOAD.format(bytes=bytes, x=0, y=0, wait=wait, fence=fence, words=128).replace(
            "bytes [%at]", f"bytes {at}"
        )
        ptx = kernel(body, [".u64 out", ".align 64 .b8 map[128]"])
        return kinds(run(ptx, "k", 1, 32, [empty((16, 16), np.uint16), TensorMap(tensor, (16, 16))], **options))

    assert found() == set()
    assert found(wait="") == {"missing wait"}
    for fence in ("fence.proxy.async.shared::cta;", "fence.proxy.async;", "fence.acq_rel.cluster;", "membar.gl;"):
        assert found(fence=fence) == set()
    assert found(fence="") == {"missing fence"} == found(fence="fence.acq_rel.cta;")
    assert found(fence="", init_fences=False) == set() and found(wait="", init_fences=False) == {"missing wait"}
    assert found(bytes=528) == {"deadlock"}
    assert "misaligned" in found(at="[%at+16]")
    assert "out of bounds" in found(at="[%at+7808]")
    with pytest.raises(ValueError, match="no multiples of 16"):
        TensorMap(np.ones((4, 20), np.uint16), (4, 8)).encode(None)
    with pytest.raises(ValueError, match="the swizzle's span"):
        TensorMap(np.ones((4, 64), np.uint16), (4, 32), 32).encode(None)


def test_tensor_maps_made_by_the_kernel():
    """A map is written field by field in shared memory, goes to global memory, and a copy uses it there."""
    tensor, out, made = (
        np.arange(20 * 48, dtype=np.uint16).reshape(20, 48),
        empty((16, 16), np.uint16),
        empty(256, "u1"),
    )
    replace = "tensormap.replace.tile.{}.shared::cta.b1024.{} [%raw], {};"
    fields = [("global_address", "b64", "%data"), ("rank", "b32", "1"), ("elemtype", "b32", "1")]
    fields += [(f, "b32", "0") for f in ("swizzle_mode", "interleave_layout", "fill_mode")]
    numbers = {"box_dim": (16, 16), "global_dim": (48, 20), "element_stride": (1, 1)}
    fields += [(f, "b32", f"{i}, %n{n}") for f, pair in numbers.items() for i, n in enumerate(pair)]
    fields += [("global_stride", "b64", "0, %stride")]
    make = " ".join(replace.format(*field) for field in fields)
    values = " ".join(f".reg .b32 %n{n}; mov.u32 %n{n}, {n};" for n in (1, 16, 20, 48))
    build = f"""
    .shared .align 128 .b8 r[128]; .reg .b32 %raw, %w; .reg .b64 %data, %stride; mov.u32 %raw, r; {values}
    mad.lo.u32 %w, %t, 4, %raw; mov.u32 %v, 0; st.shared.b32 [%w], %v; bar.warp.sync -1; mov.b64 %stride, 96;
    ld.param.u64 %data, [data]; ld.param.u64 %m, [map]; @%p bra made; {make} made: bar.warp.sync -1;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%m], [%raw], 128;
    fence.proxy.tensormap::generic.acquire.gpu [%m], 128; prefetch.tensormap [%m]; bar.warp.sync -1; @%p bra go;
    """
    body = LOAD.format(bytes=512, x=8, y=3, wait=WAIT, fence=FENCE, words=128)
    body = body.replace("@%p bra go;", build).replace("mov.b64 %m, map;", "").replace("cvta.param.u64 %m, %m;", "")
    run(kernel(body, [".u64 out", ".u64 data", ".u64 map"]), "k", 1, 32, [out, tensor, made]).raise_if_faulty()
    assert (out.data == tensor[3:19, 8:24]).all()


def store(change=lambda s: s):
    """Threads write shared memory, one stores it as a tensor whose last rows the box exceeds."""
    out = np.full((10, 32), 7, np.uint32)
    body = change(
        """
    .shared .align 128 .b8 s[2048]; .reg .b32 %t, %at, %v; .reg .b64 %m; .reg .pred %p; mov.u32 %t, %tid.x;
    mov.u32 %at, s; mad.lo.u32 %v, %t, 4, %at; st.shared.b32 [%v], %t; add.u32 %t, %t, 512; st.shared.b32 [%v+2044], %t;
    fence.proxy.async.shared::cta; bar.sync 0; setp.ne.u32 %p, %t, 512; @%p ret; mov.b64 %m, map; cvta.param.u64 %m, %m;
    cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%m, {0, 4}], [%at];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; ret;
    """.replace("st.shared.b32 [%v+2044], %t;", "")
    )
    tensor = TensorMap(out, (16, 32))
    return out, run(kernel(body, [".align 64 .b8 map[128]"]), "k", 1, 512, [tensor])


def test_tensor_stores():
    out, report = store()
    assert report.faults == []
    assert (out[:4] == 7).all() and (out[4:].reshape(-1) == np.arange(6 * 32)).all()

    def found(old):
        return kinds(store(lambda s: s.replace(old, ""))[1])

    assert found("fence.proxy.async.shared::cta;") == {"missing fence"}
    fence = "fence.proxy.async.shared::cta;"
    for other, faults in ((".global", {"missing fence"}), ("", set()), (".shared::cluster", set())):
        assert kinds(store(lambda s, o=other: s.replace(fence, f"fence.proxy.async{o};"))[1]) == faults, other
    assert "race" in found("bar.sync 0;")
    assert found("cp.async.bulk.wait_group.read 0;") == {"missing wait"}
    assert found("cp.async.bulk.commit_group;") == {"missing wait"}


@pytest.mark.parametrize(("fence", "faults"), [
    ("fence.proxy.async;", set()), ("fence.proxy.async.global;", set()), ("", {"missing fence"}),
    ("fence.proxy.async.shared::cta;", {"missing fence"}),
])  # fmt: skip
def test_copies_of_what_the_kernel_wrote_to_global_memory(fence, faults):
    body = f"""
    .shared .align 16 .b8 s[16]; .shared .align 8 .b8 b[8]; .reg .b32 %at, %bar; .reg .pred %done; mov.u32 %at, s;
    mov.u32 %bar, b; mbarrier.init.shared.b64 [%bar], 1; {FENCE} mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 16;
    st.global.v4.b32 [%a0], {{%at, %at, %at, %bar}}; {fence}
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%at], [%a0], 16, [%bar];
    {WAIT.replace("::cta", "")} ret;
    """
    assert kinds(execute(body, [empty(4, np.uint32)], 1)) == faults


def test_linear_bulk_copies():
    x, out = np.arange(64, dtype=np.uint32), empty(64, np.uint32)
    body = f"""
    .shared .align 16 .b8 s[256]; .shared .align 8 .b8 b[8]; .reg .b32 %at, %bar; .reg .pred %done; mov.u32 %at, s;
    mov.u32 %bar, b; mbarrier.init.shared.b64 [%bar], 1; {FENCE} mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%at], [%a1], 256, [%bar];
    {WAIT.replace("::cta", "")}
    cp.async.bulk.global.shared::cta.bulk_group [%a0], [%at], 256; cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0; ret;
    """
    execute(body, [out, x], 1).raise_if_faulty()
    assert (out.data == x).all()
    assert kinds(execute(body.replace("[%a1], 256", "[%a1+8], 256"), [out, x], 1)) >= {"misaligned"}
    assert kinds(execute(body.replace("[%a0], [%at]", "[%a0+16], [%at]"), [out, x], 1)) == {"out of bounds"}
