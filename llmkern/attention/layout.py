"""The memory order of an attention output: that of the query, so that neither side of a projection copies."""

from __future__ import annotations

import torch
from torch import Tensor


def output_strides(query: Tensor, width: int) -> tuple[int, int, int, int]:
    """Strides of a dense (B, H, Sq, width) whose dimensions lie in memory in the order of query's.

    A query (B, H, Sq, D) that is a view of (B, Sq, H, D) or (Sq, B, H, D) gets an output of that form; the head's
    dimension is always innermost, and a broadcast query (a stride of 0) gets the plain (B, H, Sq, width).
    """
    sizes, strides = query.shape, query.stride()
    outer = [0, 1, 2]
    if all(strides[d] > 0 for d in outer if sizes[d] > 1):
        # A dimension of size 1 has no order of its own: it stays before the next one.
        keys = [strides[d] if sizes[d] > 1 else (strides[d + 1] if d < 2 else 0) for d in outer]
        outer.sort(key=lambda d: -keys[d])
    result, step = [0, 0, 0, 1], max(width, 1)
    for d in reversed(outer):
        result[d] = step
        step *= max(sizes[d], 1)
    return result[0], result[1], result[2], result[3]


def empty_in_order(like: Tensor, width: int) -> Tensor:
    """A fresh (B, H, S, width) in like's dtype, its dimensions in memory in the order of like's (B, H, S, _)."""
    sizes = (like.size(0), like.size(1), like.size(2), width)
    return torch.empty_strided(sizes, output_strides(like, width), dtype=like.dtype, device=like.device)


def in_order(values: Tensor, like: Tensor) -> Tensor:
    """The values in like's dtype and memory order."""
    return empty_in_order(like, values.size(3)).copy_(values)
