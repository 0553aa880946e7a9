"""scaled_dot_product_attention with torch's signature."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from llmkern import check
from llmkern.attention.mask import Mask
from llmkern.attention.op import attention, short_attention
from llmkern.backend import Plans
from llmkern.operator import call_key, is_compiling

ALIGNMENTS = ("top_left", "bottom_right")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_lengths: Tensor | None = None,
    causal_alignment: str = "top_left",
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, fused.

    query (..., H, Sq, D), key (..., Hkv, Sk, D), value (..., Hkv, Sk, Dv), all float32, bfloat16 or float16; with
    enable_gqa Hkv may be a divisor of H. attn_mask broadcasts against (..., H, Sq, Sk): boolean, True takes part, or
    floating, added to the scaled scores. is_causal: query i sees the keys j <= i; with causal_alignment
    "bottom_right" j <= i + Sk - Sq. scale: 1 / sqrt(D) by default. key_lengths (B,): in batch b only the first
    key_lengths[b] keys exist, and the bottom right corner is that of the last of them. Returns (..., H, Sq, Dv); a
    row with every key masked is zeros.

    With dropout_p > 0 torch's own attention runs (a warning says so once).

    Raises TypeError for a wrong dtype, ValueError for wrong shapes, devices or options. Source: Dao 2023,
    "FlashAttention-2", section 3.
    """
    found = None
    if not is_compiling():
        args = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths, causal_alignment)
        found = call_key(*args)
    if found is not None:
        launch = _SHORT.get(found)
        if launch is not None:
            return launch(query, key, value, attn_mask, key_lengths)
    for name, t in (("query", query), ("key", key), ("value", value)):
        check.is_tensor(name, t)
        if t.dim() < 2 or t.dim() != query.dim():
            raise ValueError(
                f"{name}: expected (..., H, S, D), the same rank for all three, got shape {tuple(t.shape)}"
            )
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: expected None with is_causal=True, got a mask; put the causal rule into the mask")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment: expected one of {', '.join(ALIGNMENTS)}, got {causal_alignment!r}")
    if query.dim() > 2 and not enable_gqa and query.size(-3) != key.size(-3):
        expected = f"{query.size(-3)} heads as in query (fewer only with enable_gqa=True)"
        raise ValueError(f"key: expected {expected}, got shape {tuple(key.shape)}")
    if attn_mask is not None:
        check.is_tensor("attn_mask", attn_mask)
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.size(-1), 1))
    bottom_right = causal_alignment == "bottom_right"
    same_batch = query.dim() == 4 and query.size(0) == key.size(0) == value.size(0)
    if found is not None and same_batch and dropout_p == 0.0 and (attn_mask is None or attn_mask.dim() == 4):
        # Nothing is to be arranged: calls like this one go straight to the operator from now on.
        rules = (is_causal, bottom_right, scale, False)
        run = short_attention(found, query, key, value, attn_mask, key_lengths, *rules)
        launch = _SHORT.keep(found, lambda q, k, v, mask, lengths: run(q, k, v, mask, lengths, *rules)[0])
        return launch(query, key, value, attn_mask, key_lengths)
    shape = query.shape
    if query.dim() != 4:
        query, key, value, attn_mask = _four_dimensions(query, key, value, attn_mask)
    elif attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if not query.size(0) == key.size(0) == value.size(0):
        batch = max(query.size(0), key.size(0), value.size(0))
        query, key, value = (t.expand(batch, -1, -1, -1) if t.size(0) == 1 else t for t in (query, key, value))
    mask = Mask(attn_mask, key_lengths, is_causal, bottom_right)
    if dropout_p > 0.0:
        return _with_dropout(query, key, value, mask, dropout_p, scale).reshape(*shape[:-1], value.size(3))
    output = attention(query, key, value, mask, scale)[0]
    return output if len(shape) == 4 else output.reshape(*shape[:-1], value.size(3))


#: Launchers of calls that need no arranging.
_SHORT = Plans()


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Leading dimensions as one, a missing batch or head as 1."""
    rank = query.dim()
    if rank < 4:
        new = (None,) * (3 - rank)
        query, key, value = (t[new].unsqueeze(1) for t in (query, key, value))
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (3 - attn_mask.dim())].unsqueeze(1)
        return query, key, value, attn_mask
    leading = query.shape[:-3]
    if attn_mask is not None and attn_mask.dim() > 3:
        attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-3:]).flatten(0, -4)
    elif attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    query, key, value = (t.expand(*leading, *t.shape[-3:]).flatten(0, -4) for t in (query, key, value))
    return query, key, value, attn_mask


_warned = False


def _with_dropout(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout_p: float, scale: float) -> Tensor:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn("llmkern.attention: dropout_p > 0 runs torch's own attention", stacklevel=3)
    seen = mask.seen(query.size(2), key.size(2), query.device)
    if mask.additive is not None:
        added = mask.additive.to(query.dtype)
        seen = added if seen is None else added.masked_fill(~seen, -torch.inf)
    return F.scaled_dot_product_attention(
        query, key, value, seen, dropout_p, scale=scale, enable_gqa=query.size(1) != key.size(1)
    )
