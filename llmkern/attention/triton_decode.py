"""The attention on a cache in Triton: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023). The keys of a sequence are cut
into pieces, each the work of a program; a second kernel joins what they found."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_rules import all_finite, bend, key_limit, key_start, log2_in_parts


@triton.jit
def places(cache, b, col, there, PAGED: tl.constexpr):
    """Page (or sequence) and row within it, int64, of the tokens `col`. cache: (table, step of a sequence, page size,
    pages). A page outside the pool, which only the device could find, is read as the nearest."""
    table, table_b, size, count = cache
    page, row = col.to(tl.int64) * 0 + b, col.to(tl.int64)
    if PAGED:
        number = col // size
        row = (col - number * size).to(tl.int64)
        page = tl.load(table + b * table_b + number, mask=there, other=0).to(tl.int64)
        page = tl.minimum(tl.maximum(page, 0), count - 1)
    return page, row


@triton.jit
def _row_by_row(acc, weights, seen, x, offsets, there, DV: tl.constexpr, BLOCK_DV: tl.constexpr, COUNT: tl.constexpr):
    """acc + weights @ values, where what is not seen has no part: in tl.dot, 0 times infinity is NaN."""
    at = tl.arange(0, COUNT)
    c = tl.arange(0, BLOCK_DV)
    for j in range(COUNT):
        weight = tl.sum(tl.where(at[None, :] == j, weights, 0.0), 1)
        counts = tl.max(tl.where((at[None, :] == j) & there[None, :] & seen, 1, 0), 1)
        is_there = tl.max(tl.where((at == j) & there, 1, 0), 0)
        offset = tl.sum(tl.where(at == j, offsets, 0), 0)
        inside = (c < DV) & (c * 0 + is_there > 0)
        v = tl.load(x + offset + c, mask=inside, other=0.0).to(tl.float32)
        acc = tl.where(counts[:, None] > 0, acc + weight[:, None] * v[None, :], acc)
    return acc


@triton.jit
def _power(x, NATURAL: tl.constexpr):
    """2^x or, NATURAL, e^x: float32's exponents stay in the scores' own units, since the largest one's rounding would
    be an error of the log-sum-exp."""
    return tl.exp2(x * 1.4426950408889634 if NATURAL else x)


@triton.jit
def _piece(
    q, row, low, high, b, key, value, k_scale, v_scale, cache, limits, numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BEND: tl.constexpr, PAGED: tl.constexpr, INT8: tl.constexpr, NATURAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(values summed, sum of the weights, largest exponent as `_power` takes it) of the keys from low to high."""
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    unit = numbers[1]
    for first in range(low, high, BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        there = col < high
        page, place = places(cache, b, col, there, PAGED)
        k_at = page * key[1] + place * key[2]
        k = tl.load(key[0] + k_at[:, None] + d, mask=there[:, None] & (d < D), other=0)
        if INT8:
            k = k.to(tl.float32)  # which every integer of 8 bits is exactly, and from which Triton's interpreter rounds
        k = k.to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if INT8:
            s = s * tl.load(k_scale[0] + page * k_scale[1] + place * k_scale[2], mask=there, other=0.0)[None, :]
        s, _ = bend(
            s, row[:, None], col[None, :], (0, 0), limits, numbers, (key[0], 0, 0), LEFT, RIGHT, 0, SOFTCAP, ALIBI,
            BEND, True, NATURAL,
        )  # fmt: skip
        seen = there[None, :] & (s != float("-inf"))
        s = tl.where(there[None, :], s, float("-inf"))
        if NATURAL:
            now = tl.maximum(largest, tl.max(s, 1))
        else:
            now = tl.maximum(largest, tl.max(s, 1) * unit if BEND else tl.max(s * unit, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        exponent = s - shift[:, None] if NATURAL else s * unit - shift[:, None]
        p = _power(tl.where(seen, exponent, float("-inf")), NATURAL)
        again = _power(largest - shift, NATURAL)
        total = total * again + tl.sum(p, 1)
        acc = acc * again[:, None]
        largest = now
        v_at = page * value[1] + place * value[2]
        if INT8:
            of_values = tl.load(v_scale[0] + page * v_scale[1] + place * v_scale[2], mask=there, other=0.0)[None, :]
            p = tl.where(seen, p * of_values, 0.0)
        if EXACT:
            acc = _row_by_row(acc, p, seen, value[0], v_at, there, DV, BLOCK_DV, BLOCK_N)
        else:
            v = tl.load(value[0] + v_at[:, None] + dv, mask=there[:, None] & (dv < DV), other=0)
            if INT8:
                v = v.to(tl.float32).to(q.dtype)
                # Each row's largest weight is rounded to 16 bits as 1, so that small scales do not underflow.
                most = tl.max(tl.abs(p), 1)
                most = tl.where(most > 0.0, most, 1.0)
                acc += tl.dot((p / most[:, None]).to(q.dtype), v, input_precision="ieee") * most[:, None]
            else:
                acc = tl.dot(p.to(q.dtype), v, acc, input_precision="ieee")
    return acc, total, largest


@triton.jit
def _with_sink(total, largest, logit, NATURAL: tl.constexpr):
    """Takes a logit without a value in: (sum, largest exponent, what the values are multiplied by)."""
    exponent = logit if NATURAL else logit * 1.4426950408889634
    now = tl.maximum(largest, exponent)
    shift = tl.where(now == float("-inf"), 0.0, now)
    again = _power(largest - shift, NATURAL)
    return total * again + _power(exponent - shift, NATURAL), now, again


@triton.jit
def _finish(total, largest, NATURAL: tl.constexpr):
    """(log-sum-exp in float64, the factor of the values); zeros for a row without keys."""
    empty = total == 0.0
    whole = tl.where(empty, 1.0, total)
    if NATURAL:
        exponent = largest.to(tl.float64) + log2_in_parts(whole) * 0.6931471805599453
    else:
        exponent = (largest.to(tl.float64) + log2_in_parts(whole)) * 0.6931471805599453
    return tl.where(empty, float("-inf"), exponent), tl.div_rn(whole * 0.0 + 1.0, whole)


@triton.jit(
    do_not_specialize=[
        "heads", "group", "queries", "capacity", "added", "splits", "left", "right", "table_b", "page_size", "pages",
        "lengths_b", "slopes_b", "slopes_h",
    ]
)  # fmt: skip
def attention_decode_kernel(
    query, key, value, output, logsumexp, workspace, k_scale, v_scale, lengths, table, slopes, sink,
    heads, group, queries, capacity, added, splits, all_rows, left, right, scale, unit, softcap, page_size, pages,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, ks_b, ks_s, ks_h, vs_b, vs_s, vs_h,
    table_b, lengths_b, slopes_b, slopes_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LENGTHS: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, SINK: tl.constexpr, BEND: tl.constexpr, PAGED: tl.constexpr, INT8: tl.constexpr,
    NATURAL: tl.constexpr, ORDERED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A piece of the keys for BLOCK_M rows, the queries times the heads of a group.

    Grid: (splits, blocks of rows, B * Hkv) as one number. Without SPLIT output (B, Sq, H, DV) and logsumexp (B, H, Sq)
    float64 are written, else a piece of the workspace, float32: DV values for each of all_rows (B Sq H) and piece, then
    their largest exponents, then their sums. Strides count elements; last dimensions are contiguous. ORDERED: queries
    of a block may see different keys, so that results that are not finite are made again without the matrix units.
    """
    program = tl.program_id(0)
    piece, program = program % splits, program // splits
    rows = queries * group
    blocks = tl.cdiv(rows, BLOCK_M)
    start, bh = program % blocks * BLOCK_M, program // blocks
    kv_heads = heads // group
    b, kv_h = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    keys = capacity
    if LENGTHS:
        keys = tl.minimum(tl.maximum(tl.load(lengths + b * lengths_b).to(tl.int64) + added, 0), capacity).to(tl.int32)
    limits = (queries, keys, keys - queries, left, right)
    r = start + tl.arange(0, BLOCK_M)
    i = r // group
    h = kv_h * group + (r - i * group)
    inside = r < rows
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    at = i.to(tl.int64) * q_s + h * q_h
    q = tl.load(query + b * q_b + at[:, None] + d, mask=inside[:, None] & (d < D), other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + b * slopes_b + h * slopes_h, mask=inside, other=0.0)[:, None]
    begin = key_start(start // group, limits, LEFT)
    end = key_limit((tl.minimum(start + BLOCK_M, rows) - 1) // group, limits, RIGHT)
    of_piece = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_N) * BLOCK_N
    low = tl.minimum(begin + piece * of_piece, end)
    high = tl.minimum(low + of_piece, end)
    k = (key + kv_h * k_h, tl.cast(k_b, tl.int64), tl.cast(k_s, tl.int64))
    v = (value + kv_h * v_h, tl.cast(v_b, tl.int64), tl.cast(v_s, tl.int64))
    ks = (k_scale + kv_h * ks_h, tl.cast(ks_b, tl.int64), tl.cast(ks_s, tl.int64))
    vs = (v_scale + kv_h * vs_h, tl.cast(vs_b, tl.int64), tl.cast(vs_s, tl.int64))
    cache = (table, tl.cast(table_b, tl.int64), page_size, pages)
    numbers = (scale, unit, softcap, slope)
    acc, total, largest = _piece(
        q, i, low, high, b, k, v, ks, vs, cache, limits, numbers, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT,
        RIGHT, SOFTCAP, ALIBI, BEND, PAGED, INT8, NATURAL, False,
    )  # fmt: skip
    if ORDERED:  # noqa: SIM102 (known to the compiler)
        if not all_finite(acc):
            acc, total, largest = _piece(
                q, i, low, high, b, k, v, ks, vs, cache, limits, numbers, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                LEFT, RIGHT, SOFTCAP, ALIBI, BEND, PAGED, INT8, NATURAL, True,
            )  # fmt: skip
    out_row = (b * queries + i) * heads + h
    if SPLIT:
        part = out_row * splits + piece
        tl.store(workspace + part[:, None] * DV + dv, acc, mask=inside[:, None] & (dv < DV))
        sums = workspace + tl.cast(all_rows, tl.int64) * splits * DV
        tl.store(sums + part, largest, mask=inside)
        tl.store(sums + tl.cast(all_rows, tl.int64) * splits + part, total, mask=inside)
    else:
        if SINK:
            logit = tl.load(sink + h, mask=inside, other=0.0)
            total, largest, again = _with_sink(total, largest, logit, NATURAL)
            acc = acc * again[:, None]
        lse, factor = _finish(total, largest, NATURAL)
        acc = acc * factor[:, None]
        tl.store(output + out_row[:, None] * DV + dv, acc.to(output.dtype.element_ty), mask=inside[:, None] & (dv < DV))
        tl.store(logsumexp + (b * heads + h) * queries + i, lse, mask=inside)


@triton.jit(do_not_specialize=["heads", "queries", "splits"])
def attention_combine_kernel(
    workspace, output, logsumexp, sink, heads, queries, splits, all_rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr, SINK: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Joins the pieces of a row of the output. Grid: (B Sq H,). SPLITS: a power of two of at least `splits`."""
    number = tl.program_id(0).to(tl.int64)
    h = number % heads
    token = number // heads
    b, i = token // queries, token % queries
    part = number * splits
    sums = workspace + tl.cast(all_rows, tl.int64) * splits * DV
    s = tl.arange(0, SPLITS)
    exponents = tl.load(sums + part + s, mask=s < splits, other=float("-inf"))
    totals = tl.load(sums + tl.cast(all_rows, tl.int64) * splits + part + s, mask=s < splits, other=0.0)
    # Of one element, as what is joined needs tensors.
    largest = tl.max(exponents[None, :], 1)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(totals[None, :] * _power(exponents[None, :] - shift[:, None], NATURAL), 1)
    dv = tl.arange(0, BLOCK_DV)[None, :]
    acc = tl.zeros((1, BLOCK_DV), tl.float32)
    for first in range(0, splits, 8):
        j = first + tl.arange(0, 8)
        there = j < splits
        weight = _power(tl.load(sums + part + j, mask=there, other=float("-inf")) - shift, NATURAL)
        x = tl.load(workspace + (part + j)[:, None] * DV + dv, mask=there[:, None] & (dv < DV), other=0.0)
        acc += tl.sum(weight[:, None] * x, 0)[None, :]
    if SINK:
        total, largest, again = _with_sink(total, largest, tl.load(sink + h), NATURAL)
        acc = acc * again[:, None]
    lse, factor = _finish(total, largest, NATURAL)
    one = tl.arange(0, 1)
    acc = acc * factor[:, None]
    tl.store(output + number * DV + dv, acc.to(output.dtype.element_ty), mask=dv < DV)
    tl.store(logsumexp + (b * heads + h) * queries + i + one, lse)
