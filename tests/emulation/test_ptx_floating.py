"""Floating-point instructions and conversions against exact fractions, rounded once by tests/emulation/snippets.py."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.emulation.ptx.parse import PtxError
from tests.emulation.snippets import WIDTH, evaluate, interesting, rounded, value_of

N = 400
TINY = {"f32": 2.0**-126, "f16": 2.0**-14, "bf16": 2.0**-126}


def same(bits: int, expected: float, t: str) -> bool:
    got = value_of(int(bits), t)
    if math.isnan(expected):
        return math.isnan(got)
    return got == expected and math.copysign(1, got) == math.copysign(1, expected)


def special(op: str, *numbers: float) -> float | None:
    """What IEEE 754 says where a number is no number, infinite, or the exact result a zero; None elsewhere."""
    with np.errstate(all="ignore"):
        a = np.array(numbers, np.float64)
        if op == "fma":
            result = a[0] * a[1] + a[2]
        else:
            result = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[op](a[0], a[1])
    if not all(map(math.isfinite, numbers)) or (not math.isfinite(result) and op == "div"):
        return float(result)
    return float(result) if _exact(op, *numbers) == 0 else None


def _exact(op: str, *numbers: float) -> Fraction:
    a, b, *c = map(Fraction, numbers)
    return {
        "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "fma": lambda: a * b + c[0],
        "div": lambda: a / b,
    }[op]()  # fmt: skip


def result_of(op: str, t: str, mode: str, numbers: list[float]) -> float:
    known = special(op, *numbers)
    if known is not None:
        exact_zero = known == 0 and all(map(math.isfinite, numbers))
        if exact_zero and mode == "rm" and op in ("add", "sub", "fma") and not _all_zero(op, numbers):
            return -0.0
        return known
    return rounded(_exact(op, *numbers), t, mode)


def _all_zero(op: str, numbers: list[float]) -> bool:
    terms = [numbers[0] * numbers[1], numbers[2]] if op == "fma" else numbers
    return all(x == 0 for x in terms)


def operands(t: str, count: int):
    """Bits of a type; a third of them close to each other, so that sums cancel and products hit halves."""
    values = [interesting(t, N, seed) for seed in range(count)]
    near = np.random.default_rng(3).random(N) < 0.3
    values[-1] = np.where(near, values[0] ^ values[0].dtype.type(3), values[-1])
    return dict(zip("xyz", ((t, v) for v in values), strict=False))


def check(op: str, t: str, mode: str = "rn"):
    inputs = operands(t, 3 if op == "fma" else 2)
    names = ", ".join(f"%{n}" for n in inputs)
    written = f".{mode}" if t == "f32" or op == "fma" or mode != "rn" else ""
    got = evaluate(f"{op}{written}.{t} %d, {names};", t, inputs)
    for i in range(N):
        numbers = [value_of(int(v[i]), t) for _, v in inputs.values()]
        if op == "mul" and mode in ("rm",) and 0 in numbers:
            continue
        assert same(got[i], result_of(op, t, mode, numbers), t), (op, t, mode, numbers, value_of(int(got[i]), t))


@pytest.mark.parametrize("t", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_arithmetic_is_rounded_once(op, t):
    check(op, t)


@pytest.mark.parametrize("mode", ["rz", "rp"])
@pytest.mark.parametrize("op", ["add", "mul", "fma"])
def test_directed_rounding(op, mode):
    check(op, "f32", mode)


def test_division_and_roots():
    check("div", "f32")
    inputs = {"x": ("f32", interesting("f32", N))}
    root, inverse = evaluate("sqrt.rn.f32 %d, %x;", "f32", inputs), evaluate("rcp.rn.f32 %d, %x;", "f32", inputs)
    for bits, a, b in zip(inputs["x"][1], root, inverse, strict=True):
        x = value_of(int(bits), "f32")
        assert same(b, result_of("div", "f32", "rn", [1.0, x]), "f32")
        if x > 0 and math.isfinite(x):
            # The root of a 24-bit number is never half way between two: one more bit of an integer root decides.
            scaled = Fraction(x) * 4**160
            assert same(a, rounded(Fraction(2 * math.isqrt(int(scaled)) + 1, 2 * 2**160), "f32"), "f32")
        elif x < 0:
            assert math.isnan(value_of(int(a), "f32"))


@pytest.mark.parametrize("op,function,domain", [
    ("ex2", lambda x: 2.0**x, (-120, 120)), ("lg2", math.log2, (1e-30, 1e30)),
    ("sin", math.sin, (-3, 3)), ("cos", math.cos, (-3, 3)), ("tanh", math.tanh, (-9, 9)),
    ("rsqrt", lambda x: x**-0.5, (1e-30, 1e30)), ("rcp", lambda x: 1 / x, (1e-30, 1e30)),
    ("sqrt", math.sqrt, (1e-30, 1e30)),
])  # fmt: skip
def test_approximate_functions(op, function, domain):
    low, high = domain
    x = np.random.default_rng(0).uniform(low, high, N).astype(np.float32)
    got = evaluate(f"{op}.approx.f32 %d, %x;", "f32", {"x": ("f32", x)}).view(np.float32)
    expected = np.array([function(float(v)) for v in x])
    assert (np.abs(got - expected) <= np.abs(expected) * 2.0**-23).all()


def test_functions_of_infinities():
    x = np.array([-np.inf, np.inf, 0.0, -0.0, np.nan], np.float32)
    got = evaluate("ex2.approx.ftz.f32 %d, %x;", "f32", {"x": ("f32", x)}).view(np.float32)
    assert np.array_equal(got, np.array([0, np.inf, 1, 1, np.nan], np.float32), equal_nan=True)
    got = evaluate("lg2.approx.f32 %d, %x;", "f32", {"x": ("f32", x)}).view(np.float32)
    assert np.array_equal(got, np.array([np.nan, np.inf, -np.inf, -np.inf, np.nan], np.float32), equal_nan=True)


def test_subnormals_are_flushed():
    x = np.array([1e-40, -1e-40, 2.0**-126, -(2.0**-126), 1.0], np.float32)
    y = np.array([0.0, 0.0, 0.5, 0.5, 1e-40], np.float32)
    inputs = {"x": ("f32", x), "y": ("f32", y)}
    got = evaluate("mul.ftz.f32 %d, %x, %y;", "f32", inputs).view(np.float32)
    assert (got == 0).all() and list(np.signbit(got)) == [False, True, False, True, False]
    got = evaluate("add.ftz.f32 %d, %x, %y;", "f32", inputs).view(np.float32)
    assert list(got[2:]) == [np.float32(2.0**-126) + np.float32(0.5), 0.5, 1.0] and (got[:2] == 0).all()
    got = evaluate("setp.gt.ftz.f32 %d, %x, 0f00000000;", "pred", inputs)
    assert list(got) == [0, 0, 1, 0, 1]


def test_saturation_and_relu():
    x = np.array([-1.0, -0.0, 0.25, 1.5, np.inf, np.nan], np.float32)
    got = evaluate("add.sat.f32 %d, %x, 0f00000000;", "f32", {"x": ("f32", x)}).view(np.float32)
    assert list(got) == [0, 0, 0.25, 1, 1, 0]
    h = x.astype(np.float16)
    one = np.full(len(h), 1.0, np.float16)
    inputs = {"x": ("f16", h), "y": ("f16", one), "z": ("f16", one * 0)}
    got = evaluate("fma.rn.relu.f16 %d, %x, %y, %z;", "f16", inputs).view(np.float16)
    assert list(got[:5]) == [0, 0, 0.25, 1.5, np.inf] and np.isnan(got[5])


@pytest.mark.parametrize("t", ["f32", "f16", "bf16", "f64"])
def test_smaller_and_larger(t):
    inputs = operands(t, 2)
    zeros = [0, 1 << WIDTH[t] - 1]
    for i in range(4):
        inputs["x"][1][i], inputs["y"][1][i] = zeros[i % 2], zeros[i // 2]
    for op in ("min", "max"):
        plain = evaluate(f"{op}.{t} %d, %x, %y;", t, inputs)
        nan = evaluate(f"{op}.NaN.{t} %d, %x, %y;", t, inputs) if t != "f64" else plain
        for i in range(N):
            a, b = (value_of(int(inputs[n][1][i]), t) for n in "xy")
            key = lambda v: (v, math.copysign(1, v))  # noqa: E731
            expected = b if math.isnan(a) else a if math.isnan(b) else (min if op == "min" else max)(a, b, key=key)
            assert same(plain[i], expected, t)
            if t != "f64":
                assert same(nan[i], math.nan if math.isnan(a) or math.isnan(b) else expected, t)


def test_signs():
    x = interesting("f32", N)
    inputs = {"x": ("f32", x), "y": ("f32", interesting("f32", N, 1))}
    assert (evaluate("neg.f32 %d, %x;", "f32", inputs) == x ^ np.uint32(1 << 31)).all()
    assert (evaluate("abs.f32 %d, %x;", "f32", inputs) == x & np.uint32(0x7FFFFFFF)).all()
    expected = inputs["y"][1] & np.uint32(0x7FFFFFFF) | x & np.uint32(1 << 31)
    assert (evaluate("copysign.f32 %d, %x, %y;", "f32", inputs) == expected).all()


@pytest.mark.parametrize("t", ["f32", "f64", "f16", "bf16"])
def test_comparisons(t):
    inputs = operands(t, 2)
    inputs["y"] = (t, np.where(np.arange(N) % 5 == 0, inputs["x"][1], inputs["y"][1]))
    compare = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }  # fmt: skip
    numbers = [[value_of(int(v), t) for v in inputs[n][1]] for n in "xy"]
    unordered = [math.isnan(a) or math.isnan(b) for a, b in zip(*numbers, strict=True)]
    for name, function in compare.items():
        plain = evaluate(f"setp.{name}.{t} %d, %x, %y;", "pred", inputs)
        loose = evaluate(f"setp.{name}u.{t} %d, %x, %y;", "pred", inputs)
        for i, (a, b) in enumerate(zip(*numbers, strict=True)):
            assert plain[i] == (function(a, b) and not unordered[i])
            assert loose[i] == (function(a, b) or unordered[i])
    assert list(evaluate(f"setp.nan.{t} %d, %x, %y;", "pred", inputs)) == unordered
    assert list(evaluate(f"setp.num.{t} %d, %x, %y;", "pred", inputs)) == [not u for u in unordered]


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_comparisons_of_two_at_once(t):
    """The second predicate is that of the upper halves, and not the opposite of the first."""
    x, y = (operands(t, 2)[n][1].astype(np.uint32) for n in "xy")
    y = np.where(np.arange(N) % 5 == 0, x, y)
    both = {n: (f"{t}x2", v | np.roll(v, 1) << np.uint32(16)) for n, v in (("x", x), ("y", y))}
    for name in ("lt", "neu", "num"):
        one = evaluate(
            f"setp.{name}.{t} %d, %x, %y;", "pred", {"x": (t, x.astype(np.uint16)), "y": (t, y.astype(np.uint16))}
        )
        low, high = (
            evaluate(f".reg .pred %other; setp.{name}.{t}x2 {pair}, %x, %y;", "pred", both)
            for pair in ("%d|%other", "%other|%d")
        )
        assert (low == one).all() and (high == np.roll(one, 1)).all()
    for text in (f"setp.lt.{t}x2 %d, %x, %y;", "setp.lt.s16x2 %d|%d, %x, %y;"):
        with pytest.raises(PtxError, match="packed types"):
            evaluate(text, "pred", both)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_to_half_precision(to, mode):
    x = np.concatenate([interesting("f32", N), _halves(to)])
    got = evaluate(f"cvt.{mode}.{to}.f32 %d, %x;", to, {"x": ("f32", x)})
    back = evaluate(f"cvt.f32.{to} %d, %x;", "f32", {"x": (to, got)})
    for i, bits in enumerate(x):
        v = value_of(int(bits), "f32")
        expected = rounded(Fraction(v), to, mode) if math.isfinite(v) and v else v
        assert same(got[i], expected, to) and same(back[i], expected, "f32")
        if math.isnan(v):
            assert got[i] == 0x7FFF  # canonical


def _halves(to: str) -> np.ndarray:
    """float32 numbers in the middle between neighbours of a narrower type, and beside it."""
    keep = {"f16": 10, "bf16": 7}[to]
    rng = np.random.default_rng(5)
    base = (rng.integers(100, 140, 60) << 23 | rng.integers(0, 1 << keep, 60) << (23 - keep)).astype(np.uint32)
    middle = base + np.uint32(1 << (22 - keep))
    return np.concatenate([middle, middle - np.uint32(1), middle + np.uint32(1)])


@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_pairs(to):
    inputs = operands("f32", 2)
    got = evaluate(f"cvt.rn.{to}x2.f32 %d, %x, %y;", "b32", inputs)
    high, low = (evaluate(f"cvt.rn.{to}.f32 %d, %x;", to, {"x": inputs[n]}) for n in "xy")
    assert (got == low | high.astype(np.uint32) << np.uint32(16)).all()
    packed = {"x": ("b32", got), "y": ("b32", got[::-1].copy())}
    total = evaluate(f"add.{to}x2 %d, %x, %y;", "b32", packed)
    for part in (0, 16):
        halves = {n: (to, (v >> np.uint32(part)).astype(np.uint16)) for n, (_, v) in packed.items()}
        assert ((total >> np.uint32(part)).astype(np.uint16) == evaluate(f"add.{to} %d, %x, %y;", to, halves)).all()


@pytest.mark.parametrize("to", ["e4m3", "e5m2"])
def test_to_eight_bits(to):
    codes = np.arange(256, dtype=np.uint8)
    values = np.array([value_of(int(c), to) for c in codes])
    finite = np.unique(np.abs(values[np.isfinite(values)]))
    middles = (finite[1:] + finite[:-1]) / 2
    chosen = np.concatenate([middles, -middles, finite, middles * 1.001, [1e6]]).astype(np.float32)
    x = np.concatenate([interesting("f32", N).view(np.float32), chosen])
    y = x[::-1].copy()
    got = evaluate(f"cvt.rn.satfinite.{to}x2.f32 %d, %x, %y;", "b16", {"x": ("f32", x), "y": ("f32", y)})
    for i in range(len(x)):
        for value, code in ((x[i], got[i] >> 8), (y[i], got[i] & 255)):
            v = float(value)
            if math.isnan(v):
                assert code == 0x7F
            elif math.isinf(v):
                assert abs(value_of(int(code), to)) == finite[-1] and (code >= 128) == (v < 0)
            else:
                assert same(code, rounded(Fraction(v), to, "rn", finite=True) if v else v, to), (v, code)
    halves = evaluate(f"cvt.rn.f16x2.{to}x2 %d, %x;", "b32", {"x": ("b16", got)})
    for i in range(len(x)):
        for part, code in ((0, got[i] & 255), (16, got[i] >> 8)):
            assert same(int(halves[i]) >> part & 0xFFFF, value_of(int(code), to), "f16")


@pytest.mark.parametrize("mode,rule", [("rna", "rna"), ("rn", "rn"), ("rz", "rz")])
def test_to_tf32(mode, rule):
    x = interesting("f32", N)
    got = evaluate(f"cvt.{mode}.tf32.f32 %d, %x;", "b32", {"x": ("f32", x)})
    for bits, code in zip(x, got, strict=True):
        v = value_of(int(bits), "f32")
        assert code & 0x1FFF == 0 or math.isnan(v)
        assert same(code, rounded(Fraction(v), "tf32", rule) if math.isfinite(v) and v else v, "tf32")


@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u8", "s8"])
@pytest.mark.parametrize("source", ["f32", "f64", "f16", "bf16"])
def test_to_integers(to, source):
    x = interesting(source, N)
    if source in ("f32", "f64"):
        dtype = {"f32": np.float32, "f64": np.float64}[source]
        x = np.concatenate([x, (np.random.default_rng(0).uniform(-300, 300, 100).round(1)).astype(dtype).view(x.dtype)])
    w = int(to[1:])
    low, high = (-(1 << w - 1), (1 << w - 1) - 1) if to[0] == "s" else (0, (1 << w) - 1)
    rounds = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    result = to if w >= 16 else "b32"
    for mode, function in rounds.items():
        got = evaluate(f"cvt.{mode}.{to}.{source} %d, %x;", result, {"x": (source, x)})
        for bits, code in zip(x, got, strict=True):
            v = value_of(int(bits), source)
            if math.isnan(v):
                expected = 0 if w < 64 else 1 << 63
            elif math.isinf(v):
                expected = high if v > 0 else low
            else:
                expected = max(low, min(high, function(Fraction(v))))
            assert int(code) == expected & (1 << WIDTH[result]) - 1, (mode, v, code)


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64", "s16"])
@pytest.mark.parametrize("to", ["f32", "f64", "f16", "bf16"])
def test_from_integers(to, source):
    x = interesting(source, N)
    got = evaluate(f"cvt.rn.{to}.{source} %d, %x;", to, {"x": (source, x)})
    w = WIDTH[source]
    for bits, code in zip(x, got, strict=True):
        v = int(bits) - (1 << w) if source[0] == "s" and int(bits) >> w - 1 else int(bits)
        assert same(code, rounded(Fraction(v), to), to), v


def test_rounding_to_integral_floats():
    x = np.array([0.5, 1.5, -0.5, -1.5, 2.4, -2.6, 1e30, np.inf], np.float32)
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        got = evaluate(f"cvt.{mode}.f32.f32 %d, %x;", "f32", {"x": ("f32", x)}).view(np.float32)
        assert (got == function(x)).all()
    got = evaluate("cvt.sat.f32.f32 %d, %x;", "f32", {"x": ("f32", x)}).view(np.float32)
    assert (got == np.clip(x, 0, 1)).all()


def test_between_f32_and_f64():
    x = interesting("f64", N)
    got = evaluate("cvt.rn.f32.f64 %d, %x;", "f32", {"x": ("f64", x)})
    up = evaluate("cvt.f64.f32 %d, %x;", "f64", {"x": ("f32", got)})
    for bits, code, wide in zip(x, got, up, strict=True):
        v = value_of(int(bits), "f64")
        expected = rounded(Fraction(v), "f32") if math.isfinite(v) and v else v
        assert same(code, expected, "f32") and same(wide, expected, "f64")


def test_properties():
    x = np.array([0.0, -0.0, 1e-40, 1.0, np.inf, np.nan], np.float32)
    expected = {
        "finite": [1, 1, 1, 1, 0, 0], "infinite": [0, 0, 0, 0, 1, 0], "number": [1, 1, 1, 1, 1, 0],
        "notanumber": [0, 0, 0, 0, 0, 1], "normal": [0, 0, 0, 1, 0, 0], "subnormal": [0, 0, 1, 0, 0, 0],
    }  # fmt: skip
    for name, answer in expected.items():
        assert list(evaluate(f"testp.{name}.f32 %d, %x;", "pred", {"x": ("f32", x)})) == answer
