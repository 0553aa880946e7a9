"""Integer, bit and comparison instructions against Python's integers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation.snippets import WIDTH, evaluate, interesting

N = 300
TYPES = ["u16", "s16", "u32", "s32", "u64", "s64"]


def number(bits: int, t: str) -> int:
    w = WIDTH[t]
    return bits - (1 << w) if t[0] == "s" and bits >> (w - 1) else bits


def check(instruction, result, inputs, expected):
    """expected(*numbers) -> a number, whose low bits must come out."""
    got = evaluate(instruction, result, inputs)
    mask = (1 << WIDTH[result]) - 1
    for i in range(len(got)):
        numbers = [number(int(values[i]), t) for t, values in inputs.values()]
        assert int(got[i]) == int(expected(*numbers)) & mask, (instruction, numbers)


def two(t, seed=0, second=None):
    return {"x": (t, interesting(t, N, seed)), "y": (second or t, interesting(second or t, N, seed + 1))}


def cut(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


@pytest.mark.parametrize("t", TYPES)
def test_arithmetic(t):
    w = WIDTH[t]
    check(f"add.{t} %d, %x, %y;", t, two(t), lambda a, b: a + b)
    check(f"sub.{t} %d, %x, %y;", t, two(t), lambda a, b: a - b)
    check(f"min.{t} %d, %x, %y;", t, two(t), min)
    if t == "s32":
        check("min.relu.s32 %d, %x, %y;", t, two(t), lambda a, b: max(min(a, b), 0))
        check("max.relu.s32 %d, %x, %y;", t, two(t), lambda a, b: max(a, b, 0))
    check(f"max.{t} %d, %x, %y;", t, two(t), max)
    check(f"mul.lo.{t} %d, %x, %y;", t, two(t), lambda a, b: a * b)
    check(f"mul.hi.{t} %d, %x, %y;", t, two(t), lambda a, b: a * b >> w)
    three = two(t) | {"z": (t, interesting(t, N, 7))}
    check(f"mad.lo.{t} %d, %x, %y, %z;", t, three, lambda a, b, c: a * b + c)
    check(f"mad.hi.{t} %d, %x, %y, %z;", t, three, lambda a, b, c: (a * b >> w) + c)
    check(f"sad.{t} %d, %x, %y, %z;", t, three, lambda a, b, c: c + abs(a - b))
    divided = two(t)
    safe = np.where(divided["y"][1] == 0, 3, divided["y"][1]).astype(divided["y"][1].dtype)
    divided["y"] = (t, safe)
    check(f"div.{t} %d, %x, %y;", t, divided, cut)
    check(f"rem.{t} %d, %x, %y;", t, divided, lambda a, b: a - cut(a, b) * b)
    if w < 64:
        wide = t[0] + str(2 * w)
        check(f"mul.wide.{t} %d, %x, %y;", wide, two(t), lambda a, b: a * b)
        third = two(t) | {"z": (wide, interesting(wide, N, 3))}
        check(f"mad.wide.{t} %d, %x, %y, %z;", wide, third, lambda a, b, c: a * b + c)
    if t[0] == "s":
        check(f"neg.{t} %d, %x;", t, {"x": (t, interesting(t, N))}, lambda a: -a)
        check(f"abs.{t} %d, %x;", t, {"x": (t, interesting(t, N))}, abs)


def test_saturated_addition():
    def clip(x):
        return max(-(2**31), min(2**31 - 1, x))

    check("add.sat.s32 %d, %x, %y;", "s32", two("s32"), lambda a, b: clip(a + b))
    check("sub.sat.s32 %d, %x, %y;", "s32", two("s32"), lambda a, b: clip(a - b))


@pytest.mark.parametrize("w", [16, 32, 64])
def test_logic(w):
    t = f"b{w}"
    check(f"and.{t} %d, %x, %y;", t, two(t), lambda a, b: a & b)
    check(f"or.{t} %d, %x, %y;", t, two(t), lambda a, b: a | b)
    check(f"xor.{t} %d, %x, %y;", t, two(t), lambda a, b: a ^ b)
    check(f"not.{t} %d, %x;", t, {"x": (t, interesting(t, N))}, lambda a: ~a)
    check(f"cnot.{t} %d, %x;", t, {"x": (t, interesting(t, N))}, lambda a: int(a == 0))


@pytest.mark.parametrize("w", [16, 32, 64])
def test_shifts(w):
    distance = np.random.default_rng(0).choice([0, 1, 5, w - 1, w, w + 1, 255, 2**31], N).astype(np.uint32)
    for t in (f"b{w}", f"u{w}", f"s{w}"):
        inputs = {"x": (t, interesting(t, N)), "n": ("u32", distance)}
        if t[0] == "b":
            check(f"shl.{t} %d, %x, %n;", t, inputs, lambda a, n: a << n if n < w else 0)
        check(f"shr.{t} %d, %x, %n;", t, inputs, lambda a, n: a >> min(n, w))


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shift(direction, mode):
    def expected(low, high, n):
        n = min(n, 32) if mode == "clamp" else n % 32
        both = high << 32 | low
        return both << n >> 32 if direction == "l" else both >> n

    distance = np.random.default_rng(1).choice([0, 1, 7, 31, 32, 33, 63, 200], N).astype(np.uint32)
    inputs = two("b32") | {"n": ("u32", distance)}
    check(f"shf.{direction}.{mode}.b32 %d, %x, %y, %n;", "b32", inputs, expected)


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_bit_fields(t):
    w = WIDTH[t]
    rng = np.random.default_rng(2)
    position = rng.choice([0, 1, 7, w - 9, w - 1, w, 200, 256 + 3], N).astype(np.uint32)
    length = rng.choice([0, 1, 8, w - 1, w, 255], N).astype(np.uint32)

    def bit(x, i):
        return x >> i & 1

    def extracted(a, p, n):
        """The pseudocode of bfe, PTX ISA 9.7.1.19."""
        p, n = p & 255, n & 255
        sign = 0 if t[0] == "u" or n == 0 else bit(a & ((1 << w) - 1), min(p + n - 1, w - 1))
        return sum((bit(a & ((1 << w) - 1), p + i) if i < n and p + i < w else sign) << i for i in range(w))

    def inserted(a, b, p, n):
        p, n = p & 255, n & 255
        result = b
        for i in range(n):
            if p + i < w:
                result = result & ~(1 << (p + i)) | bit(a, i) << (p + i)
        return result

    fields = {"p": ("u32", position), "n": ("u32", length)}
    check(f"bfe.{t} %d, %x, %p, %n;", t, {"x": (t, interesting(t, N))} | fields, extracted)
    check(f"bfi.b{w} %d, %x, %y, %p, %n;", f"b{w}", two(f"b{w}") | fields, inserted)


def test_bits_counted_and_found():
    for w in (32, 64):
        t, one = f"b{w}", {"x": (f"b{w}", interesting(f"b{w}", N))}
        check(f"popc.{t} %d, %x;", "u32", one, lambda a: bin(a).count("1"))
        check(f"clz.{t} %d, %x;", "u32", one, lambda a, w=w: w - a.bit_length())
        check(f"brev.{t} %d, %x;", t, one, lambda a, w=w: int(bin(a)[2:].zfill(w)[::-1], 2))
        check(f"bfind.u{w} %d, %x;", "u32", {"x": (f"u{w}", one["x"][1])}, lambda a: a.bit_length() - 1)
        signed = {"x": (f"s{w}", one["x"][1])}
        check(f"bfind.s{w} %d, %x;", "u32", signed, lambda a: (~a if a < 0 else a).bit_length() - 1)


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xE8, 0xCA, 0xFF, 0x2D])
def test_three_input_logic(table):
    def expected(a, b, c):
        return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))

    inputs = two("b32") | {"z": ("b32", interesting("b32", N, 5))}
    check(f"lop3.b32 %d, %x, %y, %z, {table:#x};", "b32", inputs, expected)


def test_permuted_bytes():
    def expected(a, b, selector):
        pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        chosen = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = pool[nibble & 7]
            chosen.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(chosen), "little")

    check("prmt.b32 %d, %x, %y, %z;", "b32", two("b32") | {"z": ("b32", interesting("b32", N, 9))}, expected)


@pytest.mark.parametrize("ta", ["u32", "s32"])
@pytest.mark.parametrize("tb", ["u32", "s32"])
def test_dot_products_of_bytes(ta, tb):
    def parts(x, t, width):
        raw = (x & 0xFFFFFFFF).to_bytes(4, "little")
        size = width // 8
        return [int.from_bytes(raw[i : i + size], "little", signed=t[0] == "s") for i in range(0, 4, size)]

    inputs = {"x": ("b32", interesting("b32", N)), "y": ("b32", interesting("b32", N, 1)), "z": two("b32", 5)["x"]}
    check(
        f"dp4a.{ta}.{tb} %d, %x, %y, %z;",
        "b32",
        inputs,
        lambda a, b, c: c + sum(p * q for p, q in zip(parts(a, ta, 8), parts(b, tb, 8), strict=True)),
    )
    for half, first in (("lo", 0), ("hi", 2)):
        check(
            f"dp2a.{half}.{ta}.{tb} %d, %x, %y, %z;",
            "b32",
            inputs,
            lambda a, b, c, f=first: (
                c + sum(p * q for p, q in zip(parts(a, ta, 16), parts(b, tb, 8)[f : f + 2], strict=True))
            ),
        )


@pytest.mark.parametrize("t", TYPES)
def test_comparisons(t):
    compare = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }  # fmt: skip
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"} if t[0] == "u" else {}
    for name, plain in {**{c: c for c in compare}, **unsigned}.items():
        check(f"setp.{name}.{t} %d, %x, %y;", "pred", two(t), compare[plain])
    third = two(t) | {"z": ("u32", np.arange(N, dtype=np.uint32) % 2)}
    for op, joined in (("and", lambda p, c: p and c), ("or", lambda p, c: p or c), ("xor", lambda p, c: p != bool(c))):
        setup = ".reg .pred %q, %w; setp.ne.u32 %q, %z, 0;"
        got = evaluate(f"setp.lt.{op}.{t} %d|%w, %x, %y, %q;", "pred", third, setup)
        other = evaluate(f"setp.lt.{op}.{t} %w|%d, %x, %y, !%q;", "pred", third, setup)
        for i in range(N):
            a, b = (number(int(third[n][1][i]), t) for n in "xy")
            c = int(third["z"][1][i])
            assert got[i] == joined(a < b, c) and other[i] == joined(not a < b, 1 - c)


def test_selections():
    inputs = two("b64") | {"z": ("s32", interesting("s32", N, 4))}
    setup = ".reg .pred %q; setp.gt.s32 %q, %z, 5;"
    got = evaluate("selp.b64 %d, %x, %y, %q;", "b64", inputs, setup)
    signed = inputs["z"][1].view(np.int32)
    assert (got == np.where(signed > 5, inputs["x"][1], inputs["y"][1])).all()
    got = evaluate("slct.b64.s32 %d, %x, %y, %z;", "b64", inputs)
    assert (got == np.where(signed >= 0, inputs["x"][1], inputs["y"][1])).all()
    got = evaluate("set.lt.u32.s32 %d, %z, 0;", "u32", inputs)
    assert (got == np.where(signed < 0, 0xFFFFFFFF, 0)).all()


def test_moves_pack_and_unpack():
    x = interesting("b64", N)
    setup = ".reg .b32 %l, %h; .reg .b16 %q<4>;"
    got = evaluate("mov.b64 {%l, %h}, %x; mov.b64 %d, {%h, %l};", "b64", {"x": ("b64", x)}, setup)
    assert (got == (x << np.uint64(32) | x >> np.uint64(32))).all()
    move = "mov.b64 {%q0, %q1, %q2, %q3}, %x; mov.b64 %d, {%q3, %q2, %q1, %q0};"
    got = evaluate(move, "b64", {"x": ("b64", x)}, setup)
    assert (got.view(np.uint16).reshape(-1, 4) == x.view(np.uint16).reshape(-1, 4)[:, ::-1]).all()


@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_conversions_of_integers(to, source):
    inputs = {"x": (source, interesting(source, N))}
    check(f"cvt.{to}.{source} %d, %x;", to, inputs, lambda a: a)
    w = WIDTH[to]
    low, high = (-(1 << w - 1), (1 << w - 1) - 1) if to[0] == "s" else (0, (1 << w) - 1)
    check(f"cvt.sat.{to}.{source} %d, %x;", to, inputs, lambda a: max(low, min(high, a)))


def test_narrow_loads_and_conversions_extend():
    x = interesting("b32", N)
    inputs = {"x": ("b32", x)}
    check("cvt.s32.s8 %d, %x;", "s32", inputs, lambda a: (a & 255) - 256 if a & 128 else a & 255)
    check("cvt.u32.u8 %d, %x;", "u32", inputs, lambda a: a & 255)
    check("cvt.s64.s16 %d, %x;", "s64", inputs, lambda a: (a & 0xFFFF) - 0x10000 if a & 0x8000 else a & 0xFFFF)


@pytest.mark.parametrize("to,low,high", [("s8", -128, 127), ("u8", 0, 255), ("s16", -32768, 32767), ("u16", 0, 65535)])
def test_packing_conversions(to, low, high):
    def clip(x):
        return max(low, min(high, x))

    w = WIDTH[to]
    ones = (1 << w) - 1
    inputs = {"x": ("s32", interesting("s32", N)), "y": ("s32", interesting("s32", N, 1))}
    if w == 16:
        check(f"cvt.pack.sat.{to}.s32 %d, %x, %y;", "b32", inputs, lambda a, b: (clip(a) & ones) << w | clip(b) & ones)
        return
    inputs["z"] = ("b32", interesting("b32", N, 2))
    check(
        f"cvt.pack.sat.{to}.s32.b32 %d, %x, %y, %z;",
        "b32",
        inputs,
        lambda a, b, c: c << 2 * w | (clip(a) & ones) << w | clip(b) & ones,
    )


def test_packed_halves():
    def both(function):
        def of(a, b):
            parts = [(x >> s & 0xFFFF) - (0x10000 if x >> s & 0x8000 else 0) for s in (0, 16) for x in (a, b)]
            return (function(parts[0], parts[1]) & 0xFFFF) | (function(parts[2], parts[3]) & 0xFFFF) << 16

        return of

    for op, function in (("add", lambda a, b: a + b), ("min", min), ("max", max)):
        check(f"{op}.s16x2 %d, %x, %y;", "b32", {k: ("b32", v) for k, (_, v) in two("b32").items()}, both(function))
