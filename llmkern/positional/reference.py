"""Positional encodings in plain PyTorch: what every kernel of this family is held to."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._C import _functorch

from llmkern import autocast, check
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
    # Autocast is none of this function's business, and its torch.cat fails on a CPU for float16 in bfloat16's autocast.
    with torch.autocast(q.device.type, enabled=False) if autocast.is_on(q.device) else nullcontext():
        results = [None if x is None else rotate(x, cos, sin, interleaved) for x in (q, k)]
    if inplace:
        results = [x if x is None or y is None else x.copy_(y) for x, y in zip((q, k), results, strict=True)]
    assert results[0] is not None
    return results[0], results[1]


def check_rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    floats: tuple[torch.dtype, ...] = check.FLOATS,
) -> None:  # fmt: skip
    """Raises on what `rotary` cannot take, from metadata: TypeError for dtypes, ValueError for shapes and devices.

    floats: the dtypes of q and k.
    """
    check.dtype("q", q, floats)
    check.rank("q", q, "(B, H, S, D)")
    batch, _, length, width = q.shape
    if k is not None:
        check.same_dtype("k", k, "q", q)
        check.same_device("k", k, "q", q)
        check.rank("k", k, "(B, Hkv, S, D)")
        check.shape("k", k, "(B, Hkv, S, D)", (batch, k.size(1), length, width))
    check.dtype("cos", cos, (torch.float32,) if q.dtype == torch.float32 else (torch.float32, q.dtype))
    check.same_dtype("sin", sin, "cos", cos)
    for name, table in (("cos", cos), ("sin", sin)):
        check.same_device(name, table, "q", q)
        check.rank(name, table, "(length, R/2)")
    check.shape("sin", sin, "(length, R/2)", tuple(cos.shape))
    if 2 * cos.size(1) > width:
        raise ValueError(f"cos: expected (length, R/2) with R <= D = {width} of q, got shape {tuple(cos.shape)}")
    if position_ids is None:
        if length > cos.size(0):
            raise ValueError(
                f"q: expected (B, H, S, D) with S <= length = {cos.size(0)} of cos, got shape {tuple(q.shape)}"
            )
    else:
        check.dtype("position_ids", position_ids, (torch.int64, torch.int32))
        check.same_device("position_ids", position_ids, "q", q)
        if tuple(position_ids.shape) not in ((length,), (batch, length)):
            raise ValueError(
                f"position_ids: expected (S,) = {(length,)} or (B, S) = {(batch, length)}, "
                f"got shape {tuple(position_ids.shape)}"
            )


def check_positions(position_ids: Tensor, cos: Tensor) -> None:
    """Raises ValueError for a position outside the tables, where its value can be read without waiting for a device."""
    if torch.compiler.is_compiling():
        return
    while _functorch.is_functorch_wrapped_tensor(position_ids):  # below a transform of torch.func are its samples
        position_ids = _functorch.get_unwrapped(position_ids)
    if position_ids.device.type != "cpu" or type(position_ids) is not Tensor or not position_ids.numel():
        return
    low, high = (int(x) for x in position_ids.aminmax())
    if low < 0 or high >= cos.size(0):
        raise ValueError(
            f"position_ids: expected values in [0, length) with length = {cos.size(0)} of cos and sin, "
            f"got {low if low < 0 else high}"
        )


def rotary_table(max_len: int, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2 j / dim), each (max_len, dim/2), float32; angles formed in float64."""
    frequency = float(base) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(max_len, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().float(), angle.sin().float()


class PositionalEncoding(nn.Module):
    """Adds the sinusoidal table to embeddings: x + pe[:S].

    d_model: the width. max_len: the longest sequence. x: (S, B, d_model), sequence first. Buffer pe: (max_len, 1,
    d_model), float32; an odd d_model drops the last cosine column.

    Raises TypeError where d_model or max_len is no integer, ValueError where it is not positive. Source: Vaswani et al.
    2017, section 3.5.
    """

    pe: Tensor

    def __init__(self, d_model: int, max_len: int = 5000) -> None:
        check.positive("d_model", d_model)
        check.positive("max_len", max_len)
        super().__init__()
        self.d_model, self.max_len = d_model, max_len
        self.register_buffer("pe", sinusoidal_table(max_len, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """x (S, B, d_model), S <= max_len, floating. Returns its shape, in the dtype of the sum.

        Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
        """
        self._check_input(x, check.PLAIN_FLOATS)
        return x + self.pe[: x.size(0), :]

    def _check_input(self, x: Tensor, floats: tuple[torch.dtype, ...]) -> None:
        check.dtype("x", x, floats)
        if x.dim() != 3 or x.size(0) > self.max_len or x.size(2) != self.d_model:
            expected = f"(S, B, d_model) with S <= max_len = {self.max_len} and d_model = {self.d_model}"
            raise ValueError(f"x: expected {expected}, got shape {tuple(x.shape)}")
        check.same_device("x", x, "pe", self.pe)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys.

    dim: the rotated part R of the head size, even. max_len: positions in the tables. base: pair j turns by base^(-2 j /
    dim) from one position to the next. interleaved: pairs are neighbours, (2 j, 2 j + 1), instead of (j, j + R/2).
    Buffers cos and sin: (max_len, dim/2), float32, not saved in the state_dict.

    Raises TypeError for an argument of another type (integers, a number, a flag), ValueError for a dim that is not
    positive and even, a max_len that is not positive, a base that is not positive and finite. Source: Su et al. 2021,
    "RoFormer", section 3.4.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, max_len: int = 5000, base: float = 10000.0, interleaved: bool = False) -> None:
        check.positive("max_len", max_len)
        check.integer("dim", dim)
        if dim < 2 or dim % 2:
            raise ValueError(f"dim: expected a positive even number, got {dim}")
        check.finite("base", base)
        if base <= 0.0:
            raise ValueError(f"base: expected a positive number, got {base}")
        check.flag("interleaved", interleaved)
        super().__init__()
        self.dim, self.max_len, self.base, self.interleaved = dim, max_len, base, interleaved
        cos, sin = rotary_table(max_len, dim, base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor | None = None, position_ids: Tensor | None = None, *, offset: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """q (B, H, S, D), k (B, Hkv, S, D) or None -> (q, k), each in its shape and dtype.

        q: float32, bfloat16, float16 or float64. k: the dtype of q. position_ids: (S,) or (B, S), int64 or int32,
        0 ... S - 1 without. offset is added to all; beside position_ids it has 32 bits.

        Raises TypeError for a wrong dtype or type, ValueError for a wrong shape or device, for an offset or position
        outside the tables.
        """
        cos, sin, position_ids = self._tables(q, position_ids, offset)
        check_rotary(q, k, cos, sin, position_ids, check.PLAIN_FLOATS)
        if position_ids is not None:
            check_positions(position_ids, cos)
        return rotary(q, k, cos, sin, interleaved=self.interleaved, position_ids=position_ids)

    def _tables(self, q: Tensor, position_ids: Tensor | None, offset: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos, sin and the positions in them, with the offset in one of the two."""
        check.is_tensor("q", q)
        check.rank("q", q, "(B, H, S, D)")
        check.integer("offset", offset)
        if position_ids is not None:
            check.dtype("position_ids", position_ids, (torch.int64, torch.int32))
            if not -(2**31) <= offset < 2**31:
                raise ValueError(f"offset: expected an integer of 32 bits beside position_ids, got {offset}")
            # In 64 bits, where their sum does not wrap to a valid position.
            return self.cos, self.sin, position_ids.long() + offset if offset else position_ids
        if offset == 0:
            return self.cos, self.sin, None
        if offset < 0 or offset + q.size(-2) > self.max_len:
            expected = f"0 <= offset <= max_len - S = {self.max_len - q.size(-2)}"
            raise ValueError(f"offset: expected {expected}, got {offset}")
        return self.cos[offset:], self.sin[offset:], None
