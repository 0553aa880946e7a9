"""New keys and values of a cache in Triton: rotated, quantised and written in one pass, and the queries rotated.

Rotary: Su et al. 2021, "RoFormer", section 3.4. Integers and scales of the same elements are those of
llmkern/attention/cache.py, bit for bit; rotated elements are too where the angles are float32, since the products are
rounded apart (the launcher forbids fused multiply-adds).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.int8.triton_kernels import round_to_even, usable


@triton.jit
def _turned(
    x, row, there, c, position, cos, sin, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """(rows, columns) in float32, rounded as x's elements are, whose first 2 * HALF are turned by the angles of a
    position. cos, sin: (address, step of a position, positions); a position outside is NaN."""
    y = tl.load(x + row + c, mask=there, other=0.0).to(tl.float32)
    if HALF > 0:
        if INTERLEAVED:
            other, pair, first = c ^ 1, c // 2, c % 2 == 0
        else:
            other, pair, first = tl.where(c < HALF, c + HALF, c - HALF), c % HALF, c < HALF
        turns = c < 2 * HALF
        partner = tl.load(x + row + other, mask=there & turns, other=0.0).to(tl.float32)
        each = c.to(tl.int64) * 0 + position
        known = turns & (each >= 0) & (each < cos[2])
        a = tl.load(cos[0] + position * cos[1] + pair, mask=known, other=float("nan")).to(tl.float32)
        b = tl.load(sin[0] + position * sin[1] + pair, mask=known, other=float("nan")).to(tl.float32)
        left, right = y * a, partner * b
        y = tl.where(turns, tl.where(first, left - right, left + right), y)
    return y.to(x.dtype.element_ty)


@triton.jit
def _put(x, to, to_h, scales, scales_h, head, c, there, exists, QUANTISED: tl.constexpr):
    """Writes rows (heads, columns) of x into a cache at `to`, of which the heads lie to_h apart."""
    where = to + head[:, None] * to_h + c
    if QUANTISED:
        x = x.to(tl.float32)
        # As integers, infinities and NaN are the largest.
        bits = tl.where(there, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        largest = tl.max(bits, 1).to(tl.float32, bitcast=True)
        scale = usable(tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)))
        y = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        y = tl.where(y == y, tl.minimum(tl.maximum(y, -127.0), 127.0), 0.0)
        tl.store(where, round_to_even(y).to(tl.int32).to(tl.int8), mask=there & exists[:, None])
        tl.store(scales + head * scales_h, scale, mask=exists)
    else:
        tl.store(where, x, mask=there & exists[:, None])


@triton.jit(
    do_not_specialize=[
        "heads", "kv_heads", "queries", "added", "capacity", "positions", "page_size", "pages", "table_b", "lengths_b",
    ]
)  # fmt: skip
def cache_append_kernel(
    query, key, value, rotated, k_cache, v_cache, k_scale, v_scale, lengths, table, cos, sin,
    heads, kv_heads, queries, added, capacity, positions, page_size, pages, programs,
    q_b, q_s, q_h, xk_b, xk_s, xk_h, xv_b, xv_s, xv_h, k_b, k_s, k_h, v_b, v_s, v_h, ks_b, ks_s, ks_h,
    vs_b, vs_s, vs_h, cos_s, sin_s, table_b, lengths_b,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ORDERED: tl.constexpr, PAGED: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Writes new keys (B, Sn, Hkv, D) and values (B, Sn, Hkv, DV) behind the first tokens of each sequence; with HALF,
    turns keys and the queries (B, Sq, H, D), which go to `rotated`, contiguous.

    Grid: `programs` of HEADS heads of a new token, then those of the queries. Strides count elements; last dimensions
    are contiguous. ORDERED: query i is turned to the place of the new token i, else all to that of the first. Tokens
    outside the cache or on pages outside the pool are not written.
    """
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)[None, :]
    c, s = (cos, tl.cast(cos_s, tl.int64), positions), (sin, tl.cast(sin_s, tl.int64), positions)
    if program < programs:
        blocks = tl.cdiv(kv_heads, HEADS)
        token = program // blocks
        b, step = (token // added).to(tl.int64), (token % added).to(tl.int64)
        head = (program % blocks * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        inside = head < kv_heads
        place = tl.load(lengths + b * lengths_b).to(tl.int64) + step
        exists = inside & (head * 0 + place >= 0) & (head * 0 + place < capacity)
        page, row = b, place
        if PAGED:
            number = tl.minimum(tl.maximum(place, 0), capacity - 1) // page_size
            row = place - number * page_size
            page = tl.load(table + b * table_b + number).to(tl.int64)
            exists = exists & (head * 0 + page >= 0) & (head * 0 + page < pages)
        there = inside[:, None] & (d < D)
        from_row = b * xk_b + step * xk_s + head[:, None] * xk_h
        x = _turned(key, from_row, there, d, place, c, s, HALF, INTERLEAVED)
        ks = k_scale + page * ks_b + row * ks_s
        _put(x, k_cache + page * k_b + row * k_s, k_h, ks, ks_h, head, d, there, exists, INT8)
        dv = tl.arange(0, BLOCK_DV)[None, :]
        there = inside[:, None] & (dv < DV)
        from_row = b * xv_b + step * xv_s + head[:, None] * xv_h
        x = tl.load(value + from_row + dv, mask=there, other=0.0)
        vs = v_scale + page * vs_b + row * vs_s
        _put(x, v_cache + page * v_b + row * v_s, v_h, vs, vs_h, head, dv, there, exists, INT8)
    else:
        program -= programs
        blocks = tl.cdiv(heads, HEADS)
        token = program // blocks
        b, step = (token // queries).to(tl.int64), (token % queries).to(tl.int64)
        head = (program % blocks * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        place = tl.load(lengths + b * lengths_b).to(tl.int64)
        if ORDERED:
            place += step
        there = (head < heads)[:, None] & (d < D)
        x = _turned(query, b * q_b + step * q_s + head[:, None] * q_h, there, d, place, c, s, HALF, INTERLEAVED)
        tl.store(rotated + ((b * queries + step) * heads + head[:, None]) * D + d, x, mask=there)
