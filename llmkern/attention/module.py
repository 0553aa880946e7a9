"""Multi-head attention on the fused kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkern import check
from llmkern.attention import reference
from llmkern.attention.mask import Mask, window
from llmkern.attention.op import attention, attention_weights


class MultiHeadAttention(reference.MultiHeadAttention):
    """Multi-head attention, batch first, fused.

    d_model: the width. n_head: heads, a divisor of d_model. Constructor, forward and state_dict are those of
    llmkern.reference.MultiHeadAttention. Raises ValueError where n_head does not divide d_model.

    Sources: Vaswani et al. 2017, section 3.2; Dao 2023, "FlashAttention-2", section 3.
    """

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__(d_model, n_head)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        need_weights: bool = True,
        is_causal: bool = False,
        key_lengths: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        learnable_sink: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output (B, Sq, d_model) and the attention weights (B, n_head, Sq, Sk), or None without need_weights.

        query (B, Sq, d_model), key and value (B, Sk, d_model). mask broadcasts against (B, n_head, Sq, Sk): 0 or
        False is masked. is_causal: query i sees the keys j <= i. key_lengths (B,): only the first key_lengths[b] keys
        exist. A row with every key masked attends to all keys alike, or with learnable_sink to none. The output is
        computed without the weights; they cost one more pass.

        window_size (left, right): query i sees the keys i - left <= j <= i + right, where -1 is no limit. softcap: a
        scaled score s becomes softcap * tanh(s / softcap). alibi_slopes (n_head,) or (B, n_head) float32: a score gets
        -slope * |i - j|. learnable_sink (n_head,): one more logit in each row's denominator, so that the weights of a
        row sum to less than 1; it has a gradient.

        Raises TypeError for what is no floating tensor or not of the parameters' dtype, ValueError for wrong shapes.
        Under autocast, which casts them, query, key and value may be float32, bfloat16 or float16.
        """
        w_q, w_k, w_v, w_o = projections = self.w_q, self.w_k, self.w_v, self.w_o
        reference.check_inputs(self.d_model, self.n_head, projections, query, key, value, mask, check.FLOATS)
        check.flag("need_weights", need_weights)
        heads = (self.n_head, self.d_k)
        q = w_q(query).unflatten(2, heads).transpose(1, 2)
        k = w_k(key).unflatten(2, heads).transpose(1, 2)
        v = w_v(value).unflatten(2, heads).transpose(1, 2)
        dense = None
        if mask is not None:
            dense = (mask if mask.dtype == torch.bool else mask != 0)[(None,) * (4 - mask.dim())]
        left, right = window(window_size, is_causal)
        described = Mask(
            dense, key_lengths, alibi_slopes, learnable_sink, window_left=left, window_right=right, softcap=softcap
        )
        scale = 1.0 / math.sqrt(self.d_k)
        output, logsumexp = attention(q, k, v, described, scale, True)
        weights = attention_weights(q, k, logsumexp, described, scale, True) if need_weights else None
        # The output has the memory order of q, (B, Sq, n_head, d_k): this is a view.
        return w_o(output.transpose(1, 2).flatten(2)), weights
