"""A dense mask looked at by tiles in Triton, so that attention skips what it hides and reads only what it must.

FlashAttention-2's loop with the block masks of FlexAttention (Dong et al. 2024, section 3.3): here the table is made on
the device at every call, since masks change in place, and tiles keep their order, so that results keep their bits.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_configurations import MASK_TILE

_SIZE = tl.constexpr(MASK_TILE)
#: A byte of the table: some pair of the tile is seen; some is hidden, or has something added to its score.
_SEEN, _TO_READ = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def look(dense, first_row, first_col, limits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILED: tl.constexpr):
    """(whether a tile of scores holds anything that the mask leaves, what `bend` needs of the mask).

    dense: (address for this batch and head, step of a query, step of a key, then the same three of the table). Tiles
    begin at multiples of BLOCK_M and BLOCK_N, powers of two; one larger than the table's is what those in it are
    together. Without TILED there is no table.
    """
    seen, to_read = True, True
    if TILED:
        ROWS: tl.constexpr = max(BLOCK_M // _SIZE, 1)
        COLS: tl.constexpr = max(BLOCK_N // _SIZE, 1)
        row, col = first_row // _SIZE, first_col // _SIZE
        if ROWS * COLS == 1:
            found = tl.load(dense[3] + (row * dense[4] + col * dense[5])).to(tl.int32)
            seen, to_read = found & _SEEN > 0, found & _TO_READ > 0
        else:
            r, c = row + tl.arange(0, ROWS)[:, None], col + tl.arange(0, COLS)[None, :]
            there = (r * _SIZE < limits[0]) & (c * _SIZE < limits[1])
            found = tl.load(dense[3] + (r * dense[4] + c * dense[5]), mask=there, other=0).to(tl.int32)
            seen = tl.max(tl.max(found & _SEEN, 1), 0) > 0
            to_read = tl.max(tl.max(found & _TO_READ, 1), 0) > 0
    return seen, (dense[0], dense[1], dense[2], to_read)


@triton.jit(do_not_specialize=["heads", "rows"])
def attention_mask_tiles_kernel(
    mask, table, heads, rows, columns, m_b, m_h, m_q, m_k,
    ADDED: tl.constexpr, DENSE_ROWS: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """table (B, H, tiles of rows, tiles of columns) uint8, contiguous, of a mask (B, H, rows, columns), of bytes or
    ADDED: of each tile of SIZE x SIZE whether some of it is seen, and whether some of it must be read: what is not
    finite or not 0 where it is added, False where it is not.

    B, heads, rows and columns are those that differ: 1 where the mask is broadcast. DENSE_ROWS: m_k is 1, and 16 bytes
    are read at a time where the other strides divide by 16. Grid: (B * H * tiles of rows * pieces of TILES tiles of
    columns,).
    """
    program = tl.program_id(0)
    across = tl.cdiv(columns, SIZE)
    pieces, down = tl.cdiv(across, TILES), tl.cdiv(rows, SIZE)
    piece, line = program % pieces, program // pieces
    block, bh = line % down, line // down
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    row = block * SIZE + tl.arange(0, SIZE)[:, None]
    col = piece * (TILES * SIZE) + tl.arange(0, TILES * SIZE)[None, :]
    there = (row < rows) & (col < columns)
    at = col if DENSE_ROWS else col.to(tl.int64) * m_k
    where = mask + b * m_b + h * m_h + (row.to(tl.int64) * m_q + at)
    if ADDED:
        x = tl.load(where, mask=there, other=0.0).to(tl.float32)
        seen, to_read = x != float("-inf"), x != 0.0  # NaN is both
    else:
        x = tl.load(where, mask=there, other=0)
        seen, to_read = x != 0, x == 0
    # Counted in one sum: at most 2^12 of each.
    counts = tl.where(there & seen, 1, 0) + tl.where(there & to_read, 1 << 16, 0)
    counts = tl.sum(tl.sum(tl.reshape(counts, (SIZE, TILES, SIZE)), 2), 0)
    kind = tl.where((counts & 0xFFFF) > 0, _SEEN, 0) | tl.where((counts >> 16) > 0, _TO_READ, 0)
    tile = piece * TILES + tl.arange(0, TILES)
    tl.store(table + line.to(tl.int64) * across + tile, kind.to(tl.uint8), mask=tile < across)
