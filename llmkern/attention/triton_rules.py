"""What Triton's attention kernels share: the rules between scores and softmax, tiles of rows, products that skip.

Offsets inside a tile have 32 bits, those of tiles 64: the launcher refuses rows too far apart for that.

Everything here is called by kernels. `row` and `col` number the queries and keys of a tile of scores and broadcast
against it, so that the same rules serve scores (queries, keys) and their transpose. Some arguments are tuples:

limits: (queries, keys, diagonal, left, right): query i stands at the place of key i + diagonal and sees the keys from
    i + diagonal - left to i + diagonal + right, below `keys` (csrc/attention/key_limits.h has the same for C++).
numbers: (scale, unit, softcap, slope): a score as `bend` gives it, times `unit`, is an exponent of 2.
corner: the first query and key of the tile.
dense: (address for this batch and head, step of a query, step of a key, whether it must be read).
dropout: (seed, head counted through the batches, drop_below).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

#: Arguments of the kernels of whole sequences for whose values none is compiled anew.
PLAIN = [
    "heads", "group", "queries", "keys", "left", "right", "seed", "drop_below", "m_b", "m_h", "m_q", "m_k", "lengths_b",
    "slopes_b", "slopes_h", "rows", "sequences", "t_b", "t_h", "t_q", "t_k",
]  # fmt: skip


@triton.jit
def sequence(key_lengths, b, lengths_b, queries, keys, LENGTHS: tl.constexpr, BOTTOM_RIGHT: tl.constexpr):
    """(keys, diagonal) of a sequence of the batch: how many keys there are, and the place of its first query."""
    if LENGTHS:
        keys = tl.minimum(tl.maximum(tl.load(key_lengths + b * lengths_b), 0), keys).to(tl.int32)
    diagonal = keys - queries if BOTTOM_RIGHT else keys * 0
    return keys, diagonal


@triton.jit
def slope_of(slopes, b, h, slopes_b, slopes_h, ALIBI: tl.constexpr):
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + b * slopes_b + h * slopes_h)
    return slope


@triton.jit
def key_limit(row, limits, RIGHT: tl.constexpr):
    """No query up to `row` sees a key at or past this one."""
    _, keys, diagonal, _, right = limits
    end = keys
    if RIGHT:
        end = tl.minimum(tl.maximum(row + diagonal + right + 1, 0), keys)
    return end


@triton.jit
def key_start(row, limits, LEFT: tl.constexpr):
    """No query from `row` on sees a key before this one."""
    _, keys, diagonal, left, _ = limits
    start = keys * 0
    if LEFT:
        start = tl.minimum(tl.maximum(row + diagonal - left, 0), keys)
    return start


@triton.jit
def key_tiles(first, last, limits, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """(begin, inner begin, inner end, end): the queries from `first` to `last` see keys of the tiles from begin to end
    alone, and all keys of those from inner begin to inner end. Tiles begin at multiples of BLOCK."""
    end = key_limit(last, limits, RIGHT)
    begin = key_start(first, limits, LEFT) // BLOCK * BLOCK
    inner_begin = tl.minimum(tl.cdiv(key_start(last, limits, LEFT), BLOCK), tl.cdiv(end, BLOCK)) * BLOCK
    inner_begin = tl.maximum(inner_begin, begin)
    inner_end = tl.maximum(key_limit(first, limits, RIGHT) // BLOCK * BLOCK, inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit
def query_tiles(first, last, limits, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """(begin, inner begin, inner end, end): no queries but those from begin to end see a key from `first` to `last`,
    and those of the tiles from inner begin to inner end, which are whole, see all of them. Tiles begin at multiples of
    BLOCK."""
    queries, _, diagonal, left, right = limits
    begin, end = queries * 0, queries
    inner_begin, inner_end = begin, queries
    if RIGHT:
        begin = tl.minimum(tl.maximum(first - diagonal - right, 0), queries) // BLOCK * BLOCK
        inner_begin = tl.cdiv(tl.minimum(tl.maximum(last - diagonal - right, 0), queries), BLOCK) * BLOCK
    if LEFT:
        end = tl.minimum(tl.maximum(last - diagonal + left + 1, 0), queries)
        inner_end = tl.minimum(tl.maximum(first - diagonal + left + 1, 0), queries)
    inner_begin = tl.minimum(inner_begin, tl.cdiv(end, BLOCK) * BLOCK)
    inner_begin = tl.maximum(inner_begin, begin)
    inner_end = tl.maximum(inner_end // BLOCK * BLOCK, inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit
def load_rows(
    base, step, first, limit, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr
):  # fmt: skip
    """(BLOCK, BLOCK_WIDTH) of the rows from `first`: zeros behind the width and, with CHECK, from row `limit` on."""
    r = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK_WIDTH)[None, :]
    where = base + tl.cast(first, tl.int64) * step + (r * tl.cast(step, tl.int32) + c)
    if CHECK:
        if WIDTH < BLOCK_WIDTH:
            tile = tl.load(where, mask=(first + r < limit) & (c < WIDTH), other=0.0)
        else:
            tile = tl.load(where, mask=(first + r < limit) & (c >= 0), other=0.0)
    elif WIDTH < BLOCK_WIDTH:
        tile = tl.load(where, mask=(r >= 0) & (c < WIDTH), other=0.0)
    else:
        tile = tl.load(where)
    return tile


@triton.jit
def store_rows(
    base, step, first, limit, tile, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Stores a (BLOCK, BLOCK_WIDTH) tile to the rows from `first` that lie below `limit`."""
    r = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK_WIDTH)[None, :]
    where = base + tl.cast(first, tl.int64) * step + (r * tl.cast(step, tl.int32) + c)
    tl.store(where, tile.to(base.dtype.element_ty), mask=(first + r < limit) & (c < WIDTH))


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """By the exponential, with an absolute error near 2^-23; PRECISE: near 0 by the series, with a relative one."""
    t = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * x) + 1.0)
    if PRECISE:
        y = x * x
        series = -0.0014558343870513183 * y + 0.003592128036572481
        series = series * y - 0.008863235529902197
        series = series * y + 0.021869488536155203
        series = series * y - 0.05396825396825397
        series = series * y + 0.13333333333333333
        series = series * y - 0.3333333333333333
        t = tl.where(tl.abs(x) < 0.5, x + x * y * series, t)
    return t


@triton.jit
def bend(
    s, row, col, corner, limits, numbers, dense, LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BEND: tl.constexpr, EDGE: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """The scores by all rules before the softmax, from the products of queries and keys; and the soft cap's tanh.

    MASK: 0 none, 1 boolean (bytes), 2 added. BEND: the scale is applied here, since a rule changes scaled scores.
    EDGE: some of the tile may lie beyond the limits.
    """
    queries, keys, diagonal, left, right = limits
    scale, _, softcap, slope = numbers
    capped = s
    if BEND:
        s = s * scale
    if SOFTCAP:
        capped = tanh(s * (1.0 / softcap), PRECISE)
        s = softcap * capped
    if ALIBI:
        s = s - slope * tl.abs(row + diagonal - col).to(tl.float32)
    if EDGE:
        seen = col < keys
        if RIGHT:
            seen = seen & (col <= row + diagonal + right)
        if LEFT:
            seen = seen & (col >= row + diagonal - left)
    if MASK > 0:
        base, step_row, step_col, to_read = dense
        first_row, first_col = corner
        where = base + (tl.cast(first_row, tl.int64) * step_row + tl.cast(first_col, tl.int64) * step_col)
        where = where + ((row - first_row) * step_row.to(tl.int32) + (col - first_col) * step_col.to(tl.int32))
        # No branch: of a tile that is not read nothing is loaded.
        there = (row < queries) & (col < tl.where(to_read, keys, 0))
        if MASK == 1:
            allowed = tl.load(where, mask=there, other=1) != 0
        else:
            added = tl.load(where, mask=there, other=0.0).to(tl.float32)
            s = s + added
            allowed = added != float("-inf")
        s = tl.where(allowed, s, float("-inf"))
    if EDGE:
        s = tl.where(seen, s, float("-inf"))
    return s, capped


@triton.jit
def exponents(sums):
    """What to subtract from exponents of 2 for weights, of float64 log-sum-exps: a part in float32, and the rest.

    A row that saw nothing has weights 0, whatever its scores; one whose scores are infinite has NaN.
    """
    exponent = sums * 1.4426950408889634
    high = exponent.to(tl.float32)
    low = (exponent - high.to(tl.float64)).to(tl.float32)
    infinite = tl.abs(high) == float("inf")
    high = tl.where(infinite, tl.where(high < 0.0, float("inf"), float("nan")), high)
    return high, tl.where(infinite, 0.0, low)


@triton.jit
def kept(first_row, first_col, dropout, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS): which weights stay. Weight (i, j) is word j % 4 of Philox4x32-10 at (j // 4, i, head, 0); first_col
    is a multiple of 4 (Salmon et al. 2011; llmkern/random.py)."""
    seed, head, drop_below = dropout
    four = (first_col // 4 + tl.arange(0, COLS // 4))[None, :] + tl.zeros((ROWS, 1), tl.int32)
    row = (first_row + tl.arange(0, ROWS))[:, None] + tl.zeros((1, COLS // 4), tl.int32)
    zero = tl.zeros((ROWS, COLS // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, four, row, zero + head, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLS))
    return words.to(tl.uint32, bitcast=True) >= tl.cast(drop_below, tl.uint32)


@triton.jit
def multiply_exactly(
    tile, base, step, first, limit, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """(R, COUNT): the products of `tile` (R, BLOCK_WIDTH) with the rows `first` to first + COUNT of `base`, one at a
    time. For the rare tiles that hold infinities or NaN: by tl.dot, whose operands would lie in registers as long as
    the tile goes through all rows, they would need more registers than all other tiles, and make the kernel spill."""
    at = tl.arange(0, COUNT)[None, :]
    c = tl.arange(0, BLOCK_WIDTH)
    step = tl.cast(step, tl.int64)
    tile = tile.to(tl.float32)
    found = tl.zeros((tile.shape[0], COUNT), tl.float32)
    for j in range(COUNT):
        there = (c < WIDTH) & (c * 0 + first + j < limit)
        x = tl.load(base + tl.cast(first + j, tl.int64) * step + c, mask=there, other=0.0).to(tl.float32)
        found = tl.where(at == j, tl.sum(tile * x[None, :], 1)[:, None], found)
    return found


@triton.jit
def add_exactly(
    acc, weights, seen, base, step, first, limit, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """acc + weights @ rows, where what is not seen has no part: in a product by tl.dot, 0 times infinity is NaN.

    weights, seen: (R, COUNT); the rows `first` to first + COUNT of `base`, one at a time. For the rare tiles that hold
    infinities or NaN.
    """
    at = tl.arange(0, COUNT)[None, :]
    c = tl.arange(0, BLOCK_WIDTH)
    step = tl.cast(step, tl.int64)
    for j in range(COUNT):
        weight = tl.sum(tl.where(at == j, weights, 0.0), 1)
        counts = tl.max(tl.where((at == j) & (first + at < limit) & seen, 1, 0), 1)
        there = (c < WIDTH) & (c * 0 + first + j < limit)
        x = tl.load(base + tl.cast(first + j, tl.int64) * step + c, mask=there, other=0.0).to(tl.float32)
        acc = tl.where(counts[:, None] > 0, acc + weight[:, None] * x[None, :], acc)
    return acc


@triton.jit
def all_finite(tile):
    """Whether a tile of two dimensions holds neither infinities nor NaN."""
    return tl.min(tl.min(tl.where(tl.abs(tile) < float("inf"), 1, 0), 1), 0) > 0


@triton.jit
def log2_in_parts(x):
    """log2 of positive finite float32 numbers in float64, to about 2^-31 absolutely; NaN of NaN.

    x = 2^e f with f near 1; ln f = 2 artanh z, z = (f - 1) / (f + 1), by its series, z in two parts of float32, since
    few GPUs have many units for float64.
    """
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # so that f lies between sqrt(1/2) and sqrt(2)
    f = (bits - (e << 23)).to(tl.float32, bitcast=True)
    under, over = f - 1.0, f + 1.0
    z = under / over
    # over may be rounded: what z leaves of f - 1 = z (f + 1) is exact by multiply-adds.
    rest = (tl.fma(-z, f, under) - z) / over
    y = z * z
    tail = 0.15384615384615385 * y + 0.18181818181818182
    tail = tail * y + 0.2222222222222222
    tail = tail * y + 0.2857142857142857
    tail = tail * y + 0.4
    tail = tail * y + 0.6666666666666666
    small = 2.0 * rest + z * y * tail
    ln = 2.0 * z.to(tl.float64) + small.to(tl.float64)
    return tl.where(x == x, e.to(tl.float64) + ln * 1.4426950408889634, float("nan"))
