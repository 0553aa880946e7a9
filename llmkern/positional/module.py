"""Positional encodings as modules, on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import check
from llmkern.positional import op, reference


class PositionalEncoding(reference.PositionalEncoding):
    """Adds the sinusoidal table to embeddings: x + pe[:S], sequence first, with scale and dropout in the same pass.

    d_model: the width. max_len: the longest sequence. scale: a factor for x. dropout: the probability, in training,
    with which an element becomes 0. The state_dict is that of llmkern.reference.PositionalEncoding: the buffer pe,
    (max_len, 1, d_model) float32. Source: Vaswani et al. 2017, section 3.5.
    """

    def __init__(self, d_model: int, max_len: int = 5000, *, dropout: float = 0.0, scale: float = 1.0) -> None:
        check.probability("dropout", dropout)
        check.number("scale", scale)
        super().__init__(d_model, max_len)
        self.dropout, self.scale = dropout, scale

    def forward(self, x: Tensor) -> Tensor:
        """x (S, B, d_model), S <= max_len, float32, bfloat16 or float16. Returns its shape.

        The dtype is that of a sum with pe in torch: x's own where pe has it too (a model in bfloat16), float32 where
        they differ. Raises TypeError for a wrong dtype, ValueError for a wrong shape.
        """
        check.is_tensor("x", x)
        pe, dropout_p = self.pe, self.dropout if self.training else 0.0
        if x.dtype != pe.dtype:
            check.dtype("x", x, check.FLOATS)
            x = x.to(torch.promote_types(x.dtype, pe.dtype))
        try:
            return op.sinusoidal_add(x, pe.float(), scale=self.scale, dropout_p=dropout_p)
        except (TypeError, ValueError):
            self._check_input(x, check.FLOATS)  # the same in this module's words; before, it would cost every call
            raise


class RotaryEmbedding(reference.RotaryEmbedding):
    """Rotary position embedding of queries and keys, both in one pass.

    dim: the rotated part R of the head size, even. max_len: positions in the tables. base: of the angles.
    interleaved: pairs are neighbours instead of halves. Source: Su et al. 2021, "RoFormer", section 3.4.
    """

    def __init__(self, dim: int, max_len: int = 5000, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__(dim, max_len, base, interleaved)

    def forward(
        self, q: Tensor, k: Tensor | None = None, position_ids: Tensor | None = None, *, offset: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """q (B, H, S, D), k (B, Hkv, S, D) or None -> (q, k). position_ids: (S,) or (B, S); offset is added to all.

        Raises TypeError for a wrong dtype, ValueError for a wrong shape or a position outside the tables.
        """
        cos, sin, position_ids = self._tables(q, position_ids, offset)
        return op.rotary(q, k, cos, sin, interleaved=self.interleaved, position_ids=position_ids)
