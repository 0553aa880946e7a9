"""Named shapes and rows that the tests of this family share."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.int8 import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# (M, K, N)
SHAPES = {
    "one of everything": (1, 1, 1),
    "one row": (1, 768, 96),
    "few rows": (4, 64, 65),
    "every count of rows up to twice a tile": (13, 33, 17),
    "primes": (7, 131, 67),
    "around a panel": (5, 256, 129),
    "many rows": (515, 48, 80),
    "no rows": (0, 8, 4),
    "no columns": (3, 0, 4),
    "no outputs": (3, 8, 0),
}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, depth, outputs = shape
    weight, scale = reference.quantize_weight(torch.randn(outputs, depth))
    return torch.randn(rows, depth).to(dtype), weight, scale, torch.randn(outputs)


def row_kinds(depth: int) -> dict[str, Tensor]:
    """Rows whose quantisation has something special."""
    ramp = torch.linspace(-1, 1, depth)
    return {
        "zeros": torch.zeros(depth),
        "one constant": torch.full((depth,), 3.7),
        "one negative constant": torch.full((depth,), -0.01),
        "positive alone": ramp + 1.5,
        "negative alone": ramp - 1.5,
        "an outlier": torch.cat([ramp[:-1] * 1e-3, torch.tensor([1e4])]),
        "halves": torch.arange(depth) % 256 - 0.5,  # ties everywhere
        "subnormal": ramp * 1e-39,
        "smallest with a scale": ramp * 255 * 2.0**-126,
        "huge": ramp * 1e36,
        "range beyond float32": ramp * 3e38,
        "infinite": torch.where(torch.arange(depth) == 1, torch.inf, ramp),
        "negative infinite": torch.where(torch.arange(depth) == depth - 1, -torch.inf, ramp),
        "nan first": torch.where(torch.arange(depth) == 0, torch.nan, ramp),
        "nan last": torch.where(torch.arange(depth) == depth - 1, torch.nan, ramp),
    }
