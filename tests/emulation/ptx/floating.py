"""Floating-point arithmetic. PTX ISA 9.7.3 (f32, f64), 9.7.4 (f16, bf16).

Results of .rn, .rz, .rm and .rp are the exact ones rounded once, subnormals included unless .ftz flushes them. The
.approx functions (ex2, lg2, sin, cos, tanh, rcp, rsqrt, sqrt, div) are computed in float64 and rounded, which is closer
than hardware is: a kernel that only just passes here may not there. NaN payloads are not modelled for f32 and f64.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from tests.emulation.ptx.operands import Form, Run, instruction
from tests.emulation.ptx.parse import width_of
from tests.emulation.ptx.values import (
    NAN,
    PACKED,
    UNSIGNED,
    decode,
    encode,
    flush,
    halves,
    odd_sum,
    pack,
    saturate,
)

ROUNDINGS = ("rn", "rz", "rm", "rp")
Bits = Callable[..., np.ndarray]


def build(form: Form, t: str, compute: Bits, inputs: int) -> Run:
    """d = compute(a, ...) on bits of t, for a packed type on each half."""
    if t in PACKED:
        one = compute

        def compute(*packed: np.ndarray) -> np.ndarray:
            low, high = zip(*(halves(p) for p in packed), strict=True)
            return pack(one(*low), one(*high))

    if len(form.operands) != 1 + inputs:
        raise form.error(f"expected {inputs} inputs")
    put = form.write(form.operands[0], t)
    reads = [form.read(o, t) for o in form.operands[1:]]
    return lambda unit, mask: put(unit, compute(*(read(unit) for read in reads)), mask)


class Rounding:
    """The modifiers that say how a result is made: rounding, .ftz, .sat, .relu."""

    def __init__(self, form: Form, element: str) -> None:
        self.element = element
        self.mode = form.one_of(*ROUNDINGS, default="rn")
        self.ftz = form.flag("ftz")
        self.sat = form.flag("sat")
        self.relu = form.flag("relu")
        self.plain = self.mode == "rn" and not (self.ftz or self.sat or self.relu)

    def inputs(self, *bits: np.ndarray) -> list[np.ndarray]:
        values = [decode(self.element, b) for b in bits]
        return [flush(self.element, v) for v in values] if self.ftz else values

    def result(self, value: np.ndarray) -> np.ndarray:
        """Bits of a value that is exact, or rounded to odd, in float64 (or already rounded to the type)."""
        if self.plain:
            return encode(self.element, value)
        bits = encode(self.element, value, self.mode)
        if not (self.ftz or self.sat or self.relu):
            return bits
        rounded = decode(self.element, bits)
        if self.ftz:
            rounded = flush(self.element, rounded)
        if self.sat:
            rounded = saturate(rounded)
        if self.relu:  # NaN stays NaN, which encode makes the canonical one
            rounded = np.where(rounded <= 0, rounded.dtype.type(0), rounded)
        return encode(self.element, rounded)


def arithmetic(form: Form, t: str) -> Run:
    op = form.ins.opcode
    element = PACKED.get(t, t)
    if op in ("neg", "abs"):
        return _sign(form, t, element)
    if op in ("min", "max"):
        return _smaller(form, t, element)
    if op == "mad":
        return multiply_add(form, t)
    if op not in ("add", "sub", "mul"):
        raise form.error(f"{op} is not known for .{t}")
    r = Rounding(form, element)
    fast = r.mode == "rn" and element == "f32"

    def compute(*bits: np.ndarray) -> np.ndarray:
        a, b = r.inputs(*bits)
        if op == "sub":
            b = -b
        if fast or element == "f64":
            return r.result(a * b if op == "mul" else a + b)
        a, b = a.astype(np.float64), b.astype(np.float64)
        return r.result(a * b if op == "mul" else odd_sum(a, b))

    if element == "f64" and r.mode != "rn":
        raise form.error(f".{r.mode} is not known for f64")
    return build(form, t, compute, 2)


def _sign(form: Form, t: str, element: str) -> Run:
    ftz = form.flag("ftz")
    width = width_of(element)
    sign = UNSIGNED[width](1 << (width - 1))
    negate = form.ins.opcode == "neg"

    def compute(bits: np.ndarray) -> np.ndarray:
        if ftz:
            bits = encode(element, flush(element, decode(element, bits)))
        return bits ^ sign if negate else bits & ~sign

    return build(form, t, compute, 1)


def _smaller(form: Form, t: str, element: str) -> Run:
    """min, max: -0 is less than +0; a NaN loses against a number, or with .NaN wins."""
    ftz, nan, xor = form.flag("ftz"), form.flag("NaN"), form.flag("xorsign")
    if xor and not form.flag("abs"):
        raise form.error(".xorsign goes with .abs")
    smaller = form.ins.opcode == "min"
    width = width_of(element)
    unsigned = UNSIGNED[width]
    sign = unsigned(1 << (width - 1))
    canonical = unsigned(NAN.get(element, 0x7FFFFFFF)) if width <= 32 else unsigned(0x7FFFFFFFFFFFFFFF)

    def compute(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        if ftz:
            p, q = (encode(element, flush(element, decode(element, v))) for v in (p, q))
        signs = (p ^ q) & sign
        if xor:
            p, q = p & ~sign, q & ~sign
        a, b = decode(element, p), decode(element, q)
        equal = p | q if smaller else p & q  # of equal numbers only zeros differ in a bit, the sign
        result = np.where((a < b) if smaller else (a > b), p, np.where(a == b, equal, q))
        no_a, no_b = np.isnan(a), np.isnan(b)
        result = np.where(no_b, p, result)
        neither = (no_a | no_b) if nan else (no_a & no_b)
        result = np.where(neither, canonical, result)
        return result ^ signs if xor else result

    return build(form, t, compute, 2)


@instruction("fma")
def multiply_add(form: Form, t: str | None = None) -> Run:
    """a * b + c, rounded once."""
    t = t or form.type()
    element = PACKED.get(t, t)
    r = Rounding(form, element)
    if element == "f64":
        if r.mode != "rn":
            raise form.error(f".{r.mode} is not known for f64")
        return build(form, t, _fma64, 3)
    quick = element == "f32" and r.mode == "rn"

    def compute(*bits: np.ndarray) -> np.ndarray:
        a, b, c = (v.astype(np.float64) for v in r.inputs(*bits))
        product = a * b  # exact: twice 24 bits
        if quick:
            total = product + c
            rounded = total.astype(np.float32)
            # Rounding twice is wrong only where the first one lands in the middle between two float32 numbers, of
            # which subnormal ones have fewer bits.
            low = total.view(np.int64) & 0x1FFFFFFF
            doubtful = (low == 0x10000000) | ((np.abs(rounded) < 2.0**-125) & (rounded != 0))
            if not doubtful.any():
                return r.result(rounded)
        return r.result(odd_sum(product, c))

    return build(form, t, compute, 3)


def _fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """By fractions, one after the other: exact, slow and rarely needed."""
    x, y, z = np.broadcast_arrays(*(v.view(np.float64) for v in (a, b, c)))
    result = x * y + z
    for i in np.ndindex(result.shape):
        if np.isfinite(x[i]) and np.isfinite(y[i]) and np.isfinite(z[i]):
            exact = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
            try:
                result[i] = float(exact) if exact else result[i]
            except OverflowError:
                result[i] = np.inf if exact > 0 else -np.inf
    return result.view(np.uint64)


def divide(form: Form, t: str) -> Run:
    """div with a rounding, .approx or .full (2 ulp on hardware)."""
    form.flag("approx", "full")
    r = Rounding(form, t)
    if t == "f64" and r.mode != "rn":
        raise form.error(f".{r.mode} is not known for f64")

    def compute(*bits: np.ndarray) -> np.ndarray:
        a, b = r.inputs(*bits)
        if r.mode == "rn":
            return r.result(a / b)
        a, b = a.astype(np.float64), b.astype(np.float64)
        q = a / b
        # The remainder is exact (a quotient of 24-bit numbers), and tells on which side of q the truth lies.
        remainder = odd_sum(a, -q.astype(np.float32).astype(np.float64) * b)
        side = np.sign(remainder) * np.sign(b)
        near = q.astype(np.float32)
        off = np.isfinite(near) & np.isfinite(b) & (side != 0)
        return r.result(np.where(off, np.nextafter(near.astype(np.float64), side * np.inf), q))

    return build(form, t, compute, 2)


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*FUNCTIONS)
def function_of_one(form: Form) -> Run:
    """rcp, sqrt with a rounding are exact; the .approx functions as this file's head says."""
    t = form.type()
    element = PACKED.get(t, t)
    approximate = form.flag("approx")
    rounded = any(m in form.left for m in ROUNDINGS)
    if approximate == rounded:
        raise form.error("expected .approx or a rounding")
    r = Rounding(form, element)
    if rounded and (form.ins.opcode not in ("rcp", "sqrt") or r.mode != "rn"):
        raise form.error(f".{r.mode} is not known for {form.ins.opcode}")
    function = FUNCTIONS[form.ins.opcode]

    def compute(bits: np.ndarray) -> np.ndarray:
        (a,) = r.inputs(bits)
        if rounded:
            return r.result(function(a))
        return r.result(function(a.astype(np.float64)))

    return build(form, t, compute, 1)


@instruction("copysign")
def copy_sign(form: Form) -> Run:
    """copysign d, a, b: the sign of a, the magnitude of b."""
    t = form.type()
    sign = UNSIGNED[width_of(t)](1 << (width_of(t) - 1))
    return build(form, t, lambda a, b: a & sign | b & ~sign, 2)


@instruction("testp")
def test_property(form: Form) -> Run:
    t = form.type()
    which = form.one_of("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    tiny = np.finfo(np.float32 if t == "f32" else np.float64).tiny
    tests: dict[str, Bits] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }
    put, a = form.write(form.operands[0], "pred"), form.read(form.operands[1], t)
    return lambda unit, mask: put(unit, tests[which](decode(t, a(unit))), mask)
