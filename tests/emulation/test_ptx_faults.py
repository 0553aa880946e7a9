"""Each kind of fault in a small kernel that has it, beside one that has not; memory spaces, fences, wrong PTX."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation.ptx.launch import Buffer, EmulationError, Launch, empty, find, run, run_schedules
from tests.emulation.ptx.machine import SCHEDULES
from tests.emulation.ptx.parse import PtxError, parse
from tests.emulation.snippets import execute, kernel, kinds

ALL = pytest.mark.parametrize("schedule", SCHEDULES)
SHARED = ".shared .align 16 .b8 s[1024]; .reg .b32 %at, %v, %w; .reg .b64 %q; .reg .pred %p; mov.u32 %at, s;"


def copy(change: str = "", threads: int = 32, x=None, out=None, **options):
    """out[t] = x[t], four bytes each, with a change of the address or the instruction."""
    x = np.arange(32, dtype=np.uint32) if x is None else x
    out = empty(32, np.uint32) if out is None else out
    body = f"""
    .reg .b64 %i, %o; .reg .b32 %v; mad.wide.u32 %i, %t, 4, %a1; mad.wide.u32 %o, %t, 4, %a0; {change}
    ld.global.b32 %v, [%i]; st.global.b32 [%o], %v; ret;
    """
    return execute(body, [out, x], threads, **options)


def test_global_memory():
    assert copy().faults == []
    assert kinds(copy(threads=33)) == {"out of bounds"}
    assert kinds(copy("sub.s64 %i, %i, 4;")) == {"out of bounds"}
    assert kinds(copy("add.s64 %o, %o, 100000000;")) == {"out of bounds"}
    assert kinds(copy("mov.b64 %i, 0;")) == {"out of bounds"}
    assert kinds(copy("add.s64 %i, %i, 2;")) >= {"misaligned"}
    assert kinds(copy(x=Buffer(np.zeros(32, np.uint32), offset=2))) == {"misaligned"}
    assert kinds(copy(x=empty(32, np.uint32))) == {"uninitialised"}
    assert kinds(copy(out=Buffer(np.zeros(32, np.uint32), read_only=True))) == {"read-only"}


def test_a_fault_says_where():
    report = copy(threads=34)
    faults = {f.instruction.opcode: f for f in report.faults}
    assert (
        faults["ld"].thread == 32
        and faults["ld"].count == 2
        and "byte 128 of argument p1 (128 bytes)" in str(faults["ld"])
    )
    assert f"PTX line {faults['ld'].instruction.line}: ld.global.b32 %v, [%i]" in str(faults["ld"])
    with pytest.raises(EmulationError, match="out of bounds"):
        report.raise_if_faulty()
    ptx = kernel(".loc 1 42 7\nld.global.b32 %r, [0];\n.reg .b32 %r; ret;", outside='.file 1 "/some/where/k.cu"')
    assert run(ptx, "k", 1, 1, []).faults[0].instruction.source == ("k.cu", 42)


@ALL
def test_shared_memory(schedule):
    def found(body):
        return kinds(execute(SHARED + body, [], 64, schedule=schedule))

    write, read = "mad.lo.u32 %w, %t, 4, %at; st.shared.b32 [%w], %t;", "ld.shared.b32 %v, [%w]; ret;"
    other = "xor.b32 %w, %t, 32; mad.lo.u32 %w, %w, 4, %at;"
    assert found(write + read) == set()
    assert found(write + "bar.sync 0;" + other + read) == set()
    assert "race" in found(write + other + read)
    assert found("mad.lo.u32 %w, %t, 16, %at;" + "st.shared.b32 [%w+8], %t; ld.shared.b32 %v, [%w+8]; ret;") == set()
    assert found("mad.lo.u32 %w, %t, 32, %at; st.shared.b32 [%w], %t; ret;") == {"out of bounds"}
    assert found("st.shared.b32 [%at+-4], %t; ret;") >= {"out of bounds"}
    assert found("mad.lo.u32 %w, %t, 8, %at; st.shared.v4.b32 [%w], {%t, %t, %t, %t}; ret;") >= {"misaligned"}
    assert found("mad.lo.u32 %w, %t, 4, %at; ld.shared.b32 %v, [%w]; ret;") == {"uninitialised"}
    assert found("st.shared.b32 [%at], %t; ret;") == {"race"}  # all threads, different values
    assert found("mov.u32 %v, 7; st.shared.b32 [%at], %v; ret;") == set()  # the same value


@ALL
def test_races_within_a_warp(schedule):
    def found(between):
        body = f"""
        mad.lo.u32 %w, %t, 4, %at; st.shared.b32 [%w], %t; {between} xor.b32 %w, %t, 1; mad.lo.u32 %w, %w, 4, %at;
        ld.shared.b32 %v, [%w]; {between} st.shared.b32 [%w], %v; ret;
        """
        return kinds(execute(SHARED + body, [], 32, schedule=schedule))

    assert found("bar.warp.sync -1;") == set() == found("bar.sync 0;")
    assert found("") == {"race"}


@ALL
def test_a_write_after_a_read_is_a_race(schedule):
    def found(barrier):
        body = f"""
        mad.lo.u32 %w, %t, 4, %at; st.shared.b32 [%w], %t; bar.sync 0; ld.shared.b32 %v, [%at]; {barrier}
        st.shared.b32 [%w], 9999; ret;
        """.replace("st.shared.b32 [%w], 9999;", "add.u32 %v, %v, 9999; st.shared.b32 [%w], %v;")
        return kinds(execute(SHARED + body, [], 64, schedule=schedule))

    assert found("bar.sync 0;") == set() and found("") == {"race"}


@ALL
def test_a_write_is_compared_with_every_reader(schedule):
    """Other warps' reads count also where the last to read were the writer's own warp, and lanes beside a lane."""

    def found(after, threads=64):
        body = f"""
        mov.u32 %v, 5; setp.eq.u32 %p, %t, 40; @%p st.shared.b32 [%at], %v; bar.sync 0; ld.shared.b32 %w, [%at];
        {after} ret;
        """
        return kinds(execute(SHARED + body, [], threads, schedule=schedule))

    assert found("bar.sync 0; @%p st.shared.b32 [%at], %t;") == set()
    assert found("bar.warp.sync -1; @%p st.shared.b32 [%at], %t;") == {"race"}
    assert found("bar.warp.sync -1; @%p st.shared.b32 [%at], %t;", 256) == {"race"}


@ALL
def test_one_lane_does_not_speak_for_its_warp(schedule):
    """Lane 0 says by an mbarrier that the warp has read, without the warp having met before."""

    def found(meet):
        body = f"""
        .shared .align 8 .b8 b[8]; .reg .b32 %bar; .reg .pred %done, %first; mov.u32 %bar, b; mov.u32 %v, 5;
        setp.eq.u32 %first, %t, 0; @%first mbarrier.init.shared.b64 [%bar], 1; @%first st.shared.b32 [%at], %v;
        bar.sync 0; setp.ge.u32 %p, %t, 32; @%p bra write; ld.shared.b32 %w, [%at]; {meet}
        @%first mbarrier.arrive.shared.b64 _, [%bar]; ret;
        write: setp.ne.u32 %p, %t, 32; @%p ret;
        wait: mbarrier.try_wait.parity.shared.b64 %done, [%bar], 0; @!%done bra wait; st.shared.b32 [%at], %t; ret;
        """
        return kinds(execute(SHARED + body, [], 64, schedule=schedule))

    assert found("bar.warp.sync -1;") == set()
    assert found("") == {"race"}


@ALL
def test_a_later_read_does_not_hide_an_earlier_one(schedule):
    """Lane 1 reads, lane 0 arrives and reads later: only its read is ordered before the write."""

    def found(meet):
        body = f"""
        .shared .align 8 .b8 b[16]; .reg .b32 %bar; .reg .pred %done, %first; mov.u32 %bar, b; mov.u32 %v, 5;
        setp.eq.u32 %first, %t, 0; @%first mbarrier.init.shared.b64 [%bar], 1;
        @%first mbarrier.init.shared.b64 [%bar+8], 1; @%first st.shared.b32 [%at], %v;
        bar.sync 0; setp.ge.u32 %p, %t, 32; @%p bra write; ld.shared.b32 %w, [%at]; {meet}
        @%first mbarrier.arrive.shared.b64 _, [%bar+8]; @%first ld.shared.b32 %w, [%at];
        @%first mbarrier.arrive.shared.b64 _, [%bar]; ret;
        write: setp.ne.u32 %p, %t, 32; @%p ret;
        wait: mbarrier.try_wait.parity.shared.b64 %done, [%bar], 0; @!%done bra wait; st.shared.b32 [%at], %t; ret;
        """
        return kinds(execute(SHARED + body, [], 64, schedule=schedule))

    assert found("bar.warp.sync -1;") == set()
    assert found("") == {"race"}


def test_races_between_blocks():
    def found(body, blocks=4):
        cell = np.zeros(4, np.uint32)
        return kinds(execute(".reg .b64 %q; .reg .b32 %v; .reg .pred %p;" + body, [cell], 1, blocks))

    assert found("mad.wide.u32 %q, %b, 4, %a0; st.global.b32 [%q], %b; ret;") == set()
    assert found("add.u32 %v, %b, 1; st.global.b32 [%a0], %v; ret;") == {"race"}
    assert found("red.global.add.u32 [%a0], 1; ret;") == set()
    assert found("red.global.add.u32 [%a0], 1; ld.global.b32 %v, [%a0]; ret;") == {"race"}


@ALL
def test_barrier_divergence_and_deadlock(schedule):
    def found(body, threads=64):
        return kinds(execute(SHARED + body, [], threads, schedule=schedule, limit=200_000))

    part = "setp.lt.u32 %p, %t, {n}; @%p bar.sync 0; ret;"
    assert found(part.format(n=64)) == set()
    assert found(part.format(n=40)) == {"barrier divergence"}
    assert found("setp.lt.u32 %p, %t, 40; @%p bra a; bar.sync 0; ret; a: bar.sync 0; ret;") == {"barrier divergence"}
    assert found("setp.lt.u32 %p, %t, 32; @%p bra a; bar.sync 1; ret; a: bar.sync 0; ret;") == {"deadlock"}
    assert found("bar.sync 0, 96; ret;") == {"deadlock"}
    assert "barrier divergence" in found("bar.sync 0, 50; ret;")
    assert found("bar.sync 15; ret;") == set() and "barrier divergence" in found("bar.sync 16; ret;")
    assert found("bar.sync 1, 64; ret;") == set()
    assert found("bar.sync 1, 64; ret;", 96) & {"barrier divergence", "deadlock"}
    assert found("again: bra again;") == {"deadlock"}
    assert found("setp.lt.u32 %p, %t, 3; @%p bra a; ret; a: shfl.sync.bfly.b32 %v, %t, 1, 31, -1; ret;") == {
        "collective"
    }
    assert found(
        "setp.lt.u32 %p, %t, 3; @%p bra a; bar.sync 0; ret; a: shfl.sync.bfly.b32 %v, %t, 1, 31, -1; bra b; b: ret;"
    ) >= {"deadlock"}
    assert found("shfl.sync.bfly.b32 %v, %t, 1, 31, 0xffff; ret;") >= {"collective"}
    assert found("setp.lt.u32 %p, %t, 3; @%p trap; ret;") == {"trap"}


def test_non_determinism():
    x = np.random.default_rng(0).standard_normal(128).astype(np.float32)

    def found(body, cell):
        body = ".reg .b64 %q; .reg .f32 %x; .reg .b32 %v; mad.wide.u32 %q, %t, 4, %a1; ld.global.f32 %x, [%q];" + body
        ptx_body = ".reg .b32 %t; .reg .b64 %a<2>; mov.u32 %t, %tid.x; ld.param.u64 %a0, [p0]; ld.param.u64 %a1, [p1];"
        ptx = kernel(ptx_body + body, [".u64 p0", ".u64 p1"])
        return {f.kind for f in run_schedules(ptx, "k", 1, 128, lambda: [cell.copy(), x], lambda a: [a[0]])}

    assert found("red.global.add.f32 [%a0], %x; ret;", np.zeros(1, np.float32)) == {"non-determinism"}
    assert found("cvt.rni.s32.f32 %v, %x; red.global.add.u32 [%a0], %v; ret;", np.zeros(1, np.uint32)) == set()
    assert found("atom.global.exch.b32 %v, [%a0], %t; ret;", np.zeros(1, np.uint32)) == {"non-determinism"}


def test_memory_spaces():
    """Local memory of each thread, constants, module variables, parameters, generic addresses of all of them."""
    outside = """
    .const .align 4 .b32 table[4] = {10, 20, 30, 0f40000000};
    .global .align 4 .b32 counter = 5;
    """
    body = """
    .local .align 16 .b8 mine[64]; .shared .align 4 .b8 s[128]; .reg .b32 %r<6>, %k; .reg .b64 %g<4>, %q;
    and.b32 %k, %t, 3; mov.u64 %g0, table; mad.wide.u32 %q, %k, 4, %g0; ld.const.b32 %r0, [%q];
    cvta.const.u64 %g0, %q; ld.b32 %r5, [%g0]; add.u32 %r0, %r0, %r5;
    mov.u64 %g1, mine; cvta.local.u64 %g2, %g1; mad.wide.u32 %q, %k, 4, %g1; st.local.b32 [%q], %t;
    mad.wide.u32 %q, %k, 4, %g2; ld.b32 %r1, [%q]; mov.u64 %g1, s; cvta.shared.u64 %g2, %g1;
    mad.wide.u32 %q, %t, 4, %g2; st.b32 [%q], %r1; cvta.to.shared.u64 %g3, %q; ld.shared.b32 %r2, [%g3];
    ld.global.b32 %r3, [counter]; add.u32 %r0, %r0, %r2; add.u32 %r0, %r0, %r3; mov.b64 %q, p0; ld.param.u64 %q, [%q];
    mad.wide.u32 %q, %t, 4, %q; st.b32 [%q], %r0; ret;
    """
    out = empty(32, np.uint32)
    execute(body, [out], outside=outside).raise_if_faulty()
    table = np.array([10, 20, 30, 0x40000000])
    assert (out.data == 2 * table[np.arange(32) % 4] + np.arange(32) + 5).all()
    assert kinds(execute(body.replace("mine[64]", "mine[8]"), [out], outside=outside)) >= {"out of bounds"}


@pytest.mark.parametrize("t,size", [("u8", 1), ("s8", 1), ("u16", 2), ("b32", 4), ("b64", 8)])
def test_widths_of_loads_and_stores(t, size):
    x = np.random.default_rng(0).integers(0, 256, 32 * size * 2, dtype=np.uint8)
    out = empty(32 * size * 2, np.uint8)
    register = {1: ".b32", 2: ".b16", 4: ".b32", 8: ".b64"}[size]
    body = f"""
    .reg {register} %v<2>; .reg .b64 %q<2>; mad.wide.u32 %q0, %t, {2 * size}, %a0;
    mad.wide.u32 %q1, %t, {2 * size}, %a1;
    ld.global.v2.{t} {{%v0, %v1}}, [%q1]; st.global.v2.{t} [%q0], {{%v1, %v0}}; ret;
    """
    execute(body, [out, x]).raise_if_faulty()
    assert (out.data.reshape(32, 2, size) == x.reshape(32, 2, size)[:, ::-1]).all()
    if size == 1:  # a wider register is filled with zeros, or with the sign
        wide = empty(32, np.uint32)
        body = f".reg .b32 %v; .reg .b64 %q; add.u64 %q, %tw, %a1; ld.global.{t} %v, [%q]; mad.wide.u32 %q, %t, 4, %a0; st.global.b32 [%q], %v; ret;"  # noqa: E501
        execute(body, [wide, x]).raise_if_faulty()
        expected = x[:32].view(np.int8).astype(np.int32) if t == "s8" else x[:32].astype(np.int32)
        assert (wide.data.view(np.int32) == expected).all()


def test_read_only_loads_of_what_is_written():
    body = ".reg .b32 %v; st.global.b32 [%a0], %t; ld.global.nc.b32 %v, [%a0]; ret;"
    assert kinds(execute(body, [np.zeros(1, np.uint32)], 1)) == {"race"}


def test_a_block_has_no_more_shared_memory_than_its_target():
    """Static and dynamic together; without the runtime's attribute 48 KB, and of static memory never more."""

    def launch(target, static, dynamic, **options):
        body = f".shared .align 4 .b8 s[{static}]; .reg .b32 %v; mov.u32 %v, s; ret;"
        ptx = kernel(body, outside=".extern .shared .align 16 .b8 more[];").replace("sm_90a", target)
        run(ptx, "k", 1, 32, [], shared_bytes=dynamic, **options)

    for target, most in (("sm_80", 163), ("sm_86", 99), ("sm_89", 99), ("sm_90a", 227), ("sm_100a", 227)):
        launch(target, 1024, 1024 * (most - 1))
        with pytest.raises(PtxError, match="bytes of shared memory; a block"):
            launch(target, 1024, 1024 * (most - 1) + 16)
    launch("sm_80", 1024, 47 * 1024, most_dynamic=0)
    launch("sm_80", 1024, 60000, most_dynamic=60000)
    for most in (0, 59984):
        with pytest.raises(PtxError, match="are allowed"):
            launch("sm_80", 1024, 60000, most_dynamic=most)
    with pytest.raises(PtxError, match="static shared memory"):
        launch("sm_80", 49168, 0)


def test_a_launch_has_a_shape_that_is_possible():
    """What the runtime refuses, and what the kernel was not compiled for."""

    def launch(grid, block, directive=""):
        run(kernel("ret;").replace("entry k()", f"entry k()\n{directive}\n"), "k", grid, block, [])

    for shape in ((1, 1024), (1, (32, 32)), ((1, 1, 3), (2, 2, 64)), (1, 128, ".maxntid 128"), (1, 64, ".maxntid 128"),
                  (1, (2, 64), ".maxntid 32, 4"), (1, (32, 4), ".reqntid 32, 4"),
                  (1, 128, ".reqntid 128")):  # fmt: skip
        launch(*shape)
    for words, *shape in (
        ("a grid of", (1, 70000), 32), ("a grid of", (1, 1, 65536), 32), ("a grid of", 1 << 31, 32),
        ("a grid of", 0, 32), ("a block of", 1, 2048), ("a block of", 1, (1, 1, 65)), ("a block of", 1, (4, 0)),
        ("1088 threads in a block; at most 1024", 1, (34, 32)), ("256 threads .* 128", 1, 256, ".maxntid 128, 1, 1"),
        (r"\.reqntid asks for \(128, 1, 1\)", 1, 64, ".reqntid 128"), (r"\.reqntid", 1, (4, 32), ".reqntid 32, 4"),
    ):  # fmt: skip
        with pytest.raises(PtxError, match=words):
            launch(*shape)


def test_a_launch_of_several_kernels_keeps_its_buffers():
    launch, x = Launch(), np.arange(4, dtype=np.uint32)
    address = launch.address(x, "x")
    ptx = kernel(
        ".reg .b64 %q; .reg .b32 %v; ld.param.u64 %q, [p]; ld.global.b32 %v, [%q]; add.u32 %v, %v, 5;"
        "st.global.b32 [%q], %v; ret;",
        [".u64 p"],
    )
    for _ in range(2):
        run(ptx, "k", 1, 1, [address], launch=launch).raise_if_faulty()
    assert list(x) == [10, 1, 2, 3]


# ---- PTX that is not known, or wrong


@pytest.mark.parametrize("instruction,words", [
    ("frobnicate.b32 %r, %r;", "the instruction frobnicate is not known: frobnicate.b32"),
    ("add.s32.round %r, %r, 1;", "expected a type"),
    ("shl.wide.b32 %r, %r, 1;", r"the modifier .wide is not known here: shl\.wide\.b32"),
    ("add.f32.cc %r, %r, 1;", "expected a type"),
    ("ld.global.b32 %r, [%q];", "unknown base of an address: %q"),
    ("mov.u32 %r, %pm0;", "special register %pm0 is not known"),
    ("mov.u32 %x, 1;", "unknown register %x"),
    ("bra nowhere;", "unknown label nowhere"),
    ("call foo;", "the instruction call is not known"),
    ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%r], [%r], 16;", "cp.reduce is not known"),
    ("@%z add.s32 %r, %r, 1;", "unknown predicate %z"),
])  # fmt: skip
def test_what_is_not_known_is_an_error(instruction, words):
    with pytest.raises(PtxError, match=words):
        run(kernel(f".reg .b32 %r; .reg .pred %p; ret; {instruction}"), "k", 1, 1, [])


def test_parsing():
    text = kernel(
        """
        .reg .b32 %r<3>; // a comment; with a semicolon
        .shared .align 8 .b8 s[24];
        { .reg .b32 %r0; mov.u32 %r0, 5; { .reg .b32 %r0; mov.u32 %r0, 6; } mov.u32 %r1, %r0; }
        /* two
           lines */ @!%p bra $L_1; { again: bra again; } { again: bra again; }
        $L_1: ret;
        .reg .pred %p;
        """,
        [".align 8 .b8 struct[24]", ".u64 .ptr .global .align 16 pointer", ".f32 scale"],
    )
    k = parse(text)["k"]
    assert [(p.name, p.size, p.align) for p in k.parameters] == [("struct", 24, 8), ("pointer", 8, 8), ("scale", 4, 4)]
    assert (k.shared[0].name, k.shared[0].size) == ("s", 24)
    outer, inner, out = (i.operands for i in k.instructions[:3])
    assert outer[0] == out[1] != inner[0] and out[0] == "%r1" and len(k.labels) == 3
    branch = k.instructions[3]
    assert (branch.opcode, branch.predicate, branch.negated, branch.operands) == ("bra", "%p", True, ["$L_1"])
    assert branch.line == text[: text.index("@!%p")].count("\n") + 1
    with pytest.raises(PtxError, match=r"no \.entry"):
        parse(".version 8.0")
    with pytest.raises(PtxError, match="0 kernels have 'other'"):
        find(text, "other")
    with pytest.raises(TypeError, match="expected 3 for"):
        run(text, "k", 1, 1, [])
    with pytest.raises(ValueError, match="schedule: expected one of"):
        run(text, "k", 1, 1, [], schedule="fast")
