"""torch's multi-head attention and Transformer layers on the fused kernels: the same constructor, state and results."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern.attention.mask import Mask
from llmkern.attention.op import attention, attention_weights
from llmkern.attention.sdpa import scaled_dot_product_attention
from llmkern.norm.module import LayerNorm, RMSNorm


class FusedAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, fused; the weights, where they are asked for, cost one more pass.

    Serves every option of torch's (kdim and vdim, bias_k and bias_v, add_zero_attn) and every mask. Torch's own forward
    serves what the kernels do not have: nested tensors, float64, and weights that dropout has thinned. A row with every
    key masked is zeros, where torch's path with weights gives NaN.
    """

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
        dropout = self.dropout if self.training else 0.0
        if (
            (need_weights and dropout > 0.0)
            or (is_causal and attn_mask is None)  # torch's own error
            or any(t.is_nested or t.dtype == torch.float64 for t in (query, key, value))
        ):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        # torch's own errors
        F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        batched = query.dim() == 3
        self._check_masks(query, key, key_padding_mask, attn_mask)
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        elif self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        k, v, added = self._with_more_keys(k, v)
        batch = q.size(1)
        q, k, v = (t.unflatten(2, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3) for t in (q, k, v))
        hint = is_causal and key_padding_mask is None and not need_weights and added == 0
        causal = hint and q.size(2) == k.size(2)
        mask = None if causal else self._mask(attn_mask, key_padding_mask, batch, q.dtype, added)
        weights = None
        if need_weights:
            described, scale = (
                Mask(mask if mask is None or mask.dim() == 4 else mask[None, None]),
                1.0 / math.sqrt(self.head_dim),
            )
            output, logsumexp = attention(q, k, v, described, scale)
            weights = attention_weights(q, k, logsumexp, described, scale)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            output = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        # The output has the memory order of q, so that this is a view.
        output = output.permute(2, 0, 1, 3).flatten(2)
        if not batched:
            output = output.squeeze(1)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return self.out_proj(output), weights

    def _check_masks(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """Raises on masks that torch refuses, and which would be added or broadcast here."""
        batched, second = query.dim() == 3, not self.batch_first
        batch = query.size(int(second)) if batched else 1
        queries, keys = (t.size(0 if second or not batched else 1) for t in (query, key))
        shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
            "key_padding_mask": (key_padding_mask, [(batch, keys) if batched else (keys,)]),
            "attn_mask": (attn_mask, [(queries, keys), (batch * self.num_heads, queries, keys)]),
        }
        for name, (mask, allowed) in shapes.items():
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{name}: expected dtype bool or a floating one, got {mask.dtype}")
            if tuple(mask.shape) not in allowed:
                expected = " or ".join(map(str, allowed))
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(mask.shape)}")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, in one matmul for self-attention and in two where key is value."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is None:  # kdim or vdim
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
            return q, k, v
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

    def _with_more_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values (Sk, B, W) with those that the module adds, and how many these are."""
        more = []
        if self.bias_k is not None and self.bias_v is not None:
            more.append((self.bias_k.to(k.dtype), self.bias_v.to(v.dtype)))
        if self.add_zero_attn:
            more.append((k.new_zeros(1, 1, k.size(2)), v.new_zeros(1, 1, v.size(2))))
        for one_k, one_v in more:
            k, v = (torch.cat([t, one.expand(1, t.size(1), -1)]) for t, one in ((k, one_k), (v, one_v)))
        return k, v, len(more)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype, added: int
    ) -> Tensor | None:
        """Both masks as one for scaled_dot_product_attention, where True takes part (in these, True is forbidden).

        added: keys of the module's own at the end, which no mask speaks of.
        """
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
        if added:
            masks = [F.pad(m, (0, added)) for m in masks]
        if all(m.dtype == torch.bool for m in masks):
            seen = ~masks[0]
            return seen & ~masks[1] if len(masks) == 2 else seen
        sums = [
            torch.zeros_like(m, dtype=dtype).masked_fill_(m, -torch.inf) if m.dtype == torch.bool else m.to(dtype)
            for m in masks
        ]
        return sums[0] + sums[1] if len(sums) == 2 else sums[0]


def _is_hooked(module: nn.Module) -> bool:
    """Whether torch runs something with this module's forward or backward, or with every module's."""
    every = nn.modules.module
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or every._global_forward_hooks or every._global_forward_pre_hooks
        or every._global_backward_hooks or every._global_backward_pre_hooks
    )  # fmt: skip


def added(norm: nn.Module, x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x + change), x + change), in one pass where the norm is ours and no hook sees what it takes and gives."""
    if type(norm) in (LayerNorm, RMSNorm) and not _is_hooked(norm):
        normal, total = norm(change, residual=x)
        return normal, total
    total = x + change
    return norm(total), total


class FusedEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, each residual added in the norm behind it.

    Never takes torch's own function for inference, which would read the weights behind the backs of its modules.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn.TransformerEncoderLayer.forward, whose arguments these are."""
        masks = (src_mask, src_key_padding_mask)
        if self.norm_first:
            x, total = added(self.norm2, src, self._sa_block(self.norm1(src), *masks, is_causal=is_causal))
            return total + self._ff_block(x)
        x, _ = added(self.norm1, src, self._sa_block(src, *masks, is_causal=is_causal))
        return added(self.norm2, x, self._ff_block(x))[0]


class FusedEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder of such layers, which no nested tensor may reach."""


class FusedDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer, each residual added in the norm behind it."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn.TransformerDecoderLayer.forward, whose arguments these are."""
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        other = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            x, total = added(self.norm2, tgt, self._sa_block(self.norm1(tgt), *own))
            x, total = added(self.norm3, total, self._mha_block(x, *other))
            return total + self._ff_block(x)
        x, _ = added(self.norm1, tgt, self._sa_block(tgt, *own))
        x, _ = added(self.norm2, x, self._mha_block(x, *other))
        return added(self.norm3, x, self._ff_block(x))[0]
