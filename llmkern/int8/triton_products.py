"""Triton kernels of int8_linear: products of digits with the weight, and what follows.

The digits are those of triton_kernels.py: an integer is u = 256 high + low + 128. So the sum over k of (u - zero) w is
256 sum(high w) + sum(low w) + (128 - zero) sum(w).
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmkern.int8.triton_kernels import FLAGGED


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
    part = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(first_group * GROUP, last_group * GROUP, DEPTH):
        if DESCRIBED:
            a, b = low.load([m0, first]), weight.load([n0, first]).T
        else:
            a = tl.load(low + first + from_row, mask=mine & (first + k < depth)[None, :], other=0)
            b = tl.load(weight + first + from_weight, mask=there & (first + k < depth)[:, None], other=0)
        part = tl.dot(a, b, part, out_dtype=tl.int32)
        if (first + DEPTH) % GROUP == 0:
            g = first // GROUP
            shift = 128 - tl.load(zero + m * groups + g, mask=m < rows, other=128)
            total = tl.load(weight_sum + n * groups + g, mask=n < outputs, other=0)
            s = tl.load(scale + m * groups + g, mask=m < rows, other=0.0)
            w = tl.load(weight_scale + n * scale_n + g * scale_g, mask=n < outputs, other=0.0)
            y += (part + shift[:, None] * total[None, :]).to(tl.float32) * (s[:, None] * w[None, :])
            part = tl.zeros((ROWS, COLUMNS), tl.int32)
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
