"""Multi-head attention in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern import autocast, check


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
        Under autocast, which casts them, query, key and value may be float32, bfloat16 or float16.
        """
        w_q, w_k, w_v, w_o = projections = self.w_q, self.w_k, self.w_v, self.w_o
        check_inputs(self.d_model, self.n_head, projections, query, key, value, mask, check.PLAIN_FLOATS)
        heads = (self.n_head, self.d_k)
        q = w_q(query).unflatten(2, heads).transpose(1, 2)
        k = w_k(key).unflatten(2, heads).transpose(1, 2)
        v = w_v(value).unflatten(2, heads).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            # -1e9, or in float16, which does not reach that far, the most negative number that it has.
            scores = scores.masked_fill(mask == 0, max(-1e9, torch.finfo(scores.dtype).min))
        weights = F.softmax(scores, dim=-1)
        output = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        return w_o(output), weights


def check_inputs(
    d_model: int, n_head: int, projections: tuple[nn.Module, ...], query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, floats: tuple[torch.dtype, ...],
) -> None:  # fmt: skip
    """Raises on what forward of a MultiHeadAttention cannot take.

    projections: all four, since any may be quantised: such a one takes all of `floats` and gives them back, and what it
    gives meets the others.
    """
    # A user's own projection need not have a weight; the first one's says where the module lies.
    weights: list[Any] = [getattr(p, "weight", None) for p in projections]
    weight = weights[0]
    dtypes = tuple([w.dtype for w in weights if isinstance(w, Tensor) and w.is_floating_point()])
    is_cast = autocast.is_on(weight.device)
    for name, t, length in (("query", query, "Sq"), ("key", key, "Sk"), ("value", value, "Sk")):
        check.is_tensor(name, t)
        check.rank(name, t, f"(B, {length}, d_model)")
        if t.size(2) != d_model:
            raise ValueError(f"{name}: expected (B, {length}, d_model) with d_model = {d_model}, got {tuple(t.shape)}")
        check.same_device(name, t, "the parameters", weight)
        if dtypes:
            check.parameters_dtype(name, t, dtypes, is_cast)
        else:
            check.dtype(name, t, floats)
            if t.dtype != query.dtype and not (is_cast and t.dtype in check.FLOATS and query.dtype in check.FLOATS):
                check.same_dtype(name, t, "query", query)
        if t.size(0) != query.size(0):
            raise ValueError(f"{name}: expected the batch of query, {query.size(0)}, got shape {tuple(t.shape)}")
    if value.size(1) != key.size(1):
        raise ValueError(f"value: expected the length of key, {key.size(1)}, got shape {tuple(value.shape)}")
    if mask is not None:
        check.is_tensor("mask", mask)
        check.same_device("mask", mask, "query", query)
        check.broadcasts("mask", mask, "(B, n_head, Sq, Sk)", (query.size(0), n_head, query.size(1), key.size(1)))
