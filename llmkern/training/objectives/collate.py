"""Examples of several lengths as tensors of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  #: the label of what no loss counts


def pad(rows: Sequence[np.ndarray], value: int, length: int) -> Tensor:
    """(rows, length) int64."""
    made = np.full((len(rows), length), value, np.int64)
    for target, row in zip(made, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(made)


def padded_length(rows: Sequence[np.ndarray], multiple: int) -> int:
    longest = max(map(len, rows))
    return -(-longest // multiple) * multiple


def column(examples: Sequence[dict[str, Any]], name: str) -> list[np.ndarray]:
    """That entry of every example. Raises ValueError where one has none."""
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    for number, example in enumerate(examples):
        if name not in example:
            raise ValueError(f"examples: expected {name!r} in each, got {sorted(example)} in number {number}")
    return [np.asarray(example[name]) for example in examples]
