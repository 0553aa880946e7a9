"""Triton kernels for the emulator's tests: softmax, matrix products through pointers and descriptors, attention."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax(x, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row of x (rows, width) for each program; BLOCK: a power of two, at least width."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=-float("inf")).to(tl.float32)
    weight = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * width + column, (weight / tl.sum(weight, 0)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """c (m, n) = a (m, k) @ b (k, n), a tile of BM x BN for each program."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for first in range(0, k, BK):
        at = first + depth
        x = tl.load(a + rows[:, None] * k + at[None, :], mask=(rows[:, None] < m) & (at[None, :] < k), other=0.0)
        y = tl.load(b + at[:, None] * n + columns[None, :], mask=(at[:, None] < k) & (columns[None, :] < n), other=0.0)
        sums = tl.dot(x, y, sums)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c + rows[:, None] * n + columns[None, :], sums.to(c.dtype.element_ty), mask=inside)


@triton.jit
def product_by_descriptors(  # type: ignore[no-untyped-def]
    a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """The same through tensor descriptors made on the device, which become copies of tensor maps."""
    da = tl.make_tensor_descriptor(a, shape=[m, k], strides=[k, 1], block_shape=[BM, BK])
    db = tl.make_tensor_descriptor(b, shape=[k, n], strides=[n, 1], block_shape=[BK, BN])
    dc = tl.make_tensor_descriptor(c, shape=[m, n], strides=[n, 1], block_shape=[BM, BN])
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for first in range(0, k, BK):
        sums = tl.dot(da.load([row, first]), db.load([first, column]), sums)
    dc.store([row, column], sums.to(c.dtype.element_ty))


@triton.jit
def attention(  # type: ignore[no-untyped-def]
    q, k, v, out, length, scale, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr
):
    """softmax(q k^T scale) v for (heads, length, WIDTH) each. Grid: (blocks of BM queries, heads).

    scale includes log2(e). The running maximum and sum: Milakov and Gimelshein 2018; Dao et al. 2022.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, WIDTH)
    base = tl.program_id(1) * length * WIDTH
    query = tl.load(q + base + rows[:, None] * WIDTH + column[None, :], mask=rows[:, None] < length, other=0.0)
    most = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, WIDTH), tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, tl.program_id(0) * BM + BM)
    for first in range(0, end, BN):
        keys = first + tl.arange(0, BN)
        key = tl.load(k + base + keys[None, :] * WIDTH + column[:, None], mask=keys[None, :] < length, other=0.0)
        score = tl.dot(query, key) * scale
        seen = keys[None, :] < length
        if CAUSAL:
            seen = seen & (keys[None, :] <= rows[:, None])
        score = tl.where(seen, score, -float("inf"))
        new_most = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(v + base + keys[:, None] * WIDTH + column[None, :], mask=keys[:, None] < length, other=0.0)
        sums = tl.dot(weight.to(value.dtype), value, sums * shrink[:, None])
        most = new_most
    sums = sums / total[:, None]
    tl.store(
        out + base + rows[:, None] * WIDTH + column[None, :],
        sums.to(out.dtype.element_ty),
        mask=rows[:, None] < length,
    )
