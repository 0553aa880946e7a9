"""The gradients of attention in Triton: FlashAttention-2 (Dao 2023, section 3.1.2), without atomics.

Three kernels: of each row the statistics; the gradient of a block of queries; the gradients of a block of keys and
values, which goes through all heads of its group. The weights are made again from the log-sum-exp, in both of the
latter, so that each sum is formed in one order by one program, and results are the same bits in every run.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_rules import (
    add_exactly,
    all_finite,
    bend,
    kept,
    key_tiles,
    load_rows,
    query_tiles,
    sequence,
    slope_of,
    store_rows,
)

_PLAIN = [
    "heads", "group", "queries", "keys", "left", "right", "seed", "drop_below", "m_b", "m_h", "m_q", "m_k", "lengths_b",
    "slopes_b", "slopes_h", "rows",
]  # fmt: skip


@triton.jit
def _load_statistics(statistics, rows, first, queries, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Of the rows from `first`: the exponent of 2 to subtract, in two parts; delta; the log-sum-exp's gradient."""
    row = first + tl.arange(0, BLOCK)
    there = row < queries
    rows = tl.cast(rows, tl.int64)
    high = tl.load(statistics + row, mask=there, other=float("inf"))  # so that weights are 0
    low = tl.load(statistics + rows + row, mask=there, other=0.0)
    delta = tl.load(statistics + 2 * rows + row, mask=there, other=0.0)
    added = delta
    if ADDED:
        added = tl.load(statistics + 3 * rows + row, mask=there, other=0.0)
    return high, low, delta, added


@triton.jit
def _gradients(
    q, grad, k, v, of_rows, first_row, first_col, limits, numbers, dense, dropout, keep_scale,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, BEND: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Of a tile (queries, keys), or TRANSPOSED: the weights as the values got them, the gradient of the scores as the
    softmax took them, that of the scaled products, which are seen, and weight times (its gradient less delta)."""
    ROWS: tl.constexpr = q.shape[0]
    COLS: tl.constexpr = k.shape[0]
    precise: tl.constexpr = q.dtype == tl.float32
    high, low, delta, added = of_rows
    if TRANSPOSED:
        row = first_row + tl.arange(0, ROWS)[None, :]
        col = first_col + tl.arange(0, COLS)[:, None]
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        high, low, delta, added = high[None, :], low[None, :], delta[None, :], added[None, :]
    else:
        row = first_row + tl.arange(0, ROWS)[:, None]
        col = first_col + tl.arange(0, COLS)[None, :]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        high, low, delta, added = high[:, None], low[:, None], delta[:, None], added[:, None]
    s, capped = bend(
        s, row, col, (first_row, first_col), limits, numbers, dense, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, BEND, EDGE,
        precise,
    )  # fmt: skip
    exponent = s * numbers[1] - high
    if precise:
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


@triton.jit(do_not_specialize=_PLAIN)
def attention_statistics_kernel(
    query, key, value, output, grad_output, logsumexp, grad_logsumexp, statistics, mask, key_lengths, slopes,
    sink, seed, rows, heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, g_b, g_h, g_s, m_b, m_h, m_q, m_k,
    lengths_b, slopes_b, slopes_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
    UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PRECISION: tl.constexpr, ADDED: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """statistics (4, B, H, Sq) float32: the log-sum-exp as an exponent of 2, its part and the rest; delta, the sum of
    weight times gradient; the log-sum-exp's gradient (with ADDED).

    delta is the product of output and gradient or, FROM_WEIGHTS, summed over the weights themselves, which the rounding
    of the output does not reach. Grid: (B * H * blocks of BLOCK_M queries,).
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    start, bh = program % blocks * BLOCK_M, program // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    first_of_head = bh.to(tl.int64) * queries
    row = start + tl.arange(0, BLOCK_M)
    there = row < queries
    sums = tl.load(logsumexp + first_of_head + row, mask=there, other=0.0)
    exponent = sums * 1.4426950408889634
    high = exponent.to(tl.float32)
    low = (exponent - high.to(tl.float64)).to(tl.float32)
    # A row that saw nothing has weights 0, whatever its scores; one whose scores are infinite has NaN.
    infinite = tl.abs(high) == float("inf")
    high = tl.where(infinite, tl.where(high < 0.0, float("inf"), float("nan")), high)
    low = tl.where(infinite, 0.0, low)
    place = statistics + first_of_head + row
    rows = tl.cast(rows, tl.int64)
    tl.store(place, high, mask=there)
    tl.store(place + rows, low, mask=there)
    if ADDED:
        added = tl.load(grad_logsumexp + first_of_head + row, mask=there, other=0.0)
        tl.store(place + 3 * rows, added.to(tl.float32), mask=there)
    grad = load_rows(grad_output + b * g_b + h * g_h, g_s, start, queries, DV, BLOCK_DV, BLOCK_M, True)
    if FROM_WEIGHTS:
        keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
        slope = slope_of(slopes, b, h, slopes_b, slopes_h, ALIBI)
        limits = (queries, keys, diagonal, left, right)
        numbers = (scale, unit, softcap, slope)
        dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64))
        q = load_rows(query + b * q_b + h * q_h, q_s, start, queries, D, BLOCK_D, BLOCK_M, True)
        last = tl.minimum(start + BLOCK_M, queries) - 1
        tiles = key_tiles(start, last, limits, LEFT, RIGHT, BLOCK_N)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        nothing = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(tiles[0], tiles[3], BLOCK_N):
            k = load_rows(key + b * k_b + h // group * k_h, k_s, first, keys, D, BLOCK_D, BLOCK_N, True)
            v = load_rows(value + b * v_b + h // group * v_h, v_s, first, keys, DV, BLOCK_DV, BLOCK_N, True)
            found = _gradients(
                q, grad, k, v, (high, low, nothing, nothing), start, first, limits, numbers, dense,
                (tl.cast(seed, tl.int64), bh, drop_below), keep_scale, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND,
                False, PRECISION, True, False,
            )  # fmt: skip
            delta += tl.sum(found[4], 1)
    else:
        out = load_rows(output + b * o_b + h * o_h, o_s, start, queries, DV, BLOCK_DV, BLOCK_M, True)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(place + 2 * rows, delta, mask=there)


@triton.jit
def _query_step(
    state, q, grad, of_rows, start, first, key, value, grad_scores, keys_apart, limits, numbers, dense, dropout,
    keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BEND: tl.constexpr, ADDED: tl.constexpr, MASK_GRAD: tl.constexpr,
    CENTRE: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds to a block of queries' gradient what the keys from `first` give. state: (gradient over the scale, with
    CENTRE the sum of the scores' gradients)."""
    acc, rest = state
    k = load_rows(key[0], key[1], first, limits[1], D, BLOCK_D, BLOCK_N, EDGE)
    v = load_rows(value[0], value[1], first, limits[1], DV, BLOCK_DV, BLOCK_N, EDGE)
    _, ds, inner, seen, through = _gradients(
        q, grad, k, v, of_rows, start, first, limits, numbers, dense, dropout, keep_scale, LEFT, RIGHT, MASK, SOFTCAP,
        ALIBI, DROPOUT, BEND, ADDED, PRECISION, EDGE, False,
    )  # fmt: skip
    if CENTRE:
        rest = rest + tl.sum(through, 1)
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
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BEND: tl.constexpr, ADDED: tl.constexpr, MASK_GRAD: tl.constexpr,
    CENTRE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Computes and stores the gradient of the queries from `start`; whether all of it is finite."""
    queries = limits[0]
    q = load_rows(query[0], query[1], start, queries, D, BLOCK_D, BLOCK_M, True)
    grad = load_rows(grad_output[0], grad_output[1], start, queries, DV, BLOCK_DV, BLOCK_M, True)
    of_rows = _load_statistics(statistics[0], statistics[1], start, queries, ADDED, BLOCK_M)
    state = (tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M,), tl.float32))
    last = tl.minimum(start + BLOCK_M, queries) - 1
    tiles = key_tiles(start, last, limits, LEFT, RIGHT, BLOCK_N)
    begin = tiles[0]
    # One loop for tiles at the edge and within: with two, registers spill.
    for first in range(begin, tiles[3], BLOCK_N):
        state = _query_step(
            state, q, grad, of_rows, start, first, key, value, grad_scores, keys_apart, limits, numbers, dense, dropout,
            keep_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND,
            ADDED, MASK_GRAD, CENTRE, PRECISION, True, EXACT,
        )  # fmt: skip
    acc, rest = state
    if CENTRE:
        # The gradients of a row's scores add up to 0 but for the rounding of the output that delta comes from. That
        # rest, times an average key as large as trained models have it, would be the largest error.
        k = load_rows(key[0], key[1], begin, limits[1], D, BLOCK_D, BLOCK_N, True).to(tl.float32)
        centre = tl.sum(k, 0) / tl.maximum(tl.minimum(limits[1] - begin, BLOCK_N), 1).to(tl.float32)
        centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
        acc = acc - rest[:, None] * centre[None, :]
    acc = acc * numbers[0]
    store_rows(grad_query[0], grad_query[1], start, queries, acc, D, BLOCK_D, BLOCK_M)
    return all_finite(acc)


@triton.jit(do_not_specialize=_PLAIN)
def attention_backward_query_kernel(
    query, key, value, grad_output, statistics, grad_query, grad_scores, mask, key_lengths, slopes, sink, seed,
    rows, heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dq_b, dq_h, dq_s, m_b, m_h, m_q, m_k,
    lengths_b, slopes_b, slopes_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
    UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PRECISION: tl.constexpr, ADDED: tl.constexpr,
    MASK_GRAD: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """The gradient of query (B, H, Sq, D) and, with MASK_GRAD, that of the scores, (B, H, Sq, Sk) float32, where a
    query may see a key. CENTRE: delta comes from the rounded output, without sinks and soft cap. Grid: (B * H * blocks
    of BLOCK_M queries,)."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    block, bh = program % blocks, program // blocks
    if RIGHT:
        block = blocks - 1 - block  # the longest first
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    kv_h = h // group
    keys_apart = tl.cast(keys, tl.int64)
    of_head = grad_scores + bh.to(tl.int64) * queries * keys_apart
    keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
    slope = slope_of(slopes, b, h, slopes_b, slopes_h, ALIBI)
    limits = (queries, keys, diagonal, left, right)
    numbers = (scale, unit, softcap, slope)
    dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64))
    dropout = (tl.cast(seed, tl.int64), bh, drop_below)
    q = (query + b * q_b + h * q_h, q_s)
    k = (key + b * k_b + kv_h * k_h, k_s)
    v = (value + b * v_b + kv_h * v_h, v_s)
    g = (grad_output + b * g_b + h * g_h, g_s)
    dq = (grad_query + b * dq_b + h * dq_h, dq_s)
    of_rows = (statistics + bh.to(tl.int64) * queries, rows)
    start = block * BLOCK_M
    finite = _query_rows(
        start, q, g, dq, k, v, of_rows, of_head, keys_apart, limits, numbers, dense, dropout, keep_scale, D, DV,
        BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND, ADDED, MASK_GRAD,
        CENTRE, PRECISION, False,
    )  # fmt: skip
    if HIDES:  # noqa: SIM102 (known to the compiler)
        if not finite:
            tl.debug_barrier()  # the same elements are stored again
            for again in range(start, tl.minimum(start + BLOCK_M, queries), 16):
                _query_rows(
                    again, q, g, dq, k, v, of_rows, of_head, keys_apart, limits, numbers, dense, dropout, keep_scale,
                    D, DV, BLOCK_D, BLOCK_DV, 16, 16, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND, ADDED,
                    MASK_GRAD, CENTRE, PRECISION, True,
                )  # fmt: skip


@triton.jit
def _key_step(
    state, k, v, start, first, query, grad_output, statistics, limits, numbers, dense, dropout, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BEND: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of the keys from `start` what the queries from `first` of one head give. state: (gradient
    of the keys over the scale, gradient of the values)."""
    dk, dv = state
    queries = limits[0]
    q = load_rows(query[0], query[1], first, queries, D, BLOCK_D, BLOCK_M, True)
    grad = load_rows(grad_output[0], grad_output[1], first, queries, DV, BLOCK_DV, BLOCK_M, True)
    of_rows = _load_statistics(statistics[0], statistics[1], first, queries, ADDED, BLOCK_M)
    p, _, inner, seen, _ = _gradients(
        q, grad, k, v, of_rows, first, start, limits, numbers, dense, dropout, keep_scale, LEFT, RIGHT, MASK, SOFTCAP,
        ALIBI, DROPOUT, BEND, ADDED, PRECISION, EDGE, True,
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
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, UNIFORM: tl.constexpr, BEND: tl.constexpr,
    ADDED: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
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
    begin, end = query_tiles(start, last, limits, LEFT, RIGHT, BLOCK_M)
    if LENGTHS:
        end = tl.where(start < keys, end, begin)
    for member in range(group):
        q = (query[0] + member * query[2], query[1])
        g = (grad_output[0] + member * grad_output[2], grad_output[1])
        of_rows = (statistics[0] + tl.cast(member, tl.int64) * queries, statistics[1])
        mask = (dense[0] + member * dense[3], dense[1], dense[2])
        drop = (seed, first_head + member, drop_below)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes[0] + member * slopes[1])
        of_head = (scale, unit, softcap, slope)
        state = (dk, dv)
        for first in range(begin, end, BLOCK_M):
            state = _key_step(
                state, k, v, start, first, q, g, of_rows, limits, of_head, mask, drop, keep_scale, D, DV, BLOCK_D,
                BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, SOFTCAP, ALIBI, DROPOUT, BEND, ADDED, PRECISION,
                LEFT or RIGHT or EXACT, EXACT,
            )  # fmt: skip
        dk, dv = state
    dk = dk * scale
    if LENGTHS:
        there = (start + tl.arange(0, BLOCK_N) < keys)[:, None]
        dk, dv = tl.where(there, dk, 0.0), tl.where(there, dv, 0.0)
    if UNIFORM:
        # Queries that see no key attend to all values alike.
        alike = tl.zeros((BLOCK_DV,), tl.float32)
        for member in range(group):
            for first in range(0, queries, BLOCK_M):
                row = first + tl.arange(0, BLOCK_M)
                of_row = statistics[0] + tl.cast(member, tl.int64) * queries + row
                empty = tl.load(of_row, mask=row < queries, other=0.0) == float("inf")
                if tl.max(tl.where(empty, 1, 0), 0) > 0:
                    grad = load_rows(
                        grad_output[0] + member * grad_output[2], grad_output[1], first, queries, DV, BLOCK_DV, BLOCK_M,
                        True,
                    )  # fmt: skip
                    alike += tl.sum(tl.where(empty[:, None], grad.to(tl.float32), 0.0), 0)
        dv += (alike / all_keys.to(tl.float32))[None, :]
    store_rows(grad_key[0], grad_key[1], start, all_keys, dk, D, BLOCK_D, BLOCK_N)
    store_rows(grad_value[0], grad_value[1], start, all_keys, dv, DV, BLOCK_DV, BLOCK_N)
    return all_finite(dk) & all_finite(dv)


@triton.jit(do_not_specialize=_PLAIN)
def attention_backward_key_kernel(
    query, key, value, grad_output, statistics, grad_key, grad_value, mask, key_lengths, slopes, sink, seed,
    rows, heads, group, queries, keys, left, right, scale, unit, softcap, drop_below, keep_scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, m_b, m_h, m_q, m_k,
    lengths_b, slopes_b, slopes_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
    UNIFORM: tl.constexpr, BEND: tl.constexpr, HIDES: tl.constexpr, PRECISION: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """The gradients of key (B, Hkv, Sk, D) and value (B, Hkv, Sk, DV). Grid: (B * Hkv * blocks of BLOCK_N keys,)."""
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_N)
    block, bh = program % blocks, program // blocks
    kv_heads = heads // group
    b, kv_h = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    h = kv_h * group
    first_head = bh * group
    all_keys = keys
    keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
    limits = (queries, keys, diagonal, left, right)
    numbers = (scale, unit, softcap, 0.0)
    m_h = tl.cast(m_h, tl.int64)
    dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64), m_h)
    dropout = (tl.cast(seed, tl.int64), drop_below)
    q = (query + b * q_b + h * q_h, q_s, tl.cast(q_h, tl.int64))
    k = (key + b * k_b + kv_h * k_h, k_s)
    v = (value + b * v_b + kv_h * v_h, v_s)
    g = (grad_output + b * g_b + h * g_h, g_s, tl.cast(g_h, tl.int64))
    dk = (grad_key + b * dk_b + kv_h * dk_h, dk_s)
    dv = (grad_value + b * dv_b + kv_h * dv_h, dv_s)
    of_rows = (statistics + first_head.to(tl.int64) * queries, rows)
    of_heads = (slopes + b * slopes_b + h * slopes_h, slopes_h)
    start = block * BLOCK_N
    finite = _key_rows(
        start, q, k, v, g, dk, dv, of_rows, of_heads, heads, first_head, group, all_keys, limits, numbers, dense,
        dropout, keep_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, LENGTHS, MASK, SOFTCAP, ALIBI,
        DROPOUT, UNIFORM, BEND, ADDED, PRECISION, False,
    )  # fmt: skip
    if HIDES:  # noqa: SIM102 (known to the compiler)
        if not finite:
            tl.debug_barrier()  # the same elements are stored again
            for again in range(start, tl.minimum(start + BLOCK_N, all_keys), 16):
                _key_rows(
                    again, q, k, v, g, dk, dv, of_rows, of_heads, heads, first_head, group, all_keys, limits, numbers,
                    dense, dropout, keep_scale, D, DV, BLOCK_D, BLOCK_DV, 16, 16, LEFT, RIGHT, LENGTHS, MASK, SOFTCAP,
                    ALIBI, DROPOUT, UNIFORM, BEND, ADDED, PRECISION, True,
                )  # fmt: skip
