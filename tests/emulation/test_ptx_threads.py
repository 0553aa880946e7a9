"""Control flow, barriers, shuffles, votes, reductions, atomics: what threads do together."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation.ptx.launch import empty, run
from tests.emulation.ptx.machine import SCHEDULES
from tests.emulation.ptx.parse import PtxError
from tests.emulation.snippets import evaluate, execute, interesting, kernel

N = 128
ALL = pytest.mark.parametrize("schedule", SCHEDULES)


def per_thread(body: str, *inputs: np.ndarray, blocks: int = 1, threads: int = N, **options) -> np.ndarray:
    """Runs a body that leaves 32 bits in %r for each thread; %x0, %x1 ...: its elements of the inputs."""
    out = empty(threads * blocks, np.uint32)
    lines = [".reg .b32 %r, %id; .reg .b64 %q; mad.lo.u32 %id, %b, " + f"{threads}, %t;"]
    for i in range(len(inputs)):
        lines.append(f".reg .b32 %x{i}; mad.wide.u32 %q, %id, 4, %a{i + 1}; ld.global.b32 %x{i}, [%q];")
    lines += [body, "mad.wide.u32 %q, %id, 4, %a0; st.global.b32 [%q], %r; ret;"]
    execute("\n".join(lines), [out, *inputs], threads, blocks, **options).raise_if_faulty()
    return out.data


# ---- control flow


@ALL
def test_loops_of_different_lengths(schedule):
    """Collatz steps: every thread leaves the loop at its own time, and all meet behind it for a vote."""
    x = np.arange(1, 1 + 3 * N, dtype=np.uint32)
    body = """
    .reg .pred %odd, %one; mov.u32 %r, 0;
    top: setp.eq.u32 %one, %x0, 1; @%one bra done; add.u32 %r, %r, 1; .reg .b32 %low; and.b32 %low, %x0, 1;
    setp.ne.u32 %odd, %low, 0; @%odd bra up; shr.u32 %x0, %x0, 1; bra top;
    up: mad.lo.u32 %x0, %x0, 3, 1; bra top;
    done: .reg .pred %all, %true; setp.ne.u32 %true, %r, -1; vote.sync.all.pred %all, %true, -1;
    @!%all mov.u32 %r, 9999;
    """

    def steps(n):
        count = 0
        while n != 1:
            n, count = 3 * n + 1 if n % 2 else n // 2, count + 1
        return count

    got = per_thread(body, x, blocks=3, schedule=schedule)
    assert list(got) == [steps(int(v)) for v in x]


def test_code_out_of_order_meets():
    """The loop's body stands behind its exit, as nvcc lays it out at times; the shuffle needs all lanes together."""
    body = """
    .reg .pred %p; mov.u32 %r, 0; and.b32 %x0, %t, 7; bra test;
    out: shfl.sync.bfly.b32 %r, %r, 1, 31, -1; bra done;
    loop: add.u32 %r, %r, %x0; sub.u32 %x0, %x0, 1;
    test: setp.eq.u32 %p, %x0, 0; @%p bra out; bra loop;
    done:
    """
    got = per_thread(body, np.zeros(N, np.uint32))
    n = (np.arange(N) ^ 1) & 7
    assert (got == n * (n + 1) // 2).all()


def test_branches_by_a_table():
    body = """
    .reg .b32 %w; and.b32 %w, %t, 3; targets: .branchtargets L0, L1, L2, L3; brx.idx %w, targets;
    L0: mov.u32 %r, 10; bra.uni end;
    L1: mov.u32 %r, 11; bra.uni end;
    L2: mov.u32 %r, 12; bra.uni end;
    L3: mov.u32 %r, 13;
    end:
    """
    assert (per_thread(body) == 10 + np.arange(N) % 4).all()


def test_predicated_return():
    out = empty(N, np.uint32)
    body = """
    .reg .pred %p; .reg .b64 %q; .reg .b32 %m; mad.wide.u32 %q, %t, 4, %a0; st.global.b32 [%q], %t;
    setp.lt.u32 %p, %t, 40; @%p ret; mov.u32 %m, 7; st.global.b32 [%q], %m; exit;
    """
    execute(body, [out], N).raise_if_faulty()
    assert (out.data == np.where(np.arange(N) < 40, np.arange(N), 7)).all()


def test_special_registers():
    names = {
        "%tid.x": lambda x, y, z, b: x, "%tid.y": lambda x, y, z, b: y, "%tid.z": lambda x, y, z, b: z,
        "%ctaid.x": lambda x, y, z, b: b % 2, "%ctaid.y": lambda x, y, z, b: b // 2, "%ntid.y": lambda x, y, z, b: 3,
        "%nctaid.x": lambda x, y, z, b: 2, "%laneid": lambda x, y, z, b: (x + 8 * y + 24 * z) % 32,
        "%lanemask_lt": lambda x, y, z, b: (1 << (x + 8 * y + 24 * z) % 32) - 1,
        "%lanemask_ge": lambda x, y, z, b: (1 << 32) - (1 << (x + 8 * y + 24 * z) % 32),
    }  # fmt: skip
    from tests.emulation.ptx.launch import run
    from tests.emulation.snippets import kernel

    for name, expected in names.items():
        body = f"""
        .reg .b32 %r<6>; .reg .b64 %q; ld.param.u64 %q, [p]; mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y;
        mov.u32 %r2, %tid.z; mad.lo.u32 %r0, %r1, 8, %r0; mad.lo.u32 %r0, %r2, 24, %r0; mov.u32 %r3, %ctaid.x;
        mov.u32 %r4, %ctaid.y; mad.lo.u32 %r3, %r4, 2, %r3; mad.lo.u32 %r0, %r3, 48, %r0;
        mad.wide.u32 %q, %r0, 4, %q; mov.u32 %r5, {name}; st.global.u32 [%q], %r5; ret;
        """
        out = empty(4 * 48, np.uint32)
        run(kernel(body, [".u64 p"]), None, (2, 2), (8, 3, 2), [out]).raise_if_faulty()
        wanted = [expected(i % 8, i // 8 % 3, i // 24, b) for b in range(4) for i in range(48)]
        assert list(out.data) == wanted, name


# ---- a warp


def lanes(warp_values, t):
    """The 32 values of the warp of thread t, and its lane."""
    return warp_values[t // 32 * 32 : t // 32 * 32 + 32], t % 32


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode, width):
    """The pseudocode of shfl, PTX ISA 9.7.9.6, a lane at a time."""
    rng = np.random.default_rng(0)
    x, by = interesting("b32", N), rng.integers(0, 40, N).astype(np.uint32)
    clamp = (0 if mode == "up" else 31) | (32 - width) << 8
    setup = ".reg .pred %p; .reg .b32 %e;"
    instruction = f"shfl.sync.{mode}.b32 %d|%p, %x, %y, {clamp}, -1;"
    inputs = {"x": ("b32", x), "y": ("b32", by)}
    got = evaluate(instruction, "b32", inputs, setup)
    inside = evaluate(instruction.replace("%d|%p", "%e|%d"), "pred", inputs, setup)
    for t in range(N):
        values, lane = lanes(x, t)
        b, c, segment = int(by[t]) & 31, clamp & 31, clamp >> 8 & 31
        most, least = (lane & segment) | (c & ~segment), lane & segment
        if mode == "up":
            j, ok = lane - b, lane - b >= most
        elif mode == "down":
            j, ok = lane + b, lane + b <= most
        elif mode == "bfly":
            j, ok = lane ^ b, lane ^ b <= most
        else:
            j = least | (b & ~segment)
            ok = j <= most
        assert bool(inside[t]) == ok and got[t] == values[j if ok else lane]


def test_votes_and_matches():
    x = np.random.default_rng(0).integers(0, 3, N).astype(np.uint32)
    x[32:64], x[64:96] = 1, 0
    inputs = {"x": ("b32", x)}
    setup = ".reg .pred %p; setp.eq.u32 %p, %x, 1;"
    results = {
        name: evaluate(f"vote.sync.{name}.pred %d, %p, -1;", "pred", inputs, setup) for name in ("all", "any", "uni")
    }
    ballot = evaluate("vote.sync.ballot.b32 %d, %p, -1;", "b32", inputs, setup)
    some = evaluate("match.any.sync.b32 %d, %x, -1;", "b32", inputs, setup)
    every = evaluate("match.all.sync.b32 %d, %x, -1;", "b32", inputs, setup)
    for t in range(N):
        values, lane = lanes(x, t)
        bits = sum(1 << i for i in range(32) if values[i] == 1)
        assert ballot[t] == bits
        assert [results[n][t] for n in ("all", "any", "uni")] == [bits == 2**32 - 1, bits != 0, bits in (0, 2**32 - 1)]
        assert some[t] == sum(1 << i for i in range(32) if values[i] == values[lane])
        assert every[t] == (2**32 - 1 if len(set(values)) == 1 else 0)


def test_warp_reductions():
    x = interesting("s32", N)
    signed, inputs = x.view(np.int32).astype(int), {"x": ("b32", x)}
    functions = {"add.s32": sum, "min.s32": min, "max.s32": max}
    for name, function in functions.items():
        got = evaluate(f"redux.sync.{name} %d, %x, -1;", "b32", inputs)
        assert all(int(got[t]) == function(lanes(signed, t)[0]) & 0xFFFFFFFF for t in range(N))
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        got = evaluate(f"redux.sync.{name}.b32 %d, %x, -1;", "b32", inputs)
        assert all(got[t] == function.reduce(lanes(x, t)[0]) for t in range(N))
    got = evaluate("redux.sync.max.u32 %d, %x, -1;", "b32", inputs)
    assert all(got[t] == lanes(x, t)[0].max() for t in range(N))


def test_a_part_of_a_warp_works_together():
    """Half of each warp shuffles among itself in a branch; activemask and elect see that half."""
    body = """
    .reg .pred %p, %e; .reg .b32 %m, %o; mov.u32 %r, 0; and.b32 %o, %t, 16; setp.ne.u32 %p, %o, 0; @%p bra out;
    activemask.b32 %m; shfl.sync.bfly.b32 %r, %t, 1, 31, %m; elect.sync _|%e, %m; @%e add.u32 %r, %r, 1000;
    out: bar.warp.sync -1;
    """
    t = np.arange(N)
    expected = np.where(t & 16, 0, (t ^ 1) + np.where(t % 32 == 0, 1000, 0))
    assert (per_thread(body) == expected).all()


@ALL
def test_lanes_wait_for_those_behind(schedule):
    """Two halves of a warp come to one shuffle by different ways."""
    body = """
    .reg .pred %p; .reg .b32 %o; and.b32 %o, %t, 1; setp.ne.u32 %p, %o, 0; @%p bra odd; mul.lo.u32 %r, %t, 2; bra meet;
    odd: mul.lo.u32 %r, %t, 3;
    meet: shfl.sync.bfly.b32 %r, %r, 1, 31, -1;
    """
    t = np.arange(N)
    assert (per_thread(body, schedule=schedule) == np.where(t % 2, (t ^ 1) * 2, (t ^ 1) * 3)).all()


# ---- a block


@ALL
def test_barriers_with_numbers_and_counts(schedule):
    """Two warps hand a value to the other two through barrier 1: arrive there, sync here."""
    body = """
    .shared .align 4 .b8 s[512]; .reg .pred %p; .reg .b32 %at; mov.u32 %at, s; mad.lo.u32 %at, %t, 4, %at;
    mov.u32 %r, 5; setp.lt.u32 %p, %t, 64; @%p bra give; bar.sync 1, 128; ld.shared.b32 %r, [%at+-256]; bra end;
    give: mul.lo.u32 %r, %t, 11; st.shared.b32 [%at], %r; bar.arrive 1, 128;
    end:
    """
    t = np.arange(N)
    assert (per_thread(body, blocks=3, schedule=schedule)[:N] == np.where(t < 64, t * 11, (t - 64) * 11)).all()


@ALL
def test_a_barrier_whose_number_is_in_a_register(schedule):
    """Each warp pair has its own number, and a register that holds no number before it comes there."""
    body = """
    .shared .align 4 .b8 s[512]; .reg .pred %p; .reg .b32 %at, %n; mov.u32 %at, s; mad.lo.u32 %at, %t, 4, %at;
    setp.lt.u32 %p, %t, 64; mul.lo.u32 %r, %t, 7; st.shared.b32 [%at], %r; @%p bra low;
    mov.u32 %n, 3; bra meet; low: mov.u32 %n, 2; meet: bar.sync %n, 64; xor.b32 %at, %at, 128; ld.shared.b32 %r, [%at];
    """
    got = per_thread(body, schedule=schedule)
    assert (got == (np.arange(N) ^ 32) * 7).all()
    body = """
    .reg .pred %p; .reg .b32 %n; mov.u32 %r, 1; setp.ge.u32 %p, %t, 64; @%p bra end; mov.u32 %n, 4; bar.sync %n, 64;
    end:
    """
    assert (per_thread(body, schedule=schedule) == 1).all()


def test_registers_are_given_in_eights():
    """Numbers that the assembler refuses are found; without a number at the launch, nothing happens. 9.7.19.5."""
    text = "setmaxnreg.dec.sync.aligned.u32 24; setmaxnreg.inc.sync.aligned.u32 240; mov.u32 %r, %t;"
    assert (per_thread(text) == np.arange(N)).all()
    for wrong in ("16", "244", "264"):
        with pytest.raises(PtxError, match="multiple of 8 from 24 to 256"):
            per_thread(text.replace("240", wrong))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("directive", [".maxnreg 168", ".maxntid 384, 1, 1\n.minnctapersm 1", ".reqntid 384"])
def test_a_block_shares_its_registers(directive, schedule):
    """Three warpgroups have 168 registers a thread at first: one gives some up, and the others wait for them."""

    def found(give, take):
        body = f"""
        .reg .b32 %t; .reg .pred %p; mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 128; @%p bra producer; {take} bra.uni end;
        producer: {give} end: ret;
        """
        ptx = kernel(body).replace("entry k()", f"entry k()\n{directive}\n")
        return {f.kind for f in run(ptx, "k", 2, 384, [], schedule=schedule).faults}

    give, take = "setmaxnreg.dec.sync.aligned.u32 24;", "setmaxnreg.inc.sync.aligned.u32 240;"
    assert found(give, take) == set()
    assert found(give, take.replace("240", "248")) == {"deadlock"} == found("", take)
    assert (
        found(give, take.replace("240", "160"))
        == {"registers"}
        == found(give.replace("24;", "176;"), take) - {"deadlock"}
    )


def test_barriers_that_reduce():
    x = np.zeros(2 * N, np.uint32)
    x[:5] = 1
    body = """
    .reg .pred %p, %q1, %q2; .reg .b32 %n; setp.ne.u32 %p, %x0, 0; barrier.cta.red.popc.aligned.u32 %n, 0, %p;
    bar.red.or.pred %q1, 0, %p; bar.red.and.pred %q2, 0, !%p; selp.u32 %r, 100, 0, %q1; add.u32 %r, %r, %n;
    @%q2 add.u32 %r, %r, 1000;
    """
    got = per_thread(body, x, blocks=2)
    assert (got[:N] == 105).all() and (got[N:] == 1000).all()


# ---- atomics


@ALL
@pytest.mark.parametrize("space", ["shared", "global"])
def test_atomics(space, schedule):
    """Each operation on eight addresses, and that the old values are those of some order."""
    x = interesting("u32", N)
    functions = {
        "add.u32": lambda a, b: (a + b) & 0xFFFFFFFF, "min.u32": min, "max.u32": max, "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b, "xor.b32": lambda a, b: a ^ b, "exch.b32": lambda a, b: b,
        "inc.u32": lambda a, b: 0 if a >= b else a + 1, "dec.u32": lambda a, b: b if a == 0 or a > b else a - 1,
        "max.s32": lambda a, b: a if (a ^ 1 << 31) > (b ^ 1 << 31) else b,
    }  # fmt: skip
    for name, function in functions.items():
        out, cells = empty(N, np.uint32), np.full(8, 3, np.uint32)
        setup = """
        .shared .align 4 .b8 s[32]; .reg .b32 %r, %x, %k, %at; .reg .b64 %q, %g; .reg .pred %p; and.b32 %k, %t, 7;
        mad.wide.u32 %q, %t, 4, %a2; ld.global.b32 %x, [%q]; mad.wide.u32 %g, %k, 4, %a1; mov.u32 %at, s;
        mad.lo.u32 %at, %k, 4, %at; setp.lt.u32 %p, %t, 8; ld.global.b32 %r, [%g]; @%p st.shared.b32 [%at], %r;
        bar.sync 0; mad.wide.u32 %q, %t, 4, %a0;
        """
        where = "[%at]" if space == "shared" else "[%g]"
        atomic = f"atom.{space}.{name} %r, {where}, %x; st.global.b32 [%q], %r; bar.sync 0;"
        end = "@%p ld.shared.b32 %r, [%at]; @%p st.global.b32 [%g], %r; ret;" if space == "shared" else "ret;"
        execute(setup + atomic + end, [out, cells, x], N, schedule=schedule).raise_if_faulty()
        for k in range(8):
            if schedule != "lockstep" and name in ("exch.b32", "inc.u32", "dec.u32"):  # these show the order
                continue
            value = 3
            for t in range(k, N, 8):
                assert schedule != "lockstep" or out.data[t] == value, (name, k, t)
                value = function(value, int(x[t]))
            assert cells[k] == value, (name, k)


def test_atomics_of_floats_and_compare_and_swap():
    x = np.random.default_rng(0).integers(-8, 8, N).astype(np.float32)
    for t, dtype, count in (("f32", np.float32, 1), ("f64", np.float64, 1), ("f16x2", np.float16, 2)):
        cells = np.zeros(count, dtype)
        values = np.repeat(x, count).astype(dtype)
        size = count * np.dtype(dtype).itemsize
        noftz = "noftz." if t == "f16x2" else ""
        body = f"""
        .reg .b{8 * size} %x; .reg .b64 %q; mad.wide.u32 %q, %t, {size}, %a1; ld.global.b{8 * size} %x, [%q];
        red.global.add.{noftz}{t} [%a0], %x; ret;
        """
        execute(body, [cells, values], N).raise_if_faulty()
        assert (cells == x.sum()).all()
    cell, wins = np.array([7], np.uint32), np.zeros(1, np.uint32)
    body = """
    .reg .b32 %r; .reg .pred %p; atom.global.cas.b32 %r, [%a0], 7, %t; setp.eq.u32 %p, %r, 7;
    @%p red.global.add.u32 [%a1], 1; ret;
    """
    execute(body, [cell, wins], 5).raise_if_faulty()
    assert wins[0] == 1 and cell[0] == 0


def test_fractions_of_a_warp():
    """A block of 50 threads: the second warp has 18."""
    got = per_thread("add.u32 %r, %t, 1; bar.sync 0; bar.warp.sync -1;", threads=50, blocks=3)
    assert (got.reshape(3, 50) == np.arange(50) + 1).all()
