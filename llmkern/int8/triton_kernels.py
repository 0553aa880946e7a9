"""The Triton kernel that makes integers of rows for int8_linear. Only the family's triton_* files of kernels import
triton.

The integers are those of llmkern.int8.reference, bit for bit: each float32 operation rounds as its does, divisions too.
A row's integer is u = 256 * high + low with low 0..255; what is stored of low is low - 128, which has a sign as the
weights have, so that one matrix instruction serves all GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Elements of k that a flag is about: whether a row has high digits there.
FLAGGED = tl.constexpr(128)
SYMMETRIC = tl.constexpr(1)
OUTLIERS = tl.constexpr(2)
WIDE = tl.constexpr(3)
GIVEN = tl.constexpr(4)


@triton.jit
def round_to_even(x):  # type: ignore[no-untyped-def]
    """x to the nearest integer, for |x| < 2^22: the sum has no bits left behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def usable(scale):  # type: ignore[no-untyped-def]
    """A scale below the smallest normal number has no inverse: 1 instead. Infinity: NaN."""
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    return tl.where(scale > 3.4028234663852886e38, float("nan"), scale)


@triton.jit
def choose(least, most, mean, INPUTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales and zero points of rows from their range, 0 within, and mean magnitude."""
    magnitude = tl.maximum(-least, most)
    if INPUTS == SYMMETRIC:
        return usable(tl.div_rn(magnitude, 127.0)), tl.full(mean.shape, 128, tl.int32)
    if INPUTS == WIDE:
        return usable(tl.div_rn(magnitude, 32000.0)), tl.full(mean.shape, 128, tl.int32)
    if INPUTS == OUTLIERS:
        bound = 6.0 * mean
        least, most = tl.maximum(least, -bound), tl.minimum(most, bound)
    scale = tl.div_rn(most - least, 255.0)
    if INPUTS == OUTLIERS:
        scale = tl.maximum(scale, tl.div_rn(magnitude, 32000.0))
    scale = usable(scale)
    zero = round_to_even(-least * tl.div_rn(1.0, scale))
    return scale, tl.where(zero == zero, tl.minimum(tl.maximum(zero, 0.0), 255.0), 0.0).to(tl.int32)


@triton.jit
def integers(x, scale, zero, TWO: tl.constexpr):  # type: ignore[no-untyped-def]
    """(R, N) int32 from x (R, N) and what belongs to its rows."""
    scaled = x * tl.div_rn(1.0, scale)[:, None]
    scaled = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -32000.0), 32000.0), 0.0)
    u = round_to_even(scaled).to(tl.int32) + zero[:, None]
    if not TWO:
        u = tl.minimum(tl.maximum(u, 0), 255)
    return u


@triton.jit
def quantize_kernel(  # type: ignore[no-untyped-def]
    x, low, high, flags, scale, zero, given,
    rows, depth, groups, x_s, digits_s, flags_s,
    INPUTS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Digits, scales and zero points of x (rows, depth), contiguous along depth, ROWS rows a program.

    low, high: int8, rows digits_s apart; high and flags (rows, ceil(depth / 128)) int8 for OUTLIERS and WIDE alone.
    scale, zero: (rows, groups). given: scale and zero point for GIVEN. GROUP: 0 for whole rows; GROUP_BLOCK: the power
    of two that is at least it. The mean magnitude is the sum that decides integers: 64 sums in the order of k, then by
    halves, as the reference adds them. Source: see llmkern.int8.scheme.Int8Scheme.
    """
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mine = m[:, None] < rows
    row = x + (m * x_s)[:, None]
    to = (m * digits_s)[:, None]
    nothing = tl.zeros((ROWS,), tl.float32)
    if GROUP > 0:
        k = tl.arange(0, GROUP_BLOCK)[None, :]
        for g in range(groups):
            at = g * GROUP + k
            there = mine & (k < GROUP) & (at < depth)
            v = tl.load(row + at, mask=there, other=0.0).to(tl.float32)
            s, z = choose(tl.minimum(tl.min(v, 1), 0.0), tl.maximum(tl.max(v, 1), 0.0), nothing, INPUTS)
            s += tl.sum(v * 0.0, 1)
            u = integers(v, s, z, False)
            tl.store(low + to + at, (u - 128).to(tl.int8), mask=there)
            tl.store(scale + m * groups + g, s, mask=m < rows)
            tl.store(zero + m * groups + g, z, mask=m < rows)
    else:
        TWO: tl.constexpr = INPUTS >= OUTLIERS and INPUTS <= WIDE
        lane = tl.arange(0, 64)[None, :]
        sums = tl.zeros((ROWS, 64), tl.float32)
        least, most, broken = sums, sums, sums
        for first in range(0, depth, 64):
            v = tl.load(row + first + lane, mask=mine & (first + lane < depth), other=0.0).to(tl.float32)
            least, most = tl.minimum(least, v), tl.maximum(most, v)
            broken += v * 0.0
            sums += tl.abs(v)
        mean = nothing
        if INPUTS == OUTLIERS:
            mean = tl.div_rn(by_halves(sums, ROWS), nothing + tl.maximum(depth, 1))  # without any k it stays 0
        if INPUTS == GIVEN:
            s, z = tl.load(given) + nothing, tl.load(given + 1) + nothing
            z = tl.where(z == z, tl.minimum(tl.maximum(z, 0.0), 255.0), 0.0).to(tl.int32)
            s = tl.where(tl.abs(s) > 3.4028234663852886e38, float("nan"), s)
        else:
            s, z = choose(tl.min(least, 1), tl.max(most, 1), mean, INPUTS)
        s += tl.sum(broken, 1)
        tl.store(scale + m, s, mask=m < rows)
        tl.store(zero + m, z, mask=m < rows)
        k = tl.arange(0, FLAGGED)[None, :]
        for chunk in range(tl.cdiv(depth, FLAGGED)):
            at = chunk * FLAGGED + k
            there = mine & (at < depth)
            v = tl.load(row + at, mask=there, other=0.0).to(tl.float32)
            u = integers(v, s, z, TWO)
            tl.store(low + to + at, ((u & 255) - 128).to(tl.int8), mask=there)
            if TWO:
                digit = tl.where(there, u >> 8, 0)
                tl.store(high + to + at, digit.to(tl.int8), mask=there)
                tl.store(flags + m * flags_s + chunk, tl.max(tl.abs(digit), 1).to(tl.int8), mask=m < rows)


@triton.jit
def by_halves(x, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums of x (ROWS, 64) over its columns: the first half and the second, and so on."""
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, 32)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(a + b, (ROWS, 2, 16)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(a + b, (ROWS, 2, 8)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(a + b, (ROWS, 2, 4)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(a + b, (ROWS, 2, 2)), (0, 2, 1)))
    a, b = tl.split(tl.reshape(a + b, (ROWS, 2)))
    return a + b
