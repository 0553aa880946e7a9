"""The gradients of the attention weights in Triton: of query and key, of an additive mask's scores, and what a sink's
is made of. The weights are made again from the log-sum-exp, as in the gradients of attention (triton_backward.py), of
which these have the sums and the order: no atomics, the same bits in every run.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_backward import gradients
from llmkern.attention.triton_rules import (
    add_exactly,
    all_finite,
    exponents,
    key_tiles,
    load_rows,
    multiply_exactly,
    query_tiles,
    sequence,
    slope_of,
    store_rows,
)
from llmkern.attention.triton_weights import PLAIN


@triton.jit
def _given(grad, row, col, limits):
    """The gradients of these weights in float32, 0 where there are none. grad: (address for this batch and head, step
    of a query)."""
    where = grad[0] + row.to(tl.int64) * grad[1] + col
    return tl.load(where, mask=(row < limits[0]) & (col < limits[1]), other=0.0).to(tl.float32)


@triton.jit
def _query_tile(
    q, of_rows, start, first, key, grad, limits, numbers, dense, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BEND: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What `gradients` makes of the weights of the queries from `start` for the keys from `first`, and these keys."""
    k = load_rows(key[0], key[1], first, limits[1], D, BLOCK_D, BLOCK_N, True)
    if EXACT:
        s = multiply_exactly(q, key[0], key[1], first, limits[1], D, BLOCK_D, BLOCK_N)
    else:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    row, col = start + tl.arange(0, BLOCK_M)[:, None], first + tl.arange(0, BLOCK_N)[None, :]
    _, ds, inner, seen, through = gradients(
        s, _given(grad, row, col, limits), of_rows, start, first, limits, numbers, dense, (0, 0, 0), 1.0, LEFT, RIGHT,
        MASK, SOFTCAP, ALIBI, False, BEND, False, True, q.dtype == tl.float32, False,
    )  # fmt: skip
    return k, ds, inner, seen, through


@triton.jit
def _query_rows(
    start, query, grad, grad_query, key, sums, deltas, grad_scores, keys_apart, limits, numbers, dense,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BEND: tl.constexpr,
    MASK_GRAD: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Computes and stores the gradient of the queries from `start`, and of each the sum of weight times gradient;
    whether all of it is finite. They go through their keys twice: the gradients of the scores need that sum."""
    queries = limits[0]
    row = start + tl.arange(0, BLOCK_M)
    q = load_rows(query[0], query[1], start, queries, D, BLOCK_D, BLOCK_M, True)
    high, low = exponents(tl.load(sums + row, mask=row < queries, other=float("-inf")))
    tiles = key_tiles(start, tl.minimum(start + BLOCK_M, queries) - 1, limits, LEFT, RIGHT, BLOCK_N)
    nothing = tl.zeros((BLOCK_M,), tl.float32)
    delta = nothing
    for first in range(tiles[0], tiles[3], BLOCK_N):
        _, _, _, _, through = _query_tile(
            q, (high, low, nothing, nothing), start, first, key, grad, limits, numbers, dense, D, BLOCK_D, BLOCK_M,
            BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, BEND, PRECISION, EXACT,
        )  # fmt: skip
        delta += tl.sum(through, 1)
    tl.store(deltas + row, delta, mask=row < queries)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(tiles[0], tiles[3], BLOCK_N):
        k, ds, inner, seen, _ = _query_tile(
            q, (high, low, delta, nothing), start, first, key, grad, limits, numbers, dense, D, BLOCK_D, BLOCK_M,
            BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, BEND, PRECISION, EXACT,
        )  # fmt: skip
        if MASK_GRAD:
            col = first + tl.arange(0, BLOCK_N)[None, :]
            where = grad_scores + (row[:, None].to(tl.int64) * keys_apart + col)
            tl.store(where, ds, mask=(row[:, None] < queries) & (col < limits[1]))
        if EXACT:
            acc = add_exactly(acc, inner, seen, key[0], key[1], first, limits[1], D, BLOCK_D, BLOCK_N)
        else:
            acc = tl.dot(inner.to(k.dtype), k, acc, input_precision=PRECISION)
    acc = acc * numbers[0]
    store_rows(grad_query[0], grad_query[1], start, queries, acc, D, BLOCK_D, BLOCK_M)
    return all_finite(acc)


@triton.jit(do_not_specialize=PLAIN)
def attention_weights_query_kernel(
    query, key, grad_weights, logsumexp, grad_query, deltas, grad_scores, mask, key_lengths, slopes, sink, seed,
    heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, g_b, g_h, g_s, dq_b, dq_h, dq_s, m_b, m_h, m_q, m_k, lengths_b, slopes_b, slopes_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
    UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    MASK_GRAD: tl.constexpr,
):  # fmt: skip
    """The gradient of query (B, H, Sq, D); deltas (B, H, Sq) float32, of each row the sum of weight times gradient;
    with MASK_GRAD that of the scores, (B, H, Sq, Sk) float32, where a query may see a key. Grid: (B * H * blocks of
    BLOCK_M queries,)."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    start, bh = program % blocks * BLOCK_M, program // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, keys_apart = bh.to(tl.int64) * queries, tl.cast(keys, tl.int64)
    keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
    slope = slope_of(slopes, b, h, slopes_b, slopes_h, ALIBI)
    limits = (queries, keys, diagonal, left, right)
    numbers = (scale, unit, softcap, slope)
    dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64), True)
    q = (query + b * q_b + h * q_h, q_s)
    k = (key + b * k_b + h // group * k_h, k_s)
    g = (grad_weights + b * g_b + h * g_h, g_s)
    dq = (grad_query + b * dq_b + h * dq_h, dq_s)
    of_scores = grad_scores + rows * keys_apart
    finite = _query_rows(
        start, q, g, dq, k, logsumexp + rows, deltas + rows, of_scores, keys_apart, limits, numbers, dense, D, BLOCK_D,
        BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, BEND, MASK_GRAD, PRECISION, False,
    )  # fmt: skip
    if HIDES:  # noqa: SIM102 (known to the compiler)
        if not finite:
            tl.debug_barrier()  # the same elements are stored again
            for again in range(start, tl.minimum(start + BLOCK_M, queries), 16):
                _query_rows(
                    again, q, g, dq, k, logsumexp + rows, deltas + rows, of_scores, keys_apart, limits, numbers, dense,
                    D, BLOCK_D, 16, 16, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, BEND, MASK_GRAD, PRECISION, True,
                )  # fmt: skip


@triton.jit
def _key_rows(
    start, query, key, grad, grad_key, rows, slopes, group, all_keys, limits, numbers, dense, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    LENGTHS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BEND: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Computes and stores the gradient of the keys from `start`; whether all of it is finite. The tuples of what
    differs by head are those of the group's first head, and their steps from head to head."""
    queries, keys = limits[0], limits[1]
    k = load_rows(key[0], key[1], start, keys, D, BLOCK_D, BLOCK_N, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    col = start + tl.arange(0, BLOCK_N)[:, None]
    tiles = query_tiles(start, tl.minimum(start + BLOCK_N, all_keys) - 1, limits, LEFT, RIGHT, BLOCK_M)
    begin, end = tiles[0], tiles[3]
    if LENGTHS:
        end = tl.where(start < keys, end, begin)
    for member in range(group):
        of_query, of_grad = query[0] + member * query[2], (grad[0] + member * grad[2], grad[1])
        of_mask = (dense[0] + member * dense[3], dense[1], dense[2], True)
        sums, deltas = rows[0] + member * rows[2], rows[1] + member * rows[2]
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes[0] + member * slopes[1])
        of_head = (numbers[0], numbers[1], numbers[2], slope)
        for first in range(begin, end, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            high, low = exponents(tl.load(sums + row, mask=row < queries, other=float("-inf")))
            delta = tl.load(deltas + row, mask=row < queries, other=0.0)
            q = load_rows(of_query, query[1], first, queries, D, BLOCK_D, BLOCK_M, True)
            if EXACT:
                s = multiply_exactly(k, of_query, query[1], first, queries, D, BLOCK_D, BLOCK_M)
            else:
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            _, _, inner, seen, _ = gradients(
                s, _given(of_grad, row[None, :], col, limits), (high, low, delta, delta), first, start, limits, of_head,
                of_mask, (0, 0, 0), 1.0, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, False, BEND, False, True,
                k.dtype == tl.float32, True,
            )  # fmt: skip
            if EXACT:
                dk = add_exactly(dk, inner, seen, of_query, query[1], first, queries, D, BLOCK_D, BLOCK_M)
            else:
                dk = tl.dot(inner.to(q.dtype), q, dk, input_precision=PRECISION)
    dk = tl.where(col < keys, dk * numbers[0], 0.0)
    store_rows(grad_key[0], grad_key[1], start, all_keys, dk, D, BLOCK_D, BLOCK_N)
    return all_finite(dk)


@triton.jit(do_not_specialize=PLAIN)
def attention_weights_key_kernel(
    query, key, grad_weights, logsumexp, deltas, grad_key, mask, key_lengths, slopes, sink, seed,
    heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, g_b, g_h, g_s, dk_b, dk_h, dk_s, m_b, m_h, m_q, m_k, lengths_b, slopes_b, slopes_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
    UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of key (B, Hkv, Sk, D). Grid: (B * Hkv * blocks of BLOCK_N keys,)."""
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_N)
    start, bh = program % blocks * BLOCK_N, program // blocks
    kv_heads = heads // group
    b, kv_h = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    h, apart = kv_h * group, tl.cast(queries, tl.int64)
    all_keys = keys
    keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
    limits = (queries, keys, diagonal, left, right)
    numbers = (scale, unit, softcap, 0.0)
    m_h = tl.cast(m_h, tl.int64)
    dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64), m_h)
    q = (query + b * q_b + h * q_h, q_s, tl.cast(q_h, tl.int64))
    k = (key + b * k_b + kv_h * k_h, k_s)
    g = (grad_weights + b * g_b + h * g_h, g_s, tl.cast(g_h, tl.int64))
    dk = (grad_key + b * dk_b + kv_h * dk_h, dk_s)
    first_row = (bh * group).to(tl.int64) * apart
    of_rows = (logsumexp + first_row, deltas + first_row, apart)
    of_heads = (slopes + b * slopes_b + h * slopes_h, slopes_h)
    finite = _key_rows(
        start, q, k, g, dk, of_rows, of_heads, group, all_keys, limits, numbers, dense, D, BLOCK_D, BLOCK_M, BLOCK_N,
        LEFT, RIGHT, LENGTHS, MASK, SOFTCAP, ALIBI, BEND, PRECISION, False,
    )  # fmt: skip
    if HIDES:  # noqa: SIM102 (known to the compiler)
        if not finite:
            tl.debug_barrier()  # the same elements are stored again
            for again in range(start, tl.minimum(start + BLOCK_N, all_keys), 16):
                _key_rows(
                    again, q, k, g, dk, of_rows, of_heads, group, all_keys, limits, numbers, dense, D, BLOCK_D, 16, 16,
                    LEFT, RIGHT, LENGTHS, MASK, SOFTCAP, ALIBI, BEND, PRECISION, True,
                )  # fmt: skip
