"""Tiles, warps and stages of Triton's attention kernels, by kernel, architecture, element and width of the heads.

Chosen by what the compiler makes of them (`python -m llmkern inspect --source triton`): no spills, shared memory that
fits, then the most products for what is read. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    """Queries and keys of a tile of scores, warps of a program, stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


#: Columns of a line below: the widest padded head, then the configuration.
_Lines = tuple[tuple[int, Configuration], ...]
_C = Configuration

#: Multiprocessors alike in what decides here: sm_80 has 163 KB of shared memory for a block; sm_86, 89 and 120 have 99;
#: sm_90 has wgmma and 227, sm_100 tcgen05 and 227; gfx942 has 64 and waves of 64.
FAMILIES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")

#: (kernel, bytes of an element): for each family, by width.
TABLE: dict[tuple[str, int], dict[str, _Lines]] = {
    ("forward", 2): {
        "sm_80": ((64, _C(128, 64, 4, 3)), (128, _C(128, 64, 8, 3)), (256, _C(64, 32, 4, 2))),
        "sm_86": ((64, _C(128, 64, 4, 3)), (128, _C(128, 32, 8, 2)), (256, _C(64, 32, 4, 2))),
        "sm_90": ((64, _C(128, 128, 8, 3)), (128, _C(128, 128, 8, 2)), (256, _C(128, 64, 8, 2))),
        "sm_100": ((64, _C(128, 128, 8, 3)), (128, _C(128, 128, 8, 2)), (256, _C(128, 64, 8, 2))),
        "gfx942": ((64, _C(128, 64, 4, 1)), (128, _C(128, 64, 4, 1)), (256, _C(64, 32, 4, 1))),
    },
    ("queries", 2): {
        "sm_80": ((64, _C(64, 64, 4, 2)), (128, _C(64, 64, 4, 2)), (256, _C(32, 32, 4, 1))),
        "sm_86": ((64, _C(64, 64, 4, 2)), (128, _C(64, 32, 4, 2)), (256, _C(32, 32, 4, 1))),
        "sm_90": ((64, _C(128, 64, 8, 2)), (128, _C(128, 64, 8, 2)), (256, _C(64, 32, 4, 1))),
        "sm_100": ((64, _C(128, 64, 8, 2)), (128, _C(128, 64, 8, 2)), (256, _C(64, 32, 4, 1))),
        "gfx942": ((64, _C(64, 64, 4, 1)), (128, _C(64, 64, 4, 1)), (256, _C(32, 32, 4, 1))),
    },
    ("keys", 2): {
        "sm_80": ((64, _C(64, 64, 4, 2)), (128, _C(32, 64, 4, 2)), (256, _C(32, 32, 4, 1))),
        "sm_86": ((64, _C(64, 64, 4, 2)), (128, _C(32, 64, 4, 1)), (256, _C(16, 32, 4, 1))),
        "sm_90": ((64, _C(64, 128, 8, 2)), (128, _C(64, 128, 8, 2)), (256, _C(32, 64, 8, 1))),
        "sm_100": ((64, _C(64, 128, 8, 2)), (128, _C(64, 128, 8, 2)), (256, _C(32, 64, 8, 1))),
        "gfx942": ((64, _C(64, 64, 4, 1)), (128, _C(32, 64, 4, 1)), (256, _C(32, 32, 4, 1))),
    },
    ("queries", 4): dict.fromkeys(FAMILIES, ((64, _C(32, 32, 4, 1)), (128, _C(32, 32, 4, 1)), (256, _C(16, 16, 4, 1)))),
    ("keys", 4): dict.fromkeys(FAMILIES, ((64, _C(32, 32, 4, 1)), (128, _C(16, 32, 4, 1)), (256, _C(16, 16, 4, 1)))),
    ("forward", 4): {
        "sm_80": ((64, _C(64, 32, 4, 2)), (128, _C(64, 32, 4, 2)), (256, _C(32, 32, 4, 1))),
        "sm_86": ((64, _C(64, 32, 4, 2)), (128, _C(64, 32, 4, 1)), (256, _C(32, 16, 4, 1))),
        "sm_90": ((64, _C(64, 32, 4, 2)), (128, _C(64, 32, 4, 2)), (256, _C(32, 32, 4, 1))),
        "sm_100": ((64, _C(64, 32, 4, 2)), (128, _C(64, 32, 4, 2)), (256, _C(32, 32, 4, 1))),
        "gfx942": ((64, _C(64, 32, 4, 1)), (128, _C(64, 32, 4, 1)), (256, _C(32, 16, 4, 1))),
    },
}


def family(capability: tuple[int, int] | None) -> str:
    """The line of the table for a device of this compute capability; None for AMD's."""
    if capability is None:
        return "gfx942"
    if capability[0] == 9:
        return "sm_90"
    if capability[0] in (10, 11):
        return "sm_100"
    return "sm_80" if capability == (8, 0) else "sm_86"


def configuration(kernel: str, family: str, itemsize: int, width: int) -> Configuration:
    """Of heads padded to `width`, a power of two up to 256."""
    lines = TABLE["queries" if kernel == "statistics" else kernel, itemsize][family]
    return next(found for widest, found in lines if width <= widest)
