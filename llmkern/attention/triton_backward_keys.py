"""The gradients of the keys and values of attention in Triton (triton_backward.py says how the gradients are made)."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_backward import (
    gradients,
    load_statistics,
)
from llmkern.attention.triton_mask import look
from llmkern.attention.triton_packed import locate
from llmkern.attention.triton_rules import (
    PLAIN,
    add_exactly,
    all_finite,
    load_rows,
    multiply_exactly,
    query_tiles,
    sequence,
    store_rows,
)
from llmkern.attention.triton_tiles import edge_tile, edge_tiles, load_tile


@triton.jit
def _key_step(
    state, k, v, start, first, query, grad_output, statistics, limits, numbers, dense, dropout, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BEND: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr, CHECK: tl.constexpr, EXACT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of the keys from `start` what the queries from `first` of one head give. state: (gradient
    of the keys over the scale, gradient of the values). CHECK: some of the queries may lie behind the last."""
    dk, dv = state
    queries = limits[0]
    if EXACT:
        s = multiply_exactly(k, query[0], query[1], first, queries, D, BLOCK_D, BLOCK_M)
        dp = multiply_exactly(v, grad_output[0], grad_output[1], first, queries, DV, BLOCK_DV, BLOCK_M)
    else:
        q = load_tile(query, first, queries, D, BLOCK_D, BLOCK_M, CHECK, DESCRIBED)
        grad = load_tile(grad_output, first, queries, DV, BLOCK_DV, BLOCK_M, CHECK, DESCRIBED)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    of_rows = load_statistics(statistics[0], statistics[1], first, queries, ADDED, BLOCK_M, CHECK)
    p, _, inner, seen, _ = gradients(
        s, dp, of_rows, first, start, limits, numbers, dense, dropout, keep_scale, LEFT, RIGHT, MASK, SOFTCAP,
        ALIBI, DROPOUT, BEND, ADDED, EDGE, k.dtype == tl.float32, True,
    )  # fmt: skip
    if EXACT:
        dv = add_exactly(dv, p, seen, grad_output[0], grad_output[1], first, queries, DV, BLOCK_DV, BLOCK_M)
        dk = add_exactly(dk, inner, seen, query[0], query[1], first, queries, D, BLOCK_D, BLOCK_M)
    else:
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(inner.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _key_rows(
    start, query, key, value, grad_output, grad_key, grad_value, statistics, slopes, heads, first_head, group, all_keys,
    limits, numbers, dense, dropout, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LENGTHS: tl.constexpr, MASK: tl.constexpr,
    TILED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UNIFORM: tl.constexpr,
    BEND: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Computes and stores the gradients of the keys and values from `start`; whether all of them are finite. The tuples
    of the query, its gradient and what else differs by head are those of the group's first head, and their steps from
    head to head."""
    queries, keys = limits[0], limits[1]
    scale, unit, softcap, _ = numbers
    seed, drop_below = dropout
    k = load_rows(key[0], key[1], start, keys, D, BLOCK_D, BLOCK_N, True)
    v = load_rows(value[0], value[1], start, keys, DV, BLOCK_DV, BLOCK_N, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    last = tl.minimum(start + BLOCK_N, all_keys) - 1
    tiles = query_tiles(start, last, limits, LEFT, RIGHT, BLOCK_M)
    if LENGTHS:
        begin, some = tiles[0], start < keys
        inner = (tl.where(some, tiles[1], begin), tl.where(some, tiles[2], begin))
        tiles = (begin, inner[0], inner[1], tl.where(some, tiles[3], begin))
    for member in range(group):
        q = (query[0] + member * query[5], query[1], query[2], query[3], query[4] + member)
        g = (grad_output[0] + member * grad_output[5], grad_output[1], grad_output[2], grad_output[3], q[4])
        of_rows = (statistics[0] + member * statistics[2], statistics[1])
        mask = (
            dense[0] + member * dense[6], dense[1], dense[2], dense[3] + member * dense[7], dense[4], dense[5]
        )  # fmt: skip
        drop = (seed, first_head + member, drop_below)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes[0] + member * slopes[1])
        of_head = (scale, unit, softcap, slope)
        state = (dk, dv)
        # Two loops, for tiles at the edge and within, where descriptors leave the registers for it; else one.
        if DESCRIBED:
            for i in range(0, edge_tiles(tiles, BLOCK_M)):
                first = edge_tile(i, tiles, BLOCK_M)
                some, of_mask = look(mask, first, start, limits, BLOCK_M, BLOCK_N, TILED)
                if some:
                    state = _key_step(
                        state, k, v, start, first, q, g, of_rows, limits, of_head, of_mask, drop, keep_scale, D, DV,
                        BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND, ADDED,
                        PRECISION, LEFT or RIGHT, True, EXACT, DESCRIBED,
                    )  # fmt: skip
            for first in range(tiles[1], tiles[2], BLOCK_M):
                some, of_mask = look(mask, first, start, limits, BLOCK_M, BLOCK_N, TILED)
                if some:
                    state = _key_step(
                        state, k, v, start, first, q, g, of_rows, limits, of_head, of_mask, drop, keep_scale, D, DV,
                        BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND, ADDED,
                        PRECISION, False, False, EXACT, DESCRIBED,
                    )  # fmt: skip
        else:
            for first in range(tiles[0], tiles[3], BLOCK_M):
                some, of_mask = look(mask, first, start, limits, BLOCK_M, BLOCK_N, TILED)
                if some:
                    state = _key_step(
                        state, k, v, start, first, q, g, of_rows, limits, of_head, of_mask, drop, keep_scale, D, DV,
                        BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND, ADDED,
                        PRECISION, LEFT or RIGHT or EXACT, True, EXACT, DESCRIBED,
                    )  # fmt: skip
        dk, dv = state
    dk = dk * scale
    if LENGTHS or DESCRIBED:
        # Keys behind the last are zeros, whose weights may have become infinite.
        there = (start + tl.arange(0, BLOCK_N) < keys)[:, None]
        dk, dv = tl.where(there, dk, 0.0), tl.where(there, dv, 0.0)
    if UNIFORM:
        # Queries that see no key attend to all values alike.
        alike = tl.zeros((BLOCK_DV,), tl.float32)
        for member in range(group):
            for first in range(0, queries, BLOCK_M):
                row = first + tl.arange(0, BLOCK_M)
                of_row = statistics[0] + member * statistics[2] + row
                empty = tl.load(of_row, mask=row < queries, other=0.0) == float("inf")
                if tl.max(tl.where(empty, 1, 0), 0) > 0:
                    grad = load_rows(
                        grad_output[0] + member * grad_output[5], grad_output[1], first, queries, DV, BLOCK_DV, BLOCK_M,
                        True,
                    )  # fmt: skip
                    alike += tl.sum(tl.where(empty[:, None], grad.to(tl.float32), 0.0), 0)
        dv += (alike / all_keys.to(tl.float32))[None, :]
    store_rows(grad_key[0], grad_key[1], start, all_keys, dk, D, BLOCK_D, BLOCK_N)
    store_rows(grad_value[0], grad_value[1], start, all_keys, dv, DV, BLOCK_DV, BLOCK_N)
    return all_finite(dk) & all_finite(dv)


@triton.jit(do_not_specialize=PLAIN)
def attention_backward_key_kernel(
    query, key, value, grad_output, query_rows, grad_rows, statistics, grad_key, grad_value, mask_tiles, mask,
    key_lengths, slopes, sink, seed,
    rows, heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, m_b, m_h, m_q, m_k,
    lengths_b, slopes_b, slopes_h, t_b, t_h, t_q, t_k, query_bounds, key_bounds, sequences,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, TILED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr,
    DROPOUT: tl.constexpr, UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, ADDED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The gradients of key (B, Hkv, Sk, D) and value (B, Hkv, Sk, DV). DESCRIBED: query_rows and grad_rows are
    descriptors of query and grad_output with blocks of (1, 1, BLOCK_M, BLOCK_D) and (1, 1, BLOCK_M, BLOCK_DV). Grid:
    (B * Hkv * blocks of BLOCK_N keys,)."""
    all_queries = tl.cast(queries, tl.int64)
    b, kv_h, bh, line, block, blocks, first_query, first_key, queries, keys = locate(
        queries, keys, heads // group, query_bounds, key_bounds, sequences, BLOCK_N, True, PACKED
    )
    if PACKED:  # noqa: SIM102 (known to the compiler)
        if block >= blocks:
            return
    h = kv_h * group
    first_head = bh * group
    all_keys = keys
    keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
    limits = (queries, keys, diagonal, left, right)
    numbers = (scale, unit, softcap, 0.0)
    m_h = tl.cast(m_h, tl.int64)
    table = mask_tiles + b * t_b + h * t_h
    dense = (
        mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64), table, t_q, t_k, m_h, t_h
    )  # fmt: skip
    dropout = (tl.cast(seed, tl.int64), drop_below)
    at = (b.to(tl.int32), h.to(tl.int32))
    q = (query + b * q_b + h * q_h + first_query * q_s, q_s, query_rows, at[0], at[1], tl.cast(q_h, tl.int64))
    k = (key + b * k_b + kv_h * k_h + first_key * k_s, k_s)
    v = (value + b * v_b + kv_h * v_h + first_key * v_s, v_s)
    g = (grad_output + b * g_b + h * g_h + first_query * g_s, g_s, grad_rows, at[0], at[1], tl.cast(g_h, tl.int64))
    dk = (grad_key + b * dk_b + kv_h * dk_h + first_key * dk_s, dk_s)
    dv = (grad_value + b * dv_b + kv_h * dv_h + first_key * dv_s, dv_s)
    of_rows = (statistics + (line * group).to(tl.int64) * all_queries + first_query, rows, all_queries)
    of_heads = (slopes + b * slopes_b + h * slopes_h, slopes_h)
    start = block * BLOCK_N
    finite = _key_rows(
        start, q, k, v, g, dk, dv, of_rows, of_heads, heads, first_head, group, all_keys, limits, numbers, dense,
        dropout, keep_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, LENGTHS, MASK, TILED, SOFTCAP,
        ALIBI, DROPOUT, UNIFORM, BEND, ADDED, PRECISION, False, DESCRIBED,
    )  # fmt: skip
    if HIDES:  # noqa: SIM102 (known to the compiler)
        if not finite:
            tl.debug_barrier()  # the same elements are stored again
            for again in range(start, tl.minimum(start + BLOCK_N, all_keys), 16):
                _key_rows(
                    again, q, k, v, g, dk, dv, of_rows, of_heads, heads, first_head, group, all_keys, limits, numbers,
                    dense, dropout, keep_scale, D, DV, BLOCK_D, BLOCK_DV, 16, 16, LEFT, RIGHT, LENGTHS, MASK, TILED,
                    SOFTCAP, ALIBI, DROPOUT, UNIFORM, BEND, ADDED, PRECISION, True, False,
                )  # fmt: skip
