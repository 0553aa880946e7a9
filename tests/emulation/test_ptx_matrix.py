"""ldmatrix, stmatrix, mma.sync: where the elements of fragments lie, as PTX ISA 9.7.14.5 lists it for each shape."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation.ptx.launch import empty
from tests.emulation.snippets import execute, value_of

LANES = range(32)


def first_or_8(i, ranges):
    return 0 if any(a <= i < b for a, b in ranges) else 8


# shape, bytes of an element -> (elements of a, row, column of element i), (elements of b, row), by lane // 4, lane % 4
LAYOUTS = {
    ("m16n8k8", 2): (4, lambda i: first_or_8(i, [(0, 2)]), lambda i, q: 2 * q + i % 2, 2, lambda i, q: 2 * q + i),
    ("m16n8k16", 2): (
        8, lambda i: first_or_8(i, [(0, 2), (4, 6)]), lambda i, q: 2 * q + i % 2 + (8 if i >= 4 else 0),
        4, lambda i, q: 2 * q + i % 2 + (8 if i >= 2 else 0),
    ),
    ("m16n8k4", 4): (2, lambda i: 8 * i, lambda i, q: q, 1, lambda i, q: q),
    ("m16n8k8", 4): (
        4, lambda i: 8 * (i % 2), lambda i, q: q + (4 if i >= 2 else 0), 2, lambda i, q: q + (4 if i >= 1 else 0),
    ),
    ("m16n8k16", 1): (
        8, lambda i: first_or_8(i, [(0, 4)]), lambda i, q: 4 * q + i % 4, 4, lambda i, q: 4 * q + i,
    ),
    ("m16n8k32", 1): (
        16, lambda i: first_or_8(i, [(0, 4), (8, 12)]), lambda i, q: 4 * q + i % 4 + (16 if i >= 8 else 0),
        8, lambda i, q: 4 * q + i % 4 + (16 if i >= 4 else 0),
    ),
}  # fmt: skip


def random_bits(t, shape, rng):
    """Bits of small numbers of the type, and their values."""
    if t in ("s8", "u8"):
        values = rng.integers(-128, 128, shape) if t == "s8" else rng.integers(0, 256, shape)
        return values.astype(np.int64).astype(np.uint8), values.astype(float)
    width = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8}[t]
    floats = rng.standard_normal(shape).astype(np.float32)
    if t == "f16":
        bits = floats.astype(np.float16).view(np.uint16)
    elif t == "bf16":
        bits = (floats.view(np.uint32) >> 16).astype(np.uint16)
    elif t == "tf32":
        bits = floats.view(np.uint32)
    else:
        bits = rng.integers(0, 0x70, shape).astype(np.uint8) | (rng.integers(0, 2, shape) << 7).astype(np.uint8)
    view = bits if t != "tf32" else bits & np.uint32(0xFFFFE000)
    values = np.vectorize(lambda b: value_of(int(b), "f32" if t == "tf32" else t))(view)
    assert bits.itemsize * 8 == width
    return bits, values


CASES = [
    ("m16n8k8", "f16", "f16", "f32"), ("m16n8k16", "f16", "f16", "f32"), ("m16n8k16", "f16", "f16", "f16"),
    ("m16n8k8", "bf16", "bf16", "f32"), ("m16n8k16", "bf16", "bf16", "f32"),
    ("m16n8k4", "tf32", "tf32", "f32"), ("m16n8k8", "tf32", "tf32", "f32"),
    ("m16n8k16", "s8", "s8", "s32"), ("m16n8k32", "s8", "u8", "s32"), ("m16n8k32", "u8", "u8", "s32"),
    ("m16n8k32", "e4m3", "e4m3", "f32"), ("m16n8k32", "e5m2", "e4m3", "f32"), ("m16n8k16", "e4m3", "e5m2", "f32"),
]  # fmt: skip


@pytest.mark.parametrize("shape,ta,tb,td", CASES)
def test_mma(shape, ta, tb, td):
    rng = np.random.default_rng(0)
    size = {"f16": 2, "bf16": 2, "tf32": 4}.get(ta, 1)
    count_a, row_a, column_a, count_b, row_b = LAYOUTS[shape, size]
    k = int(shape.split("k")[1])
    (a_bits, a), (b_bits, b) = random_bits(ta, (16, k), rng), random_bits(tb, (k, 8), rng)
    c = rng.integers(-1000, 1000, (16, 8)) if td == "s32" else rng.standard_normal((16, 8)).astype(np.float16)
    registers_a = np.array([[a_bits[t // 4 + row_a(i), column_a(i, t % 4)] for i in range(count_a)] for t in LANES])
    registers_b = np.array([[b_bits[row_b(i, t % 4), t // 4] for i in range(count_b)] for t in LANES])
    dtype = {"s32": np.int32, "f32": np.float32, "f16": np.float16}[td]
    place = [[(t // 4 + (0 if i < 2 else 8), t % 4 * 2 + i % 2) for i in range(4)] for t in LANES]
    registers_c = np.array([[c[p] for p in row] for row in place]).astype(dtype)
    words = [np.ascontiguousarray(x).view(np.uint32).reshape(32, -1) for x in (registers_a, registers_b, registers_c)]
    out = empty((32, words[2].shape[1]), np.uint32)
    lines, lists = [], []
    for i, w in enumerate(words):
        n = w.shape[1]
        lines.append(f".reg .b32 %x{i}_<{n}>; .reg .b64 %q{i}; mad.wide.u32 %q{i}, %t, {4 * n}, %a{i + 1};")
        lines += [f"ld.global.b32 %x{i}_{j}, [%q{i}+{4 * j}];" for j in range(n)]
        lists.append("{" + ", ".join(f"%x{i}_{j}" for j in range(n)) + "}")
    n = words[2].shape[1]
    lines.append(f"mma.sync.aligned.{shape}.row.col.{td}.{ta}.{tb}.{td} {lists[2]}, {', '.join(lists)};")
    lines.append(f".reg .b64 %to; mad.wide.u32 %to, %t, {4 * n}, %a0;")
    lines += [f"st.global.b32 [%to+{4 * j}], %x2_{j};" for j in range(n)]
    execute("\n".join([*lines, "ret;"]), [out, *words]).raise_if_faulty()
    got = out.data.view(dtype)
    expected = a @ b + c.astype(float)
    for t in LANES:
        for i in range(4):
            wanted = expected[place[t][i]]
            assert (
                abs(float(got[t, i]) - wanted)
                <= (0 if td == "s32" else 2e-3 * abs(wanted) + 1e-2 * (td == "f16")) + 1e-6
            )


def test_int8_sums_wrap_or_stop():
    words = np.full((32, 4), 0x7F7F7F7F, np.uint32)
    c = np.full((32, 4), 2**31 - 5, np.uint32)
    for suffix, expected in (("", (2**31 - 5 + 32 * 127 * 127) - 2**32), (".satfinite", 2**31 - 1)):
        out = empty((32, 4), np.int32)
        body = """
        .reg .b32 %x<4>, %c<4>; .reg .b64 %q; shl.b64 %q, %tw, 4; .reg .b64 %u<3>;
        add.u64 %u0, %a0, %q; add.u64 %u1, %a1, %q; add.u64 %u2, %a2, %q;
        ld.global.v4.b32 {%x0, %x1, %x2, %x3}, [%u1]; ld.global.v4.b32 {%c0, %c1, %c2, %c3}, [%u2];
        """
        body += f"mma.sync.aligned.m16n8k32.row.col{suffix}.s32.s8.s8.s32 "
        body += "{%c0, %c1, %c2, %c3}, {%x0, %x1, %x2, %x3}, {%x0, %x1}, {%c0, %c1, %c2, %c3};"
        body += "st.global.v4.b32 [%u0], {%c0, %c1, %c2, %c3}; ret;"
        execute(body, [out, words, c]).raise_if_faulty()
        assert (out.data == expected).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Rows at addresses in no order; thread t receives row t / 4, elements 2 (t % 4) and the next, of each matrix."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 1 << 16, (40, 8)).astype(np.uint16)
    rows = rng.permutation(40)[:32].astype(np.uint32)
    out = empty((32, count), np.uint32)
    registers = ", ".join(f"%r{i}" for i in range(count))
    body = f"""
    .shared .align 16 .b8 s[640]; .reg .b32 %r<4>, %at, %row; .reg .b64 %q; .reg .b32 %v<4>;
    mov.u32 %at, s; shl.b64 %q, %tw, 4; add.u64 %q, %q, %a1; ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%q];
    mad.lo.s32 %row, %t, 16, %at; st.shared.v4.b32 [%row], {{%v0, %v1, %v2, %v3}}; .reg .pred %few;
    setp.lt.u32 %few, %t, 8; @%few ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%q+512];
    @%few st.shared.v4.b32 [%row+512], {{%v0, %v1, %v2, %v3}}; bar.warp.sync -1;
    shl.b64 %q, %tw, 2; add.u64 %q, %q, %a2; ld.global.b32 %row, [%q]; mad.lo.s32 %at, %row, 16, %at;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{registers}}}, [%at];
    mad.wide.u32 %q, %t, {4 * count}, %a0;
    """
    body += "".join(f"st.global.b32 [%q+{4 * i}], %r{i};" for i in range(count)) + "ret;"
    execute(body, [out, image, rows]).raise_if_faulty()
    got = out.data.view(np.uint16).reshape(32, count, 2)
    for t in LANES:
        for i in range(count):
            matrix = image[rows[8 * i : 8 * i + 8]]
            matrix = matrix.T if transposed else matrix
            assert list(got[t, i]) == [matrix[t // 4, t % 4 * 2], matrix[t // 4, t % 4 * 2 + 1]]


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
def test_stmatrix(transposed):
    words = np.random.default_rng(0).integers(0, 1 << 32, (32, 4)).astype(np.uint32)
    out = empty((32, 8), np.uint16)
    body = f"""
    .shared .align 16 .b8 s[512]; .reg .b32 %r<4>, %at; .reg .b64 %q<2>; .reg .b32 %v<4>;
    mov.u32 %at, s; mad.lo.s32 %at, %t, 16, %at; shl.b64 %q0, %tw, 4; add.u64 %q1, %q0, %a1;
    ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%q1];
    stmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16 [%at], {{%r0, %r1, %r2, %r3}};
    bar.warp.sync -1; ld.shared.v4.b32 {{%v0, %v1, %v2, %v3}}, [%at]; add.u64 %q0, %q0, %a0;
    st.global.v4.b32 [%q0], {{%v0, %v1, %v2, %v3}}; ret;
    """
    execute(body, [out, words]).raise_if_faulty()
    for i in range(4):
        matrix = np.zeros((8, 8), np.uint16)
        for t in LANES:
            matrix[t // 4, t % 4 * 2], matrix[t // 4, t % 4 * 2 + 1] = words[t, i] & 0xFFFF, words[t, i] >> 16
        assert (out.data[8 * i : 8 * i + 8] == (matrix.T if transposed else matrix)).all()


def test_movmatrix():
    words = np.random.default_rng(0).integers(0, 1 << 32, 32).astype(np.uint32)
    out = empty(32, np.uint32)
    body = """
    .reg .b32 %r; .reg .b64 %q<2>; shl.b64 %q0, %tw, 2; add.u64 %q1, %q0, %a1; ld.global.b32 %r, [%q1];
    movmatrix.sync.aligned.m8n8.trans.b16 %r, %r; add.u64 %q0, %q0, %a0; st.global.b32 [%q0], %r; ret;
    """
    execute(body, [out, words]).raise_if_faulty()
    before, after = words.view(np.uint16).reshape(8, 8), out.data.view(np.uint16).reshape(8, 8)
    assert (after == before.T).all()


@pytest.mark.parametrize("what", ["m16n8k64.row.col.s32.s4.s4.s32", "m16n8k16.row.col.f32.f16.bf16.f32x"])
def test_other_shapes_are_errors(what):
    from tests.emulation.ptx.parse import PtxError

    body = f".reg .b32 %r<16>; mma.sync.aligned.{what} {{%r0}}, {{%r1}}, {{%r2}}, {{%r0}}; ret;"
    with pytest.raises(PtxError, match=r"mma\.sync\.aligned"):
        execute(body, [empty(1, np.uint32)])
