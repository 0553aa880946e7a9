"""Triton kernels of int8_linear for few rows: programs share out k, and a second pass adds what they found.

The sums are of integers, so that they are the same however k is split, and the results those of linear_kernel and of
the reference bit for bit. Source of the split: Osama et al. 2023, "Stream-K", section 2 (fixed split), here with a
workspace and a second kernel in place of atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmkern.int8.triton_kernels import activate, digit_sums, scaled, store_results


@triton.jit
def split_kernel(  # type: ignore[no-untyped-def]
    low, high, flags, weight, partial,
    rows, outputs, depth, each, digits_s, flags_s, weight_s,
    TWO: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partial (splits, 1 or 2 digits, rows, outputs) int32: sums of digits times weight over `each` values of k.

    Program (i, j): COLUMNS outputs from i COLUMNS on, k from j each on; each: a multiple of DEPTH. ROWS: at least rows.
    """
    n0 = tl.program_id(0) * COLUMNS
    m, n = tl.arange(0, ROWS), n0 + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    start = split * each
    sums, upper = digit_sums(
        low, high, flags, weight, 0, n0, rows, outputs, start, tl.minimum(start + each, depth),
        digits_s, flags_s, weight_s, TWO, EVEN, False, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    there = (m < rows)[:, None] & (n < outputs)[None, :]
    at = (m * outputs)[:, None] + n[None, :]
    plane = rows * outputs
    if TWO:
        to = partial + split.to(tl.int64) * 2 * plane
        tl.store(to + plane + at, upper, mask=there)
    else:
        to = partial + split.to(tl.int64) * plane
    tl.store(to + at, sums, mask=there)


@triton.jit
def added(  # type: ignore[no-untyped-def]
    partial, scale, zero, weight_scale, weight_sum, bias, m, n, rows, outputs, splits, scale_n,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) float32: the partial sums of rows m and outputs n added, scaled, plus bias."""
    there = (m < rows)[:, None] & (n < outputs)[None, :]
    at = (m * outputs)[:, None] + n[None, :]
    plane = rows * outputs
    sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    upper = tl.zeros((ROWS, COLUMNS), tl.int32)
    of = partial
    for _ in range(splits):
        sums += tl.load(of + at, mask=there, other=0)
        of += plane
        if TWO:
            upper += tl.load(of + at, mask=there, other=0)
            of += plane
    y = scaled(sums, upper, scale, zero, weight_scale, weight_sum, m, n, rows, outputs, scale_n, TWO)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def gather_kernel(  # type: ignore[no-untyped-def]
    partial, scale, zero, weight_scale, weight_sum, bias, residual, out,
    rows, outputs, splits, scale_n, residual_s, out_s,
    TWO: tl.constexpr, ACTIVATION: tl.constexpr, PAIRS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """activation(what split_kernel wrote, added, scaled, + bias) + residual, COLUMNS results of ROWS rows a program.

    As linear_kernel, also in that it is to be compiled without fusing products and sums.
    """
    results = outputs // 2 if PAIRS else outputs
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    y = added(
        partial, scale, zero, weight_scale, weight_sum, bias, m, n, rows, outputs, splits,
        scale_n, TWO, HAS_BIAS, ROWS, COLUMNS,
    )  # fmt: skip
    y = activate(y, ACTIVATION)
    if PAIRS:
        y *= added(
            partial, scale, zero, weight_scale, weight_sum, bias, m, n + results, rows, outputs, splits, scale_n,
            TWO, HAS_BIAS, ROWS, COLUMNS,
        )  # fmt: skip
    store_results(y, residual, out, m, n, rows, results, residual_s, out_s, HAS_RESIDUAL)
