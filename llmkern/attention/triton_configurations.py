"""Tiles, warps and stages of Triton's attention kernels, by kernel, architecture, element and width of the heads.

Chosen by what the compiler makes of them (`python -m llmkern inspect --source triton`): no spills, shared memory that
fits, then the most products for what is read. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkern import triton_table


@dataclass(frozen=True)
class Configuration:
    """Queries and keys of a tile of scores, warps of a program, stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


#: The widest padded head, then the configuration.
_Lines = tuple[tuple[int, Configuration], ...]
_C = Configuration

#: Multiprocessors alike in what decides here: sm_80, 86, 89 and 120 have mma.sync and at least 99 KB of shared memory
#: for a block, and the compiler finds other registers on sm_120; sm_90 wgmma and 227; sm_100 tcgen05 and 227; gfx942
#: 64 KB and waves of 64.
FAMILIES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
#: Those whose kernels read through descriptors what goes by (triton.Descriptor): without addresses to make, there are
#: registers for larger tiles.
DESCRIBED = ("sm_90", "sm_100")

_FORWARD_80 = ((64, _C(128, 64, 8, 3)), (128, _C(128, 32, 8, 3)), (256, _C(64, 32, 8, 2)))
_QUERIES_80 = ((64, _C(64, 32, 8, 1)), (128, _C(64, 64, 8, 2)), (256, _C(32, 32, 8, 1)))
_KEYS_80 = ((64, _C(32, 64, 4, 1)), (128, _C(32, 64, 8, 1)), (256, _C(32, 32, 8, 1)))
_FORWARD_90 = ((64, _C(128, 128, 8, 3)), (128, _C(128, 128, 8, 2)), (256, _C(128, 64, 8, 2)))
_QUERIES_90 = ((64, _C(128, 128, 8, 2)), (128, _C(128, 64, 8, 2)), (256, _C(64, 32, 8, 2)))
_KEYS_90 = ((64, _C(64, 128, 8, 2)), (128, _C(64, 128, 8, 2)), (256, _C(32, 32, 8, 1)))
_FORWARD_100 = (*_FORWARD_90[:2], (256, _C(64, 64, 8, 2)))
_KEYS_100 = ((64, _C(64, 64, 8, 2)), (128, _C(32, 64, 8, 2)), (256, _C(32, 32, 8, 1)))
_QUERIES_120 = ((64, _C(64, 64, 8, 2)), (128, _C(64, 32, 8, 2)), (256, _C(32, 32, 8, 1)))
_KEYS_120 = ((64, _C(64, 64, 8, 2)), (128, _C(32, 64, 8, 2)), (256, _C(32, 32, 8, 1)))
#: Of quantised queries and keys: a byte of each, two of the values.
_INT8_80 = ((64, _C(128, 64, 4, 3)), (128, _C(128, 64, 8, 3)), (256, _C(32, 64, 4, 2)))
_INT8_100 = ((64, _C(128, 128, 8, 3)), (128, _C(128, 128, 8, 3)), (256, _C(128, 32, 8, 2)))
_INT8_90 = ((64, _C(128, 128, 8, 3)), (128, _C(128, 128, 8, 3)), (256, _C(64, 64, 8, 2)))
_INT8_AMD = ((64, _C(128, 64, 8, 1)), (128, _C(128, 64, 8, 1)), (256, _C(64, 32, 8, 1)))
_QUERIES_AMD = ((64, _C(64, 32, 4, 1)), (128, _C(32, 32, 4, 1)), (256, _C(32, 16, 8, 1)))
_KEYS_AMD = ((64, _C(32, 64, 4, 1)), (128, _C(32, 32, 4, 1)), (256, _C(16, 16, 8, 1)))
_FLOAT32 = ((64, _C(32, 32, 4, 1)), (128, _C(32, 32, 8, 1)), (256, _C(16, 16, 8, 1)))

#: By kernel ("queries" and "keys" are those of the gradients), family and width, for elements of 2 bytes.
TABLE: dict[str, dict[str, _Lines]] = {
    "forward": {
        "sm_80": _FORWARD_80, "sm_90": _FORWARD_90, "sm_100": _FORWARD_100, "sm_120": _FORWARD_80,
        "gfx942": _FORWARD_80,
    },
    "queries": {
        "sm_80": _QUERIES_80, "sm_90": _QUERIES_90, "sm_100": _QUERIES_90, "sm_120": _QUERIES_120,
        "gfx942": _QUERIES_AMD,
    },
    "keys": {"sm_80": _KEYS_80, "sm_90": _KEYS_90, "sm_100": _KEYS_100, "sm_120": _KEYS_120, "gfx942": _KEYS_AMD},
    "int8": {"sm_80": _INT8_80, "sm_90": _INT8_90, "sm_100": _INT8_100, "sm_120": _INT8_80, "gfx942": _INT8_AMD},
}  # fmt: skip
_FORWARD_POINTERS = ((64, _C(128, 128, 8, 3)), (128, _C(128, 64, 8, 3)), (256, _C(64, 32, 8, 2)))
_QUERIES_POINTERS = ((64, _C(128, 64, 8, 2)), (128, _C(128, 64, 8, 2)), (256, _C(32, 32, 8, 1)))
_KEYS_POINTERS = ((64, _C(32, 64, 4, 1)), (128, _C(32, 64, 8, 1)), (256, _C(32, 32, 8, 1)))
#: The same for tensors that can have no descriptor (rows that do not begin at multiples of 16 bytes, broadcast ones).
POINTERS: dict[str, dict[str, _Lines]] = {
    "forward": {"sm_90": _FORWARD_POINTERS, "sm_100": _FORWARD_POINTERS},
    "queries": {"sm_90": _QUERIES_POINTERS, "sm_100": _QUERIES_POINTERS},
    "keys": {"sm_90": _KEYS_POINTERS, "sm_100": (_KEYS_100[0], *_KEYS_POINTERS[1:])},
}
#: Of the rows' statistics, everywhere: they are read once. (Sums over weights of 32 keys of the widest heads spill.)
STATISTICS = ((128, _C(64, 32, 4, 1)), (256, _C(32, 16, 4, 1)))
#: With rules that need registers of their own (soft cap, slopes, dense masks, dropout), everywhere.
RULES = ((64, _C(32, 32, 4, 1)), (128, _C(32, 32, 8, 1)), (256, _C(16, 16, 8, 1)))
#: With a dense mask and no other of these; what is not here as above.
_MASKED = ((128, _C(64, 32, 8, 1)), RULES[-1])
MASKED: dict[tuple[str, str], _Lines] = {(k, f): _MASKED for k in ("forward", "queries") for f in FAMILIES}
MASKED["keys", "sm_100"] = ((64, _C(16, 32, 4, 1)), *RULES[1:])
MASKED["keys", "gfx942"] = ((128, _C(32, 32, 4, 1)), RULES[-1])


def family(capability: tuple[int, int] | None) -> str:
    """The line of the table for a device of this compute capability; None for AMD's."""
    if capability is None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(capability[0], "sm_80")


def configuration(
    kernel: str, family: str, itemsize: int, width: int, rules: str, described: bool = False, own: bool = True
) -> Configuration:
    """Of heads padded to `width`, a power of two up to 256. rules: "" or those that need registers of their own, a
    dense "mask" or "more". described: keys and values, or queries, are read through descriptors. own: a line of one's
    own table may serve, which was measured with whole sequences and, where there are any, descriptors."""
    by_pointers = not described and family in DESCRIBED and kernel in POINTERS
    lines = STATISTICS if kernel == "statistics" else (POINTERS if by_pointers else TABLE)[kernel][family]
    may_own = own and itemsize == 2 and not rules and not by_pointers
    if may_own and (line := triton_table.own("attention", kernel, family, width)):
        return Configuration(**line)
    if itemsize == 4 or rules:
        lines = _FLOAT32 if itemsize == 4 else MASKED.get((kernel, family), RULES) if rules == "mask" else RULES
    return next(found for widest, found in lines if width <= widest)


#: The gradients sum delta over the weights themselves for up to so many queries or keys, where that costs little.
FEW_QUERIES, FEW_KEYS = 24, 128

#: Queries and keys of a dense mask that share a byte of its table (triton_mask.py): those of the tiles above.
MASK_TILE = 32

#: Of the attention on a cache: 16 rows to a tile everywhere, and what many blocks of a processor can hold of keys.
DECODE: dict[str, _Lines] = {
    "sm_80": ((64, _C(16, 64, 4, 3)), (128, _C(16, 32, 4, 3)), (256, _C(16, 32, 4, 2))),
    "sm_90": ((64, _C(16, 64, 4, 3)), (128, _C(16, 64, 4, 3)), (256, _C(16, 32, 4, 3))),
    "sm_100": ((64, _C(16, 64, 4, 3)), (128, _C(16, 64, 4, 3)), (256, _C(16, 32, 4, 3))),
    "sm_120": ((64, _C(16, 64, 4, 3)), (128, _C(16, 32, 4, 3)), (256, _C(16, 32, 4, 2))),
    "gfx942": ((64, _C(16, 64, 4, 1)), (128, _C(16, 32, 4, 1)), (256, _C(16, 16, 4, 1))),
}


#: The same of float32, whose products are not those of matrix units.
_DECODE_FLOAT32 = ((128, _C(16, 32, 8, 2)), (256, _C(16, 16, 8, 2)))


def decode_configuration(family: str, itemsize: int, width: int) -> Configuration:
    """Of heads padded to `width`, a power of two up to 256."""
    lines = DECODE[family] if itemsize == 2 else _DECODE_FLOAT32
    return next(found for widest, found in lines if width <= widest)
