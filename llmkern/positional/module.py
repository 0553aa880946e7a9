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
    (max_len, 1, d_model) float32.

    Raises TypeError where d_model or max_len is no integer, dropout or scale no number; ValueError for a d_model or
    max_len that is not positive, a dropout outside [0, 1], a scale that is not finite. Source: Vaswani et al. 2017,
    section 3.5.
    """

    def __init__(self, d_model: int, max_len: int = 5000, *, dropout: float = 0.0, scale: float = 1.0) -> None:
        check.probability("dropout", dropout)
        check.finite("scale", scale)
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

    dim: the rotated part R of the head size, even. max_len: positions in the tables. base: pair j turns by base^(-2 j /
    dim) from one position to the next. interleaved: pairs are neighbours, (2 j, 2 j + 1), instead of (j, j + R/2).

    Raises TypeError for an argument of another type (integers, a number, a flag), ValueError for a dim that is not
    positive and even, a max_len that is not positive, a base that is not positive and finite. Source: Su et al. 2021,
    "RoFormer", section 3.4.
    """

    def __init__(self, dim: int, max_len: int = 5000, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__(dim, max_len, base, interleaved)

    def forward(
        self, q: Tensor, k: Tensor | None = None, position_ids: Tensor | None = None, *, offset: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """q (B, H, S, D), k (B, Hkv, S, D) or None -> (q, k), each in its shape and dtype.

        q: float32, bfloat16 or float16. k: the dtype of q. position_ids: (S,) or (B, S), int64 or int32, 0 ... S - 1
        without. offset is added to all; beside position_ids it has 32 bits.

        Raises TypeError for a wrong dtype or type, ValueError for a wrong shape or device, for an offset outside the
        tables and, on the CPU, for such a position; on a GPU the rotated elements of such a row become NaN.
        """
        cos, sin, position_ids = self._tables(q, position_ids, offset)
        return op.rotary(q, k, cos, sin, interleaved=self.interleaved, position_ids=position_ids)
