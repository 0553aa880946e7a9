"""What Triton's attention kernels are told of a call: all that its metadata decide, and the arguments made of its
tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import triton
from llmkern.attention.compiled.params import as_sink
from llmkern.attention.layout import empty_in_order
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import DESCRIBED, Configuration
from llmkern.random import drop_below

WIDEST = 256
MOST_WINDOW = 2**29
LOG2E = 1.4426950408889634


def padded(n: int) -> int:
    """The power of two that is at least n, and 16, which a matrix instruction needs."""
    return max(triton.power_of_two(n), 16)


def precision(dtype: torch.dtype, family: str) -> str:
    """How float32 is multiplied: as torch's own products are, exactly or by tf32; in three products of tf32, which
    keeps float32's accuracy, where matrix units know tf32 but not float32."""
    if dtype != torch.float32:
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee" if family.startswith("gfx") else "tf32x3"


class Call:
    """What every kernel is told of a call on (B, H, S, D)."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, rules: Sequence[Any], sequences: int | None = None
    ) -> None:
        """sequences: how many of them lie end to end in the one batch of the tensors; None: padded batches."""
        mask, (scale, uniform) = Mask(*rules[:10]), rules[10:12]
        (self.batch, self.heads, self.queries, width), self.kv_heads, self.keys = query.shape, key.size(1), key.size(2)
        self.group = self.heads // max(self.kv_heads, 1)
        self.sequences = sequences
        left, right = mask.window_left, mask.window_right
        dense = mask.dense
        kind = 0 if dense is None else 1 if dense.dtype == torch.bool else 2
        bends = mask.softcap > 0.0 or mask.alibi_slopes is not None or kind == 2 or scale <= 0.0
        hides = left >= 0 or right >= 0 or mask.key_lengths is not None or kind > 0
        empty_rows = left >= 0 or (right >= 0 and mask.bottom_right) or mask.key_lengths is not None or kind > 0
        dropout = mask.dropout_p > 0.0
        self.rules = {
            "LEFT": left >= 0, "RIGHT": right >= 0, "BOTTOM_RIGHT": mask.bottom_right,
            "LENGTHS": mask.key_lengths is not None, "MASK": kind, "SOFTCAP": mask.softcap > 0.0,
            "ALIBI": mask.alibi_slopes is not None, "SINK": mask.learnable_sink is not None, "DROPOUT": dropout,
            "UNIFORM": bool(uniform and empty_rows and mask.learnable_sink is None and self.keys), "BEND": bends,
            "HIDES": hides, "PACKED": sequences is not None,
        }  # fmt: skip
        self.widths = {"D": width, "DV": value.size(3)}
        self.widths |= {"BLOCK_D": padded(width), "BLOCK_DV": padded(value.size(3))}
        #: What decides about the tiles: the padded width, and whether rules need registers.
        more = mask.softcap > 0.0 or mask.alibi_slopes is not None or scale <= 0.0 or dropout
        rules_with_registers = "more" if more else "mask" if kind > 0 else ""
        self.shape = max(self.widths["BLOCK_D"], self.widths["BLOCK_DV"]), rules_with_registers
        below = drop_below(mask.dropout_p)
        keep = 0.0 if mask.dropout_p >= 1.0 else 1.0 / (1.0 - mask.dropout_p)
        sizes = (self.heads, self.group, self.queries, self.keys)
        windows = tuple(min(max(x, 0), MOST_WINDOW) for x in (left, right))
        unit = LOG2E * (1.0 if bends else scale)
        # As a signed number of 32 bits, so that the kernel's type is the same for all.
        below -= 2**32 if below >= 2**31 else 0
        self.numbers = (*sizes, *windows, scale, unit, mask.softcap, below, keep)
        self.dense_steps: tuple[int, ...] = (0, 0, 0, 0)
        if dense is not None:
            self.dense_steps = dense.expand(self.batch, self.heads, self.queries, self.keys).stride()
        lengths, slopes = mask.key_lengths, mask.alibi_slopes
        self.steps = (
            0 if lengths is None else lengths.stride(0),
            slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
            0 if slopes is None else slopes.stride(-1),
        )

    def tensors(self, query: Tensor, rules: Sequence[Any]) -> tuple[Any, ...]:
        """(mask, lengths, slopes, sink, seed) as the kernels read them; query stands for a tensor that is not there.

        The seed lies on the CPU and goes by value: a copy to the device could not be part of a CUDA graph.
        """
        mask, lengths, slopes, sink, seed = rules[:5]
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        tensors = (query if t is None else t for t in (mask, lengths, slopes, as_sink(sink)))
        return *tensors, 0 if seed is None else int(seed)

    def programs(self, heads: int, rows: int, block: int) -> int:
        """How many take the rows of all these heads, `block` of them each (triton_packed.py)."""
        if self.sequences is None:
            return self.batch * heads * -(-rows // block)
        return heads * (rows // block + self.sequences + 1) if rows else 0

    def empty(self, like: Tensor, width: int) -> Tensor:
        """For a result of like's rows, as the operators' fakes have it."""
        if self.sequences is None:
            return empty_in_order(like, width)
        return like.new_empty((1, like.size(2), like.size(1), width)).transpose(1, 2)

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """Steps from batch to batch (sequences are found by their bounds), head to head and row to row."""
        packed = self.sequences is not None
        return sum(((0 if packed else t.stride(0), *t.stride()[1:3]) for t in tensors), ())

    def bounds(self, query: Tensor, bounds: Sequence[Tensor]) -> tuple[Any, ...]:
        """(bounds of the queries, of the keys, number of sequences); query stands for what is not there."""
        return *(bounds or (query, query)), self.sequences or 0

    def descriptors(self, described: bool, block: int, *tensors: Tensor) -> list[Any]:
        """For two tensors as wide as keys and values, blocks of `block` rows; what is not described stands for itself,
        and is not looked at."""
        if not described:
            return [*tensors]
        widths = (self.widths["BLOCK_D"], self.widths["BLOCK_DV"])
        return [triton.Descriptor(t, (1, 1, block, width)) for t, width in zip(tensors, widths, strict=True)]

    def constants(self, tile: Configuration, dtype: torch.dtype, family: str) -> dict[str, Any]:
        of_tile = {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
        return {**self.widths, **of_tile, **self.rules, "PRECISION": precision(dtype, family)}


def may_describe(family: str, call: Call, *tensors: Tensor) -> bool:
    """Whether the kernels read these tensors through descriptors, where their addresses allow it.

    A descriptor of all tokens knows nothing of where one of several sequences in it ends.
    """
    usual = family in DESCRIBED and tensors[0].element_size() == 2 and not call.shape[1] and call.sequences is None
    return usual and all(map(triton.describable, tensors))


def options(tile: Configuration) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
