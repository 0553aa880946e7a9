"""Tiles of the int8 products in Triton, by what a call needs and by architecture: one readable table.

Each line was compiled for the architectures that it serves: of the tiles that spill nowhere and fit into shared memory
it is the one with the most products for each byte that comes from memory. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmkern import triton_table


@dataclass(frozen=True)
class Tile:
    """Rows and columns of results of a program; Triton's options."""

    rows: int
    columns: int
    warps: int
    stages: int


#: What decides: "few" rows (up to 16: the weight's way from memory is the cost), "groups", "pairs" (two tiles of
#: weights), up to 64 rows, "two" digits, or "one", and that for "many" rows (over 256: a tile of more results reads
#: less for each, where there are enough of them). An architecture that is not named takes the line "".
TILES: dict[str, dict[str, Tile]] = {
    "few": {"": Tile(16, 64, 4, 4)},
    "groups": {"": Tile(64, 64, 4, 3), "sm_100": Tile(64, 64, 8, 3)},
    "pairs": {"": Tile(128, 64, 8, 3)},
    "pairs of groups": {"": Tile(32, 64, 8, 3)} | dict.fromkeys(("sm_90", "sm_100", "sm_120"), Tile(64, 64, 8, 3)),
    "up to 64": {"": Tile(64, 64, 4, 3)},
    "two": {"": Tile(128, 128, 8, 3)},
    "one": {"": Tile(128, 128, 8, 3)},
    "many": {"": Tile(128, 128, 8, 3), "sm_90": Tile(128, 256, 8, 4), "sm_100": Tile(128, 256, 8, 4)},
}


#: Programs that few rows are shared out among, about two for each multiprocessor of the large GPUs, and the least of k
#: that one takes: enough stages of loads on their way for the weight to come at the memory's rate.
PROGRAMS, LEAST_DEPTH = 256, 512
#: Values of k to which a split is rounded up: a flag's, a stage's. With groups at least so many, in whole groups.
STEP = 128


def split_depth(tiles: int, depth: int, group: int = 0) -> int:
    """How many values of k a program of few rows takes where there are so many tiles of outputs."""
    each = max(LEAST_DEPTH, -(-depth // max(PROGRAMS // max(tiles, 1), 1)))
    step = group * max(1, STEP // group) if group else STEP
    return -(-each // step) * step


#: Of the gradient of the input: rows, columns (values of k; with groups at most a group's) and outputs of a step.
@dataclass(frozen=True)
class GradientTile(Tile):
    depth: int


GRADIENT = {
    "few": GradientTile(16, 64, 4, 3, 32),
    "groups": GradientTile(64, 64, 4, 3, 32),
    "float32": GradientTile(128, 64, 8, 3, 32),
    "half": GradientTile(128, 128, 8, 3, 32),
}


def gradient_tile(rows: int, group: int, single: bool) -> GradientTile:
    """The line for a call. single: the gradient is float32, which is multiplied in three parts."""
    line = GRADIENT["few" if rows <= 16 else "groups" if group else "float32" if single else "half"]
    return replace(line, columns=min(line.columns, group & -group)) if group else line


def tile(family: str, rows: int, group: int, pairs: bool, two: bool) -> Tile:
    """The line for a call. family: "sm_80" and so on (llmkern.triton.family)."""
    if rows <= 16:
        kind = "few"
    elif group:
        kind = "pairs of groups" if pairs else "groups"
    elif pairs:
        kind = "pairs"
    else:
        kind = "up to 64" if rows <= 64 else "two" if two else "one" if rows <= 256 else "many"
    if own := triton_table.own("int8", kind, family):
        return Tile(**own)
    lines = TILES[kind]
    return lines.get(family, lines[""])
