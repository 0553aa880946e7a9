"""Which sequence, head and tile a program of Triton's attention kernels has: of padded batches, and of sequences laid
end to end.

Sequences of any lengths share one grid, which depends on how many tokens and sequences there are and not on the
longest: the launcher must not wait for the lengths, which lie on the device. Sequence n has the tiles from slot
bounds[n] // BLOCK + n on. These grow by at least as many as it has tiles, so that no two share a slot, and a program
finds its sequence by counting those that begin at its slot or before. At most one slot for each sequence stays idle.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

#: Bounds that a program looks at together.
_AT_ONCE = tl.constexpr(512)


@triton.jit
def _sequence_at(slot, bounds, sequences, BLOCK: tl.constexpr):
    """The last of the sequences, and of the tokens behind them, that begins at this slot or before."""
    begun = sequences * 0
    for first in range(0, sequences + 1, _AT_ONCE):
        n = first + tl.arange(0, _AT_ONCE)
        start = tl.load(bounds + n, mask=n <= sequences, other=0) // BLOCK + n
        # Summed here and not behind the loop: of a tensor that a loop carries, and whatever is made of it, Triton loses
        # what divides by 16, and reads keys an element at a time.
        begun += tl.sum(tl.where((n <= sequences) & (start <= slot), 1, 0), 0)
    return tl.maximum(begun - 1, 0)


@triton.jit
def _tokens(n, bounds, sequences, total, LAST: tl.constexpr):
    """(first, how many) of sequence n, inside `total` whatever the bounds say. What lies behind the last sequence is
    n = sequences, and empty without LAST."""
    first = tl.minimum(tl.maximum(tl.load(bounds + n), 0), total).to(tl.int32)
    end = tl.load(bounds + tl.minimum(n + 1, sequences))
    if LAST:
        end = tl.where(n == sequences, total, end)
    return first, tl.minimum(tl.maximum(end, first), total).to(tl.int32) - first


@triton.jit
def locate(
    queries, keys, heads, query_bounds, key_bounds, sequences, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """(b, h, bh, line, block, blocks, first_query, first_key, queries, keys) of this program.

    Batch or sequence b and head h; bh counts heads through all batches, `line` those of the results of each row; the
    tile is the one numbered `block` of `blocks` in the queries (or keys, OF_KEYS) of this sequence. PACKED: queries and
    keys come as those of all sequences, whose bounds are (N + 1,); a program whose block is none of `blocks` has
    nothing to do. Queries and keys behind the last sequence are a sequence of their own that sees nothing.
    """
    program = tl.program_id(0)
    if PACKED:
        total = keys if OF_KEYS else queries
        bounds = key_bounds if OF_KEYS else query_bounds
        slots = total // BLOCK + sequences + 1
        slot, head = program % slots, program // slots
        n = _sequence_at(slot, bounds, sequences, BLOCK)
        at_query, queries = _tokens(n, query_bounds, sequences, queries, not OF_KEYS)
        at_key, keys = _tokens(n, key_bounds, sequences, keys, OF_KEYS)
        first_query, first_key = at_query.to(tl.int64), at_key.to(tl.int64)
        block = slot - (at_key if OF_KEYS else at_query) // BLOCK - n
        blocks = tl.cdiv(keys if OF_KEYS else queries, BLOCK)
        blocks = tl.where(block < 0, block, blocks)  # where the bounds begin late
        sequence = tl.minimum(n, sequences - 1)  # whose slopes are there to be read
        bh, line = sequence * heads + head, head
        b, h = sequence.to(tl.int64), head.to(tl.int64)
    else:
        blocks = tl.cdiv(keys if OF_KEYS else queries, BLOCK)
        block, bh = program % blocks, program // blocks
        line = bh
        b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
        first_query, first_key = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    return b, h, bh, line, block, blocks, first_query, first_key, queries, keys
