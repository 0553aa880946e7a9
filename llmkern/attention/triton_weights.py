"""The weights of attention in Triton, and their sums over the queries, made again from the log-sum-exp (Dao et al.
2022, "FlashAttention", section 3.1)."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_rules import PLAIN, bend, exponents, key_tiles, load_rows, query_tiles, sequence, slope_of


@triton.jit
def _weights(
    s, high, low, row, col, corner, limits, numbers, dense, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BEND: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """From the products of queries and keys; high, low: of `exponents`, as they broadcast against them."""
    s, _ = bend(
        s, row, col, corner, limits, numbers, dense, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, BEND, True, PRECISE
    )  # fmt: skip
    exponent = s * numbers[1] - high
    if PRECISE:
        exponent = exponent - low
    return tl.where(s != float("-inf"), tl.exp2(exponent), 0.0)


@triton.jit(do_not_specialize=PLAIN)
def attention_weights_kernel(
    query, key, logsumexp, weights, mask, key_lengths, slopes, sink, seed,
    heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, w_s, m_b, m_h, m_q, m_k, lengths_b, slopes_b, slopes_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    LENGTHS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr,
    DROPOUT: tl.constexpr, UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """weights (B, H, Sq, Sk), contiguous. w_s = Sk, as `keys`, but for its multiples of 16 the kernel is compiled anew:
    rows are then stored 16 bytes at a time.

    Grid: (B * H * blocks of BLOCK_M queries * pieces of TILES tiles,). Every weight is written; tiles of keys that no
    query of the block sees are not read.
    """
    program = tl.program_id(0)
    pieces, blocks = tl.cdiv(keys, TILES * BLOCK_N), tl.cdiv(queries, BLOCK_M)
    piece, block, bh = program % pieces, program // pieces % blocks, program // pieces // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    all_keys = keys
    keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
    slope = slope_of(slopes, b, h, slopes_b, slopes_h, ALIBI)
    limits = (queries, keys, diagonal, left, right)
    numbers = (scale, unit, softcap, slope)
    dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64), True)
    start, of_key = block * BLOCK_M, key + b * k_b + h // group * k_h
    row = start + tl.arange(0, BLOCK_M)
    sums = tl.load(logsumexp + bh.to(tl.int64) * queries + row, mask=row < queries, other=0.0)
    high, low = exponents(sums)
    # What a query that sees no key gives to all of them.
    alike = tl.zeros((BLOCK_M,), tl.float32)
    if UNIFORM:
        alike = tl.where(sums == float("-inf"), 1.0 / all_keys.to(tl.float32), 0.0)
    q = load_rows(query + b * q_b + h * q_h, q_s, start, queries, D, BLOCK_D, BLOCK_M, True)
    to = weights + (bh.to(tl.int64) * queries + row[:, None]) * w_s
    tiles = key_tiles(start, tl.minimum(start + BLOCK_M, queries) - 1, limits, LEFT, RIGHT, BLOCK_N)
    # Counted in tiles: of the product with BLOCK_N Triton knows what it divides by, and stores 16 bytes at a time.
    at = piece * TILES
    past = tl.minimum(at + TILES, tl.cdiv(all_keys, BLOCK_N))
    begin = tl.minimum(tl.maximum(tiles[0] // BLOCK_N, at), past)
    end = tl.minimum(tl.maximum(tl.cdiv(tiles[3], BLOCK_N), begin), past)
    hidden = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + alike[:, None]
    for tile in range(at, begin):
        col = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(to + col, hidden.to(weights.dtype.element_ty), mask=(row[:, None] < queries) & (col < w_s))
    for tile in range(begin, end):
        first = tile * BLOCK_N
        col = first + tl.arange(0, BLOCK_N)[None, :]
        k = load_rows(of_key, k_s, first, keys, D, BLOCK_D, BLOCK_N, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = _weights(
            s, high[:, None], low[:, None], row[:, None], col, (start, first), limits, numbers, dense, LEFT, RIGHT,
            MASK, SOFTCAP, ALIBI, BEND, q.dtype == tl.float32,
        )  # fmt: skip
        if UNIFORM:
            p = tl.where(sums[:, None] == float("-inf"), alike[:, None], p)
        tl.store(to + col, p.to(weights.dtype.element_ty), mask=(row[:, None] < queries) & (col < w_s))
    for tile in range(end, past):
        col = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(to + col, hidden.to(weights.dtype.element_ty), mask=(row[:, None] < queries) & (col < w_s))


@triton.jit(do_not_specialize=PLAIN)
def attention_column_sums_kernel(
    query, key, logsumexp, sums, mask, key_lengths, slopes, sink, seed,
    heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, m_b, m_h, m_q, m_k, lengths_b, slopes_b, slopes_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
    UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums (B, H, Sk): of each key the weights of all queries, those of a tile in float32, over the tiles in float64,
    since a key may be seen by very many. Grid: (B * H * blocks of BLOCK_N keys,): one program has all queries of its
    keys, and adds them in order."""
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_N)
    start, bh = program % blocks * BLOCK_N, program // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    all_keys = keys
    keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
    slope = slope_of(slopes, b, h, slopes_b, slopes_h, ALIBI)
    limits = (queries, keys, diagonal, left, right)
    numbers = (scale, unit, softcap, slope)
    dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64), True)
    of_query, of_rows = query + b * q_b + h * q_h, logsumexp + bh.to(tl.int64) * queries
    k = load_rows(key + b * k_b + h // group * k_h, k_s, start, keys, D, BLOCK_D, BLOCK_N, True)
    col = start + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float64)
    tiles = query_tiles(start, tl.minimum(start + BLOCK_N, all_keys) - 1, limits, LEFT, RIGHT, BLOCK_M)
    begin, end = tiles[0], tiles[3]
    if LENGTHS:
        end = tl.where(start < keys, end, begin)
    for first in range(begin, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        there = row < queries
        high, low = exponents(tl.load(of_rows + row, mask=there, other=0.0))
        q = load_rows(of_query, q_s, first, queries, D, BLOCK_D, BLOCK_M, True)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = _weights(
            s, high[None, :], low[None, :], row[None, :], col[:, None], (first, start), limits, numbers, dense, LEFT,
            RIGHT, MASK, SOFTCAP, ALIBI, BEND, k.dtype == tl.float32,
        )  # fmt: skip
        # A key that is NaN makes NaN of the zeros that stand for rows behind the last.
        total += tl.sum(tl.where(there[None, :], p, 0.0), 1).to(tl.float64)
    if UNIFORM:
        # Queries that see no key attend to all alike.
        count = tl.zeros((BLOCK_M,), tl.int32)
        for first in range(0, queries, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            of_row = tl.load(of_rows + row, mask=row < queries, other=0.0)
            count += tl.where(of_row == float("-inf"), 1, 0)
        total += tl.sum(count, 0).to(tl.float64) / all_keys.to(tl.float64)
    tl.store(sums + bh.to(tl.int64) * all_keys + col, total.to(tl.float32), mask=col < all_keys)
