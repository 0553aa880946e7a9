"""Tiles of the int8 products in Triton, by what a call needs and by architecture: one readable table.

Each line was compiled for the architectures that it serves: of the tiles that spill nowhere and fit into shared memory
it is the one with the most products for each byte that comes from memory. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkern import triton_table


@dataclass(frozen=True)
class Tile:
    """Rows and columns of results of a program; Triton's options."""

    rows: int
    columns: int
    warps: int
    stages: int


#: What decides: "few" rows (up to 16: the weight's way from memory is the cost), "groups", "pairs" (two tiles of
#: weights), up to 64 rows, "two" digits, or "one". An architecture that is not named takes the line "".
TILES: dict[str, dict[str, Tile]] = {
    "few": {"": Tile(16, 64, 4, 4)},
    "groups": {"": Tile(64, 64, 4, 3), "sm_100": Tile(64, 64, 8, 3)},
    "pairs": {"": Tile(64, 64, 8, 3)},
    "pairs of groups": {"": Tile(32, 64, 8, 3)},
    "up to 64": {"": Tile(64, 64, 4, 3)},
    "two": {"": Tile(128, 128, 8, 3)} | dict.fromkeys(("sm_86", "sm_89", "sm_120"), Tile(128, 64, 8, 3)),
    "one": {"": Tile(128, 128, 8, 3)},
}


def tile(family: str, rows: int, group: int, pairs: bool, two: bool) -> Tile:
    """The line for a call. family: "sm_80" and so on (llmkern.triton.family)."""
    if rows <= 16:
        kind = "few"
    elif group:
        kind = "pairs of groups" if pairs else "groups"
    elif pairs:
        kind = "pairs"
    else:
        kind = "up to 64" if rows <= 64 else "two" if two else "one"
    if own := triton_table.own("int8", kind, family):
        return Tile(**own)
    lines = TILES[kind]
    return lines.get(family, lines[""])
