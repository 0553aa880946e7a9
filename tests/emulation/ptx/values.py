"""Registers' bits as numbers and back: types, rounding, the narrow floating-point formats.

A register is an array of unsigned integers (bool for a predicate), one element a thread, or one element alone where
all threads hold the same. Arrays are never changed in place, so that registers may share them.

Sources: PTX ISA 5.2 (types), 9.7.3 to 9.7.5 (floating point: .ftz, .sat, rounding), 9.7.9.21 (cvt).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tests.emulation.ptx.parse import PtxError, width_of

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
FLOATING = ("f16", "bf16", "f32", "f64", "tf32", "e4m3", "e5m2")
#: Packed types: the type of an element, which takes half of the register.
PACKED = {
    "f16x2": "f16",
    "bf16x2": "bf16",
    "e4m3x2": "e4m3",
    "e5m2x2": "e5m2",
    "u16x2": "u16",
    "s16x2": "s16",
}
SMALLEST_NORMAL = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126}
#: What a NaN becomes on its way into a narrow format (PTX ISA 9.7.9.21: canonical).
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "e4m3": 0x7F, "e5m2": 0x7F}


def is_float(t: str) -> bool:
    return t in FLOATING


def decode(t: str, bits: np.ndarray) -> np.ndarray:
    """The numbers that bits of type t mean: float64 for f64, float32 for narrower floats (exact), else integers."""
    if t == "f32":
        return bits.view(np.float32)
    if t == "tf32":  # the matrix unit does not look at the low 13 bits
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if t == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    if t == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if t == "f64":
        return bits.view(np.float64)
    if t in ("e4m3", "e5m2"):
        return fp8_table(t)[bits.astype(np.uint8)]
    return bits.view(SIGNED[width_of(t)]) if t[0] == "s" else bits


@lru_cache
def fp8_table(t: str) -> np.ndarray:
    """The float32 value of each of the 256 codes. e4m3: bias 7, no infinity, NaN is 0x7f and 0xff. e5m2: bias 15."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if t == "e4m3" else (5, 2, 15)
    code = np.arange(256)
    exponent, mantissa = code >> mantissa_bits & ((1 << exponent_bits) - 1), code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / 2.0**mantissa_bits
    value = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent.astype(float) - bias)
    )
    if t == "e4m3":
        value[code & 0x7F == 0x7F] = np.nan
    else:
        top = exponent == 31
        value[top] = np.where(mantissa[top] == 0, np.inf, np.nan)
    return np.where(code & 0x80, -value, value).astype(np.float32)


def encode(t: str, value: np.ndarray, mode: str = "rn", saturate: bool = False) -> np.ndarray:
    """Bits of type t for numbers: floats are rounded (mode rn, rz, rm, rp, rna), integers must fit already."""
    if t == "f32" and value.dtype == np.float32:
        return value.view(np.uint32)
    if not is_float(t):
        return value.astype(SIGNED[width_of(t)] if t[0] == "s" else UNSIGNED[width_of(t)]).view(UNSIGNED[width_of(t)])
    value = np.asarray(value, np.float64)
    if t == "f64":
        return value.view(np.uint64)
    if t == "f32":
        return _directed(value, np.float32, mode).view(np.uint32)
    if t == "tf32":
        bits = _tf32(_odd32(value), mode)
        return np.where(saturate & (bits & np.uint32(0x7FFFFFFF) == 0x7F800000), bits - np.uint32(0x2000), bits)
    if t == "f16":
        if saturate:
            value = np.clip(value, -65504.0, 65504.0)
        bits = _directed(value, np.float16, mode).view(np.uint16)
    elif t == "bf16":
        bits = _bf16(value, mode)
        if saturate:
            bits = np.where(bits & np.uint16(0x7FFF) == 0x7F80, bits - np.uint16(1), bits)
    else:
        if mode != "rn" or not saturate:
            raise PtxError(f"cvt to {t} is known as .rn.satfinite only")
        bits = _fp8(t, value)
    return np.where(np.isnan(value), bits.dtype.type(NAN[t]), bits)


def _directed(value: np.ndarray, dtype: type, mode: str) -> np.ndarray:
    """float64 rounded to a narrower numpy type."""
    nearest = value.astype(dtype)
    if mode == "rn":
        return nearest
    back = nearest.astype(np.float64)
    if mode == "rz":
        return np.where(np.abs(back) > np.abs(value), np.nextafter(nearest, dtype(0)), nearest)
    if mode == "rm":
        return np.where(back > value, np.nextafter(nearest, dtype(-np.inf)), nearest)
    if mode == "rp":
        return np.where(back < value, np.nextafter(nearest, dtype(np.inf)), nearest)
    raise PtxError(f"rounding .{mode} to {np.dtype(dtype)} is not known")


def _odd32(value: np.ndarray) -> np.ndarray:
    """float64 to float32, cut off, with the last bit set where something was lost (rounding to odd).

    Rounding this once more, to at least two bits less, gives what rounding the float64 at once would.
    """
    cut = _directed(value, np.float32, "rz")
    inexact = (cut.astype(np.float64) != value) & ~np.isnan(value)
    return np.where(inexact, cut.view(np.uint32) | np.uint32(1), cut.view(np.uint32)).view(np.float32)


def _bf16(value: np.ndarray, mode: str) -> np.ndarray:
    bits = _odd32(value).view(np.uint32)
    if mode == "rz":
        return (bits >> np.uint32(16)).astype(np.uint16)
    if mode == "rna":
        raise PtxError("rounding .rna to bf16 is not known")
    if mode in ("rm", "rp"):
        away = (bits >> np.uint32(31) == 1) if mode == "rm" else (bits >> np.uint32(31) == 0)
        up = np.where(away & (bits & np.uint32(0xFFFF) != 0), np.uint32(1), np.uint32(0))
        return ((bits >> np.uint32(16)) + up).astype(np.uint16)
    rounded = bits.astype(np.uint64) + np.uint64(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (rounded >> np.uint64(16)).astype(np.uint16)


def _tf32(value: np.ndarray, mode: str) -> np.ndarray:
    """The float32 bits with a mantissa of 10 bits: ties away from zero (rna) or to even (rn), or cut off (rz)."""
    bits = value.view(np.uint32).astype(np.uint64)
    if mode == "rna":
        rounded = bits + np.uint64(0x1000)
    elif mode == "rn":
        rounded = bits + np.uint64(0xFFF) + (bits >> np.uint64(13) & np.uint64(1))
    elif mode == "rz":
        rounded = bits
    else:
        raise PtxError(f"rounding .{mode} to tf32 is not known")
    rounded = (rounded & np.uint64(0xFFFFE000)).astype(np.uint32)
    return np.where(np.isnan(value), np.uint32(0x7FFFFFFF), rounded)


def _fp8(t: str, value: np.ndarray) -> np.ndarray:
    """Round to nearest even, the largest finite number where it would overflow (.satfinite)."""
    positive = fp8_table(t)[: 0x7F if t == "e4m3" else 0x7C].astype(np.float64)  # finite codes in ascending order
    magnitude = np.minimum(np.abs(np.nan_to_num(value)), positive[-1])
    middle = (positive[1:] + positive[:-1]) / 2
    low = np.searchsorted(middle, magnitude, side="left")  # ties stay below, then go to the even code
    tie = (low < len(middle)) & (middle[np.minimum(low, len(middle) - 1)] == magnitude) & (low % 2 == 1)
    code = (low + tie).astype(np.uint8)
    return np.where(np.signbit(value), code | np.uint8(0x80), code)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b as a rounded float64 sum and its error, exactly (Knuth 1997, section 4.2.2, theorem B)."""
    s = a + b
    other = s - a
    return s, (a - (s - other)) + (b - other)


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b rounded to odd in float64, so that rounding it again to a narrower type is right.

    Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums".
    """
    s, error = two_sum(a, b)
    bits = s.view(np.int64)
    inexact = np.isfinite(s) & (error != 0) & (bits & 1 == 0)
    # Towards the error: away from zero where it has the sign of the sum.
    step = np.where((error > 0) == (s > 0), 1, -1)
    return np.where(inexact, bits + step, bits).view(np.float64)


def flush(t: str, value: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of the same sign (.ftz, for f32 inputs and outputs)."""
    small = np.abs(value) < SMALLEST_NORMAL.get(t, 0.0)
    return np.where(small, np.copysign(value.dtype.type(0), value), value) if small.any() else value


def saturate(value: np.ndarray) -> np.ndarray:
    """To [0, 1]; NaN becomes 0 (.sat)."""
    return np.where(np.isnan(value), value.dtype.type(0), np.clip(value, value.dtype.type(0), value.dtype.type(1)))


def extend(t: str, bits: np.ndarray, width: int) -> np.ndarray:
    """Bits of type t in a register of another width: cut off, or extended by the sign or by zeros (PTX ISA 9.4.1)."""
    if t[0] == "s" and width > width_of(t):
        return bits.view(SIGNED[width_of(t)]).astype(SIGNED[width]).view(UNSIGNED[width])
    return bits.astype(UNSIGNED[width])


def halves(bits: np.ndarray, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high element of a packed register; `width`: bits of an element."""
    whole, half = UNSIGNED[2 * width], UNSIGNED[width]
    return bits.astype(half), (bits.astype(whole) >> whole(width)).astype(half)


def pack(low: np.ndarray, high: np.ndarray, width: int = 16) -> np.ndarray:
    whole = UNSIGNED[2 * width]
    return low.astype(whole) | high.astype(whole) << whole(width)
