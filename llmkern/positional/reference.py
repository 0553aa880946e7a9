"""Positional encodings in plain PyTorch: what every kernel of this family is held to."""

from __future__ import annotations

from torch import Tensor


def sinusoidal_add(x: Tensor, pe: Tensor, scale: float = 1.0) -> Tensor:
    """x * scale + pe[:S]; x (S, B, D), pe (max_len, 1, D)."""
    return x * scale + pe[: x.size(0)].to(x.dtype)
