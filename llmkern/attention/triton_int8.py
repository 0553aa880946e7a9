"""Attention of quantised queries and keys in Triton, after Zhang et al. 2024, "SageAttention: Accurate 8-Bit Attention
for Plug-and-Play Inference Acceleration", sections 4.2 (keys less their average) and 4.3: what makes the integers, and
the entry into the forward's loop.

The integers and scales are those of llmkern.attention.reference.int8, bit for bit, where these kernels are compiled
without fusing products and sums. A scale belongs to one row, not to a block of them: so a row's integers do not depend
on the tiles, and a row that is not finite spoils no other.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_forward import _rows
from llmkern.attention.triton_rules import PLAIN, load_rows, sequence, slope_of
from llmkern.int8.triton_kernels import round_to_even, usable


@triton.jit(do_not_specialize=["heads", "rows", "keys", "chunks", "lengths_b"])
def attention_key_sums_kernel(
    x, key_lengths, sums, heads, rows, keys, chunks, x_b, x_h, x_s, lengths_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LENGTHS: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr,
    HALVINGS: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """sums (B, Hkv, chunks, D) float32: of each CHUNK rows of x (B, Hkv, rows, D), over the keys that exist.

    Grid: (B * Hkv * chunks,). AVERAGE: divides by how many keys there are. Of keys in several chunks a second launch
    takes the sums of the first. LANES = 2^HALVINGS sums in the order of the rows, then by halves: the reference's
    order, since the sum decides integers. What is not finite counts as 0.
    """
    program = tl.program_id(0)
    first, bh = program % chunks * CHUNK, program // chunks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    count, _ = sequence(key_lengths, b, lengths_b, keys, keys, LENGTHS, False)
    end = tl.minimum(tl.minimum(rows, count), first + CHUNK)
    base = x + b * x_b + h * x_h
    total = tl.zeros((LANES, BLOCK_D), tl.float32)
    for at in range(first, end, LANES):
        v = load_rows(base, x_s, at, end, D, BLOCK_D, LANES, True).to(tl.float32)
        total += tl.where(tl.abs(v) < float("inf"), v, 0.0)
    for i in tl.static_range(HALVINGS):
        upper, lower = tl.split(tl.permute(tl.reshape(total, (2, LANES >> (i + 1), BLOCK_D)), (1, 2, 0)))
        total = upper + lower
    result = tl.reshape(total, (BLOCK_D,))
    if AVERAGE:
        result = tl.div_rn(result, (tl.maximum(count, 1) + tl.zeros((BLOCK_D,), tl.int32)).to(tl.float32))
    c = tl.arange(0, BLOCK_D)
    tl.store(sums + program.to(tl.int64) * D + c, result, mask=c < D)


@triton.jit(do_not_specialize=["heads", "group", "rows"])
def attention_quantize_kernel(
    x, average, digits, scale, lift, heads, group, rows, x_b, x_h, x_s,
    D: tl.constexpr, PITCH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SMOOTH: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """digits (B, H, rows, PITCH) int8, zeros behind D, and scale (B, H, rows) float32 of the rows of x (B, H, rows, D).

    Grid: (B * H * blocks of ROWS rows,). average (B, H / group, 1, D) float32 with SMOOTH: is subtracted from KEYS;
    of queries its product with each, 0 without, is stored to lift (B, H, rows).
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    start, bh = program % blocks * ROWS, program // blocks
    b, h, bh = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64), bh.to(tl.int64)
    v = load_rows(x + b * x_b + h * x_h, x_s, start, rows, D, BLOCK_D, ROWS, True).to(tl.float32)
    c = tl.arange(0, BLOCK_D)
    row = start + tl.arange(0, ROWS)
    to = bh * rows + row
    of_row = tl.zeros((ROWS,), tl.float32)
    if SMOOTH:
        of_keys = tl.load(average + (b * (heads // group) + h // group) * D + c, mask=c < D, other=0.0)[None, :]
        if KEYS:
            v = v - of_keys
        else:
            of_row = tl.sum(v * of_keys, 1)
    if not KEYS:
        tl.store(lift + to, of_row, mask=row < rows)
    s = usable(tl.div_rn(tl.max(tl.abs(v), 1), 127.0))
    scaled = round_to_even(v * tl.div_rn(1.0, s)[:, None])  # of a finite row within 127, as its scale is
    s += tl.sum(v * 0.0, 1)  # NaN of a row that is not finite
    integers = tl.where((s == s)[:, None], scaled, 0.0).to(tl.int8)
    tl.store(digits + to[:, None] * PITCH + c[None, :], integers, mask=(row[:, None] < rows) & (c[None, :] < PITCH))
    tl.store(scale + to, s, mask=row < rows)


@triton.jit(do_not_specialize=PLAIN)
def attention_int8_kernel(
    query, query_scale, lift, key, key_scale, value, output, logsumexp, mask, key_lengths, slopes, sink,
    heads, group, queries, keys, left, right, scale, unit, softcap,
    v_b, v_h, v_s, o_b, o_h, o_s, m_b, m_h, m_q, m_k, lengths_b, slopes_b, slopes_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr, BEND: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """As attention_forward_kernel, of query (B, H, Sq, D) and key (B, Hkv, Sk, D) int8, which are contiguous.

    query_scale, lift (B, H, Sq) and key_scale (B, Hkv, Sk): what attention_quantize_kernel stored.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    block, bh = program % blocks, program // blocks
    if RIGHT:
        block = blocks - 1 - block  # the longest first
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    kv_h = h // group
    of_keys, of_queries = (b * (heads // group) + kv_h) * keys, bh.to(tl.int64) * queries
    all_keys = keys
    keys, diagonal = sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS, BOTTOM_RIGHT)
    limits = (queries, keys, diagonal, left, right)
    numbers = (scale, unit, softcap, slope_of(slopes, b, h, slopes_b, slopes_h, ALIBI))
    dense = (mask + b * m_b + h * m_h, tl.cast(m_q, tl.int64), tl.cast(m_k, tl.int64))
    q = (query + of_queries * D, D, query_scale + of_queries, lift + of_queries)
    k = (key + of_keys * D, D, key_scale + of_keys)
    v = (value + b * v_b + kv_h * v_h, v_s)
    o = (output + b * o_b + h * o_h, o_s)
    lse = logsumexp + of_queries
    start = block * BLOCK_M
    finite = _rows(
        start, q, k, v, o, lse, sink + h, all_keys, limits, numbers, dense, (0, 0, 0), 1.0, D, DV, BLOCK_D, BLOCK_DV,
        BLOCK_M, BLOCK_N, LEFT, RIGHT, MASK, False, SOFTCAP, ALIBI, SINK, False, False, BEND, "ieee", False, False,
    )  # fmt: skip
    if HIDES:  # noqa: SIM102 (known to the compiler)
        if not finite:
            tl.debug_barrier()  # the same elements are stored again
            for again in range(start, tl.minimum(start + BLOCK_M, queries), 16):
                _rows(
                    again, q, k, v, o, lse, sink + h, all_keys, limits, numbers, dense, (0, 0, 0), 1.0, D, DV, BLOCK_D,
                    BLOCK_DV, 16, 16, LEFT, RIGHT, MASK, False, SOFTCAP, ALIBI, SINK, False, False, BEND, "ieee", True,
                    False,
                )  # fmt: skip
