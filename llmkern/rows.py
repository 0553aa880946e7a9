"""A tensor as rows of its last dimension, as row-wise kernels read it."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x (..., N), not empty, as (rows, N) whose elements lie side by side: a view where there is one, else a copy."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.size(-1))
    return rows if rows.stride(1) == 1 or rows.size(1) == 1 else rows.contiguous()


def of_rows(x: Tensor, dtype: torch.dtype, *columns: int) -> Tensor:
    """Unwritten memory for what is one, or some, for each row of x (rows, N)."""
    return torch.empty((x.size(0), *columns), dtype=dtype, device=x.device)
