"""Multi-head attention on the fused kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkern.attention import reference
from llmkern.attention.mask import Mask
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
    ) -> tuple[Tensor, Tensor | None]:
        """The output (B, Sq, d_model) and the attention weights (B, n_head, Sq, Sk), or None without need_weights.

        query (B, Sq, d_model), key and value (B, Sk, d_model). mask broadcasts against (B, n_head, Sq, Sk): 0 or
        False is masked. is_causal: query i sees the keys j <= i. key_lengths (B,): only the first key_lengths[b] keys
        exist. A row with every key masked attends to all keys alike. The output is computed without the weights; they
        cost one more pass.

        Raises TypeError for what is no floating tensor or not of the parameters' dtype, ValueError for wrong shapes.
        """
        reference.check_inputs(self.d_model, self.n_head, self.w_q.weight, query, key, value, mask)
        heads = (self.n_head, self.d_k)
        q = self.w_q(query).unflatten(2, heads).transpose(1, 2)
        k = self.w_k(key).unflatten(2, heads).transpose(1, 2)
        v = self.w_v(value).unflatten(2, heads).transpose(1, 2)
        dense = None
        if mask is not None:
            dense = (mask if mask.dtype == torch.bool else mask != 0)[(None,) * (4 - mask.dim())]
        described = Mask(dense, key_lengths, is_causal)
        scale = 1.0 / math.sqrt(self.d_k)
        output, logsumexp = attention(q, k, v, described, scale, True)
        weights = attention_weights(q, k, logsumexp, described, scale, True) if need_weights else None
        # The output has the memory order of q, (B, Sq, n_head, d_k): this is a view.
        return self.w_o(output.transpose(1, 2).flatten(2)), weights
