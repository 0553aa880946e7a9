"""Attention in plain PyTorch: what every kernel of this family is held to.

The functions take what the operators of op.py take: query (B, H, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv)
with Hkv a divisor of H, and a mask as `Mask` describes it. Masked keys and values are left out, not multiplied by
zero, so that nothing that stands in them can reach the result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern import check
from llmkern.attention.layout import in_order
from llmkern.attention.mask import Mask


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_lengths: Tensor | None,
    causal: bool, bottom_right: bool, scale: float, uniform_empty_rows: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * query @ key^T + mask) @ value, (B, H, Sq, Dv), and the log-sum-exp of each row, (B, H, Sq)
    float64.

    A row with every key masked is the average of all values (uniform_empty_rows) or zeros; its log-sum-exp is -inf.
    """
    described = Mask(mask, key_lengths, causal, bottom_right)
    scores, seen = _scores(query, key, described, scale)
    weights, seen = _softmax(scores, seen, uniform_empty_rows)
    output = _matmul(weights, _for_each_head(value, query), seen)
    return in_order(output, query), torch.logsumexp(scores.double(), dim=-1)


def attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
    mask: Tensor | None, key_lengths: Tensor | None, causal: bool, bottom_right: bool, scale: float,
    uniform_empty_rows: bool, mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, and with mask_grad that of the additive mask in float32 (else empty)."""
    described = Mask(mask, key_lengths, causal, bottom_right)
    scores, seen = _scores(query, key, described, scale)
    weights, kept = _softmax(scores, seen, uniform_empty_rows)
    values = _for_each_head(value, query)
    grad_value = _matmul(weights.transpose(2, 3), grad_output, None if kept is None else kept.transpose(2, 3))
    grad_weights = torch.matmul(grad_output, values.transpose(2, 3))
    grads = _through_softmax(grad_weights, weights, query, key, mask, seen, scale, mask_grad)
    return grads[0], grads[1], in_order(_sum_of_group(grad_value, value), value), grads[2]


def attention_weights(
    query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None, key_lengths: Tensor | None,
    causal: bool, bottom_right: bool, scale: float, uniform_empty_rows: bool,
) -> Tensor:  # fmt: skip
    """The softmax itself, (B, H, Sq, Sk) in query's dtype; kernels take it from the log-sum-exp."""
    scores, seen = _scores(query, key, Mask(mask, key_lengths, causal, bottom_right), scale)
    return _softmax(scores, seen, uniform_empty_rows)[0]


def attention_weights_backward(
    grad_weights: Tensor, query: Tensor, key: Tensor, logsumexp: Tensor, mask: Tensor | None,
    key_lengths: Tensor | None, causal: bool, bottom_right: bool, scale: float, uniform_empty_rows: bool,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query and key, and with mask_grad that of the additive mask in float32 (else empty)."""
    scores, seen = _scores(query, key, Mask(mask, key_lengths, causal, bottom_right), scale)
    weights, _ = _softmax(scores, seen, uniform_empty_rows)
    return _through_softmax(grad_weights, weights, query, key, mask, seen, scale, mask_grad)


def _scores(query: Tensor, key: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor | None]:
    """The scaled and masked scores, and which of them are seen (None: all)."""
    scores = torch.matmul(query, _for_each_head(key, query).transpose(2, 3)) * scale
    if mask.additive is not None:
        scores = scores + mask.additive.to(scores.dtype)
    seen = mask.seen(query.size(2), key.size(2), query.device)
    if seen is not None:
        seen = seen[(None,) * (4 - seen.dim())]
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)), seen


def _softmax(scores: Tensor, seen: Tensor | None, uniform_empty_rows: bool) -> tuple[Tensor, Tensor | None]:
    """The weights, and which of them count: those seen, and all of an empty row that is to be uniform."""
    weights = torch.softmax(scores, dim=-1)
    if seen is None:
        return weights, None
    empty = ~seen.any(-1, keepdim=True)
    uniform = 1.0 / max(scores.size(-1), 1) if uniform_empty_rows else 0.0
    return weights.masked_fill(empty, uniform), seen | empty if uniform_empty_rows else seen


def _through_softmax(
    grad_weights: Tensor, weights: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, seen: Tensor | None,
    scale: float, mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From the gradient of the weights to those of query, key and additive mask; an empty row has none."""
    if seen is not None:
        grad_weights = grad_weights.masked_fill(~seen, 0.0)
        weights = weights.masked_fill(~seen, 0.0)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_query = _matmul(grad_scores, _for_each_head(key, query), seen) * scale
    grad_key = _matmul(grad_scores.transpose(2, 3), query, None if seen is None else seen.transpose(2, 3)) * scale
    grad_mask = query.new_empty(0, dtype=torch.float32)
    if mask_grad and mask is not None:
        grad_mask = grad_scores.float().sum_to_size(mask.shape).contiguous()
    return in_order(grad_query, query), in_order(_sum_of_group(grad_key, key), key), grad_mask


def _matmul(weights: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """weights @ values, where a value that is not seen has no part, be it infinite or NaN."""
    if seen is None or bool(values.isfinite().all()):
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


class MultiHeadAttention(nn.Module):
    """Multi-head attention, batch first.

    d_model: the width. n_head: heads, a divisor of d_model. Parameters w_q, w_k, w_v and w_o are nn.Linear(d_model,
    d_model). Raises ValueError where n_head does not divide d_model.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """

    def __init__(self, d_model: int, n_head: int) -> None:
        check.positive("d_model", d_model)
        check.positive("n_head", n_head)
        if d_model % n_head:
            raise ValueError(f"n_head: expected a positive divisor of d_model = {d_model}, got {n_head}")
        super().__init__()
        self.d_model, self.n_head, self.d_k = d_model, n_head, d_model // n_head
        self.w_q = nn.Linear(d_model, d_model)
        self.w_k = nn.Linear(d_model, d_model)
        self.w_v = nn.Linear(d_model, d_model)
        self.w_o = nn.Linear(d_model, d_model)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output (B, Sq, d_model) and the attention weights (B, n_head, Sq, Sk).

        query (B, Sq, d_model), key and value (B, Sk, d_model). mask broadcasts against (B, n_head, Sq, Sk): 0 or
        False is masked. A row with every key masked attends to all keys alike.

        Raises TypeError for what is no floating tensor or not of the parameters' dtype, ValueError for wrong shapes.
        """
        check_inputs(self.d_model, self.n_head, self.w_q.weight, query, key, value, mask)
        batch = query.size(0)
        q = self.w_q(query).view(batch, -1, self.n_head, self.d_k).transpose(1, 2)
        k = self.w_k(key).view(batch, -1, self.n_head, self.d_k).transpose(1, 2)
        v = self.w_v(value).view(batch, -1, self.n_head, self.d_k).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        weights = F.softmax(scores, dim=-1)
        output = torch.matmul(weights, v).transpose(1, 2).contiguous().view(batch, -1, self.d_model)
        return self.w_o(output), weights


def check_inputs(
    d_model: int, n_head: int, weight: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> None:
    """Raises on what forward of a MultiHeadAttention cannot take."""
    for name, t, length in (("query", query, "Sq"), ("key", key, "Sk"), ("value", value, "Sk")):
        check.is_tensor(name, t)
        check.rank(name, t, f"(B, {length}, d_model)")
        if t.size(2) != d_model:
            raise ValueError(f"{name}: expected (B, {length}, d_model) with d_model = {d_model}, got {tuple(t.shape)}")
        check.same_device(name, t, "the parameters", weight)
        device = weight.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            pass  # it casts what comes
        elif weight.is_floating_point():
            check.same_dtype(name, t, "the parameters", weight)
        else:  # quantised projections take every floating dtype and give it back
            check.is_floating(name, t)
            check.same_dtype(name, t, "query", query)
        if t.size(0) != query.size(0):
            raise ValueError(f"{name}: expected the batch of query, {query.size(0)}, got shape {tuple(t.shape)}")
    if value.size(1) != key.size(1):
        raise ValueError(f"value: expected the length of key, {key.size(1)}, got shape {tuple(value.shape)}")
    if mask is not None:
        check.is_tensor("mask", mask)
        check.same_device("mask", mask, "query", query)
        check.broadcasts("mask", mask, "(B, n_head, Sq, Sk)", (query.size(0), n_head, query.size(1), key.size(1)))
