"""Modifiers of floating-point instructions that compilers rarely emit, against the manual's definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.emulation.ptx.launch import Buffer, empty
from tests.emulation.snippets import evaluate, execute, interesting, kinds, rounded, value_of
from tests.emulation.test_ptx_floating import same

N = 128
TINY = np.array([1e-40, -1e-40, 1e-45, -3e-39, 1.0, -0.0], np.float32)  # subnormal, but for the last two
FLUSHED = np.array([0.0, -0.0, 0.0, -0.0, 1.0, -0.0], np.float32)


def of(instruction: str, t: str, **inputs: np.ndarray) -> np.ndarray:
    """The bits of %d; float32 inputs are numbers, others bits of the type that their width has."""
    types = {name: "f32" if x.dtype == np.float32 else f"b{8 * x.itemsize}" for name, x in inputs.items()}
    return evaluate(instruction, t, {name: (types[name], x) for name, x in inputs.items()})


def bits(x: np.ndarray) -> list[int]:
    return x.view(np.uint32).tolist()


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_division_with_a_direction(mode):
    x, y = (interesting("f32", 4 * N, seed) for seed in (0, 1))
    got = evaluate(f"div.{mode}.f32 %d, %x, %y;", "f32", {"x": ("f32", x), "y": ("f32", y)})
    for a, b, code in zip(x, y, got, strict=True):
        p, q = value_of(int(a), "f32"), value_of(int(b), "f32")
        if math.isfinite(p) and math.isfinite(q) and p and q:
            assert same(code, rounded(Fraction(p) / Fraction(q), "f32", mode), "f32"), (p, q, mode)
        else:
            with np.errstate(all="ignore"):
                assert same(code, float(np.float64(p) / np.float64(q)), "f32"), (p, q)


def test_subnormals_are_flushed_by_what_computes_nothing():
    zero = np.zeros(len(TINY), np.float32)
    assert bits(of("abs.ftz.f32 %d, %x;", "f32", x=TINY)) == bits(np.abs(FLUSHED))
    assert bits(of("neg.ftz.f32 %d, %x;", "f32", x=TINY)) == bits(-FLUSHED)
    assert bits(of("max.ftz.f32 %d, %x, %y;", "f32", x=TINY, y=zero - 1)) == bits(FLUSHED)
    assert bits(of("min.ftz.f32 %d, %x, %y;", "f32", x=TINY, y=zero + 2)) == bits(FLUSHED)
    assert bits(of("cvt.rni.ftz.f32.f32 %d, %x;", "f32", x=TINY)) == bits(FLUSHED)
    assert bits(of("cvt.rpi.s32.f32 %d, %x;", "s32", x=TINY)) == [1, 0, 1, 0, 1, 0]
    assert bits(of("cvt.rpi.ftz.s32.f32 %d, %x;", "s32", x=TINY)) == [0, 0, 0, 0, 1, 0]
    assert bits(of("cvt.rn.ftz.f32.f64 %d, %x;", "f32", x=TINY.astype(np.float64).view(np.uint64))) == bits(FLUSHED)


def test_flushing_concerns_f32_alone():
    """A subnormal f16 is a normal f32; a subnormal f32 is nothing in f16, with .ftz or without."""
    small = np.array([1, 0x8001, 0x03FF, 0x0400, 0x8000], np.uint16)
    wide = small.view(np.float16).astype(np.float32)
    assert bits(of("cvt.ftz.f32.f16 %d, %x;", "f32", x=small)) == bits(wide)
    assert (of("cvt.rn.ftz.f16.f32 %d, %x;", "f16", x=wide) == small).all()
    assert of("cvt.rp.f16.f32 %d, %x;", "f16", x=TINY).tolist() == [1, 0x8000, 1, 0x8000, 0x3C00, 0x8000]
    assert of("cvt.rp.ftz.f16.f32 %d, %x;", "f16", x=TINY).tolist() == [0, 0x8000, 0, 0x8000, 0x3C00, 0x8000]


@pytest.mark.parametrize("mode", ["rm", "rp"])
@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_to_half_precision_with_a_direction(to, mode):
    x = interesting("f32", 4 * N)
    got = evaluate(f"cvt.{mode}.{to}.f32 %d, %x;", to, {"x": ("f32", x)})
    for number, code in zip(x, got, strict=True):
        v = value_of(int(number), "f32")
        assert same(code, rounded(Fraction(v), to, mode) if math.isfinite(v) and v else v, to), (v, mode)


@pytest.mark.parametrize(("to", "most", "nan"), [
    ("f16", 0x7BFF, 0x7FFF), ("bf16", 0x7F7F, 0x7FFF), ("tf32", 0x7F7FE000, 0x7FFFFFFF),
])  # fmt: skip
def test_the_largest_number_instead_of_infinity(to, most, nan):
    """.satfinite: what is beyond the largest finite number becomes that, with its sign."""
    x = np.array([3.4028235e38, np.inf, -np.inf, np.nan, 1.5, -2.0, 0.0], np.float32)
    mode, sign = ("rna", 1 << 31) if to == "tf32" else ("rn", 1 << 15)
    got = of(f"cvt.{mode}.satfinite.{to}.f32 %d, %x;", "b32" if to == "tf32" else to, x=x).tolist()
    plain = of(f"cvt.{mode}.{to}.f32 %d, %x;", "b32" if to == "tf32" else to, x=x).tolist()
    assert got[:4] == [most, most, most | sign, nan]
    assert plain[0] == plain[1] != most and got[4:] == plain[4:]


@pytest.mark.parametrize(("to", "one", "two"), [("f16", 0x3C00, 0x4000), ("bf16", 0x3F80, 0x4000)])
def test_relu_of_a_conversion(to, one, two):
    """What is negative becomes +0; NaN stays the canonical NaN."""
    x = np.array([-1.0, 2.0, np.nan, -0.0, -np.inf, 1.0], np.float32)
    expected = [0, two, 0x7FFF, 0, 0, one]
    assert of(f"cvt.rn.relu.{to}.f32 %d, %x;", to, x=x).tolist() == expected
    pair = of(f"cvt.rn.relu.{to}x2.f32 %d, %x, %y;", "b32", x=x, y=x[::-1].copy())
    assert pair.tolist() == [high << 16 | low for high, low in zip(expected, expected[::-1], strict=True)]


def test_magnitudes_with_the_product_of_the_signs():
    """min and max .xorsign.abs: of the magnitudes, with the exclusive or of the signs (PTX ISA 9.7.3.11)."""
    x = np.array([-1.0, 2.0, -3.0, 4.0], np.float32)
    y = np.array([3.0, -1.0, -2.0, 5.0], np.float32)
    assert of("min.xorsign.abs.f32 %d, %x, %y;", "f32", x=x, y=y).view(np.float32).tolist() == [-1, -1, 2, 4]
    assert of("max.xorsign.abs.f32 %d, %x, %y;", "f32", x=x, y=y).view(np.float32).tolist() == [-3, -2, 3, 5]


def test_the_shift_that_brings_the_highest_bit_up():
    """bfind.shiftamt: how far the highest bit is from the top; -1 where there is none."""
    x = np.array([0, 1, 1 << 31, 0x00F0], np.uint32)
    assert of("bfind.shiftamt.u32 %d, %x;", "u32", x=x).tolist() == [0xFFFFFFFF, 31, 0, 24]
    x = np.array([0xFFFFFFFF, 0xFFFFFFFE, 0], np.uint32)
    assert of("bfind.shiftamt.s32 %d, %x;", "u32", x=x).tolist() == [0xFFFFFFFF, 31, 0xFFFFFFFF]


@pytest.mark.parametrize(("operation", "function"), [("min", np.fmin), ("max", np.fmax)])
def test_atomics_of_the_smallest_and_largest_halves(operation, function):
    """red.noftz on vectors of f16x2; a NaN loses."""
    x = np.random.default_rng(0).integers(-99, 99, (32, 4)).astype(np.float16)
    x[3, 1] = x[9, 2] = np.nan
    cells = np.array([1, np.nan, 5, -7], np.float16)
    expected = function.reduce(np.concatenate([cells[None], x]))
    body = f"""
    .reg .b32 %x, %y; .reg .b64 %q; mad.wide.u32 %q, %t, 8, %a1; ld.global.v2.b32 {{%x, %y}}, [%q];
    red.global.{operation}.noftz.v2.f16x2 [%a0], {{%x, %y}}; ret;
    """
    execute(body, [cells, x]).raise_if_faulty()
    assert (cells == expected).all()


# ---- faults


def test_a_uniform_branch_is_taken_by_whole_warps():
    def found(count):
        body = f".reg .pred %p; setp.lt.u32 %p, %t, {count}; @%p bra.uni end; end: ret;"
        return kinds(execute(body.replace("end: ret", "ret; end: ret"), [], 64))

    assert found(32) == set() == found(0) == found(64)
    assert found(16) == {"collective"} == found(40)


def bulk(copy: str, arguments: list, setup: str = "") -> set[str]:
    body = f"""
    .shared .align 16 .b8 s[64]; .shared .align 8 .b8 b[8]; .reg .b32 %at, %bar; .reg .pred %done; mov.u32 %at, s;
    mov.u32 %bar, b; mbarrier.init.shared.b64 [%bar], 1; fence.mbarrier_init.release.cluster; {setup} {copy} ret;
    """
    return kinds(execute(body, arguments, 1))


def test_bulk_copies_of_what_nobody_wrote_or_may_write():
    load = """
    mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 16;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%at], [%a0], 16, [%bar];
    wait: mbarrier.try_wait.parity.shared.b64 %done, [%bar], 0; @!%done bra wait;
    """
    assert bulk(load, [np.zeros(4, np.uint32)]) == set()
    assert bulk(load, [empty(4, np.uint32)]) == {"uninitialised"}
    store = """
    cp.async.bulk.global.shared::cta.bulk_group [%a0], [%at], 16; cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    """
    written = "st.shared.v4.b32 [%at], {%at, %at, %at, %at}; fence.proxy.async;"
    assert bulk(store, [empty(4, np.uint32)], written) == set()
    assert bulk(store, [empty(4, np.uint32)]) == {"uninitialised"}
    assert bulk(store, [Buffer(np.zeros(4, np.uint32), read_only=True)], written) == {"read-only"}
    assert "out of bounds" in bulk(store.replace("[%a0]", "[%a0+268435456]"), [empty(4, np.uint32)], written)
