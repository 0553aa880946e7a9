"""Conversions between types: cvt, cvt.pack, cvta. PTX ISA 9.7.9.20 to 9.7.9.23."""

from __future__ import annotations

import numpy as np

from tests.emulation.ptx.operands import Form, Run, instruction
from tests.emulation.ptx.parse import width_of
from tests.emulation.ptx.values import (
    PACKED,
    SIGNED,
    UNSIGNED,
    decode,
    encode,
    flush,
    halves,
    is_float,
    pack,
    saturate,
)

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def make(form: Form) -> Run:
    """cvt{.rounding}{.ftz}{.sat,.satfinite}{.relu}.to.from, and cvt.pack."""
    if form.flag("pack"):
        return _pack_saturated(form)
    to, source = form.types(2)
    integral = form.one_of(*TO_INTEGER, default="")
    mode = form.one_of("rn", "rz", "rm", "rp", "rna", default="rn")
    ftz, sat, finite, relu = form.flag("ftz"), form.flag("sat"), form.flag("satfinite"), form.flag("relu")
    element, from_element = PACKED.get(to, to), PACKED.get(source, source)

    def one(bits: np.ndarray) -> np.ndarray:
        """Bits of an element of the source as bits of an element of the target."""
        value = decode(from_element, bits)
        if is_float(from_element):
            if ftz and from_element == "f32":  # subnormal numbers of narrower types stay (PTX ISA 9.7.9.21)
                value = flush(from_element, value)
            if not is_float(element):
                return _to_integer(element, value, integral or "rzi")
            if integral:
                value = TO_INTEGER[integral](value)
        elif not is_float(element):
            if sat:
                value = _clip(element, value)
            return value.astype(SIGNED[width_of(element)] if element[0] == "s" else UNSIGNED[width_of(element)]).view(
                UNSIGNED[width_of(element)]
            )
        elif width_of(from_element) == 64 and element != "f64":
            value = _odd64(value)
        if relu:
            value = np.where(value <= 0, value.dtype.type(0), value)
        result = encode(element, value, mode, finite)
        if sat:
            result = encode(element, saturate(decode(element, result)))
        if ftz and element == "f32":
            result = encode(element, flush(element, decode(element, result)))
        return result

    put = form.write(form.operands[0], to)
    width = width_of(element)
    if to in PACKED and source in PACKED:
        packed, from_width = form.read(form.operands[1], source), width_of(from_element)
        return lambda unit, mask: put(unit, pack(*map(one, halves(packed(unit), from_width)), width), mask)
    if to in PACKED:  # the first source goes into the upper half
        high, low = (form.read(o, source) for o in form.operands[1:3])
        return lambda unit, mask: put(unit, pack(one(low(unit)), one(high(unit)), width), mask)
    a = form.read(form.operands[1], source)
    return lambda unit, mask: put(unit, one(a(unit)), mask)


def _limits(t: str) -> tuple[int, int]:
    width = width_of(t)
    return (-(1 << (width - 1)), (1 << (width - 1)) - 1) if t[0] == "s" else (0, (1 << width) - 1)


def _clip(t: str, value: np.ndarray) -> np.ndarray:
    low, high = _limits(t)
    info = np.iinfo(value.dtype)
    return np.clip(value, max(low, info.min), min(high, info.max))


def _to_integer(t: str, value: np.ndarray, rounding: str) -> np.ndarray:
    """Saturates; NaN becomes 0, or with 64 bits the top bit alone (PTX ISA 9.7.9.21)."""
    rounded = TO_INTEGER[rounding](value.astype(np.float64))
    low, high = _limits(t)
    width = width_of(t)
    inside = np.clip(np.nan_to_num(rounded, nan=0.0), low, np.nextafter(float(high) + 1, 0))
    result = inside.astype(SIGNED[width] if t[0] == "s" else UNSIGNED[width])
    result = np.where(rounded >= high, result.dtype.type(high), result)
    if width == 64:
        result = np.where(np.isnan(value), np.uint64(1 << 63).astype(result.dtype), result)
    return result.view(UNSIGNED[width])


def _odd64(value: np.ndarray) -> np.ndarray:
    """64-bit integers as float64 rounded to odd, so that a second rounding is right."""
    exact = [int(v) for v in value]
    floats = np.array([float(v) for v in exact])
    for i, v in enumerate(exact):
        if int(floats[i]) != v and floats[i : i + 1].view(np.uint64)[0] & np.uint64(1) == 0:
            floats[i] = np.nextafter(floats[i], np.inf if v > int(floats[i]) else -np.inf)
    return floats


def _pack_saturated(form: Form) -> Run:
    """cvt.pack.sat.{s8,u8,...}.s32.b32 d, a, b, c: a and b, clipped, below the low bits of c shifted up."""
    last = form.type()
    source = form.type() if last == "b32" else last
    to = form.type()
    if not form.flag("sat"):
        raise form.error("expected .sat")
    width = width_of(to)
    put = form.write(form.operands[0], "b32")
    a, b = (form.read(o, source) for o in form.operands[1:3])
    c = form.read(form.operands[3], "b32") if len(form.operands) > 3 else None

    def run(unit, mask):
        x, y = (
            (_clip(to, decode(source, r(unit)))).astype(np.int64).astype(np.uint32) & np.uint32((1 << width) - 1)
            for r in (a, b)
        )
        low = x << np.uint32(width) | y
        put(unit, low | (c(unit) << np.uint32(2 * width) if c else np.uint32(0)), mask)

    return run


@instruction("cvta")
def to_or_from_generic(form: Form) -> Run:
    """cvta.space: an address of the space as a generic one; cvta.to.space: back."""
    t = form.type()
    back = form.flag("to")
    space = form.space()
    put, a = form.write(form.operands[0], t), form.read(form.operands[1], t)

    def run(unit, mask):
        window = np.uint64(unit.machine.window(space))
        put(unit, a(unit) - window if back else a(unit) + window, mask)

    return run
