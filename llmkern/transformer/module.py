"""The encoder-decoder with torch's layers, their attention fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern.attention.sdpa import scaled_dot_product_attention
from llmkern.transformer import reference


class Transformer(reference.Transformer):
    """An encoder and a decoder, sequence first, on fused attention.

    d_model: the width. nhead: attention heads, a divisor of d_model. num_layers: layers of each stack. Constructor,
    forward and state_dict are those of llmkern.reference.Transformer; the same seed gives the same parameters. In
    training, where the attention weights are dropped out, attention is torch's own.

    Raises what the reference raises. Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.
    """

    def __init__(self, d_model: int = 512, nhead: int = 8, num_layers: int = 6) -> None:
        super().__init__(d_model, nhead, num_layers)
        for module in self.modules():
            if type(module) is nn.MultiheadAttention:
                module.__class__ = FusedAttention  # adds a forward and no state


class FusedAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention whose forward is one fused kernel wherever no weights are asked for."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention.forward, whose arguments these are."""
        if (
            need_weights
            or (self.training and self.dropout > 0)
            or self.in_proj_weight is None
            or self.bias_k is not None
            or self.add_zero_attn
            or (is_causal and attn_mask is None)  # torch's own error
        ):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._project(query, key, value)
        batched = query.dim() == 3
        if not batched:
            q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        elif self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        batch = q.size(1)
        q, k, v = (t.unflatten(2, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3) for t in (q, k, v))
        causal = is_causal and key_padding_mask is None and q.size(2) == k.size(2)
        mask = None if causal else self._mask(attn_mask, key_padding_mask, batch, q.dtype)
        # The output has the memory order of q, so that this is a view.
        output = scaled_dot_product_attention(q, k, v, mask, is_causal=causal).permute(2, 0, 1, 3).flatten(2)
        if not batched:
            output = output.squeeze(1)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return self.out_proj(output), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, in one matmul for self-attention and in two where key is value."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).split(width, dim=-1)
            return q, k, v
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        q = F.linear(query, weight[:width], q_bias)
        if key is value:
            k, v = F.linear(key, weight[width:], kv_bias).split(width, dim=-1)
            return q, k, v
        k_bias, v_bias = (None, None) if kv_bias is None else (kv_bias[:width], kv_bias[width:])
        return (
            q,
            F.linear(key, weight[width : 2 * width], k_bias),
            F.linear(value, weight[2 * width :], v_bias),
        )

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks as one for scaled_dot_product_attention, where True takes part (in these, True is forbidden)."""
        masks = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
            masks.append(attn_mask)
        if key_padding_mask is not None:
            padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask.unsqueeze(0)
            masks.append(padding[:, None, None, :])
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            seen = ~masks[0]
            return seen & ~masks[1] if len(masks) == 2 else seen
        added = [
            torch.zeros_like(m, dtype=dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m.to(dtype)
            for m in masks
        ]
        return added[0] + added[1] if len(added) == 2 else added[0]
