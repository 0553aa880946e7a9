"""Going through tiles in Triton's attention kernels: those at the edge of what is seen, their rows, sums of them."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from llmkern.attention.triton_rules import load_rows


@triton.jit
def edge_tiles(tiles, BLOCK: tl.constexpr):
    """How many of the tiles (begin, inner begin, inner end, end) lie outside of the inner ones."""
    return tl.cdiv(tiles[1] - tiles[0], BLOCK) + tl.cdiv(tl.maximum(tiles[3] - tiles[2], 0), BLOCK)


@triton.jit
def edge_tile(i, tiles, BLOCK: tl.constexpr):
    """Where the i-th of them begins."""
    first = tiles[0] + i * BLOCK
    return tl.where(first >= tiles[1], first + (tiles[2] - tiles[1]), first)


@triton.jit
def load_tile(
    source, first, limit, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """As load_rows, of source (address, step, descriptor of (B, H, rows, width), batch, head). DESCRIBED: through the
    descriptor, with zeros behind the tensor's end; rows from `limit` on that lie before it come as they are."""
    if DESCRIBED:
        tile = source[2].load([source[3], source[4], first, 0]).reshape(BLOCK, BLOCK_WIDTH)
    else:
        tile = load_rows(source[0], source[1], first, limit, WIDTH, BLOCK_WIDTH, BLOCK, CHECK)
    return tile


@triton.jit
def row_sums(tile):
    """(R, 8) of a tile (R, C): sums of each eighth column. In the matrix instructions' layout a thread forms them
    alone; the sums of whole rows, which it shares with others, can wait for the end."""
    R: tl.constexpr = tile.shape[0]
    C: tl.constexpr = tile.shape[1]
    return tl.sum(tl.reshape(tile, (R, C // 8, 8)), 1)
