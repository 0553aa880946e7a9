"""Triton kernels of this family. Only this file of the family imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotary_kernel(  # type: ignore[no-untyped-def]
    q, k, q_out, k_out, cos, sin, position_ids,
    q_heads, kv_heads, width, table_length,
    q_b, q_h, q_s, k_b, k_h, k_s,
    q_out_b, q_out_h, q_out_s, k_out_b, k_out_h, k_out_s,
    cos_s, sin_s, ids_b, ids_s,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HAS_IDS: tl.constexpr, INPLACE: tl.constexpr,
    HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotates the first 2 * HALF elements of HEADS rows of one position, of q or of k, and copies the rest.

    Grid: (S, B, blocks of q's heads, then blocks of k's). The last dimension of every tensor is contiguous; strides
    count elements. HALF_BLOCK and REST_BLOCK: powers of two, at least HALF and the width that is not rotated (0: none).
    A position outside the table gives NaN. Computes in float32.
    """
    s = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    q_blocks = tl.cdiv(q_heads, HEADS)
    if block < q_blocks:
        x, y, heads = q + b * q_b + s * q_s, q_out + b * q_out_b + s * q_out_s, q_heads
        x_h, y_h = tl.cast(q_h, tl.int64), tl.cast(q_out_h, tl.int64)
    else:
        x, y, heads = k + b * k_b + s * k_s, k_out + b * k_out_b + s * k_out_s, kv_heads
        x_h, y_h = tl.cast(k_h, tl.int64), tl.cast(k_out_h, tl.int64)
        block -= q_blocks

    position = s
    if HAS_IDS:
        position = tl.load(position_ids + b * ids_b + s * ids_s).to(tl.int64)
    pair = tl.arange(0, HALF_BLOCK)
    inside = pair < HALF
    each = tl.full((HALF_BLOCK,), 0, tl.int64) + position  # the interpreter takes no mask made with a scalar
    known = inside & (each >= 0) & (each < table_length)
    c = tl.load(cos + position * cos_s + pair, mask=known, other=float("nan")).to(tl.float32)
    d = tl.load(sin + position * sin_s + pair, mask=known, other=float("nan")).to(tl.float32)
    if INVERSE:
        d = -d

    head = block * HEADS + tl.arange(0, HEADS)
    x_row, y_row = x + head[:, None] * x_h, y + head[:, None] * y_h
    there = head[:, None] < heads
    if INTERLEAVED:
        # As one contiguous run, so that the accesses are wide; the pairs part in registers.
        both = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        mask = there & (both < 2 * HALF)
        pairs = tl.load(x_row + both, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, (HEADS, HALF_BLOCK, 2)))
        out = tl.join(first * c[None, :] - second * d[None, :], second * c[None, :] + first * d[None, :])
        tl.store(y_row + both, tl.reshape(out, (HEADS, 2 * HALF_BLOCK)).to(y.dtype.element_ty), mask=mask)
    else:
        mask = there & inside[None, :]
        first = tl.load(x_row + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_row + (HALF + pair)[None, :], mask=mask, other=0.0).to(tl.float32)
        upper = first * c[None, :] - second * d[None, :]
        lower = second * c[None, :] + first * d[None, :]
        tl.store(y_row + pair[None, :], upper.to(y.dtype.element_ty), mask=mask)
        tl.store(y_row + (HALF + pair)[None, :], lower.to(y.dtype.element_ty), mask=mask)
    if REST_BLOCK > 0 and not INPLACE:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        mask = there & (rest < width)
        tl.store(y_row + rest, tl.load(x_row + rest, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["seed", "drop_below"])  # a seed must not compile the kernel anew
def sinusoidal_add_kernel(  # type: ignore[no-untyped-def]
    x, pe, out,
    rows, batch, width, x_s, x_b, pe_s, out_s, out_b,
    scale, seed, drop_below, keep_scale,
    HAS_PE: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = dropout(x * scale + pe) of ROWS rows by COLUMNS elements; row s * batch + b is that of x[s, b].

    Grid: (blocks of rows, blocks of columns). The last dimension of every tensor is contiguous; strides count elements.
    Without HAS_PE pe is not read and stands for zeros. COLUMNS: a power of two of at least 4. Element d of a row is
    kept where word d % 4 of Philox4x32-10 at (d // 4, low and high half of the row's number, 0) is at least drop_below
    (Salmon et al. 2011; llmkern/random.py). Computes in float32.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    d = (first + tl.arange(0, COLUMNS))[None, :]
    there = (row[:, None] < rows) & (d < width)
    s = row // batch
    b = row - s * batch
    y = tl.load(x + (s * x_s + b * x_b)[:, None] + d, mask=there, other=0.0).to(tl.float32) * scale
    if HAS_PE:
        y += tl.load(pe + (s * pe_s)[:, None] + d, mask=there, other=0.0)
    if DROPOUT:
        four = (first // 4 + tl.arange(0, COLUMNS // 4))[None, :] + tl.zeros((ROWS, 1), tl.int32)
        zero = tl.zeros((ROWS, COLUMNS // 4), tl.int32)
        low, high = row[:, None].to(tl.int32) + zero, (row >> 32)[:, None].to(tl.int32) + zero
        w0, w1, w2, w3 = tl.philox(tl.cast(seed, tl.int64), four, low, high, zero)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS)).to(tl.uint32, bitcast=True)
        y = tl.where(words >= tl.cast(drop_below, tl.uint32), y * keep_scale, 0.0 * y)
    tl.store(out + (s * out_s + b * out_b)[:, None] + d, y.to(out.dtype.element_ty), mask=there)
