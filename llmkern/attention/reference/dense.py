"""Attention in plain PyTorch, and its gradients by hand.

The functions take what the operators of op/ take: query (B, H, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv)
with Hkv a divisor of H, and at the end `rules`: what `Mask.arguments` gives, the scale, and uniform_empty_rows. Masked
keys and values are left out, not multiplied by zero, so that nothing that stands in them can reach the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.attention.layout import in_order
from llmkern.attention.mask import Mask
from llmkern.random import LOW, drop_below, philox_words

_ALL = slice(None)
#: Queries whose weights are in memory at a time where only their sums are asked for.
_ROWS = 256


def attention(query: Tensor, key: Tensor, value: Tensor, *rules: Any, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T, changed and masked) @ value, (B, H, Sq, Dv), and the log-sum-exp of each row of
    scores and sink, (B, H, Sq) float64.

    A row with every key masked is zeros, or the average of all values (uniform_empty_rows, without a sink). first_batch
    is the place of the first batch for dropout.
    """
    mask, scale, uniform_empty_rows = _described(rules)
    scores, seen = _scores(query, key, mask, scale)
    weights, _, kept = _softmax(scores, seen, mask, uniform_empty_rows)
    output = _matmul(_dropped(weights, mask, first_batch), _for_each_head(value, query), kept)
    return in_order(output, query), torch.logsumexp(_with_sink(scores, mask).double(), dim=-1)


def attention_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    logsumexp: Tensor, *rest: Any, first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, and in float32 of an additive mask (where `rest` ends with True) and of
    the sink; these two are empty where there are none."""
    *rules, mask_grad = rest
    mask, scale, uniform_empty_rows = _described(rules)
    scores, seen = _scores(query, key, mask, scale)
    weights, sink, kept = _softmax(scores, seen, mask, uniform_empty_rows)
    to_values = _dropped(weights, mask, first_batch)
    grad_value = _matmul(to_values.transpose(2, 3), grad_output, None if kept is None else kept.transpose(2, 3))
    grad_weights = torch.matmul(grad_output, _for_each_head(value, query).transpose(2, 3))
    grad_weights = _dropped(grad_weights, mask, first_batch)
    through = _through_softmax(
        grad_weights, grad_logsumexp, weights, sink, query, key, mask, seen, scale, bool(mask_grad)
    )
    return through[0], through[1], in_order(_sum_of_group(grad_value, value), value), through[2], through[3]


def attention_weights(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Tensor:
    """The softmax itself, before dropout, (B, H, Sq, Sk) in query's dtype; kernels take it from the log-sum-exp."""
    mask, scale, uniform_empty_rows = _described(rules)
    scores, seen = _scores(query, key, mask, scale)
    return _softmax(scores, seen, mask, uniform_empty_rows)[0]


def attention_weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query and key, and in float32 of an additive mask and of the sink, as in attention_backward."""
    *rules, mask_grad = rest
    mask, scale, uniform_empty_rows = _described(rules)
    scores, seen = _scores(query, key, mask, scale)
    weights, sink, _ = _softmax(scores, seen, mask, uniform_empty_rows)
    return _through_softmax(grad_weights, None, weights, sink, query, key, mask, seen, scale, bool(mask_grad))


def attention_column_sums(query: Tensor, key: Tensor, logsumexp: Tensor, *rules: Any) -> Tensor:
    """The sum over the queries of each key's weight, (B, H, Sk) float32, some queries at a time."""
    mask, scale, uniform_empty_rows = _described(rules)
    sums = query.new_zeros((*query.shape[:2], key.size(2)), dtype=torch.float32)
    for start in range(0, query.size(2), _ROWS):
        scores, seen = _scores(query, key, mask, scale, slice(start, start + _ROWS))
        sums = sums + _softmax(scores, seen, mask, uniform_empty_rows)[0].float().sum(2)
    return sums


def dropout_factor(like: Tensor, dropout_p: float, seed: Tensor | int, first_batch: int = 0) -> Tensor:
    """0 for the weights (B, H, Sq, Sk) that are dropped and 1 / (1 - dropout_p) for the others, in like's dtype.

    Weight (b, h, i, j) is dropped where word j % 4 of Philox4x32-10 at counter (j // 4, i, (b + first_batch) * H + h,
    0), keyed by the seed's low and high halves, is less than dropout_p * 2^32.
    """
    if dropout_p >= 1.0:
        return torch.zeros_like(like)
    batch, heads, queries, keys = like.shape
    four = torch.arange((keys + 3) // 4, device=like.device)
    row = torch.arange(queries, device=like.device).view(-1, 1)
    place = torch.arange(batch * heads, device=like.device).view(-1, 1, 1) + first_batch * heads
    words = philox_words((four, row & LOW, place & LOW, torch.zeros_like(row)), seed)
    words = words.reshape(batch, heads, queries, 4 * four.numel())[..., :keys]
    return (words >= drop_below(dropout_p)).to(like.dtype) * (1.0 / (1.0 - dropout_p))


def _described(rules: Any) -> tuple[Mask, float, bool]:
    *mask, scale, uniform_empty_rows = rules
    return Mask(*mask), scale, uniform_empty_rows


def _products(query: Tensor, key: Tensor, scale: float, rows: slice = _ALL) -> Tensor:
    """The scaled scores before any rule."""
    return torch.matmul(query[:, :, rows], _for_each_head(key, query).transpose(2, 3)) * scale


def _capped(scores: Tensor, mask: Mask) -> Tensor:
    return mask.softcap * torch.tanh(scores / mask.softcap) if mask.softcap > 0.0 else scores


def _scores(query: Tensor, key: Tensor, mask: Mask, scale: float, rows: slice = _ALL) -> tuple[Tensor, Tensor | None]:
    """The scores of some rows as the softmax takes them, and which of them are seen (None: all)."""
    return _ruled(_capped(_products(query, key, scale, rows), mask), mask, query.size(2), rows)


def _ruled(scores: Tensor, mask: Mask, queries: int, rows: slice = _ALL) -> tuple[Tensor, Tensor | None]:
    """Capped scores under the rules that follow, and which of them are seen. queries: those that there are in all."""
    sizes = (queries, scores.size(3), scores.device, rows)
    bias = mask.distance_bias(*sizes)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask.additive is not None:
        added = mask.additive.to(scores.dtype)
        scores = scores + (added[:, :, rows] if added.size(2) > 1 else added)
    seen = mask.seen(*sizes)
    if seen is not None:
        seen = seen[(None,) * (4 - seen.dim())]
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)), seen


def _with_sink(scores: Tensor, mask: Mask) -> Tensor:
    """The scores, and the sink as one more column."""
    if mask.learnable_sink is None:
        return scores
    sink = mask.learnable_sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, sink), -1)


def _softmax(
    scores: Tensor, seen: Tensor | None, mask: Mask, uniform_empty_rows: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weights, that of the sink (B, H, Sq, 1), and which weights count: those seen, and all of an empty row that
    is to be uniform."""
    weights, sink = torch.softmax(_with_sink(scores, mask), dim=-1), None
    if mask.learnable_sink is not None:
        weights, sink = weights[..., :-1], weights[..., -1:]
    if seen is None:
        return weights, sink, None
    empty = ~seen.any(-1, keepdim=True)
    uniform = uniform_empty_rows and sink is None
    weights = weights.masked_fill(empty, 1.0 / max(scores.size(-1), 1) if uniform else 0.0)
    return weights, sink, seen | empty if uniform else seen


def _dropped(weights: Tensor, mask: Mask, first_batch: int) -> Tensor:
    if mask.dropout_p == 0.0 or mask.dropout_seed is None:
        return weights
    return weights * dropout_factor(weights, mask.dropout_p, mask.dropout_seed, first_batch)


def _through_softmax(
    grad_weights: Tensor, grad_logsumexp: Tensor | None, weights: Tensor, sink: Tensor | None, query: Tensor,
    key: Tensor, mask: Mask, seen: Tensor | None, scale: float, mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """From the gradients of weights and log-sum-exp to those of query, key, additive mask and sink; an empty row has
    none."""
    if seen is not None:
        grad_weights = grad_weights.masked_fill(~seen, 0.0)
        weights = weights.masked_fill(~seen, 0.0)
    # The softmax is one operation: what is inside it is rounded once, as torch's own backward does it.
    wide = torch.promote_types(weights.dtype, torch.float32)
    weights, grad_weights = weights.to(wide), grad_weights.to(wide)
    row_sum = (weights * grad_weights).sum(-1, keepdim=True)
    # The log-sum-exp's part comes last: it may be small beside two that cancel.
    added = 0.0 if grad_logsumexp is None else grad_logsumexp.unsqueeze(-1).to(wide)
    grad_scores = (weights * (grad_weights - row_sum + added)).to(query.dtype)
    grad_mask = grad_sink = query.new_empty(0, dtype=torch.float32)
    if mask_grad and mask.dense is not None:
        grad_mask = grad_scores.to(wide).sum_to_size(mask.dense.shape).contiguous()
    if sink is not None:
        grad_sink = (sink.double() * (added - row_sum)).sum((0, 2, 3)).to(wide)
    if mask.softcap > 0.0:
        slope = 1.0 - (_capped(_products(query, key, scale), mask) / mask.softcap).square()
        grad_scores = grad_scores * (slope if seen is None else slope.masked_fill(~seen, 0.0))
    grad_query = _matmul(grad_scores, _for_each_head(key, query), seen) * scale
    grad_key = _matmul(grad_scores.transpose(2, 3), query, None if seen is None else seen.transpose(2, 3)) * scale
    return in_order(grad_query, query), in_order(_sum_of_group(grad_key, key), key), grad_mask, grad_sink


def _matmul(weights: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """weights @ values, where a value that is not seen has no part, be it infinite or NaN."""
    if seen is None or values.is_meta or bool(values.isfinite().all()):
        return torch.matmul(weights, values)
    products = weights.unsqueeze(-1) * values.unsqueeze(2)
    return products.masked_fill(~seen.expand(weights.shape).unsqueeze(-1), 0.0).sum(3)


def _for_each_head(key: Tensor, query: Tensor) -> Tensor:
    """Key or value repeated for the heads of its group."""
    group = query.size(1) // max(key.size(1), 1)
    return key if group == 1 else key.repeat_interleave(group, dim=1)


def _sum_of_group(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of `_for_each_head`."""
    group = grad.size(1) // max(like.size(1), 1)
    return grad if group == 1 else grad.unflatten(1, (like.size(1), group)).sum(2)
