"""LayerNorm and RMSNorm in Triton, forward and backward: a program takes whole rows, which stay in registers.

Sums are float32. The gradients of weight and bias are sums over all rows: a program of the backward adds those of its
rows in registers and writes them once, to a place of its own, so that the result is the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def factors_of(weight, d, there, offset, HAS_WEIGHT: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """offset + weight of each column, (1, COLUMNS), or 1 without weights."""
    if HAS_WEIGHT:
        return tl.load(weight + d, mask=there, other=0.0).to(tl.float32) + offset
    return tl.full((1, COLUMNS), 1.0, tl.float32)


@triton.jit
def norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, out, total, statistics,
    rows, width, x_s, residual_s, eps, offset,
    CENTRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = normalised (x + residual) * (offset + weight) + bias of ROWS rows; csrc/norm/params.h has the formulas.

    Grid: (blocks of rows,). COLUMNS: a power of two that is at least the width. The variance is that of the
    differences to the mean, not a difference of two large sums.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)[None, :]
    inside = d < width
    there = (row[:, None] < rows) & inside
    value = tl.load(x + (row * x_s)[:, None] + d, mask=there, other=0.0)
    place = (row * width)[:, None] + d
    if HAS_RESIDUAL:
        added = tl.load(residual + (row * residual_s)[:, None] + d, mask=there, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + place, value, mask=there)
    y = value.to(tl.float32)
    if CENTRED:
        mean = tl.sum(y, 1) / width
        y = tl.where(inside, y - mean[:, None], 0.0)
    else:
        mean = tl.zeros((ROWS,), tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(y * y, 1) / width + eps)
    tl.store(statistics + 2 * row, mean, mask=row < rows)
    tl.store(statistics + 2 * row + 1, scale, mask=row < rows)
    y = y * scale[:, None] * factors_of(weight, d, inside, offset, HAS_WEIGHT, COLUMNS)
    if HAS_BIAS:
        y += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad, grad_total, total, weight, statistics, dx, weight_sums, bias_sums,
    rows, width, block, grad_s, grad_total_s, total_s, offset,
    CENTRED: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of `block` rows, ROWS at a time, and their sums for the gradients of weight and bias.

    Grid: (blocks of rows,); weight_sums, bias_sums (blocks, width) float32. statistics (rows, 2) as norm_kernel writes
    them. COLUMNS: a power of two that is at least the width.
    """
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)[None, :]
    inside = d < width
    factor = factors_of(weight, d, inside, offset, HAS_WEIGHT, COLUMNS)
    of_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((program + 1) * block, rows)
    for start in range(0, block, ROWS):
        row = program * block + start + tl.arange(0, ROWS)
        there = (row[:, None] < end) & inside
        given = tl.load(grad + (row * grad_s)[:, None] + d, mask=there, other=0.0).to(tl.float32)
        y = tl.load(total + (row * total_s)[:, None] + d, mask=there, other=0.0).to(tl.float32)
        mean = tl.load(statistics + 2 * row, mask=row < end, other=0.0)[:, None]
        scale = tl.load(statistics + 2 * row + 1, mask=row < end, other=0.0)[:, None]
        y = tl.where(there, (y - mean) * scale, 0.0)
        if HAS_WEIGHT:
            of_weight += given * y
        if HAS_BIAS:
            of_bias += given
        g = given * factor
        result = g - y * (tl.sum(g * y, 1) / width)[:, None]
        if CENTRED:
            result -= (tl.sum(g, 1) / width)[:, None]
        result *= scale
        if HAS_TOTAL:
            result += tl.load(grad_total + (row * grad_total_s)[:, None] + d, mask=there, other=0.0).to(tl.float32)
        tl.store(dx + (row * width)[:, None] + d, result.to(dx.dtype.element_ty), mask=there)
    at = program * width + tl.arange(0, COLUMNS)
    if HAS_WEIGHT:
        tl.store(weight_sums + at, tl.sum(of_weight, 0), mask=tl.arange(0, COLUMNS) < width)
    if HAS_BIAS:
        tl.store(bias_sums + at, tl.sum(of_bias, 0), mask=tl.arange(0, COLUMNS) < width)
