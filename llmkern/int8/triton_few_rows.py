"""Triton kernels of int8_linear for few rows: programs share out k, and a second pass adds what they found.

Without groups the sums are of integers, so that they are the same however k is split, and the results those of
linear_kernel and of the reference bit for bit. With groups each program adds the float32 of its own in the order of k,
and the second pass those of the programs in that order: other roundings than in one sum, the same in every run.
Source of the split: Osama et al. 2023, "Stream-K", section 2 (fixed split), here with a workspace and a second kernel
in place of atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmkern.int8.triton_products import activate, digit_sums, group_sums, scaled, store_results


@triton.jit
def split_kernel(  # type: ignore[no-untyped-def]
    low, high, flags, weight, partial,
    rows, outputs, depth, each, digits_s, flags_s, weight_s,
    TWO: tl.constexpr, EVEN: tl.constexpr, DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partial (splits, 1 or 2 digits, rows, outputs) int32: sums of digits times weight over `each` values of k.

    Program (i, j): COLUMNS outputs from i COLUMNS on, k from j each on; each: a multiple of DEPTH. ROWS: at least rows.
    DESCRIBED: as linear_kernel.
    """
    n0 = tl.program_id(0) * COLUMNS
    m, n = tl.arange(0, ROWS), n0 + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    start = split * each
    sums, upper = digit_sums(
        low, high, flags, weight, 0, n0, rows, outputs, start, tl.minimum(start + each, depth),
        digits_s, flags_s, weight_s, TWO, EVEN, DESCRIBED, ROWS, COLUMNS, DEPTH,
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
def split_groups_kernel(  # type: ignore[no-untyped-def]
    low, scale, zero, weight, weight_scale, weight_sum, partial,
    rows, outputs, depth, each, groups, digits_s, weight_s, scale_n, scale_g,
    GROUP: tl.constexpr, DESCRIBED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partial (splits, rows, outputs) float32: what `each` groups add. Programs as split_kernel's; compiled as
    linear_kernel, without fusing products and sums."""
    n0 = tl.program_id(0) * COLUMNS
    m, n = tl.arange(0, ROWS), n0 + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    start = split * each
    y = group_sums(
        low, scale, zero, weight, weight_scale, weight_sum, 0, n0, rows, outputs, depth,
        start, tl.minimum(start + each, groups), groups, digits_s, weight_s, scale_n, scale_g,
        GROUP, DESCRIBED, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    to = partial + split.to(tl.int64) * (rows * outputs) + (m * outputs)[:, None] + n[None, :]
    tl.store(to, y, mask=(m < rows)[:, None] & (n < outputs)[None, :])


@triton.jit
def added(  # type: ignore[no-untyped-def]
    partial, scale, zero, weight_scale, weight_sum, bias, m, n, rows, outputs, splits, scale_n,
    TWO: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) float32: the partial sums of rows m and outputs n added, scaled where they are not yet, plus
    bias."""
    there = (m < rows)[:, None] & (n < outputs)[None, :]
    at = (m * outputs)[:, None] + n[None, :]
    plane = rows * outputs
    of = partial
    if GROUPS:
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
        for _ in range(splits):
            y += tl.load(of + at, mask=there, other=0.0)
            of += plane
    else:
        sums = tl.zeros((ROWS, COLUMNS), tl.int32)
        upper = tl.zeros((ROWS, COLUMNS), tl.int32)
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
    TWO: tl.constexpr, GROUPS: tl.constexpr, ACTIVATION: tl.constexpr, PAIRS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """activation(what split_kernel wrote, added, scaled, + bias) + residual, COLUMNS results of ROWS rows a program.

    GROUPS: it was split_groups_kernel, whose sums are scaled. As linear_kernel, also in that it is to be compiled
    without fusing products and sums.
    """
    results = outputs // 2 if PAIRS else outputs
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    y = added(
        partial, scale, zero, weight_scale, weight_sum, bias, m, n, rows, outputs, splits,
        scale_n, TWO, GROUPS, HAS_BIAS, ROWS, COLUMNS,
    )  # fmt: skip
    y = activate(y, ACTIVATION)
    if PAIRS:
        y *= added(
            partial, scale, zero, weight_scale, weight_sum, bias, m, n + results, rows, outputs, splits, scale_n,
            TWO, GROUPS, HAS_BIAS, ROWS, COLUMNS,
        )  # fmt: skip
    store_results(y, residual, out, m, n, rows, results, residual_s, out_s, HAS_RESIDUAL)
