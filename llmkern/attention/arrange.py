"""Tensors of any rank as the operators take them, by the rules of torch's own attention."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import check


def arranged(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, has_lengths: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """query, key and value as (B, H, S, D), the mask with four dimensions, and the shape of query after broadcasting.

    Leading dimensions broadcast and become one batch; a missing batch or head is 1. In (N, S, D) the first dimension
    is that of the heads, as torch has it, or with `has_lengths`, which belong to batches, that of the batch. A single
    head of query, key or value serves all, and key and value may have different numbers of heads.

    Raises ValueError for leading dimensions that do not broadcast, the mask's among them.
    """
    rank = query.dim()
    at = 1 if has_lengths else 0  # where a dimension is missing in (N, S, D)
    if rank == 2:
        query, key, value = (t[None, None] for t in (query, key, value))
        shape = tuple(query.shape[2:])
    elif rank == 3:
        query, key, value = (t.unsqueeze(at) for t in (query, key, value))
        query, key, value = _heads(*_batches(query, key, value))
        shape = tuple(query.squeeze(at).shape)
    else:
        query, key, value = _heads(*_batches(query, key, value))
        shape = tuple(query.shape)
    if attn_mask is not None:
        # A mask may have the dimensions of batch and head that a query of lower rank lacks.
        leading = shape[:-1] if attn_mask.dim() <= rank else tuple(query.shape[:-1])
        check.broadcasts("attn_mask", attn_mask, "(..., H, Sq, Sk)", (*leading, key.size(-2)))
    if rank == 3:
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(at)
    elif rank > 3:
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*shape[:-3], *attn_mask.shape[-3:])
            attn_mask = attn_mask.flatten(0, -4) if rank > 4 else attn_mask
        if rank > 4:
            query, key, value = (t.flatten(0, -4) for t in (query, key, value))
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return query, key, value, attn_mask, shape


def _batches(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading dimensions broadcast."""
    if query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        return query, key, value
    try:
        leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(
            f"query, key, value: expected leading dimensions that broadcast against each other, got shapes {shapes}"
        ) from None
    query, key, value = (t.expand(*leading, *t.shape[-3:]) for t in (query, key, value))
    return query, key, value


def _heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As many heads of values as of keys, and no fewer of queries than of these."""
    heads = max(query.size(-3), *((t.size(-3) for t in (key, value)) if query.size(-3) == 1 else (1,)))
    if query.size(-3) != heads:
        query = query.expand(*query.shape[:-3], heads, *query.shape[-2:])
    if key.size(-3) != value.size(-3):
        key, value = (
            t.expand(*t.shape[:-3], heads, *t.shape[-2:])
            if t.size(-3) == 1
            else t.repeat_interleave(heads // max(t.size(-3), 1), -3)
            for t in (key, value)
        )
    return query, key, value
