"""The attention forward in Triton: FlashAttention-2 (Dao 2023, section 3.1) with the online softmax of Milakov and
Gimelshein 2018."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_integers import integer_products, of_keys, of_queries
from llmkern.attention.triton_mask import look
from llmkern.attention.triton_packed import locate
from llmkern.attention.triton_rules import (
    PLAIN,
    add_exactly,
    all_finite,
    bend,
    kept,
    key_tiles,
    load_rows,
    log2_in_parts,
    multiply_exactly,
    sequence,
    slope_of,
    store_rows,
)
from llmkern.attention.triton_tiles import edge_tile, edge_tiles, load_tile, row_sums


@triton.jit
def _step(
    state, q, start, first, key, value, limits, numbers, dense, dropout,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BEND: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
    EXACT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Takes the queries from `start` through the keys from `first`. state: (values summed, sums of the weights, largest
    exponent), (BLOCK_M, BLOCK_DV), (BLOCK_M, 8) by `row_sums`, (BLOCK_M,)."""
    acc, total, largest = state
    row = start + tl.arange(0, BLOCK_M)[:, None]
    col = first + tl.arange(0, BLOCK_N)[None, :]
    keys, unit = limits[1], numbers[1]
    if EXACT:
        s = multiply_exactly(q, key[0], key[1], first, keys, D, BLOCK_D, BLOCK_N)
    else:
        k = load_tile(key, first, keys, D, BLOCK_D, BLOCK_N, EDGE, DESCRIBED)
        if q.dtype == tl.int8:
            s = integer_products(q, k, BLOCK_M, BLOCK_N)
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if q.dtype == tl.int8:
        s = of_keys(s, key, first, keys, BLOCK_N, SOFTCAP, EDGE)
    s, _ = bend(
        s, row, col, (start, first), limits, numbers, dense, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, BEND, EDGE,
        q.dtype == tl.float32,
    )  # fmt: skip
    now = tl.maximum(largest, tl.max(s, 1) * unit)
    if q.dtype == tl.int8:  # whose unit is another for each query
        unit = unit[:, None]
    shift = tl.where(now == float("-inf"), 0.0, now)  # of a query that has seen no key yet, or scores of -inf alone
    p = tl.exp2(s * unit - shift[:, None])
    again = tl.exp2(largest - shift)
    total = total * again[:, None] + row_sums(p)
    acc = acc * again[:, None]
    if DROPOUT:
        p = tl.where(kept(start, first, dropout, BLOCK_M, BLOCK_N), p, 0.0)
    if EXACT:
        acc = add_exactly(acc, p, s != float("-inf"), value[0], value[1], first, keys, DV, BLOCK_DV, BLOCK_N)
    else:
        v = load_tile(value, first, keys, DV, BLOCK_DV, BLOCK_N, EDGE, DESCRIBED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, now


@triton.jit
def _rows(
    start, query, key, value, output, logsumexp, sink, all_keys, limits, numbers, dense, dropout, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, TILED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr, UNIFORM: tl.constexpr,
    BEND: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Computes and stores the queries from `start` to start + BLOCK_M; whether all results are finite."""
    queries = limits[0]
    q = load_rows(query[0], query[1], start, queries, D, BLOCK_D, BLOCK_M, True)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M, 8), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if q.dtype == tl.int8:
        key, numbers, lift = of_queries(query, key, numbers, start, queries, BLOCK_M, SOFTCAP, BEND)
    if SINK:
        # The first of the logits, whose value is 0.
        exponent = tl.load(sink).to(tl.float32) * 1.4426950408889634
        largest = tl.zeros((BLOCK_M,), tl.float32) + exponent
        if q.dtype == tl.int8:
            largest = largest - lift * 1.4426950408889634
        total += tl.where(largest == float("-inf"), 0.0, 0.125)[:, None]
    state = (acc, total, largest)
    last = tl.minimum(start + BLOCK_M, queries) - 1
    tiles = key_tiles(start, last, limits, LEFT, RIGHT, BLOCK_N)
    if EXACT:
        tiles = (tiles[0], tiles[0], tiles[0], tiles[3])  # all at the edge: one loop is enough
    for i in range(0, edge_tiles(tiles, BLOCK_N)):
        first = edge_tile(i, tiles, BLOCK_N)
        seen, of_mask = look(dense, start, first, limits, BLOCK_M, BLOCK_N, TILED)
        if seen:
            state = _step(
                state, q, start, first, key, value, limits, numbers, of_mask, dropout, D, DV, BLOCK_D, BLOCK_DV,
                BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND, PRECISION, True, EXACT, DESCRIBED,
            )  # fmt: skip
    if not EXACT:
        for first in range(tiles[1], tiles[2], BLOCK_N):
            seen, of_mask = look(dense, start, first, limits, BLOCK_M, BLOCK_N, TILED)
            if seen:
                state = _step(
                    state, q, start, first, key, value, limits, numbers, of_mask, dropout, D, DV, BLOCK_D, BLOCK_DV,
                    BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND, PRECISION, False, EXACT,
                    DESCRIBED,
                )  # fmt: skip
    acc, total, largest = state
    total = tl.sum(total, 1)
    empty = total == 0.0
    whole = tl.where(empty, 1.0, total)
    exponent = largest.to(tl.float64) + log2_in_parts(whole)
    exponent = exponent * 0.6931471805599453
    if q.dtype == tl.int8:
        exponent = exponent + lift.to(tl.float64)
    sums = tl.where(empty, float("-inf"), exponent)
    row = start + tl.arange(0, BLOCK_M)
    tl.store(logsumexp + row, sums, mask=row < queries)
    factor = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), whole)
    if DROPOUT:
        factor = factor * keep_scale
    acc = acc * factor[:, None]
    if UNIFORM:  # noqa: SIM102
        if tl.max(tl.where(empty, 1, 0), 0) > 0:
            mean = tl.zeros((BLOCK_DV,), tl.float32)
            for first in range(0, all_keys, BLOCK_N):
                v = load_rows(value[0], value[1], first, all_keys, DV, BLOCK_DV, BLOCK_N, True)
                mean += tl.sum(v.to(tl.float32), 0)
            acc = tl.where(empty[:, None], (mean / all_keys.to(tl.float32))[None, :], acc)
    store_rows(output[0], output[1], start, queries, acc, DV, BLOCK_DV, BLOCK_M)
    return all_finite(acc)


@triton.jit(do_not_specialize=PLAIN)
def attention_forward_kernel(
    query, key, value, key_rows, value_rows, output, logsumexp, mask_tiles, mask, key_lengths, slopes, sink, seed,
    heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, m_b, m_h, m_q, m_k, lengths_b, slopes_b, slopes_h,
    t_b, t_h, t_q, t_k, query_bounds, key_bounds, sequences,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, TILED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr,
    DROPOUT: tl.constexpr, UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The output (B, H, Sq, DV) and the log-sum-exp (B, H, Sq) float64 of attention.

    Grid: (B * H * blocks of BLOCK_M queries,), the blocks of a head side by side. Strides count elements; the last
    dimension of query, key, value and output is contiguous. unit: of `bend`, log2(e) with BEND and scale * log2(e)
    without. HIDES: some rule may hide a key from a query, so that results that are not finite are made again without
    it. TILED: mask_tiles is the mask's table of attention_mask_tiles_kernel, and t_b, t_h, t_q, t_k its strides.
    DESCRIBED: key_rows and value_rows are descriptors of key and value with blocks of (1, 1, BLOCK_N, BLOCK_D) and
    (1, 1, BLOCK_N, BLOCK_DV); else they are not looked at. PACKED: sequences end to end, never DESCRIBED, `queries` and
    `keys` those of all of them, the log-sum-exp (H, queries), the strides of batches 0 (triton_packed.py).
    """
    all_queries = queries
    b, h, bh, line, block, blocks, first_query, first_key, queries, keys = locate(
        queries, keys, heads, query_bounds, key_bounds, sequences, BLOCK_M, False, PACKED
    )
    if PACKED:  # noqa: SIM102 (known to the compiler)
        if block >= blocks:
            return
    if RIGHT:
        block = blocks - 1 - block  # the longest first
    kv_h = h // group
    all_keys = keys
    keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
    slope = slope_of(slopes, b, h, slopes_b, slopes_h, ALIBI)
    limits = (queries, keys, diagonal, left, right)
    numbers = (scale, unit, softcap, slope)
    table = mask_tiles + b * t_b + h * t_h
    dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64), table, t_q, t_k)
    dropout = (tl.cast(seed, tl.int64), bh, drop_below)
    q = (query + b * q_b + h * q_h + first_query * q_s, q_s)
    at = (b.to(tl.int32), kv_h.to(tl.int32))
    k = (key + b * k_b + kv_h * k_h + first_key * k_s, k_s, key_rows, at[0], at[1])
    v = (value + b * v_b + kv_h * v_h + first_key * v_s, v_s, value_rows, at[0], at[1])
    o = (output + b * o_b + h * o_h + first_query * o_s, o_s)
    lse = logsumexp + line.to(tl.int64) * all_queries + first_query
    start = block * BLOCK_M
    finite = _rows(
        start, q, k, v, o, lse, sink + h, all_keys, limits, numbers, dense, dropout, keep_scale, D, DV, BLOCK_D,
        BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, TILED, SOFTCAP, ALIBI, SINK, DROPOUT, UNIFORM, BEND, PRECISION,
        False, DESCRIBED,
    )  # fmt: skip
    if HIDES:  # noqa: SIM102 (known to the compiler)
        if not finite:
            tl.debug_barrier()  # the same elements are stored again
            for again in range(start, tl.minimum(start + BLOCK_M, queries), 16):
                _rows(
                    again, q, k, v, o, lse, sink + h, all_keys, limits, numbers, dense, dropout, keep_scale, D, DV,
                    BLOCK_D, BLOCK_DV, 16, 16, LEFT, RIGHT, MASK, TILED, SOFTCAP, ALIBI, SINK, DROPOUT, UNIFORM, BEND,
                    PRECISION, True, False,
                )  # fmt: skip
