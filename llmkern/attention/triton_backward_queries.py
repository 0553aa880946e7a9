"""The gradient of the queries of attention in Triton (triton_backward.py says how the gradients are made)."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_backward import (
    few,
    gradients,
    load_statistics,
)
from llmkern.attention.triton_mask import look
from llmkern.attention.triton_packed import locate
from llmkern.attention.triton_rules import (
    PLAIN,
    add_exactly,
    all_finite,
    key_tiles,
    load_rows,
    multiply_exactly,
    sequence,
    slope_of,
    store_rows,
)
from llmkern.attention.triton_tiles import edge_tile, edge_tiles, load_tile, row_sums


@triton.jit
def _query_step(
    state, q, grad, of_rows, start, first, key, value, grad_scores, keys_apart, limits, numbers, dense, dropout,
    keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BEND: tl.constexpr, ADDED: tl.constexpr, MASK_GRAD: tl.constexpr,
    CENTRE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr, EXACT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Adds to a block of queries' gradient what the keys from `first` give. state: (gradient over the scale, with
    CENTRE the sums of the scores' gradients by `row_sums`)."""
    acc, rest = state
    if EXACT:
        s = multiply_exactly(q, key[0], key[1], first, limits[1], D, BLOCK_D, BLOCK_N)
        dp = multiply_exactly(grad, value[0], value[1], first, limits[1], DV, BLOCK_DV, BLOCK_N)
    else:
        k = load_tile(key, first, limits[1], D, BLOCK_D, BLOCK_N, EDGE, DESCRIBED)
        v = load_tile(value, first, limits[1], DV, BLOCK_DV, BLOCK_N, EDGE, DESCRIBED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    _, ds, inner, seen, through = gradients(
        s, dp, of_rows, start, first, limits, numbers, dense, dropout, keep_scale, LEFT, RIGHT, MASK, SOFTCAP,
        ALIBI, DROPOUT, BEND, ADDED, EDGE, q.dtype == tl.float32, False,
    )  # fmt: skip
    if CENTRE:
        rest = rest + row_sums(through)
    if MASK_GRAD:
        row = start + tl.arange(0, BLOCK_M)[:, None]
        col = first + tl.arange(0, BLOCK_N)[None, :]
        where = grad_scores + (row.to(tl.int64) * keys_apart + col)
        tl.store(where, ds, mask=(row < limits[0]) & (col < limits[1]))
    if EXACT:
        acc = add_exactly(acc, inner, seen, key[0], key[1], first, limits[1], D, BLOCK_D, BLOCK_N)
    else:
        acc = tl.dot(inner.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc, rest


@triton.jit
def _query_rows(
    start, query, grad_output, grad_query, key, value, statistics, grad_scores, keys_apart, limits, numbers, dense,
    dropout, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, TILED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BEND: tl.constexpr, ADDED: tl.constexpr,
    MASK_GRAD: tl.constexpr, CENTRE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Computes and stores the gradient of the queries from `start`; whether all of it is finite."""
    queries = limits[0]
    q = load_rows(query[0], query[1], start, queries, D, BLOCK_D, BLOCK_M, True)
    grad = load_rows(grad_output[0], grad_output[1], start, queries, DV, BLOCK_DV, BLOCK_M, True)
    of_rows = load_statistics(statistics[0], statistics[1], start, queries, ADDED, BLOCK_M, True)
    state = (tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, 8), tl.float32))
    last = tl.minimum(start + BLOCK_M, queries) - 1
    tiles = key_tiles(start, last, limits, LEFT, RIGHT, BLOCK_N)
    begin = tiles[0]
    # Two loops, for tiles at the edge and within, where descriptors leave the registers for it; else one.
    if DESCRIBED:
        for i in range(0, edge_tiles(tiles, BLOCK_N)):
            first = edge_tile(i, tiles, BLOCK_N)
            seen, of_mask = look(dense, start, first, limits, BLOCK_M, BLOCK_N, TILED)
            if seen:
                state = _query_step(
                    state, q, grad, of_rows, start, first, key, value, grad_scores, keys_apart, limits, numbers,
                    of_mask, dropout, keep_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK,
                    SOFTCAP, ALIBI, DROPOUT, BEND, ADDED, MASK_GRAD, CENTRE, PRECISION, True, EXACT, DESCRIBED,
                )  # fmt: skip
        for first in range(tiles[1], tiles[2], BLOCK_N):
            seen, of_mask = look(dense, start, first, limits, BLOCK_M, BLOCK_N, TILED)
            if seen:
                state = _query_step(
                    state, q, grad, of_rows, start, first, key, value, grad_scores, keys_apart, limits, numbers,
                    of_mask, dropout, keep_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK,
                    SOFTCAP, ALIBI, DROPOUT, BEND, ADDED, MASK_GRAD, CENTRE, PRECISION, False, EXACT, DESCRIBED,
                )  # fmt: skip
    else:
        for first in range(begin, tiles[3], BLOCK_N):
            seen, of_mask = look(dense, start, first, limits, BLOCK_M, BLOCK_N, TILED)
            if seen:
                state = _query_step(
                    state, q, grad, of_rows, start, first, key, value, grad_scores, keys_apart, limits, numbers,
                    of_mask, dropout, keep_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK,
                    SOFTCAP, ALIBI, DROPOUT, BEND, ADDED, MASK_GRAD, CENTRE, PRECISION, True, EXACT, DESCRIBED,
                )  # fmt: skip
    acc, rest = state
    if CENTRE:
        # The gradients of a row's scores add up to 0 but for the rounding of the output that delta comes from. That
        # rest, times an average key as large as trained models have it, would be the largest error.
        k = load_rows(key[0], key[1], begin, limits[1], D, BLOCK_D, BLOCK_N, True).to(tl.float32)
        centre = tl.sum(k, 0) / tl.maximum(tl.minimum(limits[1] - begin, BLOCK_N), 1).to(tl.float32)
        centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
        centred = acc - tl.sum(rest, 1)[:, None] * centre[None, :]
        acc = tl.where(few(queries, limits[1]), acc, centred) if PACKED else centred
    acc = acc * numbers[0]
    store_rows(grad_query[0], grad_query[1], start, queries, acc, D, BLOCK_D, BLOCK_M)
    return all_finite(acc)


@triton.jit(do_not_specialize=PLAIN)
def attention_backward_query_kernel(
    query, key, value, grad_output, key_rows, value_rows, statistics, grad_query, grad_scores, mask_tiles, mask,
    key_lengths, slopes, sink, seed,
    rows, heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dq_b, dq_h, dq_s, m_b, m_h, m_q, m_k,
    lengths_b, slopes_b, slopes_h, t_b, t_h, t_q, t_k, query_bounds, key_bounds, sequences,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, TILED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr,
    DROPOUT: tl.constexpr, UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, ADDED: tl.constexpr, MASK_GRAD: tl.constexpr, CENTRE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The gradient of query (B, H, Sq, D) and, with MASK_GRAD, that of the scores, (B, H, Sq, Sk) float32, where a
    query may see a key. CENTRE: delta comes from the rounded output, without sinks and soft cap; PACKED: of sequences
    that are not `few`. DESCRIBED: as of attention_forward_kernel. Grid: (B * H * blocks of BLOCK_M queries,)."""
    all_queries, keys_apart = queries, tl.cast(keys, tl.int64)
    b, h, bh, line, block, blocks, first_query, first_key, queries, keys = locate(
        queries, keys, heads, query_bounds, key_bounds, sequences, BLOCK_M, False, PACKED
    )
    if PACKED:  # noqa: SIM102 (known to the compiler)
        if block >= blocks:
            return
    if RIGHT:
        block = blocks - 1 - block  # the longest first
    kv_h = h // group
    of_head = grad_scores + bh.to(tl.int64) * queries * keys_apart
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
    g = (grad_output + b * g_b + h * g_h + first_query * g_s, g_s)
    dq = (grad_query + b * dq_b + h * dq_h + first_query * dq_s, dq_s)
    of_rows = (statistics + line.to(tl.int64) * all_queries + first_query, rows)
    start = block * BLOCK_M
    finite = _query_rows(
        start, q, g, dq, k, v, of_rows, of_head, keys_apart, limits, numbers, dense, dropout, keep_scale, D, DV,
        BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, TILED, SOFTCAP, ALIBI, DROPOUT, BEND, ADDED, MASK_GRAD,
        CENTRE, PACKED, PRECISION, False, DESCRIBED,
    )  # fmt: skip
    if HIDES:  # noqa: SIM102 (known to the compiler)
        if not finite:
            tl.debug_barrier()  # the same elements are stored again
            for again in range(start, tl.minimum(start + BLOCK_M, queries), 16):
                _query_rows(
                    again, q, g, dq, k, v, of_rows, of_head, keys_apart, limits, numbers, dense, dropout, keep_scale,
                    D, DV, BLOCK_D, BLOCK_DV, 16, 16, LEFT, RIGHT, MASK, TILED, SOFTCAP, ALIBI, DROPOUT, BEND, ADDED,
                    MASK_GRAD, CENTRE, PACKED, PRECISION, True, False,
                )  # fmt: skip
