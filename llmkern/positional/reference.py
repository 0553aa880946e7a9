"""Positional encodings in plain PyTorch: what every kernel of this family is held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmkern import check
from llmkern.random import LOW, drop_below, philox_words
from llmkern.rotation import rotate


def sinusoidal_table(max_len: int, d_model: int) -> Tensor:
    """The table (max_len, 1, d_model), float32: sines in the even columns, cosines in the odd ones.

    An odd d_model has one sine more than cosines. Source: Vaswani et al. 2017, section 3.5.
    """
    position = torch.arange(0, max_len).unsqueeze(1)
    div_term = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
    pe = torch.zeros(max_len, 1, d_model)
    pe[:, 0, 0::2] = torch.sin(position * div_term)
    pe[:, 0, 1::2] = torch.cos(position * div_term)[:, : d_model // 2]
    return pe


def sinusoidal_add(
    x: Tensor, pe: Tensor, scale: float = 1.0, dropout_p: float = 0.0, seed: Tensor | int | None = None
) -> Tensor:
    """(x * scale + pe[:S]) * dropout_factor; x (S, B, D), pe (max_len, 1, D), seed an integer or int64 tensor ()."""
    out = x * scale + pe[: x.size(0)].to(x.dtype)
    return out * dropout_factor(out, dropout_p, seed) if dropout_p > 0.0 and seed is not None else out


def dropout_factor(x: Tensor, dropout_p: float, seed: Tensor | int) -> Tensor:
    """0 for the elements of x (S, B, D) that are dropped and 1 / (1 - dropout_p) for the others, in x's dtype.

    An element (s, b, d) is dropped where word d % 4 of Philox4x32-10 at counter (d // 4, row, row >> 32, 0),
    row = s * B + b, keyed by the seed's low and high halves, is less than dropout_p * 2^32.
    """
    if dropout_p >= 1.0:
        return torch.zeros_like(x)
    length, batch, width = x.shape
    row = torch.arange(length * batch, device=x.device).view(-1, 1)
    column = torch.arange((width + 3) // 4, device=x.device)
    words = philox_words((column, row & LOW, row >> 32, torch.zeros_like(row)), seed)
    words = words.reshape(length * batch, 4 * column.numel())[:, :width].reshape(x.shape)
    return (words >= drop_below(dropout_p)).to(x.dtype) * (1.0 / (1.0 - dropout_p))


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotates the first R elements of each row of q (B, H, S, D) and k (B, Hkv, S, D) by its position's angles.

    cos, sin: (length, R/2), R <= D. position_ids: (S,) or (B, S), integers in [0, length); 0, 1, ... S - 1 without.
    interleaved: element j is paired with j + 1 (j even) instead of j + R/2. inplace: the results are written over q
    and k. Returns (q, k). Source: Su et al. 2021, "RoFormer", section 3.4.
    """
    if position_ids is None:
        cos, sin = cos[: q.size(2)], sin[: q.size(2)]
    else:
        position_ids = position_ids.long()
        cos, sin = cos[position_ids], sin[position_ids]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    results = [None if x is None else rotate(x, cos, sin, interleaved) for x in (q, k)]
    if inplace:
        results = [x if x is None or y is None else x.copy_(y) for x, y in zip((q, k), results, strict=True)]
    assert results[0] is not None
    return results[0], results[1]


def rotary_table(max_len: int, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2 j / dim), each (max_len, dim/2), float32; angles formed in float64."""
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(max_len, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().float(), angle.sin().float()


class PositionalEncoding(nn.Module):
    """Adds the sinusoidal table to embeddings: x + pe[:S].

    x: (S, B, d_model), sequence first. Buffer pe: (max_len, 1, d_model), float32; an odd d_model drops the last cosine
    column. Source: Vaswani et al. 2017, section 3.5.
    """

    pe: Tensor

    def __init__(self, d_model: int, max_len: int = 5000) -> None:
        check.positive("d_model", d_model)
        check.positive("max_len", max_len)
        super().__init__()
        self.d_model, self.max_len = d_model, max_len
        self.register_buffer("pe", sinusoidal_table(max_len, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """x (S, B, d_model), S <= max_len."""
        if x.size(0) > self.max_len:
            raise ValueError(f"x: expected (S, B, d_model) with S <= max_len = {self.max_len}, got {tuple(x.shape)}")
        return x + self.pe[: x.size(0), :]


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys.

    dim: the rotated part R of the head size, even. Buffers cos and sin: (max_len, dim/2), float32, not saved in the
    state_dict. Source: Su et al. 2021, "RoFormer", section 3.4.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, max_len: int = 5000, base: float = 10000.0, interleaved: bool = False) -> None:
        check.positive("max_len", max_len)
        if dim < 2 or dim % 2:
            raise ValueError(f"dim: expected a positive even number, got {dim}")
        super().__init__()
        self.dim, self.max_len, self.base, self.interleaved = dim, max_len, base, interleaved
        cos, sin = rotary_table(max_len, dim, base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor | None = None, position_ids: Tensor | None = None, *, offset: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """q (B, H, S, D), k (B, Hkv, S, D) or None -> (q, k). position_ids: (S,) or (B, S); offset is added to all."""
        if position_ids is None:
            position_ids = torch.arange(q.size(2), device=q.device)
        return rotary(q, k, self.cos, self.sin, interleaved=self.interleaved, position_ids=position_ids + offset)
