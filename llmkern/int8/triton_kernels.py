"""Triton kernels of int8_linear: rows to integers, and their products with the weight. Only the family's triton_*
files of kernels import triton.

The integers are those of llmkern.int8.reference, bit for bit: each float32 operation rounds as its does, divisions too.
A row's integer is u = 256 * high + low with low 0..255; what is stored of low is low - 128, which has a sign as the
weights have, so that one matrix instruction serves all GPUs. So the sum over k of (u - zero) w is
256 sum(high w) + sum((low - 128) w) + (128 - zero) sum(w).
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


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "relu":
        return tl.where(y < 0.0, 0.0, y)
    if ACTIVATION == "gelu" or ACTIVATION == "geglu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        z = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        e = tl.exp(-2.0 * tl.abs(z))  # tanh |z| = (1 - e) / (1 + e), which does not overflow
        t = (1.0 - e) / (1.0 + e)
        return 0.5 * y * (1.0 + tl.where(z < 0.0, -t, t))
    if ACTIVATION == "silu" or ACTIVATION == "swiglu":
        return y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def digit_sums(  # type: ignore[no-untyped-def]
    low, high, flags, weight, m0, n0, rows, outputs, start, end, digits_s, flags_s, weight_s,
    TWO: tl.constexpr, EVEN: tl.constexpr, DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Two (ROWS, COLUMNS) int32: the sums over k from start, a multiple of DEPTH, to end of low digits and of high, of
    rows from m0 and outputs from n0 on.

    DESCRIBED: low, high and weight are tensor descriptors, and end is a multiple of DEPTH or the end of k: what is not
    there comes as zeros. Else they are pointers; EVEN: end is a multiple of DEPTH; rows and outputs that are not there
    read the last one that is, which leaves the loop without masks. Their sums are not stored.
    """
    k = tl.arange(0, DEPTH)
    m = tl.minimum(m0 + tl.arange(0, ROWS), rows - 1)
    if not DESCRIBED:
        n = tl.minimum(n0 + tl.arange(0, COLUMNS), outputs - 1)
        from_row = (m.to(tl.int64) * digits_s)[:, None] + k[None, :]
        from_weight = (n.to(tl.int64) * weight_s)[None, :] + k[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    upper = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(start, end, DEPTH):
        if DESCRIBED:
            a, b = low.load([m0, first]), weight.load([n0, first]).T
        elif EVEN:
            a, b = tl.load(low + first + from_row), tl.load(weight + first + from_weight)
        else:
            kept = first + k < end
            a = tl.load(low + first + from_row, mask=kept[None, :], other=0)
            b = tl.load(weight + first + from_weight, mask=kept[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        if TWO:
            any_high = tl.load(flags + m * flags_s + first // FLAGGED)
            if tl.max(any_high.to(tl.int32), 0) > 0:
                if DESCRIBED:
                    c = high.load([m0, first])
                elif EVEN:
                    c = tl.load(high + first + from_row)
                else:
                    c = tl.load(high + first + from_row, mask=(first + k < end)[None, :], other=0)
                upper = tl.dot(c, b, upper, out_dtype=tl.int32)
    return sums, upper


@triton.jit
def scaled(sums, upper, scale, zero, weight_scale, weight_sum, m, n, rows, outputs, scale_n, TWO: tl.constexpr):  # type: ignore[no-untyped-def]
    """(ROWS, COLUMNS) float32 from the sums of whole rows: zero points taken off, and scaled."""
    shift = 128 - tl.load(zero + m, mask=m < rows, other=128)
    total = tl.load(weight_sum + n, mask=n < outputs, other=0)
    y = (sums + shift[:, None] * total[None, :]).to(tl.float32)
    if TWO:
        y = 256.0 * upper.to(tl.float32) + y
    s = tl.load(scale + m, mask=m < rows, other=0.0)
    w = tl.load(weight_scale + n * scale_n, mask=n < outputs, other=0.0)
    return y * (s[:, None] * w[None, :])


@triton.jit
def store_results(  # type: ignore[no-untyped-def]
    y, residual, out, m, n, rows, results, residual_s, out_s, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """Writes a tile of results, plus residual, in out's dtype."""
    there = (m < rows)[:, None] & (n < results)[None, :]
    if HAS_RESIDUAL:
        from_row = (m.to(tl.int64) * residual_s)[:, None] + n[None, :]
        y += tl.load(residual + from_row, mask=there, other=0.0).to(tl.float32)
    tl.store(out + (m.to(tl.int64) * out_s)[:, None] + n[None, :], y.to(out.dtype.element_ty), mask=there)


@triton.jit
def group_sums(  # type: ignore[no-untyped-def]
    low, scale, zero, weight, weight_scale, weight_sum, m0, n0, rows, outputs, depth, first_group, last_group, groups,
    digits_s, weight_s, scale_n, scale_g,
    GROUP: tl.constexpr, DESCRIBED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) float32: what groups from first_group up to last_group of `groups` add, in the order of k.

    DEPTH divides GROUP. As digit_sums, but for the masks.
    """
    m, n, k = m0 + tl.arange(0, ROWS), n0 + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    mine, there = (m < rows)[:, None], (n < outputs)[None, :]
    if not DESCRIBED:
        from_row = (m.to(tl.int64) * digits_s)[:, None] + k[None, :]
        from_weight = (n.to(tl.int64) * weight_s)[None, :] + k[:, None]
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for g in range(first_group, last_group):
        part = tl.zeros((ROWS, COLUMNS), tl.int32)
        for first in range(g * GROUP, g * GROUP + GROUP, DEPTH):
            if DESCRIBED:
                a, b = low.load([m0, first]), weight.load([n0, first]).T
            else:
                a = tl.load(low + first + from_row, mask=mine & (first + k < depth)[None, :], other=0)
                b = tl.load(weight + first + from_weight, mask=there & (first + k < depth)[:, None], other=0)
            part = tl.dot(a, b, part, out_dtype=tl.int32)
        shift = 128 - tl.load(zero + m * groups + g, mask=m < rows, other=128)
        total = tl.load(weight_sum + n * groups + g, mask=n < outputs, other=0)
        s = tl.load(scale + m * groups + g, mask=m < rows, other=0.0)
        w = tl.load(weight_scale + n * scale_n + g * scale_g, mask=n < outputs, other=0.0)
        y += (part + shift[:, None] * total[None, :]).to(tl.float32) * (s[:, None] * w[None, :])
    return y


@triton.jit
def scaled_sums(  # type: ignore[no-untyped-def]
    low, high, flags, scale, zero, weight, weight_scale, weight_sum, bias,
    m0, n0, rows, outputs, depth, groups, digits_s, flags_s, weight_s, scale_n, scale_g,
    TWO: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, DESCRIBED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) float32: rows from m0 of the digits times outputs from n0 of the weight, scaled, plus bias."""
    n = n0 + tl.arange(0, COLUMNS)
    if GROUP > 0:
        y = group_sums(
            low, scale, zero, weight, weight_scale, weight_sum, m0, n0, rows, outputs, depth, 0, groups, groups,
            digits_s, weight_s, scale_n, scale_g, GROUP, DESCRIBED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    else:
        sums, upper = digit_sums(
            low, high, flags, weight, m0, n0, rows, outputs, 0, depth, digits_s, flags_s, weight_s,
            TWO, EVEN, DESCRIBED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        m = m0 + tl.arange(0, ROWS)
        y = scaled(sums, upper, scale, zero, weight_scale, weight_sum, m, n, rows, outputs, scale_n, TWO)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def halves(x):  # type: ignore[no-untyped-def]
    """The first half of the columns of x, and the second."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    sums, upper, scale, zero, weight_scale, weight_sum, bias, residual, out,
    m, n0, rows, outputs, scale_n, residual_s, out_s,
    TWO: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Makes results of a tile's sums and writes them, AT_ONCE columns after the others, which saves registers."""
    if COLUMNS > AT_ONCE:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = halves(sums)
        left_upper, right_upper = halves(upper)
        finish(
            left, left_upper, scale, zero, weight_scale, weight_sum, bias, residual, out,
            m, n0, rows, outputs, scale_n, residual_s, out_s,
            TWO, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, HALF, AT_ONCE,
        )  # fmt: skip
        finish(
            right, right_upper, scale, zero, weight_scale, weight_sum, bias, residual, out,
            m, n0 + HALF, rows, outputs, scale_n, residual_s, out_s,
            TWO, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, HALF, AT_ONCE,
        )  # fmt: skip
    else:
        n = n0 + tl.arange(0, COLUMNS)
        y = scaled(sums, upper, scale, zero, weight_scale, weight_sum, m, n, rows, outputs, scale_n, TWO)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        store_results(activate(y, ACTIVATION), residual, out, m, n, rows, outputs, residual_s, out_s, HAS_RESIDUAL)


@triton.jit
def linear_kernel(  # type: ignore[no-untyped-def]
    low, high, flags, scale, zero, weight, weight_scale, weight_sum, bias, residual, out,
    rows, outputs, depth, groups, digits_s, flags_s, weight_s, scale_n, scale_g, residual_s, out_s,
    TWO: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, DESCRIBED: tl.constexpr,
    ACTIVATION: tl.constexpr, PAIRS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ABREAST: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """activation(digits @ weight^T, scaled, + bias) + residual, a tile of ROWS x COLUMNS results a program.

    What quantize_kernel has written; weight (outputs, depth) int8, contiguous along depth; weight_sum (outputs, groups)
    int32; out and residual contiguous along outputs, of pairs half as many. DESCRIBED: low, high and weight come as
    tensor descriptors with boxes of ROWS and COLUMNS by DEPTH. ABREAST tiles of rows go before the next tiles of
    columns, so that the weights that they share stay in the second-level cache. Is to be compiled without fusing
    products and sums, which the reference rounds apart.
    """
    results = outputs // 2 if PAIRS else outputs
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(results, COLUMNS)
    program = tl.program_id(0)
    wide = ABREAST * across
    top = program // wide * ABREAST
    tall = tl.minimum(down - top, ABREAST)
    m0 = (top + program % wide % tall) * ROWS
    n0 = (program % wide // tall) * COLUMNS
    m, n = m0 + tl.arange(0, ROWS), n0 + tl.arange(0, COLUMNS)
    if GROUP == 0 and not PAIRS:
        sums, upper = digit_sums(
            low, high, flags, weight, m0, n0, rows, outputs, 0, depth, digits_s, flags_s, weight_s,
            TWO, EVEN, DESCRIBED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        finish(
            sums, upper, scale, zero, weight_scale, weight_sum, bias, residual, out, m, n0, rows, outputs,
            scale_n, residual_s, out_s, TWO, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, COLUMNS, AT_ONCE,
        )  # fmt: skip
    else:
        y = scaled_sums(
            low, high, flags, scale, zero, weight, weight_scale, weight_sum, bias,
            m0, n0, rows, results, depth, groups, digits_s, flags_s, weight_s, scale_n, scale_g,
            TWO, GROUP, EVEN, DESCRIBED, HAS_BIAS, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        y = activate(y, ACTIVATION)
        if PAIRS:
            y *= scaled_sums(
                low, high, flags, scale, zero, weight, weight_scale, weight_sum, bias,
                m0, n0 + results, rows, outputs, depth, groups, digits_s, flags_s, weight_s, scale_n, scale_g,
                TWO, GROUP, EVEN, DESCRIBED, HAS_BIAS, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
        store_results(y, residual, out, m, n, rows, results, residual_s, out_s, HAS_RESIDUAL)
