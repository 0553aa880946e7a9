"""What the gradients of attention in Triton share: FlashAttention-2 (Dao 2023, section 3.1.2), without atomics.

Three kernels: of each row the statistics, here; the gradient of a block of queries (triton_backward_queries.py); the
gradients of a block of keys and values, which goes through all heads of its group (triton_backward_keys.py). The
weights are made again from the log-sum-exp, in both of the latter, so that each sum is formed in one order by one
program, and results are the same bits in every run.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_configurations import FEW_KEYS, FEW_QUERIES
from llmkern.attention.triton_mask import look
from llmkern.attention.triton_packed import locate
from llmkern.attention.triton_rules import (
    PLAIN,
    bend,
    exponents,
    kept,
    key_tiles,
    load_rows,
    sequence,
    slope_of,
)

_FEW_QUERIES, _FEW_KEYS = tl.constexpr(FEW_QUERIES), tl.constexpr(FEW_KEYS)


@triton.jit
def few(queries, keys):
    """Whether delta of a sequence is summed over the weights, as triton_launch.from_weights has it."""
    return (queries <= _FEW_QUERIES) | (keys <= _FEW_KEYS)


@triton.jit
def load_statistics(
    statistics, rows, first, queries, ADDED: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr
):  # fmt: skip
    """Of the rows from `first`: the exponent of 2 to subtract, in two parts; delta; the log-sum-exp's gradient. CHECK:
    some may lie behind the last query, and have weights 0."""
    row = first + tl.arange(0, BLOCK)
    rows = tl.cast(rows, tl.int64)
    if CHECK:
        there = row < queries
        high = tl.load(statistics + row, mask=there, other=float("inf"))  # so that weights are 0
        low = tl.load(statistics + rows + row, mask=there, other=0.0)
        delta = tl.load(statistics + 2 * rows + row, mask=there, other=0.0)
    else:
        high, low = tl.load(statistics + row), tl.load(statistics + rows + row)
        delta = tl.load(statistics + 2 * rows + row)
    added = delta
    if ADDED:
        if CHECK:
            added = tl.load(statistics + 3 * rows + row, mask=row < queries, other=0.0)
        else:
            added = tl.load(statistics + 3 * rows + row)
    return high, low, delta, added


@triton.jit
def gradients(
    s, dp, of_rows, first_row, first_col, limits, numbers, dense, dropout, keep_scale,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, BEND: tl.constexpr, ADDED: tl.constexpr, EDGE: tl.constexpr, PRECISE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Of the products s of queries and keys and dp of output gradients and values, (queries, keys) or TRANSPOSED: the
    weights as the values got them, the gradient of the scores as the
    softmax took them, that of the scaled products, which are seen, and weight times (its gradient less delta)."""
    ROWS: tl.constexpr = s.shape[1 if TRANSPOSED else 0]
    COLS: tl.constexpr = s.shape[0 if TRANSPOSED else 1]
    high, low, delta, added = of_rows
    if TRANSPOSED:
        row = first_row + tl.arange(0, ROWS)[None, :]
        col = first_col + tl.arange(0, COLS)[:, None]
        high, low, delta, added = high[None, :], low[None, :], delta[None, :], added[None, :]
    else:
        row = first_row + tl.arange(0, ROWS)[:, None]
        col = first_col + tl.arange(0, COLS)[None, :]
        high, low, delta, added = high[:, None], low[:, None], delta[:, None], added[:, None]
    s, capped = bend(
        s, row, col, (first_row, first_col), limits, numbers, dense, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, BEND, EDGE,
        PRECISE,
    )  # fmt: skip
    exponent = s * numbers[1] - high
    if PRECISE:
        exponent = exponent - low
    p = tl.exp2(exponent)
    to_values = p
    if DROPOUT:
        keep = kept(first_row, first_col, dropout, ROWS, COLS)
        if TRANSPOSED:
            keep = tl.trans(keep)
        to_values = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    seen = s != float("-inf")
    through = p * (dp - delta)
    ds = through
    if ADDED:
        ds = p * (dp - delta + added)  # last: it may be small beside two that cancel
    if EDGE or MASK > 0:
        to_values = tl.where(seen, to_values, 0.0)
        through = tl.where(seen, through, 0.0)
        ds = tl.where(seen, ds, 0.0)
    inner = ds
    if SOFTCAP:
        inner = ds * (1.0 - capped * capped)
    return to_values, ds, inner, seen, through


@triton.jit(do_not_specialize=PLAIN)
def attention_statistics_kernel(
    query, key, value, output, grad_output, logsumexp, grad_logsumexp, statistics, mask_tiles, mask, key_lengths,
    slopes, sink, seed, rows, heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, g_b, g_h, g_s, m_b, m_h, m_q, m_k,
    lengths_b, slopes_b, slopes_h, t_b, t_h, t_q, t_k, query_bounds, key_bounds, sequences,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, TILED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr,
    DROPOUT: tl.constexpr, UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, ADDED: tl.constexpr, FROM_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """statistics (4, B, H, Sq) float32: the log-sum-exp as an exponent of 2, its part and the rest; delta, the sum of
    weight times gradient; the log-sum-exp's gradient (with ADDED).

    delta is the product of output and gradient or, FROM_WEIGHTS and in PACKED sequences that are `few`, summed over the
    weights themselves, which the rounding of the output does not reach. Grid: (B * H * blocks of BLOCK_M queries,).
    """
    all_queries = queries
    b, h, bh, line, block, blocks, first_query, first_key, queries, keys = locate(
        queries, keys, heads, query_bounds, key_bounds, sequences, BLOCK_M, False, PACKED
    )
    if PACKED:  # noqa: SIM102 (known to the compiler)
        if block >= blocks:
            return
    start = block * BLOCK_M
    first_of_head = line.to(tl.int64) * all_queries + first_query
    row = start + tl.arange(0, BLOCK_M)
    there = row < queries
    sums = tl.load(logsumexp + first_of_head + row, mask=there, other=0.0)
    high, low = exponents(sums)
    place = statistics + first_of_head + row
    rows = tl.cast(rows, tl.int64)
    tl.store(place, high, mask=there)
    tl.store(place + rows, low, mask=there)
    if ADDED:
        added = tl.load(grad_logsumexp + first_of_head + row, mask=there, other=0.0)
        tl.store(place + 3 * rows, added.to(tl.float32), mask=there)
    of_grad = grad_output + b * g_b + h * g_h + first_query * g_s
    grad = load_rows(of_grad, g_s, start, queries, DV, BLOCK_DV, BLOCK_M, True)
    weighed = FROM_WEIGHTS
    if PACKED and not FROM_WEIGHTS:
        weighed = few(queries, keys)
    if weighed:
        keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
        slope = slope_of(slopes, b, h, slopes_b, slopes_h, ALIBI)
        limits = (queries, keys, diagonal, left, right)
        numbers = (scale, unit, softcap, slope)
        table = mask_tiles + b * t_b + h * t_h
        dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64), table, t_q, t_k)
        of_keys = key + b * k_b + h // group * k_h + first_key * k_s
        of_values = value + b * v_b + h // group * v_h + first_key * v_s
        q = load_rows(query + b * q_b + h * q_h + first_query * q_s, q_s, start, queries, D, BLOCK_D, BLOCK_M, True)
        last = tl.minimum(start + BLOCK_M, queries) - 1
        tiles = key_tiles(start, last, limits, LEFT, RIGHT, BLOCK_N)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        nothing = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(tiles[0], tiles[3], BLOCK_N):
            some, of_mask = look(dense, start, first, limits, BLOCK_M, BLOCK_N, TILED)
            if some:
                k = load_rows(of_keys, k_s, first, keys, D, BLOCK_D, BLOCK_N, True)
                v = load_rows(of_values, v_s, first, keys, DV, BLOCK_DV, BLOCK_N, True)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                found = gradients(
                    s, dp, (high, low, nothing, nothing), start, first, limits, numbers, of_mask,
                    (tl.cast(seed, tl.int64), bh, drop_below), keep_scale, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT,
                    BEND, False, True, q.dtype == tl.float32, False,
                )  # fmt: skip
                delta += tl.sum(found[4], 1)
    else:
        of_out = output + b * o_b + h * o_h + first_query * o_s
        out = load_rows(of_out, o_s, start, queries, DV, BLOCK_DV, BLOCK_M, True)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(place + 2 * rows, delta, mask=there)
