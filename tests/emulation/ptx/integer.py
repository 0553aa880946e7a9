"""Integer arithmetic and mov; opcodes that are floating-point too are passed on by their type. PTX ISA 9.7.1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulation.ptx.operands import Form, Run, instruction
from tests.emulation.ptx.parse import width_of
from tests.emulation.ptx.values import SIGNED, UNSIGNED, decode, is_float, pack

Numbers = Callable[..., np.ndarray]


def elementwise(form: Form, t: str, compute: Numbers, inputs: int) -> Run:
    """d = compute(a, b, ...) on bits of type t."""
    put = form.write(form.operands[0], t)
    reads = [form.read(o, t) for o in form.operands[1 : 1 + inputs]]
    if len(reads) != inputs or len(form.operands) != 1 + inputs:
        raise form.error(f"expected {inputs} inputs")
    if inputs == 2:
        a, b = reads
        return lambda unit, mask: put(unit, compute(a(unit), b(unit)), mask)
    return lambda unit, mask: put(unit, compute(*(read(unit) for read in reads)), mask)


def as_numbers(t: str, compute: Numbers) -> Numbers:
    """`compute` on numbers of an integer type as a function on bits."""
    if t[0] == "s":
        signed, unsigned = SIGNED[width_of(t)], UNSIGNED[width_of(t)]
        return lambda *bits: compute(*(b.view(signed) for b in bits)).view(unsigned)
    return compute


def add_or_subtract(form: Form, t: str) -> Run:
    """add, sub. Wraps around; add.sat.s32 and sub.sat.s32 stop at the ends."""
    plus = form.ins.opcode == "add"
    if form.flag("sat"):
        if t != "s32":
            raise form.error(".sat is for s32")

        def clipped(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            x, y = (v.view(np.int32).astype(np.int64) for v in (a, b))
            return np.clip(x + y if plus else x - y, -(1 << 31), (1 << 31) - 1).astype(np.int32).view(np.uint32)

        return elementwise(form, t, clipped, 2)
    if t in ("u16x2", "s16x2"):

        def two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            low = (a + b if plus else a - b) & np.uint32(0xFFFF)
            high = (a >> np.uint32(16)) + (b >> np.uint32(16)) if plus else (a >> np.uint32(16)) - (b >> np.uint32(16))
            return low | high << np.uint32(16)

        return elementwise(form, t, two, 2)
    return elementwise(form, t, (lambda a, b: a + b) if plus else (lambda a, b: a - b), 2)


def product_high(t: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    width = width_of(t)
    if width < 64:
        wide = np.int64 if t[0] == "s" else np.uint64
        x, y = (decode(t, v).astype(wide) for v in (a, b))
        return ((x * y) >> wide(width)).astype(UNSIGNED[width])
    # 64 bits in halves: (a1 * 2^32 + a0)(b1 * 2^32 + b0), then the correction for negative factors.
    low = np.uint64(0xFFFFFFFF)
    s = np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> s, b & low, b >> s
    middle = (a0 * b0 >> s) + (a1 * b0 & low) + (a0 * b1 & low)
    high = a1 * b1 + (a1 * b0 >> s) + (a0 * b1 >> s) + (middle >> s)
    if t[0] == "s":
        high = high - np.where(a >> np.uint64(63), b, np.uint64(0)) - np.where(b >> np.uint64(63), a, np.uint64(0))
    return high


def multiply(form: Form, t: str) -> Run:
    """mul, mad with .lo, .hi or .wide."""
    adds = form.ins.opcode.startswith("mad")
    part = form.one_of("lo", "hi", "wide")
    if form.flag("sat", "cc"):
        raise form.error("not known")
    width = width_of(t)
    result = t[0] + str(2 * width) if part == "wide" else t
    wide = SIGNED[64 if part != "wide" else 2 * width] if t[0] == "s" else UNSIGNED[64 if part != "wide" else 2 * width]

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if part == "lo":
            return a * b
        if part == "hi":
            return product_high(t, a, b)
        return (decode(t, a).astype(wide) * decode(t, b).astype(wide)).view(UNSIGNED[2 * width])

    put = form.write(form.operands[0], result)
    a, b = form.read(form.operands[1], t), form.read(form.operands[2], t)
    if not adds:
        return lambda unit, mask: put(unit, product(a(unit), b(unit)), mask)
    c = form.read(form.operands[3], result)
    return lambda unit, mask: put(unit, product(a(unit), b(unit)) + c(unit), mask)


def quotient(t: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero. By zero, which PTX leaves open, all bits are set."""
    ones = UNSIGNED[width_of(t)](-1 & ((1 << width_of(t)) - 1))
    if t[0] == "u":
        return np.where(b == 0, ones, a // np.where(b == 0, b.dtype.type(1), b))
    x, y = decode(t, a), decode(t, b)
    safe = np.where((y == 0) | (y == -1), y.dtype.type(1), y)  # the smallest number / -1 overflows in numpy
    q = x // safe
    q = q + ((x % safe != 0) & ((x < 0) != (safe < 0)))
    q = np.where(y == -1, -x, q)
    return np.where(y == 0, ones, q.astype(x.dtype).view(ones.dtype))


@instruction("div", "rem")
def divide(form: Form) -> Run:
    from tests.emulation.ptx import floating

    t = form.type()
    if is_float(t):
        return floating.divide(form, t)
    if form.ins.opcode == "div":
        return elementwise(form, t, lambda a, b: quotient(t, a, b), 2)
    return elementwise(form, t, lambda a, b: a - quotient(t, a, b) * b, 2)


@instruction("mov")
def move(form: Form) -> Run:
    t = form.type()
    put, a = form.write(form.operands[0], t), form.read(form.operands[1], t)
    return lambda unit, mask: put(unit, a(unit), mask)


@instruction("dp4a", "dp2a")
def dot_of_bytes(form: Form) -> Run:
    """dp4a: c + sum of four products of bytes; dp2a: of two halves of a and the low or high two bytes of b."""
    ta, tb = form.types(2)
    four = form.ins.opcode == "dp4a"
    high = not four and form.one_of("lo", "hi") == "hi"
    result = "s32" if "s32" in (ta, tb) else "u32"
    put = form.write(form.operands[0], result)
    a, b, c = (form.read(o, "b32") for o in form.operands[1:4])

    def parts(x, t, width, count, first=0):
        pieces = [(x >> np.uint32(width * (first + i))).astype(UNSIGNED[width]) for i in range(count)]
        return [decode(t[0] + str(width), p).astype(np.int64) for p in pieces]

    def run(unit, mask):
        x = parts(a(unit), ta, 8 if four else 16, 4 if four else 2)
        y = parts(b(unit), tb, 8, 4 if four else 2, 2 if high else 0)
        total = sum((p * q for p, q in zip(x, y, strict=True)), c(unit).astype(np.int64))
        put(unit, total.astype(np.uint32), mask)

    return run


@instruction("cvt")
def convert(form: Form) -> Run:
    from tests.emulation.ptx import conversion

    return conversion.make(form)


@instruction("neg", "abs", "min", "max", "add", "sub", "mul", "mad", "sad")
def arithmetic(form: Form) -> Run:
    from tests.emulation.ptx import floating

    t = form.type()
    op = form.ins.opcode
    if is_float(t) or t in ("f16x2", "bf16x2"):
        return floating.arithmetic(form, t)
    if op in ("add", "sub"):
        return add_or_subtract(form, t)
    if op in ("mul", "mad"):
        return multiply(form, t)
    if op == "sad":
        return elementwise(form, t, lambda a, b, c: c + _distance(t, a, b), 3)
    functions = {
        "neg": lambda a: -a,
        "abs": np.abs,
        "min": np.minimum,
        "max": np.maximum,
    }
    if t == "s32" and op in ("min", "max") and form.flag("relu"):
        chosen = functions[op]
        return elementwise(form, t, as_numbers(t, lambda a, b: np.maximum(chosen(a, b), 0)), 2)
    if t in ("u16x2", "s16x2"):
        return _in_halves(form, t, functions[op], 1 if op in ("neg", "abs") else 2)
    return elementwise(form, t, as_numbers(t, functions[op]), 1 if op in ("neg", "abs") else 2)


def _distance(t: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y = decode(t, a), decode(t, b)
    return np.where(x < y, b - a, a - b)


def _in_halves(form: Form, t: str, compute: Numbers, inputs: int) -> Run:
    half = as_numbers(t[:-2], compute)

    def both(*bits):
        low = half(*(b.astype(np.uint16) for b in bits))
        high = half(*((b >> np.uint32(16)).astype(np.uint16) for b in bits))
        return pack(low, high)

    return elementwise(form, t, both, inputs)
