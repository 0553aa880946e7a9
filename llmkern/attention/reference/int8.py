"""Attention whose scores come of products of integers, in plain PyTorch.

The rule, which every kernel follows to the bit: of each row of query, and of each row of key less the average key, the
integers and the float32 scale that int8's "symmetric" rows have (llmkern/int8/reference.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmkern.attention.layout import in_order
from llmkern.attention.mask import Mask
from llmkern.attention.reference import dense
from llmkern.int8.reference import quantize_rows

#: Keys are summed in chunks of so many, each in so many sums, and so are the chunks.
CHUNK = 1024
LANES = 32


def attention_int8(query: Tensor, key: Tensor, value: Tensor, *rules: Any) -> tuple[Tensor, Tensor]:
    """The attention of `dense.attention`, of quantised queries and keys: (B, H, Sq, Dv), and the log-sum-exp (B, H, Sq)
    in float64.

    rules: what the operator takes. Products of integers are exact; all behind them is rounded as in plain PyTorch: in
    float32, weights and values in value's dtype, or all in float64.
    """
    mask, scale, smooth_keys = described(rules)
    wide = torch.promote_types(query.dtype, torch.float32)
    average = key_average(key, mask.key_lengths) if smooth_keys else None
    (of_queries, query_scale), (of_keys, key_scale) = quantized(query), quantized(key, average)
    products = torch.matmul(of_queries.double(), dense._for_each_head(of_keys, query).double().transpose(2, 3))
    of_keys_scale = dense._for_each_head(key_scale[..., None], query).transpose(2, 3)
    scores = products.to(wide) * query_scale[..., None].to(wide) * of_keys_scale.to(wide)
    if average is not None:
        # What the average key adds to all scores of a row alike.
        scores = scores + torch.matmul(query.to(wide), dense._for_each_head(average, query).to(wide).transpose(2, 3))
    scores, seen = dense._ruled(dense._capped(scores * scale, mask), mask, query.size(2))
    weights, _, kept = dense._softmax(scores, seen, mask, False)
    output = dense._matmul(weights.to(value.dtype), dense._for_each_head(value, query), kept)
    return in_order(output, query), torch.logsumexp(dense._with_sink(scores, mask).double(), dim=-1)


def described(rules: Any) -> tuple[Mask, float, bool]:
    """The rules as the operator takes them: those between scores and softmax, the scale, smooth_keys."""
    mask, key_lengths, alibi_slopes, learnable_sink, *places, softcap, scale, smooth_keys = rules
    left, right, bottom_right = places
    tensors = (mask, key_lengths, alibi_slopes, learnable_sink, None)
    return Mask(*tensors, left, right, bottom_right, softcap), scale, smooth_keys


def key_average(key: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    """The average key of each batch and head, (B, Hkv, 1, D) float32, over the keys that exist.

    Added in one order everywhere, since the integers depend on it. What is not finite counts as 0: any other average
    would do as well, and so what a masked key holds spoils no other.
    """
    batch, heads, keys, width = key.shape
    x = key.float()
    count: Tensor | float = float(keys)
    if key_lengths is not None:
        lengths = key_lengths.long().clamp(0, keys).view(-1, 1, 1, 1)
        x = x.masked_fill(torch.arange(keys, device=key.device).view(-1, 1) >= lengths, 0.0)
        count = lengths.float()
    chunks = max(math.ceil(keys / CHUNK), 1)
    x = F.pad(x, (0, 0, 0, chunks * CHUNK - keys)).view(batch, heads, chunks, CHUNK, width)
    total = _added(_added(x)).unsqueeze(2)
    return total / (count.clamp(min=1.0) if isinstance(count, Tensor) else max(count, 1.0))


def _added(x: Tensor) -> Tensor:
    """(..., D), the sums over the rows of x (..., N, D): LANES sums in the order of the rows, then by halves."""
    x = x.where(x.isfinite(), 0.0)
    x = F.pad(x, (0, 0, 0, -x.size(-2) % LANES)).unflatten(-2, (-1, LANES))
    lanes = torch.zeros_like(x[..., 0, :, :])
    for i in range(x.size(-3)):
        lanes = lanes + x[..., i, :, :]
    while lanes.size(-2) > 1:
        first, second = lanes.chunk(2, -2)
        lanes = first + second
    return lanes.squeeze(-2)


def quantized(x: Tensor, average: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 integers from -127 to 127 (B, H, S, D) and float32 scales (B, H, S) of the rows of x less `average`.

    A row that is not finite has zeros and the scale NaN.
    """
    x = x.float() if average is None else x.float() - average
    rows = x.shape[:-1]
    integers, scale, zero_point = quantize_rows(x.reshape(math.prod(rows), x.size(-1)), "symmetric")
    integers = (integers - zero_point[:, None]).masked_fill(scale.isnan()[:, None], 0)
    return integers.to(torch.int8).view(x.shape), scale.view(rows)
